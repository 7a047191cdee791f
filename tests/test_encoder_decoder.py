"""The encoder-decoder decodes as it trains, and sees what it should: all of the source, nothing of the future."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from performer_lm import PerformerEncoderDecoder, checkpoint

CLOSE: dict[str, Any] = {"atol": 1e-9, "rtol": 1e-9}
SMALL = [f"model.{part}.{size}" for part in ("encoder", "decoder") for size in ("heads=4", "dim_head=8", "depth=2")]
KINDS = {
    "favor": ["attn.num_features=16", "attn.chunk_size=4"],
    "flash": ["attn=flash"],
    "mixed": ["attn=exact", "model.decoder.reversible=true", "model.encoder.rezero=true", "model.tie_embeddings=true"],
    "own source vocabulary": ["attn=chunked", "model.source_vocab_size=11", "model.decoder.qk_norm=3"],
}
KINDS["mixed"] += ["model/norm@model.encoder.norm=none", "model.encoder.local_heads=2"]


@pytest.fixture
def section(model_section: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda *overrides: model_section("model=performer_seq2seq", *SMALL, *overrides, tiny=["model.dim=32"])


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, section: Callable[..., dict[str, Any]]) -> PerformerEncoderDecoder:
    built: PerformerEncoderDecoder = checkpoint.build(section(*KINDS[request.param]))
    generator = torch.Generator().manual_seed(1)
    for parameter in built.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return built.double().eval()


def tokens(*shape: int, vocab: int = 11) -> Tensor:
    return torch.randint(0, vocab, shape)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 4]])
def test_any_split_of_a_target_gives_its_forward(model: PerformerEncoderDecoder, pieces: list[int]) -> None:
    source, target = tokens(2, 7), tokens(2, 9)
    whole = model(source, target)
    state, logits = model.init_state(source, max_len=9), []
    for piece in target.split(pieces, dim=1):
        out, state = model.extend(piece, state)
        logits.append(out)
    torch.testing.assert_close(torch.cat(logits, 1), whole, **CLOSE)
    assert whole.std() > 0.01


@torch.no_grad()
def test_padding_of_source_and_target_changes_nothing(model: PerformerEncoderDecoder) -> None:
    source, target = tokens(2, 7), tokens(2, 9)
    padded = torch.cat((tokens(2, 3), source, tokens(2, 2)), 1)
    source_mask = torch.tensor([False] * 3 + [True] * 7 + [False] * 2).expand(2, -1)
    late, mask = torch.cat((tokens(2, 4), target), 1), (torch.arange(13) >= 4).expand(2, -1)
    logits = model(padded, late, mask=mask, source_mask=source_mask)
    torch.testing.assert_close(logits[:, 4:], model(source, target), **CLOSE)
    state = model.init_state(padded, mask=source_mask)
    last, _ = model.extend(late, state, mask=mask, last_only=True)
    torch.testing.assert_close(last, logits[:, -1:], **CLOSE)


@torch.no_grad()
def test_integer_masks_are_the_bool_masks(model: PerformerEncoderDecoder) -> None:
    source, target = tokens(2, 7), tokens(2, 5)
    source_mask, mask = torch.rand(2, 7) < 0.6, torch.arange(5)[None] >= torch.tensor([[2], [0]])
    wanted = model(source, target, mask=mask, source_mask=source_mask)
    assert torch.equal(model(source, target, mask=mask.long(), source_mask=source_mask.long()), wanted)
    out, _ = model.extend(target, model.init_state(source, mask=source_mask.int()), mask=mask.int())
    torch.testing.assert_close(out[:, -1:], wanted[:, -1:], **CLOSE)
    nothing, _ = model.extend(target[:, :0], model.init_state(source))
    assert nothing.shape == (2, 0, 40)


def test_masks_that_are_not_of_source_and_target_are_refused(model: PerformerEncoderDecoder) -> None:
    source, target, kept = tokens(2, 7), tokens(2, 5), torch.ones(2, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^source_mask must be .* of shape \(2, 7\); got bool of shape \(1, 7\)$"):
        model(source, target, source_mask=kept[:1])
    with pytest.raises(ValueError, match=r"^mask must be .* of shape \(2, 5\); got bool of shape \(2, 7\)$"):
        model(source, target, mask=kept)
    for read in (model.init_state, model.start):
        with pytest.raises(ValueError, match=r"^mask must be .* of shape \(2, 7\); got float32 of shape \(2, 7\)$"):
            read(source, mask=kept.float())
    with pytest.raises(ValueError, match=r"^the state holds a batch of 2, got a batch of 1$"):
        model.extend(target[:1], model.init_state(source))


@torch.no_grad()
def test_it_sees_all_of_the_source_and_none_of_the_future(model: PerformerEncoderDecoder) -> None:
    source, target = tokens(1, 7), tokens(1, 9)
    logits = model(source, target)
    other = target.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 11
    torch.testing.assert_close(model(source, other)[:, :5], logits[:, :5], **CLOSE)
    for place in range(7):
        changed = source.clone()
        changed[0, place] = (changed[0, place] + 1) % 11
        assert not torch.allclose(model(changed, target)[:, 0], logits[:, 0])


def test_gradients_reach_every_parameter(model: PerformerEncoderDecoder) -> None:
    model.train()(tokens(2, 8), tokens(2, 6)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


def test_it_runs_on_the_meta_device(model: PerformerEncoderDecoder) -> None:
    model, ids = copy.deepcopy(model).to("meta").float(), torch.zeros(2, 6, dtype=torch.int64, device="meta")
    assert model(ids, ids).shape == (2, 6, 40)
    _, state = model.extend(ids[:, :1], model.init_state(ids))
    assert model.extend(ids[:, :1], state)[0].shape == (2, 1, 40)


def test_weights_survive_safetensors(model: PerformerEncoderDecoder, tmp_path: Any) -> None:
    twins = {"head.weight": "embedding.weight", "source_embedding.weight": "embedding.weight"}
    weights = model.state_dict()
    shared = {name for name, twin in twins.items() if weights[name].data_ptr() == weights[twin].data_ptr()}
    save_file({name: value for name, value in weights.items() if name not in shared}, tmp_path / "model.safetensors")
    missing, unexpected = model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert (set(missing), unexpected) == (shared, [])


def test_the_first_loss_is_that_of_a_uniform_guess(section: Callable[..., dict[str, Any]]) -> None:
    for tie in ("true", "false"):
        model = checkpoint.build(section(f"model.tie_embeddings={tie}"))
        logits = model(tokens(4, 16), tokens(4, 16)).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, tokens(64, vocab=40))
        assert loss.item() == pytest.approx(math.log(40), rel=0.02)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.decoder.cross_attend=false"], "the decoder would never see the source"),
        (["model.decoder.causal=false"], "decay needs a causal model"),
        (["model.encoder.causal=true"], "the encoder must be bidirectional"),
        (["model.encoder.cross_attend=true"], "the encoder has nothing to look at"),
        (["model.start_id=40"], r"start_id must be within 0..39, got 40"),
        (["attn=local"], "attn=local does not attend across sequences"),
    ],
)
def test_stacks_that_do_not_fit_are_refused(
    section: Callable[..., dict[str, Any]], overrides: list[str], message: str
) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        checkpoint.build(section(*overrides))
