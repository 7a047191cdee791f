"""Ways to read a text, and the score of every prediction: windows alone, windows that overlap, documents in one go.

Letters: `b` batch, `n` tokens, `t` predictions.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from performer_lm.data.ids import Indices
from performer_lm.data.windows import IGNORE, FiniteWindows
from performer_lm.evaluation.buckets import as_array
from performer_lm.language_model import READ_AT_ONCE, LanguageModel
from performer_lm.model import PerformerLM
from performer_lm.objectives import Objective, choose_chunk_size
from performer_lm.ops.precision import sum_dtype
from performer_lm.ops.terms import slices


class Scores(NamedTuple):
    """How well ids were predicted, `(t,)` each."""

    positions: NDArray[np.int64]  # in the window or document
    targets: NDArray[np.int64]
    nats: NDArray[np.float64]
    right: NDArray[np.bool_]  # the target is the likeliest


@torch.inference_mode()
def score_windows(
    model: LanguageModel,
    windows: FiniteWindows,
    *,
    objective: Objective,
    batch_size: int,
    separator: int | None = None,
    places: Indices | None = None,
) -> Iterator[Scores]:
    """Score all predictions that an objective asks of each window.

    Args:
        model: in evaluation mode.
        windows: of the text, each byte in one.
        objective: source of the predictions; next tokens are every id but the first of each window.
        batch_size: windows at a time.
        separator: the id that begins a document where tokens see their own document only.
        places: numbers of the windows to read; None for all.
    """
    device = model.head.weight.device
    places = np.arange(len(windows)) if places is None else places
    for first in range(0, len(places), batch_size):
        rows = windows.rows(places[first : first + batch_size]).to(device)
        yield from _score(model, *objective.ask(model, rows, step=None, separator=separator))


@torch.inference_mode()
def score_strided(
    model: LanguageModel,
    windows: FiniteWindows,
    *,
    objective: Objective,
    batch_size: int,
    stride: int,
    separator: int | None = None,
) -> Iterator[Scores]:
    """Score next tokens over windows that overlap, each token once, after at least context - stride others.

    Args as of `score_windows`; `stride` is by how many tokens a window starts after the last one.

    Raises:
        ValueError: for windows that do not go on from one another, or a stride longer than they are.
    """
    context = windows.rows(np.zeros(1, dtype=np.int64)).shape[1] - 1
    if stride > context:
        raise ValueError(f"task.stride ({stride}) must be at most data.context ({context})")
    device = model.head.weight.device
    last = windows.rows(np.array([len(windows) - 1]))
    total = (len(windows) - 1) * context + int((last != IGNORE).sum()) - 1  # predictions
    starts = np.arange(0, max(total - context, 0) + stride, stride)
    for first in range(0, len(starts), batch_size):
        own = starts[first : first + batch_size]
        rows = _windows_at(windows, own, context=context).to(device)
        hidden, targets = objective.ask(model, rows, step=None, separator=separator)
        is_seen = torch.arange(context, device=device) < context - stride
        is_seen = is_seen & torch.from_numpy(own > 0).to(device)[:, None]
        yield from _score(model, hidden, targets.masked_fill(is_seen, IGNORE))


def _windows_at(windows: FiniteWindows, starts: NDArray[np.int64], *, context: int) -> Tensor:
    """Return windows `(b, n + 1)` that start anywhere in the text that others cover one after the other."""
    numbers, within = np.divmod(starts, context)
    first, second = windows.rows(numbers), windows.rows(numbers + 1)
    _check_joined(first[numbers + 1 < len(windows)], second[numbers + 1 < len(windows)])
    return torch.cat((first, second[:, 1:]), dim=1).gather(
        1, torch.from_numpy(within[:, None] + np.arange(context + 1))
    )


def _check_joined(first: Tensor, second: Tensor) -> None:
    """Raise ValueError unless windows begin with the last id of those before them."""
    if bool((first[:, -1] != second[:, 0]).any()) or bool((first[:, -1] < 0).any()):
        raise ValueError(
            "these windows do not go on from one another (data.documents=cropped, data=synthetic): task.stride and "
            "task.carry need a text that does"
        )


@torch.inference_mode()
def score_documents(model: PerformerLM, windows: FiniteWindows, *, batch_size: int, end_id: int) -> Iterator[Scores]:
    """Score next tokens over whole documents, each read from its start with a state carried on from block to block.

    Memory is that of a block and of the state, however long a document is.

    Args:
        model: in evaluation mode; causal.
        windows: of the text, one after the other.
        batch_size: windows that are read at a time.
        end_id: the id that begins a document.

    Raises:
        ValueError: for windows that do not go on from one another, or a document longer than learned positions.
    """
    device, position = model.head.weight.device, 0
    state = model.init_state(1)
    for ids, targets in _stream(windows, batch_size=batch_size):
        starts = {*(ids == end_id).nonzero()[:, 0].tolist()}
        for start, stop in pairwise(sorted({*range(0, len(ids), _at_once(model)), *starts, len(ids)})):
            if start in starts:
                state, position = model.init_state(1), 0
            _check_room(model, position + stop - start)
            logits, state = model.extend(ids[None, start:stop].to(device), state)
            yield _score_logits(logits[0], targets[start:stop].to(device), position + np.arange(stop - start))
            position += stop - start


@torch.inference_mode()
def score_rows(model: PerformerLM, ids: Tensor, targets: Tensor) -> list[Scores]:
    """Score next tokens in rows that are read from their start on, as `score_documents` reads one.

    Args:
        model: in evaluation mode; causal.
        ids: `(b, n)`, any at the end of shorter rows.
        targets: `(b, n)`, `IGNORE` where nothing is scored.

    Returns:
        The scores of each row.

    Raises:
        ValueError: for rows longer than learned positions.
    """
    device, rows, found = model.head.weight.device, [], []
    _check_room(model, ids.shape[1])
    state = model.init_state(len(ids), max_len=ids.shape[1])
    for piece in slices(ids.shape[1], max(1, _at_once(model) // len(ids))):
        logits, state = model.extend(ids[:, piece].to(device), state)
        row, place = (targets[:, piece] != IGNORE).nonzero().T
        wanted = targets[:, piece][row, place].to(device)
        found.append(_score_logits(logits[row.to(device), place.to(device)], wanted, piece.start + place.numpy()))
        rows.append(row.numpy())
    whole = [np.concatenate(parts) for parts in zip(*found, strict=True)] if found else [np.empty(0)] * 4
    row_of = np.concatenate([np.empty(0, dtype=np.int64), *rows])
    return [Scores(*(part[row_of == row] for part in whole)) for row in range(len(ids))]


def _at_once(model: PerformerLM) -> int:
    """Return how many tokens to read with their logits."""
    return choose_chunk_size(READ_AT_ONCE, vocab_size=model.head.out_features)


def _check_room(model: PerformerLM, tokens: int) -> None:
    last = model.performer.max_len
    if last is not None and tokens > last:
        raise ValueError(
            f"a text of at least {tokens} tokens is longer than the {last} learned positions; windows of data.context "
            "tokens fit, without task.carry"
        )


def _stream(windows: FiniteWindows, *, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the ids of a text, some windows of them at a time, and those that follow each."""
    before: Tensor | None = None
    for first in range(0, len(windows), batch_size):
        rows = windows.rows(np.arange(first, min(first + batch_size, len(windows)), dtype=np.int64))
        _check_joined(rows[:-1], rows[1:])
        if before is not None:
            _check_joined(before, rows[:1])
        before = rows[-1:]
        ids, targets = rows[:, :-1].flatten(), rows[:, 1:].flatten()
        yield ids[targets != IGNORE], targets[targets != IGNORE]


def _score(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Iterator[Scores]:
    """Score predictions `(b, n)`, as many at a time as fit in memory with their logits."""
    asked = targets != IGNORE
    positions = as_array(asked.nonzero()[:, 1])
    hidden, wanted = hidden[asked], targets[asked]
    for piece in slices(len(wanted), choose_chunk_size(len(wanted), vocab_size=model.head.out_features)):
        yield _score_logits(model.head(hidden[piece]), wanted[piece], positions[piece])


def _score_logits(logits: Tensor, targets: Tensor, positions: NDArray[Any]) -> Scores:
    logits = logits.to(sum_dtype(logits))
    nats = F.cross_entropy(logits, targets, reduction="none")
    return Scores(positions, as_array(targets), as_array(nats), as_array(logits.argmax(-1) == targets))
