"""The end of a sweep: one table and one picture over its jobs, and `sweep.csv`.

A job that came to its end has a `summary.json` in its folder; one that failed has a line in `failures.jsonl` beside the
folders; one that was killed has neither.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from performer_lm.training.plot import printable
from performer_lm.training.report import spared
from performer_lm.writing import write_csv, write_png

FAILURES = "failures.jsonl"
MEASURES = {  # of a summary: what it is called here, and in which unit
    "parameters": ("parameters", 1.0),
    "tokens_per_second": ("tokens/s", 1.0),
    "peak_memory": ("peak memory (MiB)", 2.0**-20),
    "best_val_bpb": ("val bpb", 1.0),
    "last_val_accuracy": ("val accuracy", 1.0),
}
OPTIONAL = ("last_val_accuracy",)  # only data that ask for answers have it
Row = dict[str, Any]


def close_sweep(folder: Path) -> None:
    """Print the table of the sweep in `folder`, and write `sweep.csv` and `sweep.png`."""
    rows: list[Row] = []
    with spared("sweep.csv"):
        rows = collect(folder)
        if not rows:
            return
        write_csv(folder / "sweep.csv", list(rows[0]), (row.values() for row in rows))
    with spared("the table of the sweep"):
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 160  # a file has no edge to wrap at
        console.print(table(rows, title=str(folder)))
    with spared("sweep.png"):
        draw(rows, folder / "sweep.png")


def collect(folder: Path) -> list[Row]:
    """Return a row per job: its number, the options varied, its measures, and how it ended."""
    told: dict[int, Row] = {}
    for path in folder.glob("*/config.yaml"):
        if path.parent.name.isdecimal():
            told[int(path.parent.name)] = {"overrides": [], "ended": "unfinished"}
    for path in folder.glob("*/summary.json"):
        summary = _read_object(path.read_bytes())
        if path.parent.name.isdecimal() and _tells(summary, best_val_bpb=int | float):
            told[int(path.parent.name)] = {**summary, "ended": "done"}
    if (folder / FAILURES).exists():
        for line in (folder / FAILURES).read_bytes().splitlines():
            failure = _read_object(line)
            if not _tells(failure, job=int, error=str):
                continue
            if told.get(failure["job"], {}).get("ended") != "done":  # it may have been run again, and well
                told[failure["job"]] = {**failure, "ended": failure["error"]}
    varied = _varied([_settings(job) for job in told.values()])
    known = {key: MEASURES[key] for key in MEASURES if key not in OPTIONAL or any(key in job for job in told.values())}
    rows = []
    for number, job in sorted(told.items()):
        measured = {name: job[key] * unit if key in job else "" for key, (name, unit) in known.items()}
        chosen = {name: _settings(job).get(name, "") for name in varied}
        rows.append({"job": number, **chosen, **measured, "ended": job["ended"]})
    return rows


def _read_object(text: bytes) -> Row:
    """Return a JSON object, and nothing for one that a kill cut short."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _tells(found: Row, **wanted: Any) -> bool:
    """Return True for the report of a job: its overrides, and values of the types `wanted`."""
    is_typed = all(isinstance(found.get(name), kind) for name, kind in wanted.items())
    return is_typed and isinstance(found.get("overrides"), list)


def table(rows: Sequence[Row], *, title: str) -> Table:
    """Return the rows as people read them, the best score marked."""
    shown = Table(title=Text(printable(title)), title_justify="left")  # as text: markup would swallow brackets
    for name in rows[0]:
        shown.add_column(name, justify="left" if name == "ended" else "right", overflow="fold")
    scores = [row["val bpb"] for row in rows if row["val bpb"] != ""]
    for row in rows:
        is_best = bool(scores) and row["val bpb"] == min(scores)
        cells = (Text(printable(_spell(name, value))) for name, value in row.items())
        shown.add_row(*cells, style="bold green" if is_best else None)
    return shown


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the measures of all jobs, one panel a measure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    done = [row for row in rows if row["val bpb"] != ""]
    if not done:
        return
    names = [name for name in done[0] if name not in ("job", "ended", *(name for name, _ in MEASURES.values()))]
    labels = [" ".join(f"{name}={_rounded(row[name])}" for name in names) or f"job {row['job']}" for row in done]
    figure = Figure(figsize=(13, 1.2 + 0.35 * len(done)), dpi=120, layout="constrained")
    measured = [name for name, _ in MEASURES.values() if name in done[0]]
    panels = figure.subplots(1, len(measured), sharey=True)
    for panel, name in zip(panels, measured, strict=True):
        values = [float(row[name] or 0) for row in done]
        bars = panel.barh(range(len(done)), values, color="#4878a8")
        panel.bar_label(bars, labels=[_spell(name, value) for value in values], padding=2, fontsize=8)
        panel.set(title=name, xlim=(0, 1.25 * max(values) or 1.0))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2M, and no "1e6" below the axis
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(done)), map(printable, labels), parse_math=False)
    panels[0].invert_yaxis()
    write_png(path, figure)


def _settings(job: Mapping[str, Any]) -> dict[str, str]:
    pairs = (str(override).partition("=") for override in job["overrides"])
    return {name: value for name, _, value in pairs if name not in ("ckpt", "run_dir")}


def _varied(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys that are not the same everywhere; jobs that tell nothing do not count."""
    telling = [each for each in settings if each]
    names = dict.fromkeys(name for each in telling for name in each)
    return [name for name in names if len({each.get(name) for each in telling}) > 1]


def _spell(name: str, value: Any) -> str:
    if value == "":
        return "-"
    if name in ("val bpb", "val accuracy"):
        return f"{value:.4f}"
    if isinstance(value, str):
        return _rounded(value) if name != "ended" else value[:60]
    return f"{value:,.0f}" if isinstance(value, float) or name == "parameters" else str(value)


def _rounded(text: str) -> str:
    """Return a long fraction with five digits; a sweeper draws more than anybody reads."""
    try:
        return f"{float(text):.5g}" if len(text) > 8 and "." in text else text
    except ValueError:
        return text
