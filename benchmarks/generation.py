"""Generation of the default model: over the context, in rows, with every sampling rule, and after a million tokens.

    python benchmarks/generation.py [context] [prefill] [rows] [rules] [million]

All parts but `million` unless some are named. What is compared is timed in turns within one process, medians; weights
are untrained. `context` has performer-pytorch beside (`pip install -e '.[bench]'`), which runs the whole prefix for a
token. `million` streams 20,000 tokens after a prompt of 1,000,000, in a process of its own: about ten minutes on two
quiet cores, all others together three. Writes results/generation.json.
"""

import json
import multiprocessing
import statistics
import sys
import time
from itertools import islice
from typing import Any

import torch
from decoding import build
from measure import RESULTS, THREADS, Run, status, time_together, write_results
from peer import build_theirs
from torch import Tensor, nn

from performer_lm.attention.base import fork
from performer_lm.generation.decode import Prefix, decode, draw_tokens, read
from performer_lm.generation.sampling import Sampler
from performer_lm.model import PerformerLM
from performer_lm.performer import PerformerState

VOCABULARY = 2048
CONTEXTS = {"favor": (128, 2048, 16384, 65536), "delta": (128, 2048, 65536), "flash": (128, 2048, 16384)}
PREFILL = {"favor": 65536, "delta": 65536, "flash": 16384}
STEPS, ROUNDS = 16, 9
ALL_RULES = Sampler(
    temperature=0.8,
    top_k=50,
    top_p=0.9,
    min_p=0.02,
    typical_p=0.95,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
    presence_penalty=0.1,
    no_repeat_ngram_size=3,
    banned_tokens=(0,),
    logit_bias={1: 1.0},
)


def some_tokens(rows: int, count: int) -> Tensor:
    """Return random ids `(rows, count)`."""
    return torch.randint(0, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(0))


def steps_of(model: PerformerLM, state: PerformerState, rows: int = 1) -> Run:
    """Return a run of `STEPS` decoding steps from a state, which stays as it is."""
    token = some_tokens(rows, 1)

    @torch.inference_mode()
    def run() -> None:
        own = fork(state)
        for _ in range(STEPS):
            _, own = model.extend(token, own)

    return run


def last_token_of(model: nn.Module, length: int) -> Run:
    """Return a run of the whole prefix for one token, as a model without a state does."""
    tokens = some_tokens(1, length) % 256

    @torch.inference_mode()
    def run() -> None:
        model(tokens)

    return run


def draws_of(model: PerformerLM, prefix: Prefix, sampler: Sampler) -> Run:
    """Return a run of `STEPS` tokens drawn after a prefix, which stays as it is."""

    def run() -> None:
        own = Prefix(prefix.tokens, prefix.mask, prefix.logits, fork(prefix.state))
        for _ in draw_tokens(model, own, max_new_tokens=STEPS, sampler=sampler):
            pass

    return run


def prompt_of(model: PerformerLM, length: int) -> Run:
    """Return a run that reads a prompt."""
    tokens = some_tokens(1, length)

    def run() -> None:
        read(model, tokens)

    return run


def measure_context() -> dict[str, Any]:
    """Return the milliseconds of a token after short and long contexts, per backend, and the peer's."""
    runs: dict[str, Run] = {}
    for name, contexts in CONTEXTS.items():
        model = build(name)
        for context in contexts:
            prefix = read(model, some_tokens(1, context), max_new_tokens=STEPS)
            runs[f"{name} {context}"] = steps_of(model, prefix.state)
    found = {name: 1000 * each / STEPS for name, each in time_together(runs, repeats=ROUNDS).items()}
    peer = build_theirs(max_seq_len=2048, heads=8).eval()
    theirs = {f"performer-pytorch {n}": last_token_of(peer, n) for n in (128, 2048)}
    both = time_together({**theirs, "favor 2048": runs["favor 2048"]}, repeats=3)
    found |= {name: 1000 * both[name] for name in theirs}
    found["times performer-pytorch's at 2048"] = both["performer-pytorch 2048"] / (both["favor 2048"] / STEPS)
    return found


def measure_prefill() -> dict[str, Any]:
    """Return the tokens a second at which a long prompt is read."""
    runs = {f"{name} {length}": prompt_of(build(name), length) for name, length in PREFILL.items()}
    seconds = time_together(runs, repeats=2, warm_up=False)
    return {name: int(name.split()[1]) / each for name, each in seconds.items()}


def measure_rows() -> dict[str, Any]:
    """Return the tokens a second of all rows together."""
    model = build("favor")
    runs = {rows: steps_of(model, read(model, some_tokens(rows, 64)).state, rows) for rows in (1, 8, 32)}
    seconds = time_together({str(rows): run for rows, run in runs.items()}, repeats=ROUNDS)
    return {f"{rows} rows": rows * STEPS / seconds[str(rows)] for rows in runs}


def measure_rules() -> dict[str, Any]:
    """Return how much longer a token takes with every sampling rule than greedily, in rows of 1 and 32."""
    model, found = build("favor"), {}
    for rows in (1, 32):
        prefix = read(model, some_tokens(rows, 512), max_new_tokens=STEPS)
        samplers = {"greedy": Sampler(temperature=0), "plain": Sampler(), "all rules": ALL_RULES}
        runs = {name: draws_of(model, prefix, sampler) for name, sampler in samplers.items()}
        seconds = time_together(runs, repeats=ROUNDS)
        found[f"{rows} rows"] = {name: 1000 * each / STEPS for name, each in seconds.items()}
        found[f"{rows} rows"]["all rules over plain"] = seconds["all rules"] / seconds["plain"]
    return found


def stream_million() -> dict[str, Any]:
    """Return how time and memory go while 20,000 tokens follow a prompt of a million."""
    torch.set_num_threads(THREADS)
    model = build("favor")
    for _ in decode(model, some_tokens(1, 4096), max_new_tokens=64, sampler=Sampler()):
        pass  # libraries and buffers are not the prompt's
    prompt, start, before = some_tokens(1, 1_000_000), time.perf_counter(), status("VmRSS")
    tokens = decode(model, prompt, max_new_tokens=20_000, sampler=Sampler())
    next(tokens)
    read_in, after = time.perf_counter() - start, status("VmRSS")
    times, held = [], []
    while True:
        start = time.perf_counter()
        if not (count := sum(1 for _ in islice(tokens, 1000))):
            break
        times.append(1000 * (time.perf_counter() - start) / count)
        held.append(status("VmRSS"))
    return {
        "prefill tokens/s": 1_000_000 / read_in,
        "MiB before, after the prompt, at the end": [round(b / 2**20, 1) for b in (before, after, held[-1])],
        "growth while generating": held[-1] / after - 1,
        "ms per token, first and last thousand": [times[0], times[-2]],
        "median ms per token": statistics.median(times),
    }


PARTS = {"context": measure_context, "prefill": measure_prefill, "rows": measure_rows, "rules": measure_rules}


def main() -> None:
    """Measure the parts asked for, and keep what was measured of the others."""
    torch.set_num_threads(THREADS)
    wanted = sys.argv[1:] or list(PARTS)
    file = RESULTS / "generation.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found.pop("machine", None)
    for name in wanted:
        if name == "million":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[name] = pool.apply(stream_million)
        else:
            found[name] = PARTS[name]()
        print(name, json.dumps(found[name], indent=1), flush=True)
        write_results("generation", found)


if __name__ == "__main__":
    main()
