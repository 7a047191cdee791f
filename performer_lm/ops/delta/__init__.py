"""The delta rule on unit features: a memory of fixed size that corrects what it holds instead of adding to it.

    S' = exp(log_decay_t) S_(t-1)
    S_t = S' + beta_t phi(k_t) (v_t - phi(k_t)^T S')^T          out_t = phi(q_t)^T S_t

Features have length one, |phi| = 1, so a key that is written with beta = 1 reads back its value exactly, and nothing
that a key's length does can break the sums: no running maximum, no denominator, no epsilon. Schlag et al. 2102.11174
(the rule, on L1-normalised FAVOR+), Yang et al. 2406.06484 (blocks), 2412.06464 (with decay).

| file | holds |
|---|---|
| `naive.py` | the definition, by which all else is tested |
| `causal.py` | what callers see: `delta_rule`, and the step of decoding |
| `operator.py` | the operator that autograd and compilers see |
| `sequence.py` | the loop over blocks, forward and backward |
| `walk.py` | the memory from tile to tile, and the gradient at it back |
| `blocks.py` | a block as matrices; unit features |
"""

from performer_lm.ops.delta.causal import delta_rule as delta_rule
from performer_lm.ops.delta.causal import empty_memory as empty_memory
