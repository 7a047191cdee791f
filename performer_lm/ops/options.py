"""The options that every softmax op takes: their names, what must hold of them, and how they become `Terms`.

Letters: `b` batch, `h` heads, `g` key heads, `i` queries, `j` keys, `d` head width, `e` value width.
"""

from typing import TypedDict

from torch import Tensor

from performer_lm.ops.dropout import check_dropout
from performer_lm.ops.terms import Block, Terms, fold


class Options(TypedDict, total=False):
    """The keyword options of every softmax op; `exact_attention` says what each means."""

    causal: bool
    window: int | None
    mask: Tensor | Block | None
    key_mask: Tensor | None
    bias: Tensor | Block | None
    segments: Tensor | None
    log_decay: Tensor | None
    scale: float | None
    dropout: float
    seed: int | None


def gather_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | Block | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | Block | None = None,
    segments: Tensor | None = None,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Terms:
    """Check q `(..., h, i, d)`, k `(..., g, j, d)`, v `(..., g, j, e)` and the options, and return them as `Terms`."""
    check_shapes(q, k, v)
    check_dropout(dropout, seed)
    batch, (groups, keys), queries = tuple(q.shape[:-3]), k.shape[-3:-1], q.shape[-2]
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if log_decay is not None and not causal:
        raise ValueError("log_decay needs causal=True: a key fades as it grows older")
    per_key = {"key_mask": (key_mask, ()), "segments": (segments, ()), "log_decay": (log_decay, (groups,))}
    for name, (tensor, middle) in per_key.items():
        if tensor is not None and tensor.shape != (*batch, *middle, keys):
            raise ValueError(f"{name} must have shape {(*batch, *middle, keys)}, got {tuple(tensor.shape)}")
    counts_places = segments is not None or log_decay is not None or (window is not None and key_mask is not None)
    if counts_places and queries > keys:
        raise ValueError(f"segments, log_decay and window need each query among the keys: {queries} > {keys}")

    key_mask = None if key_mask is None else key_mask.reshape(-1, keys)
    return Terms(
        batch=batch,
        heads=q.shape[-3],
        groups=groups,
        queries=queries,
        keys=keys,
        causal=causal,
        window=window,
        mask=fold(mask, batch) if isinstance(mask, Tensor) else mask,
        bias=fold(bias, batch) if isinstance(bias, Tensor) else bias,
        key_mask=key_mask,
        segments=None if segments is None else segments.reshape(-1, keys),
        decay=None if log_decay is None else sum_of_newer(log_decay.reshape(-1, groups, keys), key_mask),
        positions=None if window is None or key_mask is None else key_mask.cumsum(-1),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dropout=dropout,
        seed=0 if seed is None else seed,
    )


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless `q (..., h, i, d)`, `k (..., g, j, d)` and `v (..., g, j, e)` fit together."""
    if min(q.ndim, k.ndim, v.ndim) < 3 or not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        wanted = "q (..., h, i, d), k (..., g, j, d), v (..., g, j, e) with equal leading dimensions"
        raise ValueError(f"wanted {wanted}, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if k.shape[-3:-1] != v.shape[-3:-1] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"k {tuple(k.shape)} must have v's heads and keys {tuple(v.shape)} and q's width {q.shape[-1]}"
        )
    if q.shape[-3] % k.shape[-3]:
        raise ValueError(f"heads ({q.shape[-3]}) must be a multiple of key heads ({k.shape[-3]})")


def sum_of_newer(log_decay: Tensor, key_mask: Tensor | None) -> Tensor:
    """Sum `log_decay` `(b, g, j)` over the keys after each one; a masked key counts 0.

    Key j weighs exp(sum[j] - sum[i]) at query i. Counted from the end and in float64, so that the difference of two
    neighbours stays exact however long the stream.
    """
    if key_mask is not None:
        log_decay = log_decay.masked_fill(~key_mask[:, None], 0.0)
    wide = log_decay.double()
    return wide.flip(-1).cumsum(-1).flip(-1) - wide
