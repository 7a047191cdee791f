"""What is counted without computing is what computing costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from performer_lm import checkpoint
from performer_lm.cost import count_activations, count_numbers, find_crossover, measure_cost
from performer_lm.objectives import NextToken, Objective, SourceToTarget

CLM = NextToken(chunk_size=None)
Sketch = Callable[..., Any]


@pytest.fixture
def sketch(model_section: Callable[..., dict[str, Any]]) -> Sketch:
    """Return a function from overrides to a small model on the meta device."""

    def build(*overrides: str, device: str = "meta") -> Any:
        with torch.device(device):
            return checkpoint.build(model_section(*overrides))

    return build


def test_numbers_are_those_of_the_model(sketch: Sketch) -> None:
    model = sketch("attn.num_features=16")
    model.performer.layers[0].requires_grad_(False)
    frozen = sum(p.numel() for p in model.performer.layers[0].parameters())
    size = count_numbers(model)
    assert size.embedding == 40 * 32
    assert size.parameters == sum(p.numel() for p in model.parameters()) == size.trainable + frozen
    assert size.buffers == 2 * 4 * 16 * 8  # the projections of two layers
    tied = count_numbers(sketch("model.tie_embeddings=true", "attn.num_features=16"))
    assert tied.parameters == size.parameters - 40 * 32


@pytest.mark.parametrize("attn", ["exact", "flash_tiled"])
@pytest.mark.parametrize("gate", ["true", "false"])
def test_arithmetic_is_what_a_counter_counts(sketch: Sketch, attn: str, gate: str) -> None:
    model = sketch(f"attn={attn}", "model.convolution=0", f"model.gate={gate}", "model.decay=false", device="cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 64, dtype=torch.int64))
    # in one tile there is no future to skip
    expected = model.count_flops(64)
    if attn != "exact":
        expected += 2 * 2 * 4 * (64 * 63 // 2) * 16
    assert counter.get_total_flops() == expected


def test_favor_grows_in_proportion_and_softmax_faster(sketch: Sketch) -> None:
    favor, flash = sketch("attn=favor"), sketch("attn=flash")
    assert favor.count_flops(4096) == 4 * favor.count_flops(1024)
    assert flash.count_flops(4096) > 10 * flash.count_flops(1024)


@pytest.mark.parametrize("causal", [True, False])
def test_the_crossover_is_where_arithmetic_crosses(sketch: Sketch, causal: bool) -> None:
    linear = sketch("attn=favor", "attn.num_features=16").performer.layers[0]["attention"].body.backend
    softmax = sketch("attn=flash").performer.layers[0]["attention"].body.backend
    n = find_crossover(linear, causal)
    assert linear.count_flops(n, n, causal=causal) < softmax.count_flops(n, n, causal=causal)
    assert linear.count_flops(n - 1, n - 1, causal=causal) >= softmax.count_flops(n - 1, n - 1, causal=causal)


def kept_on_cpu(model: Any, tokens: int) -> int:
    sizes: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = CLM(model, torch.zeros(1, tokens + 1, dtype=torch.int64), step=0)
    del losses
    return sum(sizes.values())


@pytest.mark.parametrize(
    "options", [["attn=favor", "attn.num_features=16"], ["attn=exact"], ["attn=flash"], ["model.reversible=true"]]
)
def test_activations_are_those_of_a_forward(sketch: Sketch, options: list[str]) -> None:
    counted = count_activations(sketch(*options), CLM, tokens=128)
    assert counted == pytest.approx(kept_on_cpu(sketch(*options, device="cpu"), 128), rel=0.1)


@pytest.mark.parametrize("options", ["attn=favor", "attn=exact", "attn=local attn.window=100", "attn=chunked"])
@pytest.mark.parametrize("vocab_size", [40, 50_000])  # of many ids, the loss is counted in chunks
def test_activations_are_told_of_any_length(
    model_section: Callable[..., dict[str, Any]], options: str, vocab_size: int
) -> None:
    with torch.device("meta"):
        model = checkpoint.build(model_section(*options.split()) | {"vocab_size": vocab_size})
    for context in (300, 3000):
        counted = count_activations(model, CLM, tokens=context)
        # what is told of long texts is in proportion to a shorter count, and parts that do not grow are in that too
        assert measure_cost(model, CLM, context=context).activation_bytes == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    ("options", "objective", "names"),
    [
        (["attn=favor"], CLM, {"favor": 2}),
        (
            ["attn=hybrid", "attn.pattern=[favor,flash]", "model.local_heads=2"],
            CLM,
            {"favor": 1, "local": 2, "flash": 1},
        ),
        (["attn=flash_tiled"], CLM, {"flash_tiled": 2}),
        (["attn=hybrid", "attn.pattern=[relu,linear]"], CLM, {"relu": 1, "linear": 1}),
    ],
)
def test_each_backend_is_told_with_its_layers(
    sketch: Sketch, options: list[str], objective: Objective, names: dict[str, int]
) -> None:
    cost = measure_cost(sketch(*options), objective, context=64)
    assert {backend.name: layers for backend, layers in cost.backends.items()} == names
    assert (cost.softmax is not None) == (cost.pays_from is not None) == bool({"favor", "relu", "linear"} & set(names))


def test_an_encoder_decoder_has_a_cost(model_section: Callable[..., dict[str, Any]]) -> None:
    with torch.device("meta"):
        model = checkpoint.build(model_section("model=performer_seq2seq", tiny=[]))
    cost = measure_cost(model, SourceToTarget(chunk_size=None), context=64)
    assert sum(cost.backends.values()) == 4
    assert cost.flops > 0 < cost.activation_bytes


def test_a_decoding_state_is_as_large_as_it_is(sketch: Sketch) -> None:
    (favor,), (flash,) = (measure_cost(sketch(f"attn={attn}"), CLM, context=96).backends for attn in ("favor", "flash"))
    assert favor.state_bytes == 4 * 128 * (4 * (8 + 1) + 8)  # sums, and exponents in float64
    assert flash.state_bytes == 4 * 4 * 96 * 16
