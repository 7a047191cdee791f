"""The laws of the contract, for every `configs/attn/*.yaml` and every backend made of backends."""

import inspect
import pkgutil
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

import performer_lm.attention
from performer_lm.attention.base import Attention, AttentionFactory, fork
from performer_lm.attention.exact import ExactAttention
from performer_lm.attention.feature_maps import RandomFeatures
from performer_lm.attention.hybrid import HybridAttention
from performer_lm.attention.split import SplitAttention
from performer_lm.building import build as build_section
from performer_lm.ops.projections import draw_projection

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "attn").glob("*.yaml"))
SMALL = {  # blocks smaller than the sequences here; a file without a line is tested as it is
    "delta": ["attn.num_features=8", "attn.chunk_size=3"],
    "chunked": ["attn.query_chunk_size=3", "attn.key_chunk_size=5"],
    "favor": ["attn/features=hyperbolic", "attn.num_features=8", "attn.chunk_size=3"],
    "flash_tiled": ["attn.on_chip=64"],
    "hybrid": ["attn.backends.favor.num_features=8", "attn.backends.favor.chunk_size=3"],
    "linear": ["attn.chunk_size=3"],
    "local": ["attn.window=4"],
    "relu": ["attn.num_features=8", "attn.chunk_size=3"],
}


COMPOSED = ["split", "split in a hybrid", "split of delta", "local with sinks"]  # no file of their own builds these


@cache
def find(name: str) -> AttentionFactory:
    """Return a backend's factory, small: that of `attn=name`, or of a backend made of others."""
    if name == "split":
        return partial(SplitAttention, attn=find("favor"), local=find("local"), local_heads=2)
    if name == "split in a hybrid":
        split = partial(SplitAttention, attn=find("chunked"), local=find("local"), local_heads=2)
        return partial(HybridAttention, pattern=["split"], backends={"split": split})
    if name == "split of delta":
        return partial(SplitAttention, attn=find("delta"), local=find("local with sinks"), local_heads=2)
    if name == "local with sinks":
        return partial(find("local"), sinks=2)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=[f"attn={name}", *SMALL.get(name, [])])
    factory: AttentionFactory = build_section(OmegaConf.to_container(cfg.attn, resolve=True))
    return factory


HEADS, GROUPS, WIDTH, VALUE_WIDTH = 4, 2, 6, 5
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # backends may sum in float32 whatever the inputs
CPU = torch.device("cpu")

every_backend = pytest.mark.parametrize("name", [*NAMES, *COMPOSED])
CAUSAL_ONLY = {"delta", "split of delta"}
in_every_order = pytest.mark.parametrize(
    ("name", "causal"),
    [(name, causal) for name in (*NAMES, *COMPOSED) for causal in (True, False) if causal or name not in CAUSAL_ONLY],
)
options = st.fixed_dictionaries({"mask": st.booleans(), "log_decay": st.booleans()})


def build(name: str, **options: Any) -> Attention[Any]:
    """Build a backend, with one projection for all heads, so that grouping them changes nothing."""
    sizes = {"heads": HEADS, "key_heads": GROUPS, "dim_head": WIDTH, "dim_value": VALUE_WIDTH, "layer": 0}
    attention = find(name)(**(sizes | options))
    for features in (part for part in attention.modules() if isinstance(part, RandomFeatures)):
        _, draws, width = features.projection.shape
        features.projection.copy_(draw_projection(1, draws, width, seed=0))
    return attention


def test_every_backend_of_the_package_is_held_to_the_laws() -> None:
    for module in pkgutil.iter_modules(performer_lm.attention.__path__, "performer_lm.attention."):
        import_module(module.name)
    kinds = [Attention]
    for kind in kinds:
        kinds += kind.__subclasses__()
    final = {kind for kind in kinds if not kind.__subclasses__() and "performer_lm.attention" in kind.__module__}
    assert final
    assert not [kind for kind in final if inspect.isabstract(kind)]
    assert final <= {type(part) for name in [*NAMES, *COMPOSED] for part in build(name).modules()}


