"""A server of a tiny model in this process, on a free port, and OpenAI's own client for it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from openai import OpenAI

from performer_lm.data.tokenizer import ByteTokenizer, Tokenizer
from performer_lm.generation.batch import complete
from performer_lm.generation.sampling import Sampler
from performer_lm.generation.text import Row
from performer_lm.language_model import LanguageModel
from performer_lm.model import PerformerLM
from performer_lm.serving.scheduler import Scheduler
from performer_lm.serving.server import Server, open_socket
from performer_lm.serving.wire import Reader

LIMITS = {"max_rows": 64, "max_waiting": 64, "prefix_bytes": 2**24}


class Served:
    """A server that runs, and what asks it."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.scheduler, self.url = server, server.scheduler, f"http://127.0.0.1:{port}"
        self.http = httpx.Client(timeout=60, trust_env=False, verify=False)  # certificates take a while to read
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=self.http)

    def complete(self, prompt: Any, **options: Any) -> Any:
        extra = {name: options.pop(name) for name in ("banned_tokens", "top_k") if name in options}
        return self.client.completions.create(model="tiny", prompt=prompt, extra_body=extra, **options)

    def post(self, path: str = "/v1/completions", **options: Any) -> Any:
        return self.http.post(f"{self.url}{path}", **options)

    @staticmethod
    def wait_until(holds: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < end
            time.sleep(0.005)


@contextmanager
def serving(model: LanguageModel, tokenizer: Tokenizer | None = None, **limits: Any) -> Iterator[Served]:
    """Serve a model in a thread."""
    tokenizer = tokenizer or ByteTokenizer()
    own = {**LIMITS, **limits}
    read = {"max_prompt_tokens": 5000, "max_new_tokens": 1000, "timeout": 60.0}
    read |= {name: own.pop(name) for name in list(own) if name in read}
    body = own.pop("max_body_bytes", 10_000)
    scheduler = Scheduler(model, **own)
    reader = Reader(model, tokenizer, name="tiny", max_rows=own["max_rows"], **read)
    server = Server(scheduler, reader, max_body_bytes=body)
    listening = open_socket("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    served = Served(server, listening.getsockname()[1])
    try:
        yield served
    finally:
        served.client.close()
        scheduler.close(server.end, at_once=True)
        thread.join()
        listening.close()


@pytest.fixture
def serve() -> Callable[..., Any]:
    """Return the context manager that serves a model."""
    return serving


@pytest.fixture(scope="session")
def tiny(lively_model: Callable[..., PerformerLM]) -> PerformerLM:
    return lively_model("model.depth=1", vocab_size=257)


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., list[Row]]:
    """Return a function from a model, a prompt and options to what generation gives for them."""

    def generate(
        model: LanguageModel, prompt: str, *, max_tokens: int, seed: int = 0, n: int = 1, stop: Any = (), **options: Any
    ) -> list[Row]:
        sampler = Sampler(**options)
        made = complete(
            model,
            ByteTokenizer(),
            [prompt],
            max_new_tokens=max_tokens,
            sampler=sampler,
            seed=seed,
            num_samples=n,
            stop=stop,
        )
        return next(made)

    return generate
