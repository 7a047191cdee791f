"""Softmax attention inside a sliding window, and to the first tokens before it, linear in n.

The sequence is cut into blocks as long as the window; a block of queries sees its own keys and its neighbours', and
each block is one more row of the batch of softmax's reference. A masked key is as if absent, so windows count kept
keys: the kept tokens of each row are first moved together at its end, and their outputs moved back.

Letters: `b` batch, `h` heads, `g` key heads, `i` queries, `j` keys, `t` blocks, `w` window, `s` sinks, `d` head width,
`e` value width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from performer_lm.ops.checks import check_per_key, check_shapes, fold_batch, gather_terms, sum_of_newer
from performer_lm.ops.precision import no_autocast, sum_dtype
from performer_lm.ops.sinks import in_sight, meet_sinks
from performer_lm.ops.softmax import attend, exact_attention


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    causal: bool = False,
    key_mask: Tensor | None = None,
    segments: Tensor | None = None,
    log_decay: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend as `exact_attention` with the same `window` does, in O(j window) time and memory.

    Outputs at masked tokens mean nothing. Arguments not listed here are those of `exact_attention`.

    Args:
        q: `(..., h, i, d)`; causal: the last i of the j tokens; else i = j.
        k: `(..., g, j, d)`.
        v: `(..., g, j, e)`.
        window: a query sees keys less than `window` kept keys away.
        sinks: a query sees the first `sinks` kept keys of its sequence, or its document, too, once they lie before
            the window: a softmax that was trained on whole sequences leans on them (StreamingLLM, 2309.17453).

    Returns:
        `(..., h, i, e)` in q's dtype.

    Raises:
        ValueError: as `exact_attention`, for a window below 1, sinks below 0, or lengths that do not fit.

    Examples:
        >>> import torch
        >>> from performer_lm.ops import local_attention
        >>> q, k, v = torch.randn(3, 2, 8, 100, 16).unbind()
        >>> local_attention(q, k, v, window=16, causal=True).shape
        torch.Size([2, 8, 100, 16])
    """
    check_shapes(q, k, v)
    queries, keys = q.shape[-2], k.shape[-2]
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0, got {sinks}")
    if queries > keys or (queries < keys and not causal):
        wanted = "at most as many queries as keys" if causal else "as many queries as keys"
        raise ValueError(f"a window needs {wanted}, got {queries} and {keys}; attn=exact attends across sequences")
    key_mask = check_per_key(k, mask=key_mask, segments=segments, log_decay=log_decay, name="key_mask")
    shape = (*q.shape[:-1], v.shape[-1])
    q, k, v = (fold_batch(x, 3) for x in (q, k, v))
    key_mask, segments = (None if x is None else fold_batch(x, 1) for x in (key_mask, segments))
    log_decay = None if log_decay is None else fold_batch(log_decay, 2)
    kept = k.new_ones(k.shape[0], keys, dtype=torch.bool) if key_mask is None else key_mask
    if causal and queries == 1:
        sight = in_sight(kept, segments, window, sinks)[:, None, None]
        out = exact_attention(
            q, k, v, causal=True, mask=sight, key_mask=key_mask, segments=segments, log_decay=log_decay, scale=scale
        )
        return out.reshape(shape)
    if key_mask is None:
        return _attend_in_blocks(q, k, v, window, sinks, causal, kept, segments, log_decay, scale).reshape(shape)

    order = kept_last(key_mask)
    back = order.argsort(-1)
    q = F.pad(q, (0, 0, keys - queries, 0))
    q, k, v, kept = (take_tokens(x, order) for x in (q, k, v, kept))
    segments = None if segments is None else take_tokens(segments, order)
    log_decay = None if log_decay is None else take_tokens(log_decay, order)
    out = _attend_in_blocks(q, k, v, window, sinks, causal, kept, segments, log_decay, scale)
    return take_tokens(out, back)[..., keys - queries :, :].reshape(shape)