def draw_tokens(
    tokens: int, seed: int, *, batch: int = 2, mask: bool = False, log_decay: bool = False
) -> dict[str, Tensor]:
    """Draw q, k, v and the options asked for, by the names that `forward` gives them."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    found = {
        "q": normal(batch, HEADS, tokens, WIDTH),
        "k": normal(batch, GROUPS, tokens, WIDTH),
        "v": normal(batch, GROUPS, tokens, VALUE_WIDTH),
    }
    if mask:
        found["mask"] = torch.rand(batch, tokens, generator=random) < 0.7
    if log_decay:
        found["log_decay"] = -torch.rand(batch, GROUPS, tokens, generator=random)
    return found


def cut(inputs: dict[str, Tensor], tokens: slice) -> dict[str, Tensor]:
    """Take some of the tokens of every input."""
    return {
        name: x[:, :, tokens] if name in "qkv" or name == "log_decay" else x[:, tokens] for name, x in inputs.items()
    }


def pad_left(inputs: dict[str, Tensor], pads: int) -> dict[str, Tensor]:
    """Put masked tokens full of rubbish in front."""
    padded = {
        name: torch.cat([torch.full_like(x[:, :, :1], 7.0).repeat_interleave(pads, 2), x], dim=2)
        for name, x in inputs.items()
        if name in "qkv"
    }
    if "log_decay" in inputs:
        decay = inputs["log_decay"]
        padded["log_decay"] = torch.cat([torch.zeros(*decay.shape[:2], pads), decay], dim=2)
    kept = inputs.get("mask", torch.ones(inputs["q"].shape[0], inputs["q"].shape[2], dtype=torch.bool))
    return padded | {"mask": torch.cat([torch.zeros(kept.shape[0], pads, dtype=torch.bool), kept], dim=1)}


def decode(attention: Attention[Any], inputs: dict[str, Tensor], parts: list[slice], *, max_len: int = 1) -> Tensor:
    """Run `extend` over the parts of a sequence and join the outputs."""
    state = attention.init_state(inputs["q"].shape[0], max_len=max_len, device=CPU, dtype=inputs["k"].dtype)
    outputs = []
    for part in parts:
        out, state = attention.extend(**cut(inputs, part), state=state)
        outputs.append(out)
    return torch.cat(outputs, dim=2)


def split_at(ends: list[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


def where_kept(out: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Zero the outputs at masked tokens, which mean nothing."""
    return out * inputs["mask"][:, None, :, None] if "mask" in inputs else out


@every_backend
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6), seed=st.integers(0, 99), chosen=options)
def test_extend_over_any_split_equals_the_whole(name, lengths, seed, chosen):
    attention = build(name)
    ends = [sum(lengths[: count + 1]) for count in range(len(lengths))]
    inputs = draw_tokens(ends[-1], seed, **chosen)
    whole = where_kept(attention(**inputs, causal=True), inputs)
    torch.testing.assert_close(where_kept(decode(attention, inputs, split_at(ends)), inputs), whole, **TOLERANCE)


@every_backend
@given(tokens=st.integers(1, 12), changed=st.integers(0, 11), seed=st.integers(0, 99))
def test_the_future_does_not_reach_the_past(name, tokens, changed, seed):
    attention, changed = build(name), min(changed, tokens)
    inputs, other = draw_tokens(tokens, seed), draw_tokens(tokens, seed + 1)
    mixed = {key: torch.cat([x[:, :, :changed], 3 * other[key][:, :, changed:]], dim=2) for key, x in inputs.items()}
    out, out_of_mixed = attention(**inputs, causal=True), attention(**mixed, causal=True)
    torch.testing.assert_close(out[:, :, :changed], out_of_mixed[:, :, :changed], **TOLERANCE)


@in_every_order
@given(tokens=st.integers(1, 10), pads=st.integers(1, 9), seed=st.integers(0, 99), chosen=options)
def test_left_padding_equals_no_padding(name, causal, tokens, pads, seed, chosen):
    attention = build(name)
    inputs = draw_tokens(tokens, seed, mask=chosen["mask"], log_decay=chosen["log_decay"] and causal)
    padded = pad_left(inputs, pads)
    out = attention(**padded, causal=causal)
    torch.testing.assert_close(
        where_kept(out, padded)[:, :, pads:], where_kept(attention(**inputs, causal=causal), inputs), **TOLERANCE
    )


