"""Time a decoded token of SmolLM2-135M and of its Performers, and count their bytes of state, by length of the text.

    python benchmarks/converting_decoding.py source=FILE.gguf [lengths=512,4096,16384]

Models are timed in turns, medians; weights do not change the time, so the students have not learned. Writes
results/converting.json.
"""

import statistics
import time
from typing import Any

import torch
from teacher import CONTEXT, TEACHER, make_teacher, open_student, read_options, save

from performer_lm.attention.joining import count_bytes


@torch.inference_mode()
def measure_decoding(lengths: list[int], *, steps: int = 8, rounds: int = 5) -> list[dict[str, Any]]:
    """Return milliseconds a token and bytes of state after texts of some lengths, backends timed in turns."""
    names = {"teacher": "", "favor": "attn=favor", "delta": "attn=delta attn.num_features=128"}
    names |= {"local, 128 and the first": "attn=local attn.window=128 attn.sinks=1"}
    models = {name: open_student(TEACHER, words) for name, words in names.items()}
    token, rows = torch.zeros(1, 1, dtype=torch.int64), []
    for length in lengths:
        states = {name: model.init_state(1, max_len=length + steps * rounds) for name, model in models.items()}
        for block in torch.randint(0, 1000, (1, length)).split(CONTEXT, dim=1):
            states = {name: models[name].extend(block, state, last_only=True)[1] for name, state in states.items()}
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name, model in models.items():
                started = time.perf_counter()
                for _ in range(steps):
                    _, states[name] = model.extend(token, states[name])
                times[name].append(1000 * (time.perf_counter() - started) / steps)
        for name in names:
            milliseconds = round(statistics.median(times[name]), 2)
            rows.append({"model": name, "length": length, "ms": milliseconds, "bytes": count_bytes(states[name])})
            print(rows[-1], flush=True)
    return rows


def tabulate(rows: list[dict[str, Any]]) -> str:
    """Return milliseconds and mebibytes by length."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    lines = [f"| | {' | '.join(f'{length:,} tokens' for length in lengths)} |", "|---" * (1 + len(lengths)) + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [f"{row['ms']:.1f} ms, {row['bytes'] / 2**20:.1f} MiB" for row in rows if row["model"] == model]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the lengths that are named, and print the table."""
    options = read_options()
    make_teacher(options)
    lengths = options.get("lengths", "512,4096,16384").split(",")
    rows = measure_decoding([int(length) for length in lengths])
    save(decoding=rows)
    print(tabulate(rows))


if __name__ == "__main__":
    main()
