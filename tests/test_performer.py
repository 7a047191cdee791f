"""The laws every stack keeps, whatever mix of options it is built from."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from performer_lm.attention.base import fork
from performer_lm.attention.chunked import ChunkedAttention
from performer_lm.attention.exact import ExactAttention
from performer_lm.attention.favor import FavorAttention
from performer_lm.attention.feature_maps import SoftmaxFeatures
from performer_lm.attention.flash import FlashAttention
from performer_lm.attention.hybrid import HybridAttention
from performer_lm.attention.kernel_maps import GeneralizedFeatures, IdentityFeatures
from performer_lm.attention.local import LocalAttention
from performer_lm.attention.split import SplitAttention
from performer_lm.nn.feed_forward import FeedForward
from performer_lm.nn.norm import LayerNorm, NoNorm, RMSNorm, ScaleNorm
from performer_lm.nn.positions import (
    AxialPositions,
    LearnedPositions,
    NoAbsolutePositions,
    NoPositions,
    Rotary,
    SinusoidalPositions,
)
from performer_lm.performer import Performer

CLOSE: dict[str, Any] = {"atol": 1e-9, "rtol": 1e-9}  # stacks here are float64
DIM, DEPTH, HEADS = 12, 2, 4

favor = partial(FavorAttention, seed=0, redraw_interval=None, redraw_until=None, chunk_size=5)
softmax = partial(SoftmaxFeatures, coupling="orthogonal", regularized=False, learned=False)
positive = partial(softmax, antithetic=False, centred=False, momentum=None)
relu = partial(GeneralizedFeatures, coupling="iid", regularized=False, activation="relu", epsilon=1e-3)
BACKENDS: dict[str, Any] = {
    "favor": partial(favor, features=positive, num_features=6),
    "centred favor": partial(
        favor, features=partial(softmax, antithetic=True, centred=True, momentum=0.1), num_features=6
    ),
    "relu": partial(favor, features=relu, num_features=5),
    "linear": partial(favor, features=IdentityFeatures, num_features=None),
    "exact": ExactAttention,
    "chunked": partial(ChunkedAttention, query_chunk_size=3, key_chunk_size=4),
    "flash": FlashAttention,
    "local": partial(LocalAttention, window=4),
}
BACKENDS["hybrid"] = partial(HybridAttention, pattern=["favor", "local"], backends=dict(BACKENDS))
ACROSS = [name for name in BACKENDS if name not in ("local", "hybrid")]

shared_options = {
    "key_heads": st.sampled_from([1, 2, 4]),
    "gate": st.booleans(),
    "token_shift": st.booleans(),
    "lengths": st.sampled_from([{}, {"qk_norm": 3.0}, {"head_norm": RMSNorm}]),
    "qkv_bias": st.booleans(),
    "out_bias": st.booleans(),
    "positions": st.sampled_from(
        [NoPositions, Rotary, partial(Rotary, width=2), partial(Rotary, interleaved=True, base=50.0)]
    ),
    "absolute": st.sampled_from(
        [
            NoAbsolutePositions,
            SinusoidalPositions,
            partial(LearnedPositions, max_len=40),
            partial(AxialPositions, shape=[7, 6]),
        ]
    ),
    "feed_forward": st.fixed_dictionaries(
        {
            "mult": st.sampled_from([1, 2.5]),
            "activation": st.sampled_from(["gelu", "sigmoid", "silu", "squared_relu"]),
            "gated": st.booleans(),
            "bias": st.booleans(),
            "chunks": st.integers(1, 3),
        }
    ).map(lambda options: partial(FeedForward, **options)),
    "residual": st.sampled_from([{}, {"reversible": True}, {"recompute": True}]),
    "norms": st.sampled_from(
        [
            {"norm": RMSNorm},
            {"norm": LayerNorm},
            {"norm": ScaleNorm},
            {"norm": NoNorm, "final_norm": RMSNorm},
            {"norm": NoNorm, "rezero": True},
        ]
    ),
}
causal_options = {
    "attn": st.sampled_from(sorted(BACKENDS)),
    "local_heads": st.sampled_from([0, 4, [0, 4]]),
    "convolution": st.sampled_from([0, 1, 4]),
    "decay": st.booleans(),
}
causal_mix = st.fixed_dictionaries(shared_options | causal_options)
plain_mix = causal_mix.map(lambda mix: mix | {"convolution": 0, "token_shift": False})  # those see zeros at pads
bidirectional_mix = st.fixed_dictionaries(shared_options | {"attn": st.sampled_from(sorted(BACKENDS))})
crossing_mix = st.fixed_dictionaries(shared_options | {"attn": st.sampled_from(ACROSS), "decay": st.booleans()})


def build(mix: dict[str, Any], **more: Any) -> Performer:
    """Build a small stack in which every weight does something."""
    options = {key: value for key, value in mix.items() if key not in ("attn", "residual", "norms", "lengths")}
    options |= mix["residual"] | mix["norms"] | mix.get("lengths", {}) | more
    stack = Performer(
        dim=DIM,
        depth=DEPTH,
        heads=HEADS,
        dim_head=4,
        attn=BACKENDS[mix["attn"]],
        local=partial(LocalAttention, window=3),
        **options,
    )
    enliven(stack)
    return stack.double().eval()


def enliven(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.3, generator=generator)


def vectors(batch: int, tokens: int) -> Tensor:
    return torch.randn(batch, tokens, DIM, dtype=torch.float64)


def decode(stack: Performer, x: Tensor, pieces: list[int], mask: Tensor | None = None, **context: Any) -> Tensor:
    state, outputs, start = stack.init_state(x.shape[0], max_len=3, **context), [], 0
    for piece in x.split(pieces, dim=1):
        part = None if mask is None else mask[:, start : start + piece.shape[1]]
        out, state = stack.extend(piece, state, mask=part)
        outputs.append(out)
        start += piece.shape[1]
    return torch.cat(outputs, 1)


@torch.no_grad()
@given(mix=causal_mix, pieces=st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any))
def test_any_split_of_a_sequence_gives_its_forward(mix: dict[str, Any], pieces: list[int]) -> None:
    stack, x = build(mix), vectors(2, sum(pieces))
    whole = stack(x)
    assert whole.std() > 0.01
    torch.testing.assert_close(decode(stack, x, pieces), whole, **CLOSE)
    torch.testing.assert_close(stack(x), whole, rtol=0, atol=0)  # evaluation is deterministic


@torch.no_grad()
@given(mix=causal_mix, pads=st.integers(1, 8), n=st.integers(1, 9), pieces=st.sampled_from([[1], [4], [99]]))
def test_left_padding_changes_nothing(mix: dict[str, Any], pads: int, n: int, pieces: list[int]) -> None:
    stack, short, long = build(mix), vectors(1, n), vectors(1, pads + n)
    x = torch.cat((torch.cat((9 * vectors(1, pads), short), 1), long))
    mask = torch.arange(pads + n)[None] >= torch.tensor([[pads], [0]])
    pieces = [size for size in pieces * (pads + n) if size < pads + n] or [pads + n]
    pieces = pieces[: (pads + n) // pieces[0]]
    pieces = [*pieces, pads + n - sum(pieces)] if sum(pieces) < pads + n else pieces
    for out in (decode(stack, x, pieces, mask), stack(x, mask=mask)):
        torch.testing.assert_close(out[:1, pads:], stack(short), **CLOSE)
        torch.testing.assert_close(out[1:], stack(long), **CLOSE)


@torch.no_grad()
@given(mix=plain_mix, pieces=st.sampled_from([[9], [4, 5]]))
def test_tokens_masked_by_bools_or_integers_are_as_if_absent(mix: dict[str, Any], pieces: list[int]) -> None:
    stack, x = build(mix), vectors(1, 9)
    kept = torch.tensor([False, True, True, False, False, True, False, True, True])
    alone = stack(x[:, kept])
    for mask in (kept[None], kept[None].long(), kept[None].to(torch.uint8)):
        for out in (stack(x, mask=mask), decode(stack, x, pieces, mask)):
            torch.testing.assert_close(out[:, kept], alone, **CLOSE)


@torch.no_grad()
@given(mix=causal_mix | bidirectional_mix, n=st.integers(0, 6))
def test_an_integer_mask_is_the_bool_mask_whatever_the_options(mix: dict[str, Any], n: int) -> None:
    causal = "decay" in mix
    stack, x, mask = build(mix, causal=causal), vectors(2, n), torch.rand(2, n) < 0.6
    assert torch.equal(stack(x, mask=mask.long()), stack(x, mask=mask))
    if causal:
        one, state = stack.extend(x, stack.init_state(2), mask=mask.int())
        other, other_state = stack.extend(x, stack.init_state(2), mask=mask)
        assert torch.equal(one, other)
        assert torch.equal(state.length, other_state.length)


@given(mix=causal_mix | bidirectional_mix, packed=st.booleans())
def test_a_sequence_of_no_tokens_trains(mix: dict[str, Any], packed: bool) -> None:
    stack, x = build(mix, causal="decay" in mix).train(), vectors(2, 0).requires_grad_()
    out = stack(x, mask=torch.ones(2, 0).bool(), segments=torch.zeros(2, 0).long() if packed else None)
    assert out.shape == (2, 0, DIM)
    out.sum().backward()
    assert not any(p.grad.any() for p in stack.parameters() if p.grad is not None)


@torch.no_grad()
@given(mix=causal_mix | bidirectional_mix, lengths=st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_packed_documents_equal_separate_ones(mix: dict[str, Any], lengths: list[int]) -> None:
    stack = build(mix, causal="decay" in mix)
    documents = [vectors(1, n) for n in lengths]
    segments = torch.repeat_interleave(torch.tensor(lengths))[None]
    packed = stack(torch.cat(documents, 1), segments=segments)
    torch.testing.assert_close(packed, torch.cat([stack(x) for x in documents], 1), **CLOSE)


@torch.no_grad()
@given(mix=causal_mix, seen=st.integers(1, 9))
def test_the_future_is_not_seen(mix: dict[str, Any], seen: int) -> None:
    stack, x, other = build(mix), vectors(2, 10), 3 * vectors(2, 10)
    other[:, :seen] = x[:, :seen]
    torch.testing.assert_close(stack(x)[:, :seen], stack(other)[:, :seen], **CLOSE)


@torch.no_grad()
@given(mix=bidirectional_mix, left=st.integers(0, 5), right=st.integers(0, 5), n=st.integers(1, 8))
def test_padding_on_either_side_changes_no_bidirectional_stack(
    mix: dict[str, Any], left: int, right: int, n: int
) -> None:
    stack, x = build(mix, causal=False), vectors(2, n)
    padded = torch.cat((5 * vectors(2, left), x, 5 * vectors(2, right)), 1)
    mask = torch.tensor([False] * left + [True] * n + [False] * right).expand(2, -1)
    torch.testing.assert_close(stack(padded, mask=mask)[:, left : left + n], stack(x), **CLOSE)


@torch.no_grad()
@given(mix=crossing_mix, pieces=st.lists(st.integers(1, 5), min_size=1, max_size=4), pads=st.integers(0, 4))
def test_a_stack_that_looks_at_a_context_decodes_as_it_trains(
    mix: dict[str, Any], pieces: list[int], pads: int
) -> None:
    stack, x, context = build(mix, cross_attend=True), vectors(2, sum(pieces)), vectors(2, 7)
    padded = torch.cat((context, 5 * vectors(2, pads)), 1)
    mask = (torch.arange(7 + pads) < 7).expand(2, -1)
    whole = stack(x, context=context)
    assert not torch.allclose(whole, stack(x, context=2 * context))
    torch.testing.assert_close(stack(x, context=padded, context_mask=mask), whole, **CLOSE)
    torch.testing.assert_close(stack(x, context=padded, context_mask=mask.long()), whole, **CLOSE)
    torch.testing.assert_close(decode(stack, x, [0, *pieces], context=padded, context_mask=mask.int()), whole, **CLOSE)


@given(mix=causal_mix | crossing_mix)
def test_gradients_reach_every_parameter_and_the_inputs(mix: dict[str, Any]) -> None:
    crosses = "convolution" not in mix
    stack, x = build(mix, cross_attend=crosses).train(), vectors(2, 8).requires_grad_()
    context = {"context": vectors(2, 5).requires_grad_()} if crosses else {}
    stack(x, **context).square().sum().backward()
    found = {"x": x, **context, **dict(stack.named_parameters())}
    # a key's bias shifts all scores of a query alike, which softmax over them does not see
    assert [name for name, p in found.items() if p.grad is None or not bool(p.grad.any())] == []


@given(mix=causal_mix)
def test_it_runs_on_the_meta_device(mix: dict[str, Any]) -> None:
    stack = copy.deepcopy(build(mix)).to("meta").float()
    x = torch.empty(2, 9, DIM, device="meta")
    mask = torch.ones(2, 9, dtype=torch.bool, device="meta")
    assert stack(x, mask=mask, segments=mask.long()).shape == (2, 9, DIM)
    _, state = stack.extend(x, stack.init_state(2, max_len=20), mask=mask)
    assert stack.extend(x[:, :1], state)[0].shape == (2, 1, DIM)
    stack.train()(x).sum().backward()


@given(mix=causal_mix)
def test_weights_survive_safetensors(mix: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    stack, other, x = build(mix), build(mix), vectors(1, 6)
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(stack.state_dict(), file)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(load_file(file), strict=True)
    assert torch.equal(other(x), stack(x))


@torch.no_grad()
@given(mix=causal_mix)
def test_a_forked_state_goes_two_ways(mix: dict[str, Any]) -> None:
    stack, prefix, one, two = build(mix), vectors(1, 6), vectors(1, 3), vectors(1, 3)
    _, state = stack.extend(prefix, stack.init_state(1))
    kept = fork(state)
    first, _ = stack.extend(one, state)
    second, _ = stack.extend(two, kept)
    torch.testing.assert_close(first, stack(torch.cat((prefix, one), 1))[:, 6:], **CLOSE)
    torch.testing.assert_close(second, stack(torch.cat((prefix, two), 1))[:, 6:], **CLOSE)


def plain(**options: Any) -> Performer:
    mix = {"attn": "exact", "residual": {}, "norms": {"norm": RMSNorm}}
    return build(
        mix, **{"positions": NoPositions, "feed_forward": partial(FeedForward, mult=1, activation="gelu")} | options
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": False, "decay": True, "convolution": 4}, "decay needs"),
        ({"causal": False, "convolution": 4, "reversible": True, "recompute": True}, "convolution needs"),
        ({"reversible": True, "recompute": True}, "reversible already recomputes"),
        ({"rezero": True}, "rezero stands in the place of norms: set norm to none"),
        ({"local_heads": [1, 2, 3]}, "local_heads must be one number or one per layer .2., got"),
        ({"local_heads": 5, "key_heads": 3}, "local_heads must be within 0..4 .heads., got 5"),
        ({"positions": partial(Rotary, width=3), "absolute": partial(AxialPositions, shape=[3])}, "rotary width"),
        ({"feed_forward": partial(FeedForward, mult=1, activation="gleu")}, "activation must be one of"),
        ({"absolute": partial(AxialPositions, shape=[3])}, "shape of two sizes"),
        ({"qk_norm": -1.0, "rezero": True}, "qk_norm must be above 0, got -1.0"),
        ({"dropout": 1.5}, "dropout must be at least 0 and below 1, got 1.5"),
    ],
)
def test_the_first_of_what_is_wrong_is_told_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        plain(**options)
    assert "\n" not in str(told.value)


def test_every_part_is_built_once() -> None:
    built: list[str] = []

    def noted(name: str, factory: Any) -> Any:
        return lambda *given, **more: (built.append(name), factory(*given, **more))[1]

    parts = {"positions": Rotary, "absolute": NoAbsolutePositions, "norm": RMSNorm, "final_norm": RMSNorm}
    plain(**{name: noted(name, factory) for name, factory in parts.items()})
    assert sorted(built) == ["absolute", "final_norm", *["norm"] * 2 * DEPTH, *["positions"] * DEPTH]


def test_a_context_is_wanted_exactly_where_it_is_looked_at() -> None:
    x = vectors(1, 3)
    with pytest.raises(ValueError, match="needs a context"):
        plain(cross_attend=True)(x)
    with pytest.raises(ValueError, match="needs a context"):
        plain(cross_attend=True).init_state(1)
    with pytest.raises(ValueError, match="has no cross-attention"):
        plain()(x, context=x)
    with pytest.raises(ValueError, match="attn=local does not attend across sequences"):
        build({"attn": "local", "residual": {}, "norms": {"norm": RMSNorm}}, cross_attend=True, positions=NoPositions,
              feed_forward=partial(FeedForward, mult=1, activation="gelu"))  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.ones(2, 4)}, r"^mask must be bool or integer, .* \(2, 4\); got float32 of shape \(2, 4\)$"),
        ({"mask": torch.ones(1, 4).bool()}, r"^mask must be .* \(2, 4\); got bool of shape \(1, 4\)$"),
        ({"mask": torch.ones(2, 5).long()}, r"^mask must be .* \(2, 4\); got int64 of shape \(2, 5\)$"),
        ({"segments": torch.zeros(1, 4).long()}, r"^segments must be .* \(2, 4\); got int64 of shape \(1, 4\)$"),
        ({"segments": torch.zeros(2, 4)}, r"^segments must be integer, .* got float32 of shape \(2, 4\)$"),
        ({"context_mask": torch.ones(2, 4).bool()}, "^a context_mask was given without a context$"),
    ],
)
def test_what_is_not_of_the_tokens_given_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain()(vectors(2, 4), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"context": (2, 3), "context_mask": (1, 3)},
            r"^context_mask must be .* \(2, 3\); got bool of shape \(1, 3\)$",
        ),
        (
            {"context": (2, 3), "context_mask": (2, 4)},
            r"^context_mask must be .* \(2, 3\); got bool of shape \(2, 4\)$",
        ),
        ({"context": (1, 3)}, r"^the context must have the batch of the tokens \(2\), got 1$"),
    ],
)
def test_a_context_that_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    stack, context = plain(cross_attend=True), vectors(*options["context"])
    mask = torch.ones(options["context_mask"]).bool() if "context_mask" in options else None
    for call in (lambda **more: stack(vectors(2, 4), **more), lambda **more: stack.init_state(2, **more)):
        with pytest.raises(ValueError, match=message):
            call(context=context, context_mask=mask)


def test_extend_takes_a_mask_and_a_state_of_its_own_tokens_only() -> None:
    stack, x, seen = plain(decay=True, convolution=3), vectors(2, 5), torch.ones(2, 5).bool()
    _, state = stack.extend(x[:, :4], stack.init_state(2), mask=seen[:, :4])
    with pytest.raises(ValueError, match=r"^mask must be .*, of shape \(2, 1\); got bool of shape \(2, 5\)$"):
        stack.extend(x[:, 4:], state, mask=seen)
    for batch in (1, 3):
        with pytest.raises(ValueError, match=f"^the state holds a batch of 2, got a batch of {batch}$"):
            stack.extend(vectors(batch, 1), state)
    torch.testing.assert_close(stack.extend(x[:, 4:], state)[0], stack(x)[:, 4:], **CLOSE)  # refusals leave no trace


def test_a_bidirectional_stack_does_not_decode() -> None:
    with pytest.raises(ValueError, match="does not decode token by token"):
        plain(causal=False).init_state(1)


def test_learned_positions_end_somewhere() -> None:
    stack = plain(absolute=partial(LearnedPositions, max_len=5))
    assert stack.max_len == 5
    with pytest.raises(ValueError, match="6 tokens are more than the 5 learned positions"):
        stack(vectors(1, 6))


@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "expected"),
    [
        *[(1, None, 32, 0), (2, None, 32, 0), (3, 1, 32, 0), (4, None, 32, 1), (4, 2, 32, 0), (8, None, 32, 2)],
        *[(8, 2, 32, 0), (8, 4, 32, 2), (16, 4, 32, 4), (4, None, 64, 1), (4, None, 16, 0)],
    ],
)
def test_a_quarter_of_wide_heads_is_local_in_whole_key_heads(
    heads: int, key_heads: int | None, width: int, expected: int
) -> None:
    stack = Performer(
        dim=16,
        depth=1,
        heads=heads,
        dim_head=width,
        key_heads=key_heads,
        attn=BACKENDS["flash"],
        local=partial(LocalAttention, window=3),
        local_heads=None,
        positions=NoPositions,
        norm=RMSNorm,
        feed_forward=partial(FeedForward, mult=1, activation="gelu"),
    )
    backend = stack.layers[0]["attention"].body.backend
    assert (backend.nearby.heads if isinstance(backend, SplitAttention) else 0) == expected


def test_fixed_projections_are_not_redrawn() -> None:
    mix = {"attn": "favor", "residual": {}, "norms": {"norm": RMSNorm}}
    options = {"positions": NoPositions, "feed_forward": partial(FeedForward, mult=1, activation="gelu")}
    stack = build(mix, **options, local_heads=2)
    for layer in stack.layers:
        layer["attention"].body.backend.everywhere.redraw_interval = 1
    name = "layers.0.attention.body.backend.everywhere.features.projection"
    first = stack.state_dict()[name].clone()
    stack.redraw(3)
    assert not torch.equal(stack.state_dict()[name], first)
    second = stack.state_dict()[name].clone()
    stack.fix_projections()
    stack.redraw(4)
    assert torch.equal(stack.state_dict()[name], second)