@every_backend
@given(tokens=st.integers(1, 10), pads=st.integers(1, 9), seed=st.integers(0, 99), with_decay=st.booleans())
def test_a_ragged_prompt_decodes_as_the_prompt_alone(name, tokens, pads, seed, with_decay):
    attention = build(name)
    inputs = draw_tokens(tokens, seed, log_decay=with_decay)
    padded = pad_left(inputs, pads)
    parts = [slice(0, pads + 1), *(slice(at, at + 1) for at in range(pads + 1, pads + tokens))]
    torch.testing.assert_close(
        decode(attention, padded, parts)[:, :, pads:], attention(**inputs, causal=True), **TOLERANCE
    )


@in_every_order
def test_a_masked_key_is_as_if_absent(name, causal):
    attention, inputs = build(name), draw_tokens(9, 0, batch=1, log_decay=causal)
    kept = torch.tensor([True, True, False, True, False, False, True, True, False])
    if "log_decay" in inputs:
        inputs["log_decay"] = inputs["log_decay"] * kept
    out = attention(**inputs, mask=kept[None], causal=causal)
    alone = {key: x[:, :, kept] for key, x in inputs.items()}
    torch.testing.assert_close(out[:, :, kept], attention(**alone, causal=causal), **TOLERANCE)


@in_every_order
@settings(max_examples=10)
@given(tokens=st.integers(0, 10), seed=st.integers(0, 99), chosen=options)
def test_an_integer_mask_is_the_bool_mask(name, causal, tokens, seed, chosen):
    attention = build(name)
    inputs = draw_tokens(tokens, seed, mask=True, log_decay=chosen["log_decay"] and causal)
    segments = torch.arange(tokens).expand(2, -1) // 4 if chosen["mask"] else None
    integers = inputs | {"mask": inputs["mask"].long()}
    for mode in (attention.train(), attention.eval()):
        one, other = (mode(**given_, causal=causal, segments=segments) for given_ in (integers, inputs))
        assert torch.equal(one, other)
    if causal:
        parts = split_at([tokens // 2, tokens])
        assert torch.equal(decode(attention, integers, parts), decode(attention, inputs, parts))
    elif attention.attends_across:
        states = [attention.init_state(2, max_len=1, device=CPU, dtype=torch.float64) for _ in range(2)]
        one, other = (
            attention.read(inputs["q"], attention.absorb(inputs["k"], inputs["v"], state, mask=given_["mask"]))
            for state, given_ in zip(states, (integers, inputs), strict=True)
        )
        assert torch.equal(one, other)


WRONG_MASKS = {
    "float": lambda tokens: torch.ones(2, tokens),
    "one row": lambda tokens: torch.ones(1, tokens) > 0,
    "no batch": lambda tokens: torch.ones(tokens) > 0,
    "more tokens": lambda tokens: torch.ones(2, tokens + 3) > 0,
    "one token": lambda tokens: torch.ones(2, 1).long(),
}


@every_backend
@pytest.mark.parametrize("wrong", WRONG_MASKS)
@pytest.mark.parametrize("tokens", [3, 0])
def test_a_mask_that_is_not_of_the_tokens_given_is_refused(name, wrong, tokens):
    attention, inputs, mask = build(name), draw_tokens(tokens, 0), WRONG_MASKS[wrong](tokens)
    state = attention.init_state(2, max_len=4, device=CPU, dtype=torch.float64)
    _, state = attention.extend(**draw_tokens(3, 1, mask=True), state=state)
    calls = [
        lambda: attention.train()(**inputs, mask=mask, causal=True),
        lambda: attention.eval()(**inputs, mask=mask, causal=False),
        lambda: attention.extend(**inputs, state=fork(state), mask=mask),
        lambda: attention.absorb(inputs["k"], inputs["v"], fork(state), mask=mask),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"mask must be bool or integer, .* of shape \(2, \d\); got [^\n]*$"):
            call()


@every_backend
def test_a_mask_of_all_tokens_so_far_is_refused_for_a_new_one(name):
    attention, inputs = build(name), draw_tokens(5, 0, mask=True)
    state = attention.init_state(2, max_len=4, device=CPU, dtype=torch.float64)
    _, state = attention.extend(**cut(inputs, slice(0, 4)), state=state)
    with pytest.raises(
        ValueError, match=r"one entry for each token given, of shape \(2, 1\); got bool of shape \(2, 5\)"
    ):
        attention.extend(**cut(inputs, slice(4, 5)) | {"mask": inputs["mask"]}, state=state)


@every_backend
@pytest.mark.parametrize("shape", [(2, 1, 3), (1, GROUPS, 3), (2, HEADS, 3), (2, GROUPS, 5), (2, GROUPS, 1), (2, 3)])
def test_a_decay_that_is_not_of_the_tokens_given_is_refused(name, shape):
    attention, inputs = build(name), draw_tokens(3, 0) | {"log_decay": -torch.rand(shape)}
    state = attention.init_state(2, max_len=4, device=CPU, dtype=torch.float64)
    for call in (lambda: attention(**inputs, causal=True), lambda: attention.extend(**inputs, state=state)):
        with pytest.raises(ValueError, match=r"log_decay must be floating point, .* of shape \(2, 2, 3\); got"):
            call()


@every_backend
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 4])
def test_tokens_of_another_batch_than_the_states_are_refused(name, batch, tokens):
    attention, inputs = build(name), draw_tokens(tokens, 0, batch=batch)
    state = attention.init_state(2, max_len=4, device=CPU, dtype=torch.float64)
    _, state = attention.extend(**draw_tokens(3, 1), state=state)
    for call in (
        lambda: attention.extend(**inputs, state=fork(state)),
        lambda: attention.absorb(inputs["k"], inputs["v"], fork(state)),
        lambda: attention.read(inputs["q"], state),
    ):
        with pytest.raises(ValueError, match=r"a batch of|equal leading dimensions"):
            call()


