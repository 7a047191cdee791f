"""Measure a trained model on text: `python evaluate.py ckpt=runs/latest [task=approximation] [attn=exact]`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from performer_lm.cli import Section, main, usage_errors

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: "DictConfig") -> float:
    """Let `task` measure the model, and return what it found."""
    from omegaconf import OmegaConf

    from performer_lm import checkpoint
    from performer_lm.building import build
    from performer_lm.cli.opening import open_from, typed_overrides
    from performer_lm.evaluation.base import Subject
    from performer_lm.evaluation.measured_text import open_data

    with usage_errors():
        model, tokenizer, file = open_from(cfg)
        seeded = OmegaConf.merge(cfg, {"seed": file.section["seed"]})  # projections are those of the model's own seed
        task = build(OmegaConf.to_container(seeded.task, resolve=True), key="task")
        folder = checkpoint.holder(file.path)
        task.check(model, folder=folder)
        objective = checkpoint.open_objective(file, model, tokenizer)
        given: Any = OmegaConf.to_container(cfg.data, resolve=True)
        data = open_data(given, file, tokenizer, typed=typed_overrides())
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
