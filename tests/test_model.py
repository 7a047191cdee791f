"""The laws every model keeps, whatever its attention and options."""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from performer_lm import checkpoint
from performer_lm.attention.base import fork
from performer_lm.model import PerformerLM
from performer_lm.performer import Performer

Build = Callable[..., PerformerLM]

CLOSE: dict[str, Any] = {"atol": 1e-9, "rtol": 1e-9}  # models here are float64

KINDS = {
    "favor": ["attn=favor", "attn.num_features=16", "attn.chunk_size=8"],
    "exact": ["attn=exact"],
    "chunked": ["attn=chunked"],
    "flash": ["attn=flash"],
    "local": ["attn=local", "attn.window=5"],
    "sinks": ["attn=local", "attn.window=4", "attn.sinks=2"],
    "hybrid": ["attn=hybrid", "attn.pattern=[local,favor]", "attn.backends.local.window=5"],
    "split": ["attn=favor", "attn.num_features=16", "model.local_heads=2"],
    "all local in one layer": ["attn=exact", "model.local_heads=[0,4]"],
    "rotary": ["attn=exact", "model/positions=rotary", "model.convolution=0", "model.decay=false"],
    "grouped keys": ["attn=favor", "attn.num_features=16", "model.key_heads=2", "model/positions=rotary"],
    "classic": ["model=performer_classic", "model.heads=4", "attn.num_features=16"],
    "rich": [
        *(
            "attn=favor",
            "attn.num_features=16",
            "attn/features=hyperbolic",
            "model.qk_norm=4",
            "model.token_shift=true",
        ),
        *("model/absolute=sinusoidal", "model/norm=scale", "model.qkv_bias=true", "model.head_bias=true"),
    ],
    "reversible": ["attn=favor", "attn.num_features=16", "model.reversible=true"],
    "rezero": ["attn=relu", "attn.num_features=16", "model.rezero=true", "model/norm=none", "model/absolute=axial"],
    "transformer": ["model=transformer", "attn=flash", "model.tie_embeddings=true"],
}


@pytest.fixture(params=KINDS, scope="module")
def model(request: pytest.FixtureRequest, lively_model: Build) -> PerformerLM:
    return lively_model(*KINDS[request.param])


def tokens(*shape: int, vocab: int = 40) -> Tensor:
    return torch.randint(0, vocab, shape)


def decode_in_pieces(model: PerformerLM, ids: Tensor, pieces: list[int], mask: Tensor | None = None) -> Tensor:
    state, logits = model.init_state(ids.shape[0], max_len=3), []
    for piece in ids.split(pieces, dim=1):
        start = sum(part.shape[1] for part in logits)
        part = None if mask is None else mask[:, start : start + piece.shape[1]]
        out, state = model.extend(piece, state, mask=part)
        logits.append(out)
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[21], [9, 12], [1] * 21, [13, 1, 1, 6]])
def test_any_split_of_a_sequence_gives_its_forward(model: PerformerLM, pieces: list[int]) -> None:
    ids = tokens(2, 21)
    whole = model(ids)
    assert whole.std() > 0.1
    torch.testing.assert_close(decode_in_pieces(model, ids, pieces), whole, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[16], [9, 1, 6], [1] * 16])
def test_left_padding_changes_nothing(model: PerformerLM, pieces: list[int]) -> None:
    pads = 7
    short, long = tokens(1, 16 - pads), tokens(1, 16)
    ids = torch.cat((torch.cat((tokens(1, pads), short), 1), long))
    mask = torch.arange(16)[None] >= torch.tensor([[pads], [0]])
    for logits in (decode_in_pieces(model, ids, pieces, mask), model(ids, mask=mask)):
        torch.testing.assert_close(logits[:1, pads:], model(short), **CLOSE)
        torch.testing.assert_close(logits[1:], model(long), **CLOSE)


@torch.no_grad()
def test_an_integer_mask_is_the_bool_mask(model: PerformerLM) -> None:
    ids, mask = tokens(2, 9), torch.arange(9)[None] >= torch.tensor([[4], [0]])
    assert torch.equal(model(ids, mask=mask.long()), model(ids, mask=mask))
    found, wanted = (decode_in_pieces(model, ids, [5, 0, 4], given) for given in (mask.int(), mask))
    assert torch.equal(found, wanted)
    torch.testing.assert_close(wanted[0, 4:], model(ids[:1, 4:])[0], **CLOSE)