@every_backend
@pytest.mark.parametrize("held", [0, 3])
@settings(max_examples=4)
@given(chosen=options)
def test_no_tokens_give_no_output_and_leave_the_state_as_it_was(name, held, chosen):
    attention, later = build(name), draw_tokens(4, 2)
    state = attention.init_state(2, max_len=1, device=CPU, dtype=torch.float64)
    _, state = attention.extend(**draw_tokens(held, 1, **chosen), state=state)
    wanted, _ = attention.extend(**later, state=fork(state))
    nothing = draw_tokens(0, 0, **chosen)
    for attend in (torch.inference_mode(), torch.enable_grad()):
        with attend:
            out, after = attention.extend(**nothing, state=fork(state))
            assert out.shape == attention.read(nothing["q"], after).shape == (2, HEADS, 0, VALUE_WIDTH)
            after = attention.absorb(nothing["k"], nothing["v"], after, mask=nothing.get("mask"))
            torch.testing.assert_close(attention.extend(**later, state=after)[0], wanted, **TOLERANCE)


@in_every_order
@pytest.mark.parametrize("packed", [True, False])
def test_a_sequence_of_no_tokens_has_an_output_of_none(name, causal, packed):
    attention, nothing = build(name), draw_tokens(0, 0, mask=True, log_decay=causal)
    segments = torch.zeros(2, 0, dtype=torch.int64) if packed else None
    assert attention(**nothing, causal=causal, segments=segments).shape == (2, HEADS, 0, VALUE_WIDTH)


@in_every_order
def test_queries_without_keys_give_zeros_and_keys_without_queries_nothing(name, causal):
    attention, some, none = build(name), draw_tokens(3, 0), draw_tokens(0, 0)
    if not attention.attends_across:
        return
    out = attention(some["q"], none["k"], none["v"], causal=causal)
    assert torch.equal(out, torch.zeros(2, HEADS, 3, VALUE_WIDTH, dtype=torch.float64))
    assert attention(none["q"], some["k"], some["v"], causal=causal).shape == (2, HEADS, 0, VALUE_WIDTH)


