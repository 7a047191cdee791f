from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from performer_lm.attention.base import fork, select_rows
from performer_lm.attention.joining import count_bytes, join_rows
from performer_lm.attention.kv_cache import KVCache
from performer_lm.generation.decode import decode, pad_left, read
from performer_lm.generation.sampling import Sampler
from performer_lm.model import PerformerLM

Build = Callable[..., PerformerLM]
NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/attn").glob("*.yaml"))
MODELS = [[f"attn={name}", "model.depth=1"] for name in NAMES if name != "hybrid"]
MODELS += [
    ["attn=hybrid", "attn.pattern=[delta,flash]", "model.token_shift=true"],
    ["model=transformer", "attn=flash", "model/absolute=learned", "model.depth=1"],
    ["attn=favor", "model.local_heads=2", "model.decay=false", "model.depth=1"],
]
STEPS = 4


@pytest.mark.parametrize("options", MODELS, ids=" ".join)
@torch.inference_mode()
def test_rows_that_join_late_and_leave_early_go_on_as_they_do_alone(options: list[str], lively_model: Build) -> None:
    model = lively_model(*options)
    prompts = [torch.arange(length) * 7 % 40 for length in (3, 9, 1)]
    starts, ends = (0, 1, 3), (3, 4, 4)  # the steps at which rows join, and after which they leave
    greedy = Sampler(temperature=0)
    alone = [torch.cat([*decode(model, one[None], max_new_tokens=STEPS, sampler=greedy)]).tolist() for one in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    running: list[int] = []
    parts = []
    for step in range(7):
        parts += [read(model, prompts[row][None])[2:] for row, start in enumerate(starts) if start == step]
        running += [row for row, start in enumerate(starts) if start == step]
        kept = [place for place, row in enumerate(running) if len(made[row]) < ends[row]]
        logits, state = select_rows(join_rows(parts, spare=step % 3), torch.tensor(kept))
        running = [running[place] for place in kept]
        ids = logits.argmax(-1)
        for row, token in zip(running, ids.tolist(), strict=True):
            made[row].append(token)
        logits, state = model.extend(ids[:, None], state)
        parts = [(logits[:, -1], state)]
    assert made == [tokens[:end] for tokens, end in zip(alone, ends, strict=True)]


@torch.inference_mode()
def test_rows_of_ragged_batches_join(lively_model: Build) -> None:
    model = lively_model("attn=hybrid", "attn.pattern=[local,flash]")
    rows = [[1, 2], [3, 4, 5, 6, 7], [8], [9, 10, 11]]
    parts = []
    for pair in (rows[:2], rows[2:]):
        tokens, mask = pad_left(pair, device=torch.device("cpu"))
        parts.append(read(model, tokens, mask=mask).state)
    joined = join_rows(parts)
    out, _ = model.extend(torch.full((4, 1), 12), joined)
    for row, ids in enumerate(rows):
        wanted = model(torch.tensor([[*ids, 12]]))[:, -1]
        torch.testing.assert_close(out[row], wanted, atol=1e-9, rtol=1e-9)


def cache(*shape: int, mask: torch.Tensor | None = None) -> KVCache:
    batch, length, cap = shape
    whole = torch.full((batch, 2, cap, 3), torch.nan)
    whole[:, :, :length] = torch.randn(batch, 2, length, 3)
    return KVCache(whole, whole.clone(), mask, None, length)


def test_caches_are_aligned_at_the_last_token_and_hold_numbers_alone() -> None:
    one, other = cache(1, 3, 8), cache(2, 5, 5)
    joined = join_rows([one, other], spare=2)
    assert (joined.length, joined.k.shape[2]) == (5, 7)
    assert joined.mask is not None
    assert joined.mask[:, :5].tolist() == [[False, False, True, True, True], [True] * 5, [True] * 5]
    assert bool(joined.k.isfinite().all())
    assert torch.equal(joined.k[0, :, 2:5], one.k[0, :, :3])
    assert torch.equal(joined.v[1:, :, :5], other.v)


def test_places_that_no_row_keeps_are_left_out() -> None:
    mask = torch.tensor([[False, False, True, True], [False, True, False, True]])
    joined = join_rows([cache(2, 4, 4, mask=mask), cache(1, 1, 1)])
    assert joined.length == 3
    assert joined.mask is not None
    assert joined.mask.tolist() == [[False, True, True], [True, False, True], [False, False, True]]
    assert join_rows([cache(2, 4, 6)]).mask is None


@torch.inference_mode()
def test_a_batch_that_rows_join_and_leave_for_ever_grows_no_longer_than_its_rows(lively_model: Build) -> None:
    model = lively_model("model=transformer", "attn=flash", "model.depth=1")
    state, most = read(model, torch.zeros(1, 4, dtype=torch.int64)).state, 0
    for _ in range(20):
        new = read(model, torch.zeros(1, 4, dtype=torch.int64)).state
        state = join_rows([state, new])
        state = select_rows(state, torch.arange(len(state.length))[-5:])
        _, state = model.extend(torch.zeros(len(state.length), 1, dtype=torch.int64), state)
        most = max(most, count_bytes(state))
    rows, longest, key_and_value = 5, 4 + 5, 2 * 32 * 8
    assert most <= rows * (2 * longest * (key_and_value + 1) + 8)  # room doubles where it ends


def test_joining_copies_and_bytes_are_those_of_the_tensors() -> None:
    state = (torch.zeros(1, 3), None, (torch.ones(1, 2, dtype=torch.bool),), cache(1, 2, 4))
    joined = join_rows([state])
    joined[0].add_(1)
    assert not bool(state[0].any())
    assert count_bytes(state) == 12 + 2 + 2 * 4 * 2 * 4 * 3
    assert count_bytes(fork(state)) == count_bytes(state)


def test_states_of_two_models_do_not_join() -> None:
    with pytest.raises(ValueError, match="states of one model join, got NoneType and Tensor"):
        join_rows([(torch.zeros(1),), (None,)])
