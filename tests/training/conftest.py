"""Tiny runs, built as train.py builds them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from performer_lm.cli import usage_errors
from performer_lm.training.callbacks.summary import ModelSummary
from performer_lm.training.loggers import record
from performer_lm.training.prepare import prepare
from performer_lm.training.run import Run

Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> Start:
    """Return a function from overrides to a tiny run on a text of our own; it skips picture and costs, to be quick."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "draw_metrics", lambda *arguments, **options: None)
    monkeypatch.setattr(ModelSummary, "on_train_start", Callback.on_train_start)
    Path("text.txt").write_text(lines)

    def prepared(*overrides: str) -> Run:
        from hydra import compose, initialize_config_dir

        base = [
            "debug=fast",
            "callbacks.samples.max_new_tokens=16",
            "data=files",
            "data.path=text.txt",
            "tokenizer=bytes",
            "attn.chunk_size=16",
        ]
        unfit: tuple[str, ...] = tuple(f"{group}." for group in ("attn", "callbacks") if f"{group}=" in str(overrides))
        unfit += ("debug=",) if "debug=" in str(overrides) else ()
        own = [override for override in base if not override.startswith(unfit)]
        configs = str(Path(__file__).parents[2] / "configs")
        with initialize_config_dir(configs, version_base="1.3"):
            cfg = compose("train", overrides=[*own, *overrides])
        with usage_errors():
            return prepare(cfg, overrides=list(overrides))

    return prepared