@in_every_order
def test_what_a_masked_key_holds_does_not_matter(name, causal):
    attention, inputs = build(name), draw_tokens(6, 0, mask=True, log_decay=causal)
    out = where_kept(attention(**inputs, causal=causal), inputs)
    hidden = ~inputs["mask"][:, None, :, None]
    spoilt = inputs | {key: inputs[key].masked_fill(hidden, 1e9) for key in "kv"}
    if "log_decay" in spoilt:
        spoilt["log_decay"] = spoilt["log_decay"].masked_fill(hidden[..., 0], -5.0)
    torch.testing.assert_close(where_kept(attention(**spoilt, causal=causal), inputs), out, **TOLERANCE)


@in_every_order
def test_a_fully_masked_row_gives_zeros_and_finite_gradients(name, causal):
    inputs = {key: x.requires_grad_() for key, x in draw_tokens(5, 0).items()}
    out = build(name)(**inputs, mask=torch.zeros(2, 5, dtype=torch.bool), causal=causal)
    assert (out == 0).all()
    out.sum().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in inputs.values())


@in_every_order
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_packed_documents_equal_separate_ones(name, causal, lengths, seed):
    attention = build(name)
    inputs = draw_tokens(sum(lengths), seed, log_decay=causal)
    segments = torch.repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    ends = [sum(lengths[: count + 1]) for count in range(len(lengths))]
    apart = [attention(**cut(inputs, part), causal=causal) for part in split_at(ends)]
    torch.testing.assert_close(
        attention(**inputs, segments=segments, causal=causal), torch.cat(apart, dim=2), **TOLERANCE
    )


