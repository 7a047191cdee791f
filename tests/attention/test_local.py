import pytest
import torch

from performer_lm.attention.exact import ExactAttention
from performer_lm.attention.local import LocalAttention

SHAPE = {"heads": 4, "key_heads": 2, "dim_head": 3, "dim_value": 5, "layer": 0}
CPU = torch.device("cpu")


def draw(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, tokens, 3), torch.randn(2, 2, tokens, 3), torch.randn(2, 2, tokens, 5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_as_long_as_the_text_is_all_of_it(causal):
    q, k, v = draw(9)
    local, exact = LocalAttention(**SHAPE, window=9), ExactAttention(**SHAPE)
    torch.testing.assert_close(local(q, k, v, causal=causal), exact(q, k, v, causal=causal))


def test_the_receptive_field_is_the_window_exactly():
    q, k, v = draw(20)
    out = LocalAttention(**SHAPE, window=4)(q, k, v.requires_grad_(), causal=True)
    (reached,) = torch.autograd.grad(out[:, :, 10].sum(), v)
    assert reached.abs().sum((0, 1, 3)).nonzero().flatten().tolist() == [7, 8, 9, 10]


def test_sinks_are_seen_beside_the_window():
    q, k, v = draw(20)
    out = LocalAttention(**SHAPE, window=4, sinks=2)(q, k, v.requires_grad_(), causal=True)
    (reached,) = torch.autograd.grad(out[:, :, 10].sum(), v)
    assert reached.abs().sum((0, 1, 3)).nonzero().flatten().tolist() == [0, 1, 7, 8, 9, 10]


@pytest.mark.parametrize("splits", [[1] * 12, [5] + [1] * 7, [2, 3, 1, 1, 5], [12]])
def test_steps_one_by_one_keep_the_sinks_and_their_decay(splits):
    q, k, v = draw(12)
    decay = -torch.rand(2, 2, 12)
    attention = LocalAttention(**SHAPE, window=3, sinks=2)
    state = attention.init_state(2, max_len=12, device=CPU, dtype=torch.float32)
    parts = zip(*(x.split(splits, dim=2) for x in (q, k, v, decay)), strict=True)
    outs = []
    for new_q, new_k, new_v, new_decay in parts:
        out, state = attention.extend(new_q, new_k, new_v, state, log_decay=new_decay)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=2), attention(q, k, v, causal=True, log_decay=decay))
    torch.testing.assert_close(state.k[:, :, :2], k[:, :, :2])


def test_a_window_of_one_returns_the_token_itself():
    q, k, v = draw(5)
    attention = LocalAttention(**SHAPE, window=1)
    torch.testing.assert_close(attention(q, k, v, causal=True), v.repeat_interleave(2, 1))
    state = attention.init_state(2, max_len=5, device=CPU, dtype=torch.float32)
    out, state = attention.extend(q, k, v, state)
    torch.testing.assert_close(out, v.repeat_interleave(2, 1))
    assert state.k.numel() == 0


@pytest.mark.parametrize("sinks", [0, 2])
def test_the_state_never_grows(sinks):
    attention = LocalAttention(**SHAPE, window=4, sinks=sinks)
    state = attention.init_state(2, max_len=1000, device=CPU, dtype=torch.float32)
    for tokens in (1, 50, 1, 3):
        _, state = attention.extend(*draw(tokens), state, log_decay=-torch.rand(2, 2, tokens))
        assert state.k.shape[2] == state.v.shape[2] == state.mask.shape[1] == state.log_decay.shape[2] == sinks + 3
        assert state.k.untyped_storage().nbytes() == state.k.numel() * 4  # no view of the whole prompt


@pytest.mark.parametrize("sinks", [0, 1, 2])
def test_a_finished_row_keeps_its_window(sinks):
    attention = LocalAttention(**SHAPE, window=2, sinks=sinks)
    q, k, v = draw(6)
    state = attention.init_state(2, max_len=6, device=CPU, dtype=torch.float32)
    kept = torch.tensor([[True] * 6, [True, True, True, False, False, True]])
    for at in range(6):
        token = slice(at, at + 1)
        out, state = attention.extend(q[:, :, token], k[:, :, token], v[:, :, token], state, mask=kept[:, token])
    alone = attention(*(x[1:, :, kept[1]] for x in (q, k, v)), causal=True)
    torch.testing.assert_close(out[1:], alone[:, :, -1:])


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        LocalAttention(**SHAPE, window=0)
    with pytest.raises(ValueError, match=r"sinks \(2\) need a window of at least 2 tokens, got 1"):
        LocalAttention(**SHAPE, window=1, sinks=2)
    with pytest.raises(ValueError, match="sinks must be at least 0, got -1"):
        LocalAttention(**SHAPE, window=4, sinks=-1)