def attend_to_window(q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """Attend from the one token that ends a window to all of it: a decoding step, in as few operations as it takes.

    Args:
        q: `(b, h, 1, d)`.
        k: `(b, g, w, d)`, the last of them at the query's own place.
        v: `(b, g, w, e)`.
        key_mask: `(b, w)` bool, False where keys are absent, True at the last; an absent key does not decay.
        log_decay: `(b, g, w)`.

    Returns:
        `(b, h, 1, e)` in q's dtype.
    """
    (b, g), d, dtype = k.shape[:2], k.shape[-1], sum_dtype(q, k, v)
    with no_autocast(q.device):
        queries = q.to(dtype).reshape(b, g, -1, d) * d**-0.5  # a key head's as its sequence
        scores = queries @ k.to(dtype).mT
        if log_decay is not None:
            scores += sum_of_newer(log_decay, None).to(dtype)[:, :, None]
        weights = scores.masked_fill_(~key_mask[:, None, None], -torch.inf).softmax(-1)
        out = weights @ v.to(dtype)
    return out.reshape(b, -1, 1, v.shape[-1]).to(q.dtype)


def kept_last(mask: Tensor) -> Tensor:
    """Return the order `(b, j)` that moves the kept tokens of each row to its end and changes nothing else."""
    return mask.int().argsort(dim=-1, stable=True)


def take_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the tokens of `x`, which is `(b, j)`, `(b, g, j)` or `(b, g, j, d)`, by `order` `(b, n)`."""
    if x.ndim == 2:
        return x.gather(1, order)
    if x.ndim == 3:
        return x.gather(2, order[:, None].expand(-1, x.shape[1], -1))
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _attend_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    sinks: int,
    causal: bool,
    kept: Tensor,
    segments: Tensor | None,
    log_decay: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attend where masked tokens, if any, stand at the front of their row."""
    batch, queries, given = q.shape[0], q.shape[-2], q.dtype
    blocks = -(-queries // window) + torch.compiler.is_exporting()  # programs take any number of blocks but one
    missing = blocks * window - queries

    def fold(x: Tensor) -> Tensor:
        return rearrange(F.pad(x, (0, 0, missing, 0)), "b h (t w) d -> (b t) h w d", w=window)

    def around(x: Tensor) -> Tensor:
        return _neighbourhoods(x, blocks=blocks, window=window, causal=causal)

    def around_flat(x: Tensor) -> Tensor:
        return around(x[:, None, :, None])[:, 0, :, 0]

    with no_autocast(q.device):
        dtype = sum_dtype(q, k, v)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        folded, keys, values = fold(q), around(k), around(v)
        terms = gather_terms(
            folded,
            keys,
            values,
            causal=causal,
            window=window if causal else None,
            mask=None if causal else _band(window, q.device),
            key_mask=around_flat(kept),
            segments=None if segments is None else around_flat(segments),
            log_decay=None if log_decay is None else around(log_decay[..., None])[..., 0],
            scale=scale,
        )
        own = None
        if sinks:
            scores, of_sinks = meet_sinks(q * terms.scale, k, v, window, sinks, kept, segments, log_decay)
            of_sinks = fold(rearrange(of_sinks, "b g i s e -> b g i (s e)"))
            own = fold(scores), rearrange(of_sinks, "b g w (s e) -> b g w s e", s=sinks)
        out = attend(folded, keys, values, terms, own)
    return rearrange(out, "(b t) h w e -> b h (t w) e", b=batch)[..., missing:, :].to(given)


def _neighbourhoods(x: Tensor, *, blocks: int, window: int, causal: bool) -> Tensor:
    """Give each block of queries its keys, `(b g j d)` -> `((b t) g s d)`: before, (after,) and last its own."""
    front = (blocks + 1) * window - x.shape[2]
    padded = F.pad(x, (0, 0, front, 0 if causal else window))
    parts = rearrange(padded, "b g (t w) d -> b t g w d", w=window)
    before, own = parts[:, :blocks], parts[:, 1 : blocks + 1]
    seen = torch.cat([before, own] if causal else [before, parts[:, 2:], own], dim=3)
    return rearrange(seen, "b t g s d -> (b t) g s d")


def _band(window: int, device: torch.device) -> Tensor:
    """Return True where query and key are less than `window` apart: `(w, 3 w)`, keys before, after and inside."""
    own = torch.arange(window, device=device)
    places = torch.cat([own - window, own + window, own])
    return (own[:, None] - places).abs() < window
