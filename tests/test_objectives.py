from collections.abc import Callable
from typing import Any

import pytest
import torch

from performer_lm import checkpoint, objectives
from performer_lm.data.windows import IGNORE
from performer_lm.objectives import MaskedTokens, NextToken, Objective, SourceToTarget, choose_chunk_size


def test_the_loss_is_that_of_each_next_token(lively_model: Callable[..., Any]) -> None:
    model = lively_model()
    windows = torch.randint(0, 40, (2, 9))
    nats, targets = NextToken(chunk_size=None)(model, windows, step=0)
    chances = model(windows[:, :-1]).log_softmax(-1)
    torch.testing.assert_close(nats, -chances.gather(-1, windows[:, 1:, None])[..., 0])
    assert torch.equal(targets, windows[:, 1:])


def test_the_loss_of_padding_is_zero(lively_model: Callable[..., Any]) -> None:
    model, objective = lively_model(), NextToken(chunk_size=None)
    windows = torch.randint(0, 40, (2, 9))
    whole = objective(model, windows, step=None)
    windows[1, 6:] = IGNORE
    padded = objective(model, windows, step=None)
    torch.testing.assert_close(padded.nats[:, :5], whole.nats[:, :5])
    assert not padded.nats[1, 5:].any()
    assert (padded.targets[1, 5:] == IGNORE).all()


def test_with_a_separator_no_token_sees_another_document(lively_model: Callable[..., Any]) -> None:
    model, end = lively_model(), 39

    def loss(*pieces: torch.Tensor, separator: int | None) -> torch.Tensor:
        return NextToken(chunk_size=None)(model, torch.cat(pieces, 1), step=0, separator=separator).nats

    first, second, other = (torch.randint(0, end, (2, size)) for size in (6, 5, 6))
    ends = torch.full((2, 1), end)
    packed = loss(ends, first, ends, second, separator=end)[:, 7:]
    torch.testing.assert_close(packed, loss(ends, other, ends, second, separator=end)[:, 7:])
    torch.testing.assert_close(packed, loss(ends, second, separator=None))
    assert not torch.allclose(packed, loss(ends, first, ends, second, separator=None)[:, 7:])


@pytest.mark.parametrize("options", [[], ["model.tie_embeddings=true"], ["model.head_bias=true"]])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 100])
def test_chunks_change_neither_losses_nor_gradients(
    lively_model: Callable[..., Any], options: list[str], chunk_size: int
) -> None:
    model = lively_model(*options)
    windows = torch.randint(0, 40, (2, 9))
    windows[1, 6:] = IGNORE
    found = []
    for objective in (NextToken(chunk_size=None), NextToken(chunk_size=chunk_size)):
        losses = objective(model, windows, step=0, separator=7)
        gradients = torch.autograd.grad(objective.mean(losses), list(model.parameters()))
        found.append((losses.nats, *gradients))
    torch.testing.assert_close(found[1], found[0], atol=1e-10, rtol=1e-10)


