from collections.abc import Callable
from typing import Any

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.generation.decode import decode, draw_tokens, pad_left, read
from performer_lm.generation.sampling import Sampler
from performer_lm.generation.session import stream_text
from performer_lm.language_model import READ_AT_ONCE
from performer_lm.model import PerformerLM
from performer_lm.performer import PerformerState

GREEDY = Sampler(temperature=0)
Build = Callable[..., PerformerLM]


class CountingModel(PerformerLM):
    """Notes how many tokens each call was given."""

    calls: list[int]

    def extend(
        self, tokens: torch.Tensor, state: PerformerState, *, mask: torch.Tensor | None = None, last_only: bool = False
    ) -> tuple[torch.Tensor, PerformerState]:
        self.calls.append(tokens.shape[1])
        return super().extend(tokens, state, mask=mask, last_only=last_only)


def ids_of(model: PerformerLM, prompt: torch.Tensor, count: int, **options: object) -> torch.Tensor:
    made = list(decode(model, prompt, max_new_tokens=count, sampler=GREEDY, **options))  # type: ignore[arg-type]
    return torch.stack(made, 1)


@pytest.mark.parametrize("attn", ["favor", "exact", "flash", "local"])
def test_greedy_decoding_is_the_argmax_of_forward(lively_model: Build, attn: str) -> None:
    model = lively_model(f"attn={attn}")
    prompt = torch.randint(0, 40, (2, 7))
    made = ids_of(model, prompt, 9)
    with torch.no_grad():
        logits = model(torch.cat((prompt, made), 1))
    assert torch.equal(logits[:, 6:-1].argmax(-1), made)


def test_the_prefix_is_never_run_again(lively_model: Build) -> None:
    model = lively_model()
    model.__class__ = CountingModel
    assert isinstance(model, CountingModel)
    model.calls = []
    ids_of(model, torch.randint(0, 40, (1, 11)), 5)
    assert model.calls == [11, 1, 1, 1, 1]


def test_ragged_prompts_decode_as_alone(lively_model: Build) -> None:
    model = lively_model("attn=favor", "model/positions=rotary")
    short, long = torch.randint(0, 40, (1, 4)), torch.randint(0, 40, (1, 9))
    padded = torch.cat((torch.cat((torch.zeros(1, 5, dtype=torch.int64), short), 1), long))
    mask = torch.arange(9)[None] >= torch.tensor([[5], [0]])
    together = ids_of(model, padded, 6, mask=mask)
    assert torch.equal(together, torch.cat((ids_of(model, short, 6), ids_of(model, long, 6))))


@pytest.mark.parametrize("options", [[], ["model=transformer", "attn=flash"]], ids=["mixing", "plain"])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1, 0], [1, 1, 1, 1]], "pad on the left"),
        ([[1, 0, 0, 0], [0, 0, 0, 1]], "pad on the left"),
        ([[0, 1, 1, 0], [1, 1, 1, 1]], "pad on the left"),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], "each row needs at least 1 token"),
        ([[1, 1, 1, 1]], r"mask must be .* of shape \(2, 4\)"),
        ([[1.0, 1, 1, 1], [1, 1, 1, 1]], "mask must be bool or integer"),
    ],
)
def test_prompts_that_would_be_read_wrongly_are_refused_at_once(
    lively_model: Build, options: list[str], mask: list[list[float]], message: str
) -> None:
    model, prompt = lively_model(*options), torch.randint(0, 40, (2, 4))
    for given in (torch.tensor(mask), torch.tensor(mask) > 0):
        if given.dtype == torch.bool and "bool" in message:
            continue
        with pytest.raises(ValueError, match=message):
            decode(model, prompt, max_new_tokens=2, sampler=GREEDY, mask=given)
        with pytest.raises(ValueError, match=message):
            model.start(prompt, mask=given)


def test_an_empty_prompt_is_refused_at_once(lively_model: Build) -> None:
    model, prompt = lively_model(), torch.zeros(2, 0, dtype=torch.int64)
    for start in (model.start, lambda prompt: decode(model, prompt, max_new_tokens=2, sampler=GREEDY)):
        with pytest.raises(ValueError, match="a prompt needs at least 1 token"):
            start(prompt)


@pytest.mark.parametrize("attn", ["favor", "exact", "chunked", "flash", "flash_tiled", "local", "hybrid"])
def test_padding_between_tokens_is_as_if_absent_or_refused(lively_model: Build, attn: str) -> None:
    prompt, mask = torch.randint(0, 40, (1, 7)), torch.tensor([[0, 1, 0, 0, 1, 1, 1]])
    plain = lively_model("model=transformer", f"attn={attn}")
    assert torch.equal(ids_of(plain, prompt, 5, mask=mask), ids_of(plain, prompt[:, mask[0] > 0], 5))
    for mixing in (["model.convolution=4"], ["model.token_shift=true"]):
        model = lively_model("model=transformer", f"attn={attn}", *mixing)
        with pytest.raises(ValueError, match=r"padding between its tokens.*pad on the left"):
            decode(model, prompt, max_new_tokens=2, sampler=GREEDY, mask=mask)


