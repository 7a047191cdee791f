"""Check and fold the inputs of attention: q, k, v and the options of each key or pair.

A mask is bool, or integer in the convention of `transformers`: 0 hides, 1 keeps. Values are not looked at, as that
would wait for the device.

Letters: `b` batch (all leading dimensions folded into one), `h` heads, `g` key heads, `i` queries, `j` keys, `d` head
width, `e` value width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from performer_lm.ops.precision import precise, running_sum
from performer_lm.ops.terms import Block, Terms

Shape = tuple[int, ...]


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


def check_batch(x: Tensor, held: Tensor) -> None:
    """Raise ValueError unless `x` has the batch of a state, of which `held` is a part; both are batch first."""
    if x.shape[0] != held.shape[0]:
        raise ValueError(f"the state holds a batch of {held.shape[0]}, got a batch of {x.shape[0]}")


def check_mask(mask: Tensor | None, shape: Shape, *, name: str = "mask") -> Tensor | None:
    """Check a mask of tokens that lie as `shape`, and return the mask as bool; None stays None.

    Raises:
        ValueError: for another shape, or a dtype that is neither bool nor integer.
    """
    if mask is None:
        return None
    if not _is_integer(mask) or mask.shape != shape:
        raise _refusal(name, "bool or integer, one entry for each token given", "shape", shape, mask)
    return mask.bool()


def check_log_decay(log_decay: Tensor | None, shape: Shape, *, name: str = "log_decay") -> None:
    """Raise ValueError unless a decay, if there is one, or what else heads have of a token, is floating point of this
    shape.
    """
    if log_decay is not None and (not log_decay.is_floating_point() or log_decay.shape != shape):
        raise _refusal(name, "floating point, one entry for each key head and token", "shape", shape, log_decay)


def check_per_key(
    k: Tensor, *, mask: Tensor | None, segments: Tensor | None, log_decay: Tensor | None, name: str = "mask"
) -> Tensor | None:
    """Check the options of each key `(..., g, j, d)`, and return the mask, whose name is `name`, as bool.

    Raises:
        ValueError: unless mask and segments are `(..., j)` and log_decay is `(..., g, j)`, of the right dtypes.
    """
    if mask is None and segments is None and log_decay is None:
        return None
    *batch, groups, keys, _ = k.shape
    shape = (*batch, keys)
    if segments is not None and (not _is_integer(segments) or segments.dtype is torch.bool or segments.shape != shape):
        raise _refusal("segments", "integer, one document id for each token given", "shape", shape, segments)
    check_log_decay(log_decay, (*batch, groups, keys))
    return None if mask is None else check_mask(mask, shape, name=name)


def check_pair_mask(mask: Tensor, shape: Shape) -> Tensor:
    """Check a mask of pairs, or a block of one, that broadcasts to `shape` `(..., h, i, j)`; return the mask as bool.

    Raises:
        ValueError: for a shape that does not broadcast, or a dtype that is neither bool nor integer.
    """
    if not _is_integer(mask) or not _broadcasts(mask, shape):
        raise _refusal("mask", "bool or integer", "a shape that broadcasts to", shape, mask)
    return mask.bool()


def check_bias(bias: Tensor, shape: Shape) -> Tensor:
    """Check a bias, or a block of one, that broadcasts to `shape` `(..., h, i, j)`, and return the bias.

    Raises:
        ValueError: for a shape that does not broadcast, or a bool, which would be a mask.
    """
    if bias.dtype is torch.bool or bias.is_complex() or not _broadcasts(bias, shape):
        raise _refusal("bias", "real numbers (a bool is for mask=)", "a shape that broadcasts to", shape, bias)
    return bias


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())


def _broadcasts(x: Tensor, shape: Shape) -> bool:
    """Return True if x broadcasts to `shape` without making it larger."""
    last = shape[len(shape) - x.ndim :]
    return x.ndim <= len(shape) and all(own in (1, whole) for own, whole in zip(x.shape, last, strict=True))


def _refusal(name: str, kind: str, relation: str, shape: Shape, got: Tensor) -> ValueError:
    dtype = str(got.dtype).removeprefix("torch.")
    return ValueError(f"{name} must be {kind}, of {relation} {tuple(shape)}; got {dtype} of shape {tuple(got.shape)}")


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
    (groups, keys), queries = k.shape[-3:-1], q.shape[-2]
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if dropout > 0.0 and seed is None:
        raise ValueError(f"dropout ({dropout}) needs a seed: it is a function of (seed, b, h, i, j)")
    if log_decay is not None and not causal:
        raise ValueError("log_decay needs causal=True: a key fades as it grows older")
    key_mask = check_per_key(k, mask=key_mask, segments=segments, log_decay=log_decay, name="key_mask")
    pairs = (*q.shape[:-1], keys)
    counts_places = segments is not None or log_decay is not None or (window is not None and key_mask is not None)
    if counts_places and queries > keys:
        raise ValueError(f"segments, log_decay and window need each query among the keys: {queries} > {keys}")

    key_mask = None if key_mask is None else fold_batch(key_mask, 1)
    return Terms(
        heads=q.shape[-3],
        groups=groups,
        queries=queries,
        keys=keys,
        causal=causal,
        window=window,
        mask=None if mask is None else _fold_pairs(mask, pairs, check=check_pair_mask),
        bias=None if bias is None else _fold_pairs(bias, pairs, check=check_bias),
        key_mask=key_mask,
        segments=None if segments is None else fold_batch(segments, 1),
        decay=None if log_decay is None else sum_of_newer(fold_batch(log_decay, 2), key_mask),
        positions=None if window is None or key_mask is None else key_mask.cumsum(-1),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dropout=dropout,
        seed=0 if seed is None else seed,
    )


def _fold_pairs(given: Tensor | Block, shape: Shape, *, check: Callable[[Tensor, Shape], Tensor]) -> Tensor | Block:
    """Check a mask or bias of pairs and fold its leading dimensions; of a function, those of each block it returns."""
    batch = shape[:-3]
    if isinstance(given, Tensor):
        return fold(check(given, shape), batch)

    def block(rows: slice, cols: slice) -> Tensor:
        sizes = (len(range(*part.indices(size))) for part, size in zip((rows, cols), shape[-2:], strict=True))
        return fold(check(given(rows, cols), (*shape[:-2], *sizes)), batch)

    return block


def fold(block: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Fold the leading dimensions of a mask or bias, `(..., h, i, j)` or anything that broadcasts to it, into one."""
    if block.ndim < 4:
        return block[(None,) * (4 - block.ndim)]
    return block if len(batch) == 1 else block.expand(*batch, *block.shape[-3:]).flatten(0, len(batch) - 1)


def fold_batch(x: Tensor, last: int) -> Tensor:
    """Fold all dimensions but the `last` ones into one; there may be none, and any may be empty."""
    return x[None].flatten(0, x.ndim - last)


def fold_heads(q: Tensor, k: Tensor, v: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Fold the leading dimensions of q, k and v into one `b` and widen to `dtype`."""
    return fold_batch(q, 3).to(dtype), fold_batch(k, 3).to(dtype), fold_batch(v, 3).to(dtype)


def sum_of_newer(log_decay: Tensor, key_mask: Tensor | None) -> Tensor:
    """Sum `log_decay` `(b, g, j)` over the keys after each one; a masked key counts 0.

    Key j weighs exp(sum[j] - sum[i]) at query i. Counted from the end and in float64 (where the device has it), so that
    the difference of two neighbours stays exact however long the stream.
    """
    if key_mask is not None:
        log_decay = log_decay.masked_fill(~key_mask[:, None], 0.0)
    wide = log_decay.to(precise(log_decay.device))
    return running_sum(wide.flip(-1)).flip(-1) - wide
