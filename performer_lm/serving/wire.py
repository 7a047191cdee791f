"""OpenAI's requests as jobs: every mistake is one line that names the parameter."""

import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from performer_lm.data.tokenizer import Tokenizer
from performer_lm.generation.batch import encode_prompts
from performer_lm.generation.decode import check_room
from performer_lm.generation.sampling import Sampler
from performer_lm.language_model import LanguageModel
from performer_lm.ranges import Count, Positive, ranged, refusal
from performer_lm.serving.chat import encode_messages
from performer_lm.serving.jobs import Choice, Job
from performer_lm.serving.parameters import CHATS, TEXTS, all_are, messages_of, parse, sampling_options, stop_strings
from performer_lm.wording import short

MOST_LIKELIEST: Final = 20


class UnknownModelError(ValueError):
    """A request for a model that is not served."""


@dataclass(eq=False)
class Asked:
    """A request: its jobs, a prompt each, and how their answer is written."""

    is_chat: bool
    model: str
    jobs: list[Job]
    n: int
    streams: bool = False
    tells_usage: bool = False
    log_probs: int | None = None  # the likeliest tokens told at each place; None: nothing of log-probabilities
    echoes: list[str] = field(default_factory=list)  # the prompts, where they are given back
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        """Name the request."""
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"

    @property
    def choices(self) -> list[Choice]:
        """Return the continuations in the order of their indexes."""
        return [choice for job in self.jobs for choice in job.choices]


@ranged
class Reader:
    """Reads requests into jobs for one model.

    Args:
        model: which continues.
        tokenizer: the model's.
        name: of the model, for requests.
        max_rows: continuations of a request.
        max_prompt_tokens: of a prompt.
        max_new_tokens: of a continuation, and what a chat gets that names none.
        timeout: seconds that a job may take, waiting and running.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        name: str,
        max_rows: Count,
        max_prompt_tokens: Count,
        max_new_tokens: Count,
        timeout: Positive,
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.max_rows, self.max_prompt_tokens, self.max_new_tokens = max_rows, max_prompt_tokens, max_new_tokens
        self.timeout, self._device = timeout, model.head.weight.device

    def read(self, body: bytes, tell: Callable[[Any], None], *, is_chat: bool) -> Asked:
        """Return a request's jobs, whose news go to `tell`.

        Raises:
            ValueError: for the first mistake, in one line.
        """
        given = parse(body, CHATS if is_chat else TEXTS)
        if given.get("model", self.name) != self.name:
            raise UnknownModelError(f"model: {short(given['model'])} is not served here, '{self.name}' is")
        n, top = given.get("n", 1), self._top(given, is_chat=is_chat)
        texts, prompts = self._prompts(given, is_chat=is_chat)
        if not 1 <= n * len(prompts) <= self.max_rows:
            told = f"{len(prompts)} x {short(n)}"
            raise ValueError(f"n: prompts x n must be at least 1 and at most {self.max_rows} (max_rows), got {told}")
        seed = given.get("seed", random.SystemRandom().randrange(2**31))
        if problem := refusal(seed) or refusal(seed + n):
            raise ValueError(f"seed {problem}")
        sampler = Sampler(**sampling_options(given))
        sampler.check(self.tokenizer.vocab_size)
        jobs = []
        for ids in prompts:
            most = self._max_new_tokens(given, len(ids), is_chat=is_chat)
            job = Job(ids, sampler, most, tell, top=top or 0, seconds=self.timeout)
            job.add_choices(self.tokenizer, range(seed, seed + n), stop_strings(given), device=self._device)
            jobs.append(job)
        usage = bool(given.get("stream_options", {}).get("include_usage"))
        echoes = texts if given.get("echo") else []
        return Asked(is_chat, self.name, jobs, n, given.get("stream", False), usage, top, echoes)

    def _prompts(self, given: dict[str, Any], *, is_chat: bool) -> tuple[list[str], list[list[int]]]:
        """Return the prompts as text and as ids."""
        prompt = given.get("prompt", "")
        texts: list[Any] = prompt if isinstance(prompt, list) and not all_are(prompt, int) else [prompt]
        if is_chat:
            ids = [encode_messages(self.tokenizer, messages_of(given.get("messages")))]
        elif not texts:
            raise ValueError("prompt: the list is empty")
        elif all_are(texts, str):
            ids = encode_prompts(self.tokenizer, texts, may_be_empty=False)
        else:
            ids = [self._check_ids(each) for each in texts]
            texts = [self.tokenizer.decode(each) for each in ids]
        for each in ids:
            if len(each) > self.max_prompt_tokens:
                raise ValueError(f"a prompt of {len(each)} tokens: at most {self.max_prompt_tokens} are read here")
        return texts, ids

    def _check_ids(self, ids: Any) -> list[int]:
        if not isinstance(ids, list) or not ids or not all_are(ids, int):
            raise ValueError(f"prompt: wanted text, a list of texts, or token ids, got {short(ids)}")
        last = self.tokenizer.vocab_size - 1
        for token in ids:
            if not 0 <= token <= last:
                raise ValueError(f"prompt: there is no token {short(token)}, the ids are 0 to {last}")
        return ids

    def _max_new_tokens(self, given: dict[str, Any], tokens: int, *, is_chat: bool) -> int:
        name = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
        room = self.model.room_after(tokens)
        most = self.max_new_tokens if room is None else min(self.max_new_tokens, max(1, room))
        count = given.get(name, most if is_chat else min(16, most))
        if not 1 <= count <= self.max_new_tokens:
            raise ValueError(f"{name} must be at least 1 and at most {self.max_new_tokens}, got {short(count)}")
        check_room(self.model, tokens, count)
        return int(count)

    @staticmethod
    def _top(given: dict[str, Any], *, is_chat: bool) -> int | None:
        """Return how many likeliest tokens a request wants at each place; None for no log-probabilities."""
        name = "top_logprobs" if is_chat else "logprobs"
        if is_chat and not given.get("logprobs"):
            if name in given:
                raise ValueError("top_logprobs needs logprobs: true")
            return None
        top: int | None = given.get(name, 0 if is_chat else None)
        if top is not None and not 0 <= top <= MOST_LIKELIEST:
            raise ValueError(f"{name} must be at least 0 and at most {MOST_LIKELIEST}, got {short(top)}")
        if top is not None and given.get("echo"):
            raise ValueError("logprobs are of the continuation alone: leave out echo")
        return top
