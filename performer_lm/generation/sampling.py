"""Choose next tokens from logits.

Letters: `b` batch, `n` tokens so far.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from performer_lm.generation.logits import (
    LEAST,
    add_bias,
    ban_repeats,
    count_tokens,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    penalise_seen,
)
from performer_lm.ranges import Count, Fraction, NotNegative, Positive, ranged, refusal
from performer_lm.wording import short

Penalty = Annotated[float, Ge(-2), Le(2)]
Mass = Annotated[float, Gt(0), Le(1)]
BIASES: Final = (Ge(-100), Le(100))
WHOLE: Final = 2**40  # more tokens than a row holds

Generators = torch.Generator | Sequence[torch.Generator]


@ranged
@dataclass(frozen=True)
class Sampler:
    """Draws of next tokens: biases, penalties and bans change the logits, filters leave the tokens to draw from.

    The rules act in the order of transformers' `generate`: bias and bans, penalties, repeated runs; then, unless the
    temperature is 0, temperature, `top_k`, `top_p`, `min_p`, `typical_p`.

    Args:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: keep this many tokens; None or more than there are keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities sum to at least this (arXiv 1904.09751); None: all.
        min_p: keep the tokens at least this share as likely as the likeliest (arXiv 2407.01082); None: all.
        typical_p: keep the fewest tokens of a surprise nearest to the entropy that sum to at least this
            (arXiv 2202.00666); None: all.
        repetition_penalty: divides the logits above 0 of tokens lately seen, and multiplies those below, so that any
            value above 1 makes them less likely (CTRL, arXiv 1909.05858); 1: none.
        frequency_penalty: subtracted from a token's logit for each time that it was lately seen.
        presence_penalty: subtracted from a token's logit if it was lately seen.
        repetition_window: how many tokens back count as lately, for each of the penalties, in each row by itself.
        no_repeat_ngram_size: draw no token that ends a run of this many which the row holds already; None: any.
        banned_tokens: ids that are never drawn.
        logit_bias: numbers added to the logits of ids.

    Raises:
        ValueError: for the first value outside its range, or an id below 0.
    """

    temperature: NotNegative = 1.0
    top_k: Count | None = None
    top_p: Mass | None = None
    min_p: Fraction | None = None
    typical_p: Mass | None = None
    repetition_penalty: Positive = 1.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_window: Count = 64
    no_repeat_ngram_size: Count | None = None
    banned_tokens: Sequence[int] | None = None
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        """Check the ids and amounts that are given."""
        for name, ids in (("banned_tokens", self.banned_tokens), ("logit_bias", self.logit_bias)):
            for token in ids or ():
                if type(token) is not int or token < 0:
                    raise ValueError(f"{name}: a token's id must be a whole number from 0 on, got {short(token)}")
        for token, amount in (self.logit_bias or {}).items():
            if type(amount) not in (int, float):
                raise ValueError(f"logit_bias[{token}] must be a number, got {short(amount)}")
            if problem := refusal(amount, BIASES):
                raise ValueError(f"logit_bias[{token}] {problem}")

    @property
    def reach(self) -> int:
        """Return how many tokens back the rules look."""
        if self.no_repeat_ngram_size is not None:
            return WHOLE
        return self.repetition_window if self._penalises else 0

    def check(self, vocab: int) -> None:
        """Check that the ids are those of a vocabulary, and that some may be drawn.

        Raises:
            ValueError: for the first id that is none, or a vocabulary banned as a whole.
        """
        for name, ids in (("banned_tokens", self.banned_tokens), ("logit_bias", self.logit_bias)):
            for token in ids or ():
                if token >= vocab:
                    raise ValueError(f"{name}: there is no token {token}, the ids are 0 to {vocab - 1}")
        if len(set(self.banned_tokens or ())) == vocab:
            raise ValueError(f"banned_tokens: all {vocab} tokens are banned, which leaves none to draw")

    def adjust(self, logits: Tensor, *, seen: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return logits `(b, vocab)` after bias, bans and penalties, which count for greedy choices and beams too.

        `seen` `(b, n)` are the tokens so far, `mask` `(b, n)` is False at those that do not count.

        Raises:
            FloatingPointError: for logits that are not finite.
        """
        if not bool(logits.isfinite().all()):
            raise FloatingPointError("the model's logits are not finite, so there is no next token to draw from them")
        if self.logit_bias or self.banned_tokens:
            banned = [(token, -math.inf) for token in self.banned_tokens or ()]
            logits = add_bias(logits, [*(self.logit_bias or {}).items(), *banned])
        if seen is None or not self.reach:
            return logits
        kept = torch.ones_like(seen, dtype=torch.bool) if mask is None else mask.bool()
        if self._penalises:
            last = slice(-self.repetition_window, None)
            logits = penalise_seen(
                logits,
                count_tokens(seen[:, last], kept[:, last], logits.shape[-1]),
                repetition=self.repetition_penalty,
                frequency=self.frequency_penalty,
                presence=self.presence_penalty,
            )
        if self.no_repeat_ngram_size is not None:
            logits = ban_repeats(logits, seen, kept, size=self.no_repeat_ngram_size)
        return logits

    def __call__(
        self,
        logits: Tensor,
        generator: Generators | None = None,
        *,
        seen: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Draw one id per row: logits `(b, vocab)` to ids `(b,)`; see `adjust` and `draw`.

        Raises:
            FloatingPointError: for logits that are not finite.
        """
        logits = self.adjust(logits, seen=seen, mask=mask)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = (logits - logits.amax(-1, keepdim=True)).float() / max(self.temperature, LEAST)
        vocab, places = logits.shape[-1], None
        if self.top_k is not None and self.top_k < vocab:
            logits = keep_top_k(logits, self.top_k)
            if self.top_p is not None or self.typical_p is not None:  # they sort: these tokens, not the vocabulary
                logits, places = logits.topk(self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        if self.typical_p is not None:
            logits = keep_typical(logits, self.typical_p)
        if places is not None:
            logits = logits.new_full((len(logits), vocab), -math.inf).scatter(1, places, logits)
        return draw(logits.softmax(-1), generator)

    @property
    def _penalises(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


def draw(probabilities: Tensor, generator: Generators | None = None) -> Tensor:
    """Draw an id per row from probabilities `(b, vocab)`: the first to ring of clocks with these rates.

    With a generator for each row, a row is drawn as it is alone. `torch.multinomial` draws the same ids, and waits.
    """
    if generator is None or isinstance(generator, torch.Generator):
        times = torch.empty_like(probabilities).exponential_(generator=generator)
    else:
        rows = zip(probabilities, generator, strict=True)
        times = torch.stack([torch.empty_like(row).exponential_(generator=own) for row, own in rows])
    return (probabilities / times).argmax(-1)
