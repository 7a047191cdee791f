"""Many prompts continued at once, each as it would be alone.

Letters: `b` batch.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import Any

import torch

from performer_lm.attention.base import select_rows
from performer_lm.data.tokenizer import Tokenizer
from performer_lm.generation.beams import search_beams
from performer_lm.generation.decode import Prefix, check_one_row, check_room, pad_left, read
from performer_lm.generation.sampling import Sampler
from performer_lm.generation.text import Row, write
from performer_lm.language_model import LanguageModel
from performer_lm.ranges import Count, ranged


@ranged
def complete(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: Count,
    sampler: Sampler,
    seed: int = 0,
    num_samples: Count = 1,
    best_of: Count | None = None,
    beams: Count | None = None,
    stop: Sequence[str] = (),
    batch_size: Count = 8,
    after: Prefix | None = None,
) -> Iterator[list[Row]]:
    """Return the continuations of each prompt in order, `num_samples` rows each; a prompt is read once.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prompts: texts; an empty one begins a new document.
        max_new_tokens: how many a row has at most.
        sampler: how a token is chosen.
        seed: of the first sample of each prompt, whose others have those that follow.
        num_samples: rows of a prompt.
        best_of: draw so many rows, and return the likeliest, by their mean log-probability, first.
        beams: search for the likeliest rows with so many beams instead of drawing any; stop strings cut their text.
        stop: strings that end a row, see `Row`.
        batch_size: prompts continued at once, each with all its rows.
        after: one row that every prompt continues; it stays.

    Raises:
        ValueError: at once, for the first prompt that the tokenizer cannot write, by its number, and as `Session` does.
    """
    if beams is not None and best_of is not None:
        raise ValueError("beams are searched for and best_of are drawn: give one of them")
    for name, count in (("best_of", best_of), ("beams", beams)):
        if count is not None and count < num_samples:
            raise ValueError(f"{name} ({count}) must be at least num_samples ({num_samples})")
    sampler.check(tokenizer.vocab_size)
    Row(tokenizer, stop=stop)
    if after is not None:
        check_one_row(after)
    begun = 0 if after is None else after.tokens.shape[1]
    ids = encode_prompts(tokenizer, prompts, may_be_empty=after is not None)
    for row in ids or [[]]:
        check_room(model, begun + len(row), max_new_tokens)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampler": sampler}

    def rows() -> Iterator[list[Row]]:
        for group in _batches(ids, batch_size, alike=after is not None):
            made = [[Row(tokenizer, stop=stop) for _ in range(best_of or num_samples)] for _ in group]
            tokens, mask = pad_left(group, device=model.head.weight.device)
            own = None if after is None else select_rows(after, tokens.new_zeros(len(group)))
            prefix = read(model, tokens, mask=mask, after=own, max_new_tokens=max_new_tokens)
            if beams is None:
                _draw(model, tokenizer, prefix, made, seed=seed, **options)
            else:
                _search(model, tokenizer, prefix, made, beams=beams, **options)
            for each in made:
                yield sorted(each, key=lambda row: -row.likelihood)[:num_samples] if best_of is not None else each

    return rows()


def _draw(
    model: LanguageModel, tokenizer: Tokenizer, prefix: Prefix, rows: list[list[Row]], *, seed: int, **options: Any
) -> None:
    """Draw the rows of each prompt at once, row k of each with the seed `seed` + k."""
    samples, device = len(rows[0]), prefix.tokens.device
    if samples > 1:
        prefix = select_rows(prefix, torch.arange(len(rows), device=device).repeat_interleave(samples))
    seeds = [seed + sample for _ in rows for sample in range(samples)]
    generator = [torch.Generator(device).manual_seed(each) for each in seeds]
    for _ in write(model, tokenizer, prefix, [*chain(*rows)], generator=generator, **options):
        pass


def _search(model: LanguageModel, tokenizer: Tokenizer, prefix: Prefix, rows: list[list[Row]], **options: Any) -> None:
    """Search for the likeliest rows of each prompt, one prompt after the other."""
    for index, own in enumerate(rows):
        one = select_rows(prefix, prefix.tokens.new_tensor([index]))
        found = search_beams(model, one, end_id=tokenizer.end_ids, wanted=len(own), **options)
        del own[int(found.scores.isfinite().sum()) :]  # where there are fewer continuations than were wanted
        for row, tokens, log_probs in zip(own, found.tokens.tolist(), found.log_probs.tolist(), strict=False):
            for token, log_prob in zip(tokens, log_probs, strict=True):
                row.push(token, log_prob)
            row.close()


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], *, may_be_empty: bool) -> list[list[int]]:
    """Return the ids of each prompt; an empty one begins a document, unless it may be empty.

    Raises:
        ValueError: for the first prompt that the tokenizer cannot write, by its number.
    """
    found = []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids = tokenizer.encode(prompt).tolist()
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from error
        found.append(ids if may_be_empty else tokenizer.begin(ids))
    return found


def _batches(rows: list[list[int]], size: int, *, alike: bool) -> Iterator[list[list[int]]]:
    """Yield rows in order, up to `size` at once; `alike`, of one length each, for padding may not follow text."""
    for start in range(0, len(rows), size):
        for _, group in groupby(rows[start : start + size], key=len if alike else lambda row: 0):
            yield list(group)