@every_backend
def test_grouped_queries_equal_repeated_keys(name):
    attention, inputs = build(name), draw_tokens(7, 0)
    plain = build(name, key_heads=HEADS)
    repeated = {key: x if key == "q" else x.repeat_interleave(HEADS // GROUPS, 1) for key, x in inputs.items()}
    torch.testing.assert_close(attention(**inputs, causal=True), plain(**repeated, causal=True), **TOLERANCE)


@every_backend
def test_a_forked_state_continues_in_two_ways(name):
    attention, inputs, other = build(name), draw_tokens(6, 0), draw_tokens(6, 1)
    state = attention.init_state(2, max_len=8, device=CPU, dtype=torch.float64)
    _, state = attention.extend(**cut(inputs, slice(0, 5)), state=state)
    first, _ = attention.extend(**cut(other, slice(5, 6)), state=fork(state))
    second, _ = attention.extend(**cut(inputs, slice(5, 6)), state=state)
    torch.testing.assert_close(second, attention(**inputs, causal=True)[:, :, 5:], **TOLERANCE)
    assert not torch.allclose(first, second)


@every_backend
@given(seed=st.integers(0, 99), chosen=options)
def test_reading_stands_at_the_last_key_and_adds_nothing(name, seed, chosen):
    attention, inputs = build(name), draw_tokens(3, seed, **chosen)
    state = attention.init_state(2, max_len=4, device=CPU, dtype=torch.float64)
    out, state = attention.extend(**inputs, state=state)
    for _ in range(2):
        read = attention.read(inputs["q"], state)
        torch.testing.assert_close(where_kept(read, inputs)[:, :, -1:], where_kept(out, inputs)[:, :, -1:], **TOLERANCE)


@every_backend
@given(queries=st.integers(1, 7), keys=st.integers(1, 9), cut_at=st.integers(0, 9), seed=st.integers(0, 99))
@pytest.mark.parametrize("masked", [False, True])
def test_absorbing_then_reading_is_attending_across(name, queries, keys, cut_at, seed, masked):
    attention = build(name)
    inputs, others = draw_tokens(keys, seed, mask=masked), draw_tokens(queries, seed + 1)
    if not attention.attends_across:
        return
    whole = attention(others["q"], inputs["k"], inputs["v"], causal=False, mask=inputs.get("mask"))
    state = attention.init_state(2, max_len=1, device=CPU, dtype=torch.float64)
    for part in split_at(sorted({min(cut_at, keys), keys} - {0})):
        piece = cut(inputs, part)
        state = attention.absorb(piece["k"], piece["v"], state, mask=piece.get("mask"))
    torch.testing.assert_close(attention.read(others["q"], state), whole, **TOLERANCE)


@every_backend
def test_decay_makes_old_keys_fade_as_the_weights_say(name):
    attention, inputs = build(name), draw_tokens(2, 0)
    half = torch.full((2, GROUPS, 2), 0.5).log()
    v = torch.eye(2, VALUE_WIDTH, dtype=torch.float64).expand(2, GROUPS, -1, -1)

    def odds(**more: Tensor) -> Tensor:
        last = attention(inputs["q"], inputs["k"], v, causal=True, **more)[:, :, -1]
        return last[..., 0] / last[..., 1]

    torch.testing.assert_close(odds(log_decay=half), odds() / 2, **TOLERANCE)


@every_backend
@pytest.mark.parametrize("masked", [False, True])
def test_whatever_asks_for_a_gradient_gets_the_one_it_has_beside_all_others(name, masked):
    attention, call = build(name), draw_tokens(7, 0, log_decay=True)
    fixed = {"causal": True, "mask": torch.tensor([[False] * 2 + [True] * 5, [True] * 7]) if masked else None}

    def gradients(wanted: tuple[str, ...]) -> dict[str, Tensor]:
        own = {key: x.detach().requires_grad_(key in wanted) for key, x in call.items()}
        out = attention(**own, **fixed)
        return dict(zip(wanted, torch.autograd.grad(out.cos().sum(), [own[key] for key in wanted]), strict=True))

    whole = gradients(tuple(call))
    for count in range(1, len(call)):
        for wanted in combinations(call, count):
            for key, grad in gradients(wanted).items():
                torch.testing.assert_close(grad, whole[key], **TOLERANCE)
                assert grad.any()


@every_backend
@pytest.mark.parametrize("causal", [True, False])
def test_hooks_on_saved_tensors_change_nothing(name, causal):
    """As activation checkpointing sets around a forward, and what moves tensors elsewhere around the backward, too."""
    if name in CAUSAL_ONLY and not causal:
        return
    attention, inputs = build(name), draw_tokens(33, 0, log_decay=causal)
    inputs = {key: x * 60 if key in ("q", "k") else x for key, x in inputs.items()}  # so loud that no scale fits all

    def gradients(*, of_backward: bool, hooks: AbstractContextManager[Any]) -> tuple[Tensor, ...]:
        own = {key: x.detach().requires_grad_() for key, x in inputs.items()}
        with hooks:
            loss = attention(**own, causal=causal).cos().sum()
            if of_backward:
                return torch.autograd.grad(loss, [*own.values()])
        return torch.autograd.grad(loss, [*own.values()])

    plain = gradients(of_backward=False, hooks=nullcontext())
    for of_backward in (False, True):
        hooks = torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)
        for grad, wanted in zip(gradients(of_backward=of_backward, hooks=hooks), plain, strict=True):
            assert torch.equal(grad, wanted)


@every_backend
def test_decay_without_causal_is_refused(name):
    with pytest.raises(ValueError, match="causal only" if name in CAUSAL_ONLY else "log_decay"):
        build(name)(**draw_tokens(3, 0, log_decay=True), causal=False)


@every_backend
def test_beta_counts_where_it_is_taken_and_is_refused_elsewhere(name):
    attention, inputs, beta = build(name), draw_tokens(5, 0), torch.rand(2, GROUPS, 5, dtype=torch.float64)
    state = attention.init_state(2, max_len=5, device=CPU, dtype=torch.float64)
    if attention.takes_beta:
        whole = attention(**inputs, causal=True, beta=beta)
        assert not torch.allclose(whole, attention(**inputs, causal=True))
        first, state = attention.extend(**cut(inputs, slice(0, 2)), state=state, beta=beta[..., :2])
        second, _ = attention.extend(**cut(inputs, slice(2, 5)), state=state, beta=beta[..., 2:])
        torch.testing.assert_close(torch.cat([first, second], dim=2), whole, **TOLERANCE)
    else:
        for call in (
            lambda: attention(**inputs, causal=True, beta=beta),
            lambda: attention.extend(**inputs, state=state, beta=beta),
        ):
            with pytest.raises(ValueError, match="take attn=delta"):
                call()


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_single(name, dtype):
    attention = build(name)
    inputs = {key: x.float() for key, x in draw_tokens(20, 0, mask=True, log_decay=True).items()}
    inputs["mask"] = inputs["mask"] > 0
    half = {key: x.to(dtype) if key in "qkv" else x for key, x in inputs.items()}
    # the same rounded inputs, so that only the arithmetic differs
    single = attention(**{key: x.float() if key in "qkv" else x for key, x in half.items()}, causal=True)
    out = attention(**half, causal=True)
    assert out.dtype == dtype
    torch.testing.assert_close(where_kept(out, half).float(), where_kept(single, half), atol=1e-2, rtol=1e-2)


@every_backend
def test_all_of_it_runs_without_a_device(name):
    meta = torch.device("meta")
    with meta:
        attention = build(name)
    inputs = {key: x.to(meta) for key, x in draw_tokens(7, 0, mask=True, log_decay=True).items()}
    out = attention(**inputs, causal=True, segments=torch.zeros(2, 7, dtype=torch.long, device=meta))
    state = attention.init_state(2, max_len=1, device=meta, dtype=torch.float64)
    extended, state = attention.extend(**inputs, state=state)
    assert out.shape == extended.shape == attention.read(inputs["q"], state).shape == (2, HEADS, 7, VALUE_WIDTH)


@every_backend
def test_autocast_keeps_it_near_single(name):
    attention = build(name)
    inputs = {key: x.float() for key, x in draw_tokens(20, 0, log_decay=True).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(**inputs, causal=True)
    torch.testing.assert_close(out.float(), attention(**inputs, causal=True), atol=2e-2, rtol=2e-2)  # 8 bits of q, k, v


@in_every_order
def test_a_backward_inside_autocast_is_near_one_outside(name, causal):
    attention, found = build(name), []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = draw_tokens(20, 0, mask=True, log_decay=causal)
        inputs = {key: x.to(dtype) if key in "qkv" else x.float() for key, x in inputs.items()}
        inputs["mask"] = inputs["mask"] > 0
        wanted = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
        for inside in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = where_kept(attention(**inputs, causal=causal), inputs).float().square().sum()
                grads = torch.autograd.grad(loss, wanted, retain_graph=True) if inside else ()
            found.append(grads or torch.autograd.grad(loss, wanted))
    for outside, inside in (found[:2], found[2:]):
        for one, other in zip(outside, inside, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(
                one, other, rtol=5e-2, atol=5e-2
            )  # autocast rounds the products of a backward to 8 bits; exact, autograd's own, strays as far


@every_backend
def test_probabilities_are_dropped_in_training_only_and_alike(name):
    if not build(name).drops_weights:
        with pytest.raises(ValueError, match="attn=exact, chunked and flash_tiled") as told:
            build(name, dropout=0.5)
        assert "\n" not in str(told.value)
        return
    inputs, attention = draw_tokens(9, 0), build(name, dropout=0.4)
    torch.manual_seed(1)
    out = attention(**inputs, causal=True)
    torch.manual_seed(1)
    reference = ExactAttention(
        heads=HEADS, key_heads=GROUPS, dim_head=WIDTH, dim_value=VALUE_WIDTH, layer=0, dropout=0.4
    )
    torch.testing.assert_close(out, reference(**inputs, causal=True), **TOLERANCE)
    assert not torch.equal(out, attention(**inputs, causal=True))
    torch.testing.assert_close(attention.eval()(**inputs, causal=True), build(name)(**inputs, causal=True))


@every_backend
def test_a_dropout_of_nothing_is_taken_as_older_checkpoints_name_it(name):
    inputs = draw_tokens(5, 0)
    assert torch.equal(build(name, dropout=0.0)(**inputs, causal=True), build(name)(**inputs, causal=True))
