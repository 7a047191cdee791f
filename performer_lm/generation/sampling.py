"""Choose the next token from logits.

Letters: `b` batch.
"""

from dataclasses import dataclass
from typing import Annotated, Final

import torch
from annotated_types import Gt, Le
from torch import Tensor

from performer_lm.ops.running_sum import running_sum
from performer_lm.ranges import Count, NotNegative, Positive, ranged

LEAST: Final = 1e-20  # lower temperatures and stronger penalties choose no other token, and would leave float32


@ranged
@dataclass(frozen=True)
class Sampler:
    """Draws of tokens by temperature, among the `top_k` likeliest, among the nucleus of mass `top_p`.

    Args:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: keep this many tokens; None or more than there are keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities sum to at least this (arXiv 1904.09751); None: all.
        repetition_penalty: divides the logits above 0 of tokens lately seen, and multiplies those below, so that any
            value above 1 makes them less likely (CTRL, arXiv 1909.05858); 1: none.
        repetition_window: how many tokens back count as lately, in each row by itself.
    """

    temperature: NotNegative = 1.0
    top_k: Count | None = None
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    repetition_penalty: Positive = 1.0
    repetition_window: Count = 64

    def __call__(
        self,
        logits: Tensor,
        generator: torch.Generator | None = None,
        *,
        seen: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Draw one id per row: logits `(b, vocab)` to ids `(b,)`. The filters see the tempered probabilities.

        `seen` `(b, n)` are the tokens so far, `mask` `(b, n)` is False at those that do not count; the repetition
        penalty looks at them.

        Raises:
            FloatingPointError: for logits that are not finite.
        """
        if not bool(logits.isfinite().all()):
            raise FloatingPointError("the model's logits are not finite, so there is no next token to draw from them")
        if self.repetition_penalty != 1.0 and seen is not None:
            last = slice(-self.repetition_window, None)
            counted = torch.ones_like(seen[:, last]) if mask is None else mask[:, last].long()
            lately = torch.zeros_like(logits, dtype=torch.int64).scatter_add(1, seen[:, last], counted) > 0
            strength = min(max(self.repetition_penalty, LEAST), 1.0 / LEAST)
            penalty = torch.where(logits > 0, 1.0 / strength, strength)
            logits = torch.where(lately, logits * penalty, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = (logits - logits.amax(-1, keepdim=True)).float() / max(self.temperature, LEAST)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest of `(b, vocab)` to -inf (ties with the k-th stay)."""
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[:, -1:], float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Set all of `(b, vocab)` to -inf but the fewest likeliest whose probabilities sum to at least p."""
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True)
    before = running_sum(probabilities) - probabilities  # the mass that stands above each token
    beyond = before >= p
    beyond[..., 0] = False  # for a p that is 0 in the logits' precision
    dropped = torch.zeros_like(beyond).scatter(-1, order, beyond)
    return logits.masked_fill(dropped, float("-inf"))