def test_an_integer_mask_decodes_as_the_bool_mask(lively_model: Build) -> None:
    model, prompt = lively_model(), torch.randint(0, 40, (2, 6))
    mask = torch.arange(6)[None] >= torch.tensor([[2], [0]])
    sampler = Sampler(temperature=0, repetition_penalty=2.0)
    one, other = (
        torch.stack(list(decode(model, prompt, max_new_tokens=4, sampler=sampler, mask=given)))
        for given in (mask.long(), mask)
    )
    assert torch.equal(one, other)


def test_a_row_that_has_ended_stays_ended(lively_model: Build) -> None:
    model = lively_model("attn=exact")
    prompt = torch.randint(0, 40, (3, 5))
    free = ids_of(model, prompt, 12)
    end = int(free[0, 2])
    made = ids_of(model, prompt, 12, end_id=end)
    for row, unbounded in zip(made.tolist(), free.tolist(), strict=True):
        cut = unbounded.index(end) + 1 if end in unbounded else len(unbounded)
        assert row[:cut] == unbounded[: min(cut, len(row))]
        assert set(row[cut:]) <= {end}


def test_text_streams_and_is_the_same_for_the_same_seed(lively_model: Build) -> None:
    model, tokenizer = lively_model(vocab_size=257), ByteTokenizer()
    options = {"max_new_tokens": 20, "sampler": Sampler(top_k=30)}
    one, two, other = (
        list(stream_text(model, tokenizer, "日本 é", seed=seed, **options))  # type: ignore[arg-type]
        for seed in (1, 1, 2)
    )
    assert one == two != other
    assert len(one) > 2


def test_an_empty_prompt_begins_a_document(lively_model: Build) -> None:
    model, tokenizer = lively_model(vocab_size=257), ByteTokenizer()
    text = "".join(stream_text(model, tokenizer, "", max_new_tokens=5, sampler=GREEDY, seed=0))
    begun = ids_of(model, torch.tensor([[tokenizer.end_id]]), 5, end_id=tokenizer.end_id)
    assert text == tokenizer.decode(begun[0].tolist())


def test_a_target_is_decoded_from_its_source(model_section: Callable[..., dict[str, Any]]) -> None:
    small = ["model.dim=32", "model.encoder.heads=4", "model.decoder.heads=4"]
    model = checkpoint.build(model_section("model=performer_seq2seq", *small, tiny=[])).eval()
    torch.nn.init.normal_(model.head.weight)
    source = torch.randint(0, 40, (2, 7))
    made = ids_of(model, source, 9)
    begun = torch.cat((torch.full((2, 1), model.start_id), made[:, :-1]), 1)
    with torch.no_grad():
        assert torch.equal(model(source, begun).argmax(-1), made)


def test_a_source_may_be_padded_anywhere(model_section: Callable[..., dict[str, Any]]) -> None:
    small = ["model.dim=32", "model.encoder.heads=4", "model.decoder.heads=4"]
    model = checkpoint.build(
        model_section("model=performer_seq2seq", *small, "model.encoder.token_shift=false", tiny=[])
    )
    model = model.double().eval()
    torch.nn.init.normal_(model.head.weight)
    source, mask = torch.randint(0, 40, (1, 7)), torch.tensor([[1, 1, 0, 1, 1, 0, 0]])
    assert torch.equal(ids_of(model, source, 5, mask=mask), ids_of(model, source[:, mask[0] > 0], 5))


def test_a_model_that_sees_both_sides_continues_nothing(lively_model: Build) -> None:
    model = lively_model("model=performer_encoder", "model.heads=4")
    with pytest.raises(ValueError, match="sees both sides"):
        decode(model, torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=2, sampler=GREEDY)


def test_learned_positions_leave_so_much_room(lively_model: Build) -> None:
    model, prompt = lively_model("model/absolute=learned", "model.absolute.max_len=10"), torch.zeros(1, 6).long()
    assert ids_of(model, prompt, 5).shape == (1, 5)
    with pytest.raises(ValueError, match=r"max_new_tokens \(6\) must be at most 5 after a prompt of 6 tokens"):
        decode(model, prompt, max_new_tokens=6, sampler=GREEDY)


