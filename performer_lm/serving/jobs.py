"""A prompt to continue, the continuations in the making, and why one may not be finished."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from performer_lm.data.tokenizer import Tokenizer
from performer_lm.generation.decode import Prefix
from performer_lm.generation.sampling import Sampler
from performer_lm.generation.text import Row

Likeliest = list[tuple[int, float]]


class NotServedError(Exception):
    """The reason, in one line, why a job ends without an answer; the model failed, unless a subclass says otherwise."""

    status = 500  # in HTTP


class OverloadedError(NotServedError):
    """The queue is full."""

    status = 429


class ClosingError(NotServedError):
    """The server ends."""

    status = 503


class TimedOutError(NotServedError):
    """A job took longer than the limit."""

    status = 504


class Told(NamedTuple):
    """A new token of a choice."""

    choice: "Choice"
    place: int  # of the token in the choice
    text: str  # that it settles

    @property
    def is_last(self) -> bool:
        """Return True if the choice ended with this token."""
        return self.choice.row.ending is not None and self.place + 1 == len(self.choice.row.tokens)


class Choice:
    """One continuation of a job, which draws with a seed of its own."""

    def __init__(self, job: "Job", row: Row, generator: torch.Generator) -> None:
        self.job, self.row, self.generator = job, row, generator
        self.likeliest: list[Likeliest] = []  # at each place, where the job asks for some
        self.starts: list[int] = []  # of each token in the text, in characters

    def take(self, token: int, log_prob: float, likeliest: Likeliest) -> Told:
        """Take the next token; the last that may come ends the row."""
        self.starts.append(len(self.row.text))
        self.likeliest.append(likeliest)
        text = self.row.push(token, log_prob)
        if len(self.row.tokens) == self.job.max_new_tokens:
            text += self.row.close()
        return Told(self, len(self.row.tokens) - 1, text)

    def last_ids(self, count: int) -> list[int]:
        """Return the last `count` ids of prompt and continuation."""
        made = self.row.tokens[-count:]
        return [*self.job.ids[len(made) - count :], *made] if len(made) < count else made


@dataclass(eq=False)
class Job:
    """A prompt, and how to continue the prompt.

    `tell` is called in the model's thread: for each token of each choice, or once with an error that ends the job.
    """

    ids: list[int]
    sampler: Sampler
    max_new_tokens: int
    tell: Callable[[Told | NotServedError], None]
    top: int = 0  # how many of the likeliest tokens are told at each place
    seconds: float = float("inf")  # that it may take
    choices: list[Choice] = field(default_factory=list)
    prefix: Prefix | None = None  # what of the prompt has been read
    is_cancelled: bool = False
    started: float = field(default_factory=time.monotonic)

    def add_choices(
        self, tokenizer: Tokenizer, seeds: Sequence[int], stop: Sequence[str], *, device: torch.device
    ) -> None:
        """Add a continuation for each seed."""
        for seed in seeds:
            generator = torch.Generator(device).manual_seed(seed)
            self.choices.append(Choice(self, Row(tokenizer, stop=stop), generator))

    @property
    def is_read(self) -> bool:
        """Return True if the model has read the whole prompt."""
        return self.prefix is not None and self.prefix.tokens.shape[1] >= len(self.ids)

    @property
    def is_late(self) -> bool:
        """Return True if the job has taken longer than the limit."""
        return time.monotonic() - self.started > self.seconds
