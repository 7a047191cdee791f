"""Tokens a second of the server at 32 clients, against a batch of 32 rows of generation itself.

    python benchmarks/serving.py [cuda] [attn ...]

The clients are threads of this process that ask at once, whole answers and streams; server and generation are timed in
turns, with the same prompts, seeds and lengths; medians. Writes results/serving.json, on CUDA serving_cuda.
"""

import http.client
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from decoding import build
from measure import THREADS, take_device, time_together, write_results

from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.generation.batch import complete
from performer_lm.generation.sampling import Sampler
from performer_lm.model import PerformerLM
from performer_lm.serving.scheduler import Scheduler
from performer_lm.serving.server import Server, open_socket
from performer_lm.serving.wire import Reader

CLIENTS, TOKENS, ROUNDS = 32, 128, 5
TEMPERATURE, TOP_K = 0.8, 40
PROMPTS = [f"def function_{index}(" * (1 + index % 4) for index in range(CLIENTS)]
BYTES = ByteTokenizer()
END = BYTES.end_id  # never drawn, so that all rows are as long


def generate(model: PerformerLM) -> None:
    """Continue all prompts as one batch."""
    sampler = Sampler(temperature=TEMPERATURE, top_k=TOP_K, banned_tokens=[END])
    made = complete(model, BYTES, PROMPTS, max_new_tokens=TOKENS, sampler=sampler, seed=0, batch_size=CLIENTS)
    assert sum(len(row.tokens) for rows in made for row in rows) == CLIENTS * TOKENS


def ask(port: int, prompt: str, *, stream: bool) -> bytes:
    """Ask the server for a continuation, and read it to its end."""
    asked = {"prompt": prompt, "max_tokens": TOKENS, "seed": 0, "stream": stream, "banned_tokens": [END]}
    asked |= {"temperature": TEMPERATURE, "top_k": TOP_K}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", json.dumps(asked))
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == 200, body
    connection.close()
    return body


def ask_all(pool: ThreadPoolExecutor, port: int, *, stream: bool) -> None:
    """Ask for the continuations of all prompts at once."""
    answers = [*pool.map(partial(ask, port, stream=stream), PROMPTS)]
    if not stream:
        made: Any = [json.loads(answer)["usage"]["completion_tokens"] for answer in answers]
        assert sum(made) == CLIENTS * TOKENS


def measure(model: PerformerLM, device: torch.device) -> dict[str, float]:
    """Return the seconds of each way to continue all prompts."""
    scheduler = Scheduler(model, max_rows=CLIENTS, max_waiting=CLIENTS, prefix_bytes=0)
    limits = {"max_rows": CLIENTS, "max_prompt_tokens": 1000, "max_new_tokens": TOKENS, "timeout": 600.0}
    server = Server(scheduler, Reader(model, BYTES, name="a", **limits), max_body_bytes=10_000)
    listening = open_socket("127.0.0.1", 0)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    with ThreadPoolExecutor(CLIENTS) as pool:
        ways = {
            "generate": partial(generate, model),
            "server": partial(ask_all, pool, port, stream=False),
            "server, streamed": partial(ask_all, pool, port, stream=True),
        }
        seconds = time_together(ways, repeats=ROUNDS, device=device)
    scheduler.close(server.end)
    thread.join()
    return seconds


def main() -> None:
    """Measure each backend, and tell rates and ratios."""
    device, words = take_device(sys.argv[1:])
    torch.set_num_threads(THREADS)
    results = {}
    for name in words or ["favor", "flash"]:
        seconds = measure(build(name, vocab_size=BYTES.vocab_size).to(device), device)
        rates = {way: CLIENTS * TOKENS / spent for way, spent in seconds.items()}
        results[name] = {
            way: {"tokens_per_second": round(rate, 1), "ratio": round(rate / rates["generate"], 3)}
            for way, rate in rates.items()
        }
        for way, told in results[name].items():
            print(f"{name:8} {way:18} {told['tokens_per_second']:9.1f} tokens/s  {told['ratio']:.2f} of generate's")
    write_results("serving", results, device=device)


if __name__ == "__main__":
    main()
