"""The one thread that owns the model: jobs wait, their prompts are read, and their rows run together."""

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch

from performer_lm.attention.base import select_rows
from performer_lm.encoder_decoder import PerformerEncoderDecoder
from performer_lm.generation.decode import Prefix, pad_left, read
from performer_lm.language_model import READ_AT_ONCE, LanguageModel
from performer_lm.ranges import Count, Whole, ranged
from performer_lm.serving.batch import Batch
from performer_lm.serving.jobs import Choice, ClosingError, Job, NotServedError, OverloadedError, TimedOutError
from performer_lm.serving.prefixes import PrefixStore

CLOSING: Final = ClosingError("the server is closing and takes no more requests")
STOPPED: Final = ClosingError("the server was stopped before the answer was done")


@ranged
class Scheduler:
    """Continues jobs with a model, all at once: a job's rows start as soon as there is room for them, in order.

    Between two tokens of the rows that run, at most a few thousand tokens of prompts are read.

    Args:
        model: in evaluation mode; nothing else may use it from `start` to the end.
        max_rows: continuations that run at once.
        max_waiting: jobs that wait; more are refused.
        prefix_bytes: memory for the states of texts lately seen.
    """

    def __init__(self, model: LanguageModel, *, max_rows: Count, max_waiting: Whole, prefix_bytes: Whole) -> None:
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self._model, self._batch, self._device = model, Batch(model), model.head.weight.device
        self._reads_whole = isinstance(model, PerformerEncoderDecoder)  # a source has no state of its beginning
        self._prefixes = PrefixStore(capacity=0 if self._reads_whole else prefix_bytes)
        self._waiting: deque[Job] = deque()
        self._admitted: list[Job] = []  # whose prompts are being read, and whose rows are promised
        self._changed = threading.Condition()
        self._is_closing = self._is_stopped = False
        self._tokens = self._row_bytes = 0
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._on_end: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for their turn, all of them or none.

        Raises:
            ClosingError: after `close`.
            OverloadedError: where too many wait already.
        """
        with self._changed:
            if self._is_closing:
                raise CLOSING
            if len(self._waiting) + len(jobs) > self.max_waiting + max(0, self._free_rows()):
                raise OverloadedError(f"as many prompts wait as may (max_waiting={self.max_waiting}): try again later")
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Free the rows of jobs whose clients have left."""
        with self._changed:
            for job in jobs:
                job.is_cancelled = True
            self._changed.notify()

    def close(self, on_end: Callable[[], None] = lambda: None, *, at_once: bool = False) -> None:
        """Take no more jobs, and end after those there are, or at once; then call `on_end`."""
        with self._changed:
            self._is_closing, self._is_stopped, self._on_end = True, at_once, on_end
            self._changed.notify()

    def join(self) -> None:
        """Wait for the thread's end."""
        self._thread.join()

    def status(self) -> dict[str, Any]:
        """Return the counts of rows, prompts, tokens and prefixes, as plain data."""
        store = self._prefixes
        return {
            "running": len(self._batch.choices),
            "waiting": len(self._waiting),
            "tokens": self._tokens,
            "state_bytes_per_row": self._row_bytes,
            "prefixes": {
                "held": len(store),
                "bytes": store.bytes,
                "hits": store.hits,
                "misses": store.misses,
                "tokens_spared": store.tokens_spared,
            },
        }

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._jobs() or self._is_closing):
                    self._changed.wait()
                if not self._jobs():
                    break
            try:
                self._turn()
            except Exception as error:  # of any kind: it ends the jobs at hand, not the server
                if not isinstance(error, FloatingPointError):
                    traceback.print_exception(error)
                self._give_up(NotServedError((str(error).splitlines() or [type(error).__name__])[0]))
        self._on_end()

    def _turn(self) -> None:
        """Let rows leave and join, and give each row that runs a token."""
        self._drop()
        self._admit()
        batch = self._batch
        if not batch.choices:
            return
        for told in batch.draw():
            self._tokens += 1
            told.choice.job.tell(told)
        ended = [row for row, choice in enumerate(batch.choices) if choice.row.ending]
        for row in ended:
            self._keep_answer(row)
        batch.leave(ended)
        batch.extend()

    def _drop(self) -> None:
        """Drop the jobs whose clients have left, and those that took too long."""
        for job in self._jobs():
            if not job.is_cancelled and (self._is_stopped or job.is_late):
                self._refuse(job, STOPPED if self._is_stopped else TimedOutError(f"not done in {job.seconds:g} s"))
        self._batch.leave([row for row, choice in enumerate(self._batch.choices) if choice.job.is_cancelled])
        self._admitted = [job for job in self._admitted if not job.is_cancelled]
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.is_cancelled)

    def _admit(self) -> None:
        """Give free rows to waiting jobs, read on in their prompts, and run those read whole."""
        before = len(self._admitted)
        with self._changed:
            while self._waiting and len(self._waiting[0].choices) <= self._free_rows():
                self._admitted.append(self._waiting.popleft())
        for job in self._admitted[before:]:
            job.prefix = self._prefixes.find(job.ids)
        self._read()
        rows: list[tuple[Choice, Prefix]] = []
        for job in self._admitted:
            if job.prefix is not None and job.is_read:
                self._prefixes.put(job.ids, job.prefix.logits, job.prefix.state)
                rows += [(choice, job.prefix) for choice in job.choices]
        self._batch.join(rows)
        self._admitted = [job for job in self._admitted if not job.is_read]
        for choice, _ in rows:
            choice.job.prefix = None
        self._row_bytes = self._batch.bytes_per_row or self._row_bytes

    def _read(self) -> None:
        """Read short prompts whole and together, and a part of each long one or one after a prefix."""
        left, fresh = READ_AT_ONCE, list[Job]()
        for job in self._admitted:
            if job.prefix is None and self._fits([*fresh, job]):
                fresh.append(job)
            elif job.prefix is not None or (len(job.ids) > READ_AT_ONCE and not self._reads_whole):
                begun = 0 if job.prefix is None else job.prefix.tokens.shape[1]
                part = torch.tensor([job.ids[begun : begun + left]], device=self._device, dtype=torch.int64)
                if part.shape[1]:
                    job.prefix = read(self._model, part, after=job.prefix)
                left -= part.shape[1]
        if fresh:
            tokens, mask = pad_left([job.ids for job in fresh], device=self._device)
            prefix = read(self._model, tokens, mask=mask)
            for row, job in enumerate(fresh):
                job.prefix = prefix if len(fresh) == 1 else select_rows(prefix, tokens.new_tensor([row]))

    def _fits(self, jobs: Sequence[Job]) -> bool:
        """Return True if prompts, padded to the longest, are few enough tokens to be read at once."""
        return len(jobs) * max(len(job.ids) for job in jobs) <= READ_AT_ONCE or (self._reads_whole and len(jobs) == 1)

    def _keep_answer(self, row: int) -> None:
        """Keep the state of a text with its answer, which the next turn of a conversation begins with."""
        choice = self._batch.choices[row]
        if self._prefixes.capacity and len(choice.job.choices) == 1:
            self._prefixes.put([*choice.job.ids, *choice.row.tokens[:-1]], *self._batch.state_before(row))

    def _jobs(self) -> set[Job]:
        """Return the jobs that are not done."""
        with self._changed:
            return {*self._waiting, *self._admitted, *(choice.job for choice in self._batch.choices)}

    def _free_rows(self) -> int:
        """Return how many rows are neither running nor promised."""
        return self.max_rows - len(self._batch.choices) - sum(len(job.choices) for job in self._admitted)

    @staticmethod
    def _refuse(job: Job, error: NotServedError) -> None:
        job.is_cancelled = True
        job.tell(error)

    def _give_up(self, error: NotServedError) -> None:
        """End the jobs that have rows, after an error in the model."""
        for job in {*self._admitted, *(choice.job for choice in self._batch.choices)}:
            self._refuse(job, error)
        self._batch, self._admitted = Batch(self._model), []