def test_many_logits_are_held_in_chunks(lively_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_chunk_size(2048, vocab_size=2048) == 2048  # the default run
    assert choose_chunk_size(2049, vocab_size=2**15) == 1024
    assert choose_chunk_size(2, vocab_size=2**26) == 1
    asked: list[int] = []

    def note(hidden: torch.Tensor, *arguments: Any, chunk_size: int, **options: Any) -> torch.Tensor:
        asked.append(chunk_size)
        return hidden[..., 0]

    monkeypatch.setattr(objectives, "linear_cross_entropy", note)
    monkeypatch.setattr(objectives, "WHOLE", 16 * 40 - 1)
    monkeypatch.setattr(objectives, "PIECE", 5 * 40)
    NextToken(chunk_size=None)(lively_model(), torch.zeros(2, 9, dtype=torch.int64), step=0)
    assert asked == [5]


def test_a_chunk_holds_something() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        NextToken(chunk_size=0)


class Words:
    """A tokenizer of 39 words and a mask."""

    num_pieces = 39

    def special_id(self, name: str) -> int:
        assert name == "mask"
        return 40


def masked(**options: Any) -> MaskedTokens:
    objective = MaskedTokens(
        **({"masked": 0.3, "hidden": 0.6, "replaced": 0.2, "seed": 0, "chunk_size": None} | options)
    )
    objective.adopt(Words())  # type: ignore[arg-type]
    return objective


class Spy(torch.nn.Module):
    """A model that predicts nothing and remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 41)

    def hidden(self, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        self.shown, self.options = tokens, options
        return torch.zeros(*tokens.shape, 4)


def test_masked_tokens_are_hidden_replaced_or_kept_in_their_shares() -> None:
    model, windows = Spy(), torch.randint(0, 39, (64, 257))
    objective = masked()
    _, targets = objective(model, windows, step=3)
    ids, chosen = windows[:, :-1], targets != IGNORE
    assert torch.equal(targets[chosen], ids[chosen])
    assert torch.equal(model.shown[~chosen], ids[~chosen])
    hidden = (model.shown == 40)[chosen].double().mean().item()
    changed = ((model.shown != ids) & (model.shown != 40))[chosen].double().mean().item()
    assert chosen.double().mean().item() == pytest.approx(0.3, abs=0.015)  # four standard errors of 16384 draws
    assert hidden == pytest.approx(0.6, abs=0.03)
    assert changed == pytest.approx(0.2 * 38 / 39, abs=0.025)
    assert model.shown.max() == 40


def test_what_is_masked_is_a_function_of_seed_step_and_window() -> None:
    windows = torch.randint(0, 39, (6, 33))

    def chosen(objective: Objective, rows: torch.Tensor, step: int | None) -> torch.Tensor:
        return objective(Spy(), rows, step=step).targets

    whole = chosen(masked(), windows, 5)
    assert torch.equal(torch.cat([chosen(masked(), part, 5) for part in windows.split([1, 3, 2])]), whole)
    assert torch.equal(chosen(masked(), windows, None), chosen(masked(), windows, None))
    others = [(masked(seed=1), 5), (masked(), 6), (masked(), None)]
    assert not any(torch.equal(chosen(objective, windows, step), whole) for objective, step in others)


def test_padding_is_neither_seen_nor_predicted() -> None:
    model, windows = Spy(), torch.randint(0, 39, (2, 9))
    windows[1, 5:] = IGNORE
    _, targets = masked(masked=1.0)(model, windows, step=0)
    assert model.options["mask"].tolist() == [[True] * 8, [True] * 5 + [False] * 3]
    assert (targets[1] != IGNORE).tolist() == [True] * 5 + [False] * 3
    assert model.shown.min() >= 0


def test_the_target_is_written_from_its_source(model_section: Callable[..., dict[str, Any]]) -> None:
    small = ["model.dim=32", "model.encoder.heads=4", "model.decoder.heads=4", "attn=exact"]
    model = checkpoint.build(model_section("model=performer_seq2seq", *small, tiny=[])).double()
    torch.nn.init.normal_(model.head.weight)
    windows = torch.randint(0, 39, (2, 11))
    windows[1, 9:] = IGNORE
    nats, targets = SourceToTarget(chunk_size=None)(model, windows, step=0)
    source, target = windows[:, :6], windows[:, 6:]
    begun = torch.cat((torch.full((2, 1), model.start_id), target[:, :-1].clamp(min=0)), 1)
    chances = model(source, begun).log_softmax(-1)
    expected = -chances.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(nats, expected.where(target != IGNORE, 0.0))
    assert torch.equal(targets, target)


@pytest.mark.parametrize(
    ("objective", "model", "message"),
    [
        (NextToken(chunk_size=None), "performer_encoder", "for this one set objective=mlm"),
        (NextToken(chunk_size=None), "performer_seq2seq", "for this one set objective=seq2seq"),
        (masked(), "performer", "objective=mlm needs a model that sees both sides: model=performer_encoder"),
        (SourceToTarget(chunk_size=None), "performer", "objective=seq2seq needs an encoder and a decoder"),
    ],
)
def test_a_model_that_cannot_learn_it_is_refused(
    objective: Objective, model: str, message: str, model_section: Callable[..., dict[str, Any]]
) -> None:
    fitting = {"performer": NextToken(chunk_size=None), "performer_encoder": masked()}
    with torch.device("meta"):
        built = checkpoint.build(model_section(f"model={model}", tiny=[]))
    with pytest.raises(ValueError, match=message):
        objective.check(built, packed=False, answers=False)
    fitting.get(model, SourceToTarget(chunk_size=None)).check(built, packed=False, answers=False)


def test_packed_documents_have_no_source(model_section: Callable[..., dict[str, Any]]) -> None:
    with torch.device("meta"):
        built = checkpoint.build(model_section("model=performer_seq2seq", tiny=[]))
    with pytest.raises(ValueError, match="takes no packed documents"):
        SourceToTarget(chunk_size=None).check(built, packed=True, answers=False)


@pytest.mark.parametrize(
    "options", [{"masked": 0.0}, {"masked": 1.1}, {"hidden": 0.9, "replaced": 0.2}, {"hidden": -0.1}]
)
def test_shares_outside_their_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"(masked|hidden|replaced) must be|objective\.\w+"):
        masked(**options)
