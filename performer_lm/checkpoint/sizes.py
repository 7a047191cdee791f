"""The sizes that a checkpoint declares, held against the numbers that it holds, before memory is asked for.

| bound | what it bounds |
|---|---|
| the file's numbers, or `ANY_SIZE` | every whole number of the model's section that is a size |
| the file's tensors, and `MOST_LAYERS` | depths |
| twice the file's numbers, and `ANY_SIZE` more | numbers of the model; `DRAWN` more for another backend |
| `DRAWS` times the file's numbers | numbers that are drawn on the way to its projections |
| `STATES` times the file's numbers, or `DRAWN` | numbers of the state that it decodes with |
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from performer_lm.attention.feature_maps import AttentionFeatures
from performer_lm.language_model import LanguageModel

ANY_SIZE: Final = 1 << 20
MOST_LAYERS: Final = 1 << 10
DRAWN: Final = 1 << 28
DRAWS: Final = 16
STATES: Final = 16
FREE: Final = frozenset(
    ("seed", "redraw_interval", "redraw_until", "chunk_size", "query_chunk_size", "key_chunk_size", "chunks")
)
"""Whole numbers of a model's section that are no sizes."""


def check_sizes(section: Any, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError for the first size that the weights cannot have: building it would never end."""
    held = _count(weights)
    for name, value in _numbers(section):
        most = min(len(weights), MOST_LAYERS) if "depth" in name else max(held, ANY_SIZE)
        if name not in FREE and abs(value) > most:
            raise ValueError(f"{name} is {value:,}, and the file holds {len(weights):,} tensors of {held:,} numbers")


def check_memory(model: LanguageModel, weights: Mapping[str, Tensor], *, other_backend: bool) -> None:
    """Raise ValueError for a model that needs many more numbers than there are weights: the rest would be drawn.

    Args:
        model: on the meta device, in evaluation mode.
        weights: of the file.
        other_backend: whether the model runs another backend than the file's, which draws its own.
    """
    held = _count(weights)
    declared = _count({**dict(model.named_parameters()), **dict(model.named_buffers())})
    features = [module for module in model.modules() if isinstance(module, AttentionFeatures)]
    drawn = sum(each.key_heads * each.dim_head**2 for each in features)
    for wanted, most in (
        (declared, 2 * held + (DRAWN if other_backend else ANY_SIZE)),
        (drawn, DRAWS * held + ANY_SIZE),
        (_count_state(model), max(STATES * held, DRAWN)),
    ):
        if wanted > most:
            raise ValueError(f"it describes {wanted:,} numbers, and the file holds {held:,}")


@torch.no_grad()
def _count_state(model: LanguageModel) -> int:
    """Return the numbers of a decoding state after one token."""
    if not model.decodes:
        return 0
    _, state = model.start(torch.zeros(1, 1, dtype=torch.int64, device="meta"))
    return _count_in(state)


def _count_in(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel()
    return sum(map(_count_in, state)) if isinstance(state, tuple | list) else 0


def _count(weights: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for value in weights.values())


def _numbers(section: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of a section by name."""
    if isinstance(section, int):
        yield name, section
    elif isinstance(section, Mapping):
        for key, value in section.items():
            yield from _numbers(value, str(key))
    elif isinstance(section, list | tuple):
        for value in section:
            yield from _numbers(value, name)