@torch.no_grad()
def test_no_tokens_give_no_logits_and_leave_the_state_as_it_was(model: PerformerLM) -> None:
    ids = tokens(2, 6)
    _, state = model.extend(ids[:, :4], model.init_state(2))
    for last_only in (False, True):
        nothing, state = model.extend(ids[:, :0], state, last_only=last_only)
        assert nothing.shape == (2, 0, 40)
    torch.testing.assert_close(model.extend(ids[:, 4:], state)[0], model(ids)[:, 4:], **CLOSE)


def test_a_mask_that_is_not_of_the_new_tokens_is_refused(model: PerformerLM) -> None:
    ids, seen = tokens(2, 6), torch.ones(2, 6, dtype=torch.bool)
    _, state = model.extend(ids[:, :5], model.init_state(2))
    with pytest.raises(ValueError, match=r"^mask must be .* of shape \(2, 1\); got bool of shape \(2, 6\)$"):
        model.extend(ids[:, 5:], state, mask=seen)
    with pytest.raises(ValueError, match=r"^mask must be .* of shape \(2, 6\); got bool of shape \(1, 6\)$"):
        model(ids, mask=seen[:1])


@torch.no_grad()
def test_packed_documents_equal_separate_ones(model: PerformerLM) -> None:
    documents = [tokens(1, n) for n in (9, 1, 11)]
    segments = torch.cat([torch.full_like(ids, index) for index, ids in enumerate(documents)], 1)
    packed = model(torch.cat(documents, 1), segments=segments)
    torch.testing.assert_close(packed, torch.cat([model(ids) for ids in documents], 1), **CLOSE)


@torch.no_grad()
def test_the_future_is_not_seen(model: PerformerLM) -> None:
    ids, other = tokens(2, 20), tokens(2, 20)
    other[:, :11] = ids[:, :11]
    torch.testing.assert_close(model(ids)[:, :11], model(other)[:, :11], **CLOSE)


@torch.no_grad()
def test_a_forked_state_goes_two_ways(model: PerformerLM) -> None:
    prefix, one, two = tokens(1, 10), tokens(1, 4), tokens(1, 4)
    _, state = model.extend(prefix, model.init_state(1))
    copy = fork(state)
    first, _ = model.extend(one, state)
    second, _ = model.extend(two, copy)
    torch.testing.assert_close(first, model(torch.cat((prefix, one), 1))[:, 10:], **CLOSE)
    torch.testing.assert_close(second, model(torch.cat((prefix, two), 1))[:, 10:], **CLOSE)


@torch.no_grad()
def test_last_only_gives_the_last_logits(model: PerformerLM) -> None:
    ids = tokens(2, 9)
    last, _ = model.extend(ids, model.init_state(2), last_only=True)
    torch.testing.assert_close(last, model(ids)[:, -1:], **CLOSE)


