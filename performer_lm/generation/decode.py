"""Decode: read the prompt in parallel once, then extend by one token at a time; no token is ever run twice.

Letters: `b` batch, `n` prompt tokens.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.generation.captured import Steps
from performer_lm.generation.sampling import Generators, Sampler
from performer_lm.language_model import LanguageModel
from performer_lm.performer import PerformerState


class Prefix(NamedTuple):
    """Rows that a model has read: their tokens, the logits of the next ones, and the decoding state.

    Continuing a prefix may consume its state; `fork` copies one.
    """

    tokens: Tensor  # (b, n)
    mask: Tensor  # (b, n) bool: False at padding
    logits: Tensor  # (b, vocab)
    state: PerformerState


class Drawn(NamedTuple):
    """The next token of every row, and what it was drawn from. The next draw may consume the state."""

    ids: Tensor  # (b,)
    log_probs: Tensor  # (b,): by the model alone, whatever the sampler does
    logits: Tensor  # (b, vocab), of the model
    state: PerformerState  # before these tokens


@torch.inference_mode()
def read(
    model: LanguageModel,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    after: Prefix | None = None,
    max_new_tokens: int = 0,
) -> Prefix:
    """Read prompts `(b, n)`, or more text of the rows of `after`, which is consumed; then n may be 0.

    Args:
        model: in evaluation mode.
        tokens: `(b, n)` ids, on the model's device; shorter rows are padded on the left.
        mask: `(b, n)` bool or integer, False or 0 at the padding.
        after: rows that were read before.
        max_new_tokens: how many are to be drawn next; sizes caches and is no limit.

    Raises:
        ValueError: as `check_room` does, and for prompts padded elsewhere (`LanguageModel.check_prompt`).
    """
    check_room(model, tokens.shape[1] + (0 if after is None else after.tokens.shape[1]), max_new_tokens)
    if after is not None and not tokens.shape[1]:
        return after
    mask = model.check_prompt(tokens, mask)
    kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    if after is None:
        logits, state = model.start(tokens, mask=mask, max_len=tokens.shape[1] + max_new_tokens)
        return Prefix(tokens, kept, logits[:, -1], state)
    logits, state = model.read(tokens, after.state, mask=mask)
    return Prefix(torch.cat((after.tokens, tokens), 1), torch.cat((after.mask, kept), 1), logits[:, -1], state)


def check_room(model: LanguageModel, tokens: int, max_new_tokens: int) -> None:
    """Check that a model can draw so many tokens after so many.

    Raises:
        ValueError: for a model that does not decode, or whose positions end before the last token.
    """
    if not model.decodes:
        raise ValueError("this model sees both sides of a token (objective=mlm): it does not continue text")
    left = model.room_after(tokens)
    if left is not None and max_new_tokens > left:
        raise ValueError(
            f"max_new_tokens ({max_new_tokens}) must be at most {left} after a prompt of {tokens} tokens: "
            "the model's learned positions end there"
        )


def check_one_row(prefix: Prefix) -> None:
    """Check that a prefix can be continued as one text.

    Raises:
        ValueError: for several rows.
    """
    if len(prefix.tokens) != 1:
        raise ValueError(f"one row goes on, and this state holds {len(prefix.tokens)}: `select_rows` takes one of them")


@torch.inference_mode()
def draw_tokens(
    model: LanguageModel,
    prefix: Prefix,
    *,
    max_new_tokens: int,
    sampler: Sampler,
    end_id: int | Tensor | None = None,
    generator: Generators | None = None,
) -> Iterator[Drawn]:
    """Yield the next tokens of every row one by one, until `max_new_tokens` or until all rows have ended.

    Args:
        model: in evaluation mode.
        prefix: the rows; consumed.
        max_new_tokens: how many to yield at most.
        sampler: how a token is chosen.
        end_id: the token that ends a row, which from then on yields only it, or one for each row `(b,)`; None: rows do
            not end.
        generator: source of randomness on the model's device, or one for each row: then a row is drawn as it is alone.
    """
    logits, state, steps = prefix.logits, prefix.state, Steps(model)
    ended = torch.zeros_like(prefix.tokens[:, 0], dtype=torch.bool)
    seen, kept = last_tokens(prefix, sampler.reach)
    for index in range(max_new_tokens):
        ids = sampler(logits, generator, seen=seen, mask=kept)
        if end_id is not None:
            ids = torch.where(ended, end_id, ids)
            ended = ended | (ids == end_id)
        yield Drawn(ids, log_probs_of(ids, logits), logits, state)
        if index + 1 == max_new_tokens or (end_id is not None and bool(ended.all())):
            return
        seen, kept = append_tokens(seen, kept, ids, count=sampler.reach)
        logits, state = steps.extend(ids, state)


def last_tokens(prefix: Prefix, count: int) -> tuple[Tensor, Tensor]:
    """Return the last `count` tokens of every row, padding between tokens moved to the left, and their mask."""
    if not count:
        return prefix.tokens[:, :0], prefix.mask[:, :0]
    order = prefix.mask.long().argsort(dim=1, stable=True)
    return prefix.tokens.gather(1, order)[:, -count:], prefix.mask.gather(1, order)[:, -count:]


def append_tokens(seen: Tensor, kept: Tensor, ids: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """Return the last `count` tokens of every row and their mask, both `(b, n)`, once ids `(b,)` have followed."""
    if not count:
        return seen, kept
    kept = torch.cat((kept, torch.ones_like(ids[:, None], dtype=torch.bool)), dim=1)
    return torch.cat((seen, ids[:, None]), dim=1)[:, -count:], kept[:, -count:]


def log_probs_of(ids: Tensor, logits: Tensor) -> Tensor:
    """Return the log-probabilities `(b,)` that logits `(b, vocab)` give to ids `(b,)`, in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)


def decode(
    model: LanguageModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    sampler: Sampler,
    mask: Tensor | None = None,
    end_id: int | Tensor | None = None,
    generator: Generators | None = None,
) -> Iterator[Tensor]:
    """Return the next ids `(b,)` of every row one by one, until `max_new_tokens` or until all rows have ended.

    The arguments are those of `read` and `draw_tokens`.

    Raises:
        ValueError: at once, as `check_room`, `LanguageModel.check_prompt` and `Sampler.check` do.
    """
    check_room(model, prompt.shape[1], max_new_tokens)
    mask = model.check_prompt(prompt, mask)
    sampler.check(model.head.out_features)

    def steps() -> Iterator[Tensor]:
        prefix = read(model, prompt, mask=mask, max_new_tokens=max_new_tokens)
        for drawn in draw_tokens(
            model, prefix, max_new_tokens=max_new_tokens, sampler=sampler, end_id=end_id, generator=generator
        ):
            yield drawn.ids

    return steps()


def pad_left(rows: Sequence[Sequence[int]], *, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return rows of ids as one `(b, n)`, padded on the left, and the mask where there is padding."""
    longest = max(map(len, rows))
    padded = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device, dtype=torch.int64)
    if all(len(row) == longest for row in rows):
        return padded, None
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return padded, torch.arange(longest, device=device) >= longest - lengths[:, None]
