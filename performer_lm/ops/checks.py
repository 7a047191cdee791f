"""What attention may be given: shapes and dtypes of q, k, v, masks, documents, decay and bias, checked in one place.

A mask is bool, or integer in the convention of `transformers`: 0 hides, 1 keeps. Values are not looked at, as that
would wait for the device.

Letters: `h` heads, `g` key heads, `i` queries, `j` keys, `d` head width, `e` value width.
"""

import torch
from torch import Tensor

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
    if segments is not None and (not _is_integer(segments) or _is_bool(segments) or segments.shape != shape):
        raise _refusal("segments", "integer, one document id for each token given", "shape", shape, segments)
    check_log_decay(log_decay, (*batch, groups, keys))
    return check_mask(mask, shape, name=name)


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
    if _is_bool(bias) or bias.is_complex() or not _broadcasts(bias, shape):
        raise _refusal("bias", "real numbers (a bool is for mask=)", "a shape that broadcasts to", shape, bias)
    return bias


def _is_bool(x: Tensor) -> bool:
    return x.dtype is torch.bool


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())


def _broadcasts(x: Tensor, shape: Shape) -> bool:
    """Return True if x broadcasts to `shape` without making it larger."""
    last = shape[len(shape) - x.ndim :]
    return x.ndim <= len(shape) and all(own in (1, whole) for own, whole in zip(x.shape, last, strict=True))


def _refusal(name: str, kind: str, relation: str, shape: Shape, got: Tensor) -> ValueError:
    dtype = str(got.dtype).removeprefix("torch.")
    return ValueError(f"{name} must be {kind}, of {relation} {tuple(shape)}; got {dtype} of shape {tuple(got.shape)}")