def test_gradients_reach_every_parameter(model: PerformerLM) -> None:
    model.zero_grad()
    model(tokens(2, 12)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


def test_runs_on_the_meta_device(model: PerformerLM) -> None:
    model = copy.deepcopy(model).to("meta").float()
    ids = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    mask = torch.ones(2, 9, dtype=torch.bool, device="meta")
    assert model(ids, mask=mask, segments=ids).shape == (2, 9, 40)
    _, state = model.extend(ids, model.init_state(2, max_len=20), mask=mask)
    assert model.extend(ids[:, :1], state)[0].shape == (2, 1, 40)
    model(ids).sum().backward()


def test_weights_survive_safetensors(model: PerformerLM, tmp_path: Any) -> None:
    shared = {"head.weight"} if model.head.weight is model.embedding.weight else set()
    weights = {name: value for name, value in model.state_dict().items() if name not in shared}
    save_file(weights, tmp_path / "model.safetensors")
    restored = load_file(tmp_path / "model.safetensors")
    missing, unexpected = model.load_state_dict(restored, strict=False)
    assert (set(missing), unexpected) == (shared, [])


@torch.no_grad()
def test_softmax_backends_agree(lively_model: Build) -> None:
    ids = tokens(2, 33)
    exact = lively_model("attn=exact")
    for attn in ("chunked", "flash"):
        other = lively_model(f"attn={attn}")
        other.load_state_dict(exact.state_dict())
        torch.testing.assert_close(other(ids), exact(ids), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["attn=favor", "attn.num_features=16"],
        ["attn=relu", "attn.num_features=16"],
        ["attn=linear"],
        ["attn=exact"],
        ["attn=chunked"],
        ["attn=flash"],
        ["attn=flash_tiled"],
        ["attn=local", "attn.window=5"],
        ["attn=hybrid", "attn.pattern=[favor,flash]", "model.local_heads=2"],
        ["attn=flash", "model.recompute=true", "model.feed_forward.chunks=2", "model.token_shift=true"],
        ["model=performer_classic", "model.heads=4", "attn.num_features=16", "model.qk_norm=3"],
    ],
)
@pytest.mark.filterwarnings("ignore:.*requires_grad=True to a scalar")  # dynamo looks at values as it traces
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does
def test_a_compiled_model_is_one_graph_with_the_same_loss(lively_model: Build, options: list[str]) -> None:
    torch.compiler.reset()
    model, ids = lively_model(*options).float().train(), tokens(2, 33)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for run in (model, compiled):
        loss = torch.nn.functional.cross_entropy(run(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_that_of_a_uniform_guess(kind: str, model_section: Callable[..., dict[str, Any]]) -> None:
    model = checkpoint.build(model_section(*KINDS[kind], vocab_size=300))
    loss = torch.nn.functional.cross_entropy(model(tokens(4, 32, vocab=300)).flatten(0, 1), tokens(4 * 32, vocab=300))
    assert loss.item() == pytest.approx(math.log(300), rel=0.02)


@pytest.mark.parametrize(
    ("options", "biases"),
    [
        ([], [7.0, 5.0, 3.0, 1.0]),
        (["model.local_heads=1"], [5.0, 3.0, 1.0, 7.0]),
        (["model.local_heads=2", "attn=hybrid", "attn.pattern=[delta,flash]"], [3.0, 1.0, 7.0, 5.0]),
        (["model.heads=2", "model.local_heads=1"], [7.0, 7.0]),
        (["model.heads=1"], [7.0]),
    ],
)
def test_biases_of_decay_run_from_7_for_local_heads_to_1(
    model_section: Callable[..., dict[str, Any]], options: list[str], biases: list[float]
) -> None:
    decay = checkpoint.build(model_section(*options)).performer.layers[0].attention.body.decay
    torch.testing.assert_close(decay.project.bias.data, torch.tensor(biases))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.heads=5", "model.dim_head=null"], r"dim \(32\) must be a multiple of heads \(5\)"),
        (["model.key_heads=3"], r"heads \(4\) must be a multiple of key_heads \(3\)"),
        (["model.local_heads=5"], r"local_heads must be within 0..4 \(heads\), got 5"),
        (["model.local_heads=[1,2,3]"], r"one per layer \(2\), got \[1, 2, 3\]"),
        (["model.depth=0"], "depth must be at least 1 and at most 4096, got 0"),
        (["model/positions=rotary", "model.dim_head=7"], "rotary width must be even"),
        (["attn=hybrid", "attn.pattern=[favour]"], "no backend 'favour'; did you mean 'favor'"),
        (["attn=hybrid", "attn.pattern=[]"], "must name at least one backend"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    overrides: list[str], message: str, model_section: Callable[..., dict[str, Any]]
) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        checkpoint.build(model_section(*overrides))


def test_an_encoder_reads_both_ways_and_minds_no_padding(lively_model: Build) -> None:
    model, ids = lively_model("model=performer_encoder", "model.heads=4", "attn.num_features=16"), tokens(2, 9)
    padded = torch.cat((tokens(2, 2), ids, tokens(2, 3)), 1)
    mask = torch.tensor([False] * 2 + [True] * 9 + [False] * 3).expand(2, -1)
    logits = model(ids)
    torch.testing.assert_close(model(padded, mask=mask)[:, 2:11], logits, **CLOSE)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 40
    assert not torch.allclose(model(changed)[:, 0], logits[:, 0])
    with pytest.raises(ValueError, match="does not decode token by token"):
        model.init_state(1)


def test_a_model_shows_and_takes_all_options_of_its_stack() -> None:
    shown, stack = inspect.signature(PerformerLM).parameters, inspect.signature(Performer).parameters
    assert set(shown) == {*stack, "vocab_size", "tie_embeddings", "head_bias"}
    assert all(shown[name] == parameter for name, parameter in stack.items())
    with pytest.raises(TypeError, match="dpeth"):
        PerformerLM(vocab_size=3, dpeth=2)
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        PerformerLM(vocab_size=0, dim=4, depth=1, heads=1, attn=None, positions=None, feed_forward=None, norm=None)
