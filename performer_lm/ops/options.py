"""The options that every softmax op takes: their names, what must hold of them, and how they become `Terms`.

Letters: `b` batch, `h` heads, `g` key heads, `i` queries, `j` keys, `d` head width, `e` value width.
"""

from typing import TypedDict

from torch import Tensor

from performer_lm.ops.checks import check_bias, check_pair_mask, check_per_key, check_shapes
from performer_lm.ops.dropout import check_dropout
from performer_lm.ops.precision import precise
from performer_lm.ops.running_sum import running_sum
from performer_lm.ops.terms import Block, Terms, fold, fold_batch


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
    key_mask = check_per_key(k, mask=key_mask, segments=segments, log_decay=log_decay, name="key_mask")
    pairs = (*q.shape[:-1], keys)
    counts_places = segments is not None or log_decay is not None or (window is not None and key_mask is not None)
    if counts_places and queries > keys:
        raise ValueError(f"segments, log_decay and window need each query among the keys: {queries} > {keys}")

    key_mask = None if key_mask is None else fold_batch(key_mask, 1)
    return Terms(
        batch=batch,
        heads=q.shape[-3],
        groups=groups,
        queries=queries,
        keys=keys,
        causal=causal,
        window=window,
        mask=fold(check_pair_mask(mask, pairs), batch) if isinstance(mask, Tensor) else mask,
        bias=fold(check_bias(bias, pairs), batch) if isinstance(bias, Tensor) else bias,
        key_mask=key_mask,
        segments=None if segments is None else fold_batch(segments, 1),
        decay=None if log_decay is None else sum_of_newer(fold_batch(log_decay, 2), key_mask),
        positions=None if window is None or key_mask is None else key_mask.cumsum(-1),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dropout=dropout,
        seed=0 if seed is None else seed,
    )


def sum_of_newer(log_decay: Tensor, key_mask: Tensor | None) -> Tensor:
    """Sum `log_decay` `(b, g, j)` over the keys after each one; a masked key counts 0.

    Key j weighs exp(sum[j] - sum[i]) at query i. Counted from the end and in float64 (where the device has it), so that
    the difference of two neighbours stays exact however long the stream.
    """
    if key_mask is not None:
        log_decay = log_decay.masked_fill(~key_mask[:, None], 0.0)
    wide = log_decay.to(precise(log_decay.device))
    return running_sum(wide.flip(-1)).flip(-1) - wide
