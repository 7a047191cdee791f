"""Linear attention: out_i = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j), in time linear in n.

Keys and values are absorbed into a state of fixed size, which queries read. The causal form does both block by block,
with the state going in and coming out, so training, prefill and decoding are one function. Features are any
`FeatureMap`; sums are float32 or wider, on a running exponent per feature, and no epsilon is added to anything.

| room | holds |
|---|---|
| `causal.py` | `causal_linear_attention`, with its gradient |
| `sequence.py` | the loop over blocks, forward and backward |
| `block.py` | one block: the choice of form, scales |
| `tokens.py` | its tokens, and what a map makes of them |
| `dense.py`, `halves.py` | the two forms of one block: on one scale, and at any loudness |
| `fading.py` | decay and documents inside a block |
| `step.py` | the step of decoding |
| `reading.py`, `documents.py` | attention without an order: from a state; within documents |
| `state.py`, `scratch.py` | the state and its exponents; memory that blocks share |
"""

from performer_lm.ops.linear.causal import absorb_keys as absorb_keys
from performer_lm.ops.linear.causal import bidirectional_linear_attention as bidirectional_linear_attention
from performer_lm.ops.linear.causal import causal_linear_attention as causal_linear_attention
from performer_lm.ops.linear.causal import read_state as read_state
from performer_lm.ops.linear.state import LinearState as LinearState
from performer_lm.ops.linear.state import empty_state as empty_state
