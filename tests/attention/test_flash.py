import torch
from torch.nn.attention import SDPBackend
from torch.profiler import profile

from performer_lm.attention.exact import ExactAttention
from performer_lm.attention.flash import FlashAttention
from performer_lm.ops import sdpa

SHAPE = {"heads": 4, "key_heads": 2, "dim_head": 16, "dim_value": 12, "layer": 0}


def draw(tokens: int) -> list[torch.Tensor]:
    shapes = (2, 4, tokens, 16), (2, 2, tokens, 16), (2, 2, tokens, 12)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_decay_and_padding_train_inside_the_flash_kernel():
    q, k, v = draw(30)
    log_decay = (-torch.rand(2, 2, 30)).requires_grad_()
    mask = torch.arange(30) >= torch.tensor([[0], [7]])
    with profile() as trace:
        out = FlashAttention(**SHAPE)(q, k, v, causal=True, mask=mask, log_decay=log_decay)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v, log_decay))
    names = {event.key for event in trace.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names
    wanted = ExactAttention(**SHAPE)(q, k, v, causal=True, mask=mask, log_decay=log_decay)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), (q, k, v, log_decay))
    for one, other in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_slow_kernel_is_never_chosen_in_silence():
    assert SDPBackend.MATH not in sdpa.KERNELS


def test_a_long_prompt_in_bfloat16_keeps_its_decay():
    q, k, v = (x.detach().bfloat16() for x in draw(600))
    log_decay = -torch.rand(2, 2, 600)
    out = FlashAttention(**SHAPE)(q, k, v, causal=True, log_decay=log_decay)
    wanted = ExactAttention(**SHAPE)(q, k, v, causal=True, log_decay=log_decay)
    torch.testing.assert_close(out.float(), wanted.float(), atol=2e-2, rtol=0)  # outputs near 3 have 8 bits: 0.016
