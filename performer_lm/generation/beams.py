"""Beam search: the likeliest continuations of a prefix, found by following the best few at once.

Letters: `w` beams, `n` new tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from performer_lm.attention.base import select_rows
from performer_lm.generation.captured import Steps
from performer_lm.generation.decode import Prefix, append_tokens, check_one_row, last_tokens, log_probs_of
from performer_lm.generation.sampling import Sampler
from performer_lm.language_model import LanguageModel
from performer_lm.ops.precision import precise


class Beams(NamedTuple):
    """Continuations of one prefix, the likeliest first; after its end a row holds ends alone."""

    tokens: Tensor  # (w, n)
    log_probs: Tensor  # (w, n), by the model alone
    scores: Tensor  # (w,): log-probabilities of the rows after the sampler's rules; -inf where there is no row


@torch.inference_mode()
def search_beams(
    model: LanguageModel,
    prefix: Prefix,
    *,
    beams: int,
    max_new_tokens: int,
    sampler: Sampler,
    end_id: int | Sequence[int],
    wanted: int = 1,
) -> Beams:
    """Find the continuations of the highest probability, among those that end and those of `max_new_tokens`.

    With as many beams as there are continuations that is exact.

    Args:
        model: in evaluation mode.
        prefix: one row, which stays.
        beams: rows followed at once.
        max_new_tokens: how many tokens a row has at most.
        sampler: whose biases, bans and penalties count, and whose temperature and filters do not.
        end_id: the token that ends a row, or several of them; from then on the row has the first.
        wanted: how many of the beams the caller looks at: the search ends when so many are certain.

    Raises:
        ValueError: for a prefix of several rows.
    """
    check_one_row(prefix)
    start = select_rows(prefix, prefix.tokens.new_zeros(beams))
    logits, state, (seen, kept) = start.logits, start.state, last_tokens(start, sampler.reach)
    steps = Steps(model)
    scores = torch.full((beams,), float("-inf"), device=logits.device, dtype=precise(logits.device))
    scores[0] = 0.0  # the others are copies
    tokens, log_probs = seen.new_empty(beams, 0), scores.new_empty(beams, 0)
    end_ids = [end_id] if isinstance(end_id, int) else list(end_id)
    ended, ends = torch.zeros_like(scores, dtype=torch.bool), prefix.tokens.new_tensor(end_ids)
    for index in range(max_new_tokens):
        more = sampler.adjust(logits, seen=seen, mask=kept).to(scores.dtype).log_softmax(-1)
        stays = torch.full_like(more, float("-inf"))
        stays[:, end_ids[0]] = 0.0
        totals = scores[:, None] + torch.where(ended[:, None], stays, more)
        scores, places = totals.flatten().topk(beams)
        rows, ids = places // logits.shape[-1], places % logits.shape[-1]
        logits, ended = logits[rows], ended[rows]
        tokens = torch.cat((tokens[rows], ids[:, None]), dim=1)
        own = log_probs_of(ids, logits).to(scores.dtype).masked_fill(ended, 0.0)
        log_probs = torch.cat((log_probs[rows], own[:, None]), dim=1)
        ended = ended | torch.isin(ids, ends)
        if index + 1 == max_new_tokens or bool(ended[:wanted].all()):  # the others can only lose
            break
        seen, kept = append_tokens(seen[rows], kept[rows], ids, count=sampler.reach)
        logits, state = steps.extend(ids, select_rows(state, rows))
    return Beams(tokens, log_probs, scores)
