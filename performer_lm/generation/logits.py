"""Rules that change the logits of next tokens: biases, penalties, bans and filters, each one formula.

No rule waits for the device, and none leaves a row without a token. Letters: `b` batch, `n` tokens so far.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from performer_lm.ops.precision import running_sum

LEAST: Final = 1e-20  # lower temperatures and stronger penalties choose no other token, and would leave float32


def add_bias(logits: Tensor, amounts: Sequence[tuple[int, float]]) -> Tensor:
    """Add to `(b, vocab)` the amount of each token named; -inf bans the token."""
    return logits + _as_vector(tuple(amounts), logits.shape[-1], logits.dtype, logits.device)


@lru_cache(maxsize=8)  # made once, for each copy to an accelerator waits
def _as_vector(amounts: tuple[tuple[int, float], ...], vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    vector = torch.zeros(vocab, dtype=dtype)
    for token, amount in amounts:
        vector[token] += amount
    return vector.to(device)


def penalise_seen(logits: Tensor, counts: Tensor, *, repetition: float, frequency: float, presence: float) -> Tensor:
    """Make tokens of `(b, vocab)` less likely by how often each was seen, `counts` `(b, vocab)`.

    `repetition` divides the logits above 0 of what was seen and multiplies those below (CTRL, arXiv 1909.05858);
    `frequency` is subtracted for each time, `presence` once (OpenAI's API).
    """
    strength = min(max(repetition, LEAST), 1.0 / LEAST)
    factor = torch.where(logits > 0, 1.0 / strength, strength)
    logits = torch.where(counts > 0, logits * factor, logits)
    return logits - frequency * counts - presence * (counts > 0)


def count_tokens(tokens: Tensor, mask: Tensor, vocab: int) -> Tensor:
    """Return how often each id stands in each row of `tokens` `(b, n)`, where `mask` is True: `(b, vocab)`."""
    return torch.zeros(len(tokens), vocab, dtype=torch.int64, device=tokens.device).scatter_add(1, tokens, mask.long())


def ban_repeats(logits: Tensor, tokens: Tensor, mask: Tensor, *, size: int) -> Tensor:
    """Ban from `(b, vocab)` the tokens that would end a run of `size` tokens that stands in `tokens` `(b, n)` already.

    A row in which that bans every token keeps all of them.
    """
    if tokens.shape[1] < size:
        return logits
    runs, is_text = tokens.unfold(1, size, 1), mask.unfold(1, size, 1).all(-1)
    begun = tokens[:, tokens.shape[1] - size + 1 :]
    goes_on = (runs[..., :-1] == begun[:, None]).all(-1) & is_text
    left = logits.masked_fill(count_tokens(runs[..., -1], goes_on, logits.shape[-1]) > 0, float("-inf"))
    return torch.where((left == float("-inf")).all(-1, keepdim=True), logits, left)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest of `(b, vocab)` to -inf (ties with the k-th stay)."""
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[:, -1:], float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Set all of `(b, vocab)` to -inf but the fewest likeliest whose probabilities sum to at least p."""
    probabilities = logits.softmax(-1)
    return _keep_mass(logits, probabilities, probabilities.sort(dim=-1, descending=True).indices, p)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Set those of `(b, vocab)` to -inf that are less likely than p times the likeliest."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), float("-inf"))


def keep_typical(logits: Tensor, p: float) -> Tensor:
    """Set all of `(b, vocab)` to -inf but the fewest of a surprise nearest to the entropy that sum to at least p."""
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    entropy = -(probabilities * log_probabilities).nansum(-1, keepdim=True)
    return _keep_mass(logits, probabilities, (-log_probabilities - entropy).abs().sort(dim=-1).indices, p)


def _keep_mass(logits: Tensor, probabilities: Tensor, order: Tensor, p: float) -> Tensor:
    """Set all but the first tokens of an order to -inf, as few as sum to at least p."""
    probabilities = probabilities.gather(-1, order)
    before = running_sum(probabilities) - probabilities  # the mass that stands above each token
    beyond = before >= p
    beyond[..., 0] = False  # for a p that is 0 in the logits' precision
    dropped = torch.zeros_like(beyond).scatter(-1, order, beyond)
    return logits.masked_fill(dropped, float("-inf"))
