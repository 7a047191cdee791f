"""Linear attention: out_i = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j), in time linear in n.

Keys and values are absorbed into a state of fixed size, which queries read. The causal form does both block by block,
with the state going in and coming out, so training, prefill and decoding are one function. Features are any
`FeatureMap`; sums are float32 or wider, on a running exponent per feature, and no epsilon is added to anything.

| file | holds |
|---|---|
| `naive.py` | the definition, by which all else is tested |
| `causal.py` | what callers see: `causal_linear_attention` and attention without an order |
| `operator.py` | the operator that autograd and compilers see |
| `sequence.py` | the loop over blocks, forward and backward |
| `chunks.py`, `exact.py`, `sums.py` | a block as matrices, on a scale or pair by pair; its products |
| `fading.py`, `tokens.py` | decay and documents; a run of tokens |
| `step.py` | the step of decoding |
| `state.py` | the state; how a sequence is cut, and the memory that its blocks share |
| `signed.py` | features that may be negative |
"""

from performer_lm.ops.linear.causal import absorb_keys as absorb_keys
from performer_lm.ops.linear.causal import bidirectional_linear_attention as bidirectional_linear_attention
from performer_lm.ops.linear.causal import causal_linear_attention as causal_linear_attention
from performer_lm.ops.linear.causal import read_state as read_state
from performer_lm.ops.linear.state import LinearState as LinearState
from performer_lm.ops.linear.state import empty_state as empty_state
