import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from performer_lm.training import plot
from performer_lm.training.plot import draw_metrics

ROWS = [
    {"step": step, "train/loss": 5.0 / step, "train/lr": 0.1, "train/lr_matrices": 0.2, "train/tokens_per_second": 9.0}
    for step in range(1, 31)
]
ROWS[9] |= {"val/loss": 3.0, "val/bpb": 1.9}
ROWS[19] |= {"val/loss": 2.0, "val/bpb": 1.5}
ROWS[29] |= {"val/loss": 2.5, "val/bpb": 1.7}


def drawn(rows: list[dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    made: list[Figure] = []
    build = Figure.__init__

    def keep(self: Figure, *arguments: object, **options: object) -> None:
        build(self, *arguments, **options)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(Figure, "__init__", keep)
    draw_metrics(rows, tmp_path / "m.png", title="runs/a")
    return made[0]


def test_every_panel_shows_its_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(ROWS, tmp_path, monkeypatch)
    loss, bpb, rate, speed = figure.axes
    assert [axes.get_title(loc="left").split()[0] for axes in figure.axes] == [
        "loss",
        "validation",
        "learning",
        "tokens",
    ]
    assert loss.lines[0].get_ydata().tolist() == [row["train/loss"] for row in ROWS]
    assert loss.lines[2].get_xdata().tolist() == [10, 20, 30]
    assert bpb.texts[0].get_text() == "best 1.5000 at step 20"
    assert [line.get_ydata()[0] for line in rate.lines] == [0.1, 0.2]
    assert speed.lines[1].get_label() == "median 9"


@pytest.mark.parametrize("rows", [[{"step": 1.0}], [{"step": 1, "train/loss": 2.0}], [{"step": 1, "val/bpb": 2.0}]])
def test_what_is_missing_is_left_out(rows: list[dict[str, float]], tmp_path: Path) -> None:
    draw_metrics(rows, tmp_path / "m.png", title="runs/a")
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "title", ["x$^$y", "$\\frac$", "a_$1$", b"\xff\xfe".decode(errors="surrogateescape"), "日本", "\x1b[1m"]
)
def test_any_title_is_drawn_as_it_is(title: str, tmp_path: Path) -> None:
    draw_metrics(ROWS, tmp_path / "m.png", title=title)
    assert (tmp_path / "m.png").stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]


def test_pyplot_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    draw_metrics(ROWS, tmp_path / "m.png", title="runs/a")
    assert "matplotlib.pyplot" not in sys.modules


def test_long_runs_are_thinned_by_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "POINTS", 10)
    steps, values = plot._thin(np.arange(100.0), np.arange(100.0) * 2)
    assert steps.tolist() == [4.5 + 10 * index for index in range(10)]
    assert values.tolist() == (2 * steps).tolist()


def test_smoothing_keeps_lines_straight_and_means() -> None:
    assert plot._smooth(np.full(200, 3.0)).tolist() == pytest.approx([3.0] * 200)
    line = np.arange(400.0)
    assert plot._smooth(line)[20:-20].tolist() == pytest.approx(line[20:-20].tolist())
