"""Decoding states joined along the batch, so that rows which were read apart go on together.

Letters: `b` batch.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from performer_lm.attention.kv_cache import KVCache

Tree = TypeVar("Tree")


def join_rows(states: Sequence[Tree], *, spare: int = 0) -> Tree:
    """Copy the rows of decoding states, in order, into one state; `select_rows` takes rows out again.

    Caches of different lengths are aligned at the last token, and leave out the places that no row keeps.

    Args:
        states: of one model, each after at least one token.
        spare: room of caches for so many more tokens, before they are copied again to grow.

    Raises:
        ValueError: for states that are not of one model.
    """
    joined: Tree = _join(states, spare)
    return joined


def count_bytes(state: Any) -> int:
    """Return the memory that the tensors of a decoding state take."""
    if isinstance(state, Tensor):
        return state.nbytes
    return sum(map(count_bytes, state)) if isinstance(state, tuple) else 0


def _join(parts: Sequence[Any], spare: int) -> Any:
    kinds = {type(part) for part in parts}
    if len(kinds) != 1:
        raise ValueError(f"states of one model join, got {' and '.join(sorted(kind.__name__ for kind in kinds))}")
    first = parts[0]
    if isinstance(first, KVCache):
        return KVCache.join(parts, spare=spare)
    if isinstance(first, tuple):
        items = [_join(each, spare) for each in zip(*parts, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else tuple(items)
    return torch.cat(list(parts)) if isinstance(first, Tensor) else first
