"""FAVOR's engine in this checkout against the engine of an earlier commit, in turns, on the same inputs.

    python benchmarks/against.py COMMIT

Each commit runs in a process of its own, from a worktree that is removed at the end; while one process is timed the
other waits. Measured are forward and backward at two shapes, and the decoding step of one layer; medians. Writes
results/against.json. About ten minutes on two quiet cores.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import THREADS, Run

ROOT = Path(__file__).parents[1]
SHAPES = {"d 64, m 266": {"d": 64, "m": 266}, "d 32, m 64": {"d": 32, "m": 64}}
LENGTHS, STEPS, ROUNDS = (1024, 2048, 4096, 8192, 16384), 200, 9


def serve() -> None:
    """Time the cases named on the standard input, one a line, and answer each with its seconds; `drop` forgets all."""
    from attention import build, draw, train  # those of the commit that this process runs

    torch.set_num_threads(THREADS)
    runs: dict[str, Run] = {}

    def prepare(case: str) -> Run:
        shape, length = case.split(": ")
        if length != "step":
            return train(int(length), "favor", **SHAPES[shape])
        attention = build(**SHAPES[shape]).eval()
        q, k, v = draw(512, SHAPES[shape]["d"], grad=False)
        empty = attention.init_state(1, max_len=0, device=q.device, dtype=q.dtype)
        with torch.inference_mode():
            _, start = attention.extend(q, k, v, empty)
        one = [x[:, :, :1] for x in (q, k, v)]

        @torch.inference_mode()
        def run() -> None:
            state = start
            for _ in range(STEPS):
                _, state = attention.extend(*one, state)

        return run

    for line in sys.stdin:
        case = line.strip()
        if case == "drop":
            runs.clear()
            continue
        if case not in runs:
            runs[case] = prepare(case)
            runs[case]()  # libraries and buffers are not the run's
        start = time.perf_counter()
        runs[case]()
        print(time.perf_counter() - start, flush=True)


class Commit:
    """The process that runs one commit."""

    def __init__(self, root: Path) -> None:
        path = os.pathsep.join(map(str, (root, root / "benchmarks")))  # its package and its benchmarks win
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import runpy; runpy.run_path({str(Path(__file__))!r})['serve']()"],
            cwd=root,  # whose package comes before any other
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, line: str) -> None:
        """Hand the process a case, or `drop`."""
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def time(self, case: str) -> float:
        """Return the seconds of one run of a case."""
        assert self.process.stdout is not None
        self.send(case)
        return float(self.process.stdout.readline())

    def end(self) -> None:
        """End the process."""
        self.process.communicate()


def main() -> None:
    """Time all cases in turns."""
    from measure import write_results  # which earlier commits may lack

    name, found = sys.argv[1], {}
    cases = [f"{shape}: {length}" for shape in SHAPES for length in (*LENGTHS, "step")]
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder) / "earlier"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(earlier), name], check=True, capture_output=True)
        commits = {name: Commit(earlier), "now": Commit(ROOT)}
        try:
            for case in cases:
                seconds: dict[str, list[float]] = {commit: [] for commit in commits}
                for _ in range(ROUNDS):
                    for commit, process in commits.items():
                        seconds[commit].append(process.time(case))
                medians = {commit: statistics.median(each) for commit, each in seconds.items()}
                found[case] = {**medians, "now over earlier": medians["now"] / medians[name]}
                print(f"{case:20} {name} {medians[name]:.4f} s, now {medians['now']:.4f} s, ", end="")
                print(f"{found[case]['now over earlier']:.2f} of it", flush=True)
                for process in commits.values():
                    process.send("drop")
        finally:
            for process in commits.values():
                process.end()
            subprocess.run([*git, "remove", "--force", str(earlier)], check=True)
    write_results("against", {"earlier": name, "seconds": found})


if __name__ == "__main__":
    main()
