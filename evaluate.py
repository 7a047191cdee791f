"""Measure a trained model on text: `python evaluate.py ckpt=runs/latest [task=approximation] [attn=exact]`."""

from pathlib import Path
from typing import TYPE_CHECKING

from performer_lm.cli import Section, main, usage_errors
from performer_lm.cli.opening import open_data, open_from

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: "DictConfig") -> float:
    """Let `task` measure the model, and return what it found."""
    from omegaconf import OmegaConf

    from performer_lm import checkpoint
    from performer_lm.building import build
    from performer_lm.evaluation.base import Subject

    with usage_errors():
        opened = open_from(cfg)
        model, tokenizer, file = opened
        seeded = OmegaConf.merge(cfg, {"seed": file.section["seed"]})  # projections are those of the model's own seed
        task = build(OmegaConf.to_container(seeded.task, resolve=True), key="task")
        folder = checkpoint.holder(file.path)
        task.check(model, folder=folder)
        objective = checkpoint.open_objective(file, model, tokenizer)
        data = open_data(cfg, opened)
        objective.check(model, packed=data.is_packed, answers=data.has_answers)
        return float(task(Subject(model, objective, data, folder, file)))


if __name__ == "__main__":
    main(
        run,
        config_name="evaluate",
        config_path=Path(__file__).parent / "configs",
        keys={
            "ckpt": str,
            "seed": int,
            "device": str,
            "task": Section,
            "tokenizer": Section,
            "data.context": int | None,  # of a run's own text; with data= they are the data's own
            "data.batch_size": int | None,
        },
        supplied={"tokenizer": ["plain"]},
    )
