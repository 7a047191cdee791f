"""Pure functions of tensors, usable on their own as drop-in attention functions."""

from performer_lm.ops.chunked import chunked_attention as chunked_attention
from performer_lm.ops.cross_entropy import linear_cross_entropy as linear_cross_entropy
from performer_lm.ops.delta import delta_rule as delta_rule
from performer_lm.ops.flash import tiled_attention as tiled_attention
from performer_lm.ops.flash import tiled_attention_and_logsumexp as tiled_attention_and_logsumexp
from performer_lm.ops.linear import LinearState as LinearState
from performer_lm.ops.linear import absorb_keys as absorb_keys
from performer_lm.ops.linear import bidirectional_linear_attention as bidirectional_linear_attention
from performer_lm.ops.linear import causal_linear_attention as causal_linear_attention
from performer_lm.ops.linear import empty_state as empty_state
from performer_lm.ops.linear import read_state as read_state
from performer_lm.ops.local import local_attention as local_attention
from performer_lm.ops.maps import Exponential as Exponential
from performer_lm.ops.maps import Features as Features
from performer_lm.ops.maps import Generalized as Generalized
from performer_lm.ops.maps import Taylor as Taylor
from performer_lm.ops.projections import default_num_features as default_num_features
from performer_lm.ops.projections import draw_projection as draw_projection
from performer_lm.ops.sdpa import sdpa_attention as sdpa_attention
from performer_lm.ops.softmax import exact_attention as exact_attention
