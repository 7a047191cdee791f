"""The delta rule by its definition, token by token, to test all else against.

Letters: `b` batch, `h` heads, `g` key heads, `n` tokens, `m` features, `e` value width.
"""

import torch
from torch import Tensor


def unit(features: Tensor, *, logarithmic: bool) -> Tensor:
    """Scale features `(..., m)`, given as they are or as natural logarithms, to length one; zeros stay zeros."""
    if logarithmic:
        return (features - 0.5 * (2.0 * features).logsumexp(dim=-1, keepdim=True)).exp()
    largest = features.detach().abs().amax(dim=-1, keepdim=True)
    scaled = features / torch.where(largest == 0, 1.0, largest)  # so that no square vanishes or is infinite
    return torch.where(largest == 0, 0.0, torch.nn.functional.normalize(scaled, dim=-1, eps=0.5))


def recurrent(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor,
    memory: Tensor,
    *,
    log_decay: Tensor | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Correct the memory by one token after the other, and read it after each.

    Args:
        queries: `(b, h, n, m)` unit features.
        keys: `(b, g, n, m)` unit features.
        values: `(b, g, n, e)`.
        beta: `(b, g, n)`, the share of its error that a token corrects.
        memory: `(b, g, m, e)`.
        log_decay: `(b, g, n)`, at most 0.
        mask: `(b, n)` bool; a False key is as if absent, and its decay with it.
        segments: `(b, n)` document ids; the memory belongs to the first token's.

    Returns:
        `(b, h, n, e)` and the memory after the last token.
    """
    group, out = queries.shape[1] // keys.shape[1], []
    for t in range(keys.shape[2]):
        kept = memory if log_decay is None else memory * log_decay[:, :, t, None, None].exp()
        if segments is not None and t:
            kept = kept * (segments[:, t] == segments[:, t - 1])[:, None, None, None]
        key, write = keys[:, :, t, :, None], beta[:, :, t, None, None]
        written = kept + write * key * (values[:, :, t, None] - key.mT @ kept)
        memory = written if mask is None else torch.where(mask[:, t, None, None, None], written, memory)
        if mask is not None and segments is not None and t:  # an absent key's document is still its own
            same = (segments[:, t] == segments[:, t - 1])[:, None, None, None]
            memory = torch.where(mask[:, t, None, None, None], memory, memory * same)
        out.append(queries[:, :, t, None] @ memory.repeat_interleave(group, dim=1))
    return torch.cat(out, dim=2), memory
