import torch

from performer_lm.attention.exact import ExactAttention
from performer_lm.ops.softmax import exact_attention


def test_every_argument_reaches_the_op():
    attention = ExactAttention(heads=4, key_heads=2, dim_head=3, dim_value=5, layer=0)
    q, k, v = torch.randn(2, 4, 6, 3), torch.randn(2, 2, 6, 3), torch.randn(2, 2, 6, 5)
    mask, segments = torch.rand(2, 6) < 0.7, torch.tensor([0, 0, 1, 1, 1, 2]).expand(2, -1)
    log_decay = -torch.rand(2, 2, 6)
    out = attention(q, k, v, causal=True, mask=mask, segments=segments, log_decay=log_decay)
    wanted = exact_attention(q, k, v, causal=True, key_mask=mask, segments=segments, log_decay=log_decay)
    torch.testing.assert_close(out, wanted)


def test_it_has_no_parameters_and_no_buffers():
    assert not ExactAttention(heads=4, key_heads=2, dim_head=3, dim_value=5, layer=0).state_dict()
