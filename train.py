"""Train a Performer language model: `python train.py [group=choice ...] [key=value ...]`. See configs/train.yaml."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from performer_lm.cli import Section, Sweep, as_typed, main, sweep_folder, usage_errors

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: "DictConfig") -> float:
    """Train one model and return its best validation bits per byte."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from performer_lm.training.output import lasting_output
    from performer_lm.training.prepare import prepare

    job = HydraConfig.get()
    number = int(job.job.num) if job.mode == RunMode.MULTIRUN else None
    if number is not None:
        cfg.run_dir = sweep_folder() or cfg.run_dir  # the same for every job, wherever and whenever it starts
    with lasting_output():
        with usage_errors():
            overrides = as_typed(job.overrides.task)
            ready = prepare(cfg, overrides=overrides, job=number)
        return ready.fit()


def close(folder: Path) -> None:
    """Say what the jobs of a sweep have reached."""
    from performer_lm.training.output import lasting_output
    from performer_lm.training.sweep import close_sweep

    with lasting_output():
        close_sweep(folder)


if __name__ == "__main__":
    main(
        run,
        config_name="train",
        config_path=Path(__file__).parent / "configs",
        keys={
            "compile": bool,
            "seed": Annotated[int, Ge(0), Le(2**32 - 1)],
            "ckpt": str | None,
            "init": str | None,
            "run_dir": str,
            "resume.allow": list[str],
            **dict.fromkeys(("model", "data", "objective", "trainer"), Section),
            **dict.fromkeys(("optimizer", "schedule"), Callable),
            **dict.fromkeys(("callbacks", "logger"), dict[str, Section | None] | None),
        },
        supplied={"model": ["vocab_size"]},
        sweep=Sweep(folder_key="run_dir", close=close),
    )