def test_a_penalised_token_does_not_come_again_in_its_window(lively_model: Build) -> None:
    model, prompt = lively_model("attn=exact"), torch.randint(0, 40, (2, 3))
    sampler = Sampler(temperature=0, repetition_penalty=1e9, repetition_window=5)
    made = torch.stack(list(decode(model, prompt, max_new_tokens=20, sampler=sampler)), 1)
    for row in torch.cat((prompt, made), 1).tolist():
        assert all(row[place] not in row[max(0, place - 5) : place] for place in range(3, 23))


@pytest.mark.parametrize("attn", ["favor", "linear", "delta", "exact", "chunked", "flash", "flash_tiled", "local"])
def test_a_batch_of_ragged_prompts_has_the_logits_of_each_alone(lively_model: Build, attn: str) -> None:
    model = lively_model(f"attn={attn}", "model.token_shift=true").float()
    rows = [torch.randint(0, 40, (length,)).tolist() for length in (3, 17, 1, 8)]
    tokens, mask = pad_left(rows, device=torch.device("cpu"))
    together = read(model, tokens, mask=mask).logits
    alone = torch.cat([read(model, torch.tensor([row])).logits for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_each_row_may_have_an_end_of_its_own(lively_model: Build) -> None:
    model, prompt = lively_model("attn=exact"), torch.randint(0, 40, (3, 5))
    free = ids_of(model, prompt, 12)
    ends = free[:, 4]
    made = ids_of(model, prompt, 12, end_id=ends)
    for row, unbounded, end in zip(made.tolist(), free.tolist(), ends.tolist(), strict=True):
        cut = unbounded.index(end) + 1
        assert row[:cut] == unbounded[:cut]
        assert set(row[cut:]) <= {end}


@pytest.mark.parametrize("attn", ["favor", "delta", "flash", "local"])
def test_a_prompt_read_in_parts_is_the_prompt_read_at_once(
    lively_model: Build, monkeypatch: pytest.MonkeyPatch, attn: str
) -> None:
    model = lively_model(f"attn={attn}", "model.token_shift=true")
    tokens, mask = pad_left([list(range(11)), [5] * 2, [7] * 6], device=torch.device("cpu"))
    whole = read(model, tokens, mask=mask)
    monkeypatch.setattr("performer_lm.language_model.READ_AT_ONCE", 3)
    parts = read(model, tokens, mask=mask)
    torch.testing.assert_close(parts.logits, whole.logits, atol=1e-10, rtol=1e-10)
    greedy = {"max_new_tokens": 5, "sampler": GREEDY}
    made = [[drawn.ids.tolist() for drawn in draw_tokens(model, each, **greedy)] for each in (whole, parts)]
    assert made[0] == made[1]


def test_no_more_than_some_tokens_of_a_prompt_are_in_memory_at_once(lively_model: Build) -> None:
    model = lively_model("model.depth=1").float()
    model.__class__ = CountingModel
    assert isinstance(model, CountingModel)
    model.calls = []
    prefix = read(model, torch.randint(0, 40, (1, 3 * READ_AT_ONCE + 5)))
    assert model.calls == [READ_AT_ONCE] * 3 + [5]
    sizes = [
        sum(tensor.numel() for tensor in leaves(each.state)) for each in (prefix, read(model, prefix.tokens[:, :9]))
    ]
    assert sizes[0] == sizes[1]


def leaves(state: object) -> list[torch.Tensor]:
    parts = state if isinstance(state, tuple) else ()
    return [state] if isinstance(state, torch.Tensor) else [leaf for part in parts for leaf in leaves(part)]


def test_text_read_in_turns_is_the_text_read_at_once(lively_model: Build) -> None:
    model, tokens = lively_model("attn=hybrid", "attn.pattern=[favor,flash]"), torch.randint(0, 40, (2, 9))
    whole, turns = read(model, tokens), read(model, tokens[:, :4])
    for part in (tokens[:, 4:4], tokens[:, 4:7], tokens[:, 7:]):
        turns = read(model, part, after=turns)
    torch.testing.assert_close(turns.logits, whole.logits, atol=1e-10, rtol=1e-10)
    assert torch.equal(turns.tokens, tokens)
    assert turns.mask.all()


def test_penalties_do_not_see_padding_between_tokens(lively_model: Build) -> None:
    model = lively_model("model=transformer", "attn=exact")
    prompt, mask = torch.randint(0, 40, (1, 9)), torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0, 1]])
    sampler = Sampler(temperature=0, repetition_penalty=1e9, repetition_window=3, no_repeat_ngram_size=2)
    gaps, alone = (
        torch.cat(list(decode(model, tokens, max_new_tokens=8, sampler=sampler, mask=kept)))
        for tokens, kept in ((prompt, mask), (prompt[:, mask[0] > 0], None))
    )
    assert torch.equal(gaps, alone)
