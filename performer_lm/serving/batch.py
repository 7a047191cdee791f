"""The rows that a model continues together: each joins after its prompt and leaves at its end, at any token.

Letters: `b` rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from performer_lm.attention.base import select_rows
from performer_lm.attention.joining import count_bytes, join_rows
from performer_lm.generation.captured import Steps
from performer_lm.generation.decode import Prefix, log_probs_of, pad_left
from performer_lm.generation.sampling import Sampler
from performer_lm.language_model import LanguageModel
from performer_lm.ops.precision import widen
from performer_lm.performer import PerformerState
from performer_lm.serving.jobs import Choice, Likeliest, Told

SPARE = 64  # tokens for which caches have room when rows join


class Batch:
    """Choices that run, and their state: `draw` gives each a token, `extend` lets the model read them.

    Rows join and leave between tokens. A row is drawn as it is alone.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.choices: list[Choice] = []
        self._steps, self._device = Steps(model), model.head.weight.device
        self._logits = torch.empty(0, model.head.out_features, device=self._device)  # (b, vocab) of the next tokens
        self._state: PerformerState | None = None
        self._drawn: Tensor | None = None  # (b,) ids, which the model has not read
        self._groups: list[tuple[Sampler, list[int]]] = []  # rows of equal samplers are drawn at once

    def join(self, started: Sequence[tuple[Choice, Prefix]]) -> None:
        """Take in choices, each after a prefix of one row, which stays; before `draw`."""
        if not started:
            return
        running = [] if self._state is None else [(self._logits, self._state)]
        parts = [*running, *((prefix.logits, prefix.state) for _, prefix in started)]
        self._logits, self._state = join_rows(parts, spare=SPARE)
        self.choices += [choice for choice, _ in started]
        self._group()

    def leave(self, rows: Sequence[int]) -> None:
        """Let rows go."""
        if not rows:
            return
        kept = [row for row in range(len(self.choices)) if row not in rows]
        self.choices = [self.choices[row] for row in kept]
        if kept:
            index = torch.tensor(kept, device=self._device)
            self._logits, self._state, self._drawn = select_rows((self._logits, self._state, self._drawn), index)
        else:
            self._state = self._drawn = None
        self._group()

    def draw(self) -> list[Told]:
        """Draw the next token of every row."""
        ids = torch.zeros(len(self.choices), device=self._device, dtype=torch.int64)
        for sampler, rows in self._groups:
            if len(self._groups) == 1:
                ids = self._draw_rows(sampler, rows, self._logits)
            else:
                index = torch.tensor(rows, device=self._device)
                ids[index] = self._draw_rows(sampler, rows, self._logits[index])
        self._drawn = ids
        log_probs, likeliest = log_probs_of(ids, self._logits).tolist(), self._likeliest()
        made = zip(self.choices, ids.tolist(), log_probs, likeliest, strict=True)
        return [choice.take(token, log_prob, top) for choice, token, log_prob, top in made]

    def extend(self) -> None:
        """Let the model read the tokens drawn."""
        if self._state is not None and self._drawn is not None:
            self._logits, self._state = self._steps.extend(self._drawn, self._state)
            self._drawn = None

    def state_before(self, row: int) -> tuple[Tensor, PerformerState]:
        """Return the logits and the state of one row before the token drawn last."""
        index = torch.tensor([row], device=self._device)
        return select_rows((self._logits, self._state), index)  # type: ignore[return-value]  # there are rows

    @property
    def bytes_per_row(self) -> int:
        """Return the size of a row's state, with the room of caches; 0 without rows."""
        return count_bytes(self._state) // max(1, len(self.choices))

    def _group(self) -> None:
        groups: dict[str, list[int]] = {}
        for row, choice in enumerate(self.choices):
            groups.setdefault(repr(choice.job.sampler), []).append(row)
        self._groups = [(self.choices[rows[0]].job.sampler, rows) for rows in groups.values()]

    def _draw_rows(self, sampler: Sampler, rows: list[int], logits: Tensor) -> Tensor:
        choices = [self.choices[row] for row in rows]
        seen = mask = None
        if sampler.reach:
            seen, mask = pad_left([choice.last_ids(sampler.reach) for choice in choices], device=self._device)
        return sampler(logits, [choice.generator for choice in choices], seen=seen, mask=mask)

    def _likeliest(self) -> list[Likeliest]:
        """Return for each row as many of the likeliest tokens as are asked for, with the model's log-probabilities."""
        most = min(max(choice.job.top for choice in self.choices), self._logits.shape[1])
        if not most:
            return [[] for _ in self.choices]
        values, ids = widen(self._logits).log_softmax(-1).topk(most)
        rows = zip(self.choices, ids.tolist(), values.tolist(), strict=True)
        return [list(zip(own, numbers, strict=True))[: choice.job.top] for choice, own, numbers in rows]
