import torch

from performer_lm.nn.branch import Branch, TokenInfo
from performer_lm.nn.feed_forward import FeedForward
from performer_lm.nn.mixing import TokenShift
from performer_lm.nn.norm import NoNorm, RMSNorm

INFO = TokenInfo(torch.arange(5)[None])


def test_a_branch_is_norm_shift_body() -> None:
    body, shift = FeedForward(6, mult=2, activation="gelu"), TokenShift(6, causal=True)
    branch, x = Branch(6, body=body, norm=RMSNorm, shift=shift), torch.randn(2, 5, 6)
    shifted, _ = shift(RMSNorm(6)(x), torch.zeros(2, 1, 3))
    torch.testing.assert_close(branch(x, INFO), body(shifted, INFO))


def test_a_rezero_gate_starts_closed_and_opens_in_one_step() -> None:
    body = FeedForward(6, mult=2, activation="gelu")
    branch, x = Branch(6, body=body, norm=NoNorm, rezero=True), torch.randn(2, 5, 6)
    out = branch(x, INFO)
    assert branch.gate is not None
    assert bool((out == 0).all())
    out.sum().backward()
    assert bool(branch.gate.grad != 0)
    branch.gate.data.fill_(0.5)
    torch.testing.assert_close(branch(x, INFO), 0.5 * body(x))
