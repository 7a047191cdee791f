"""Take over a model of transformers or llama.cpp: `python convert.py source=FOLDER_OR_GGUF [out=runs/NAME]`."""

from pathlib import Path
from typing import TYPE_CHECKING

from performer_lm.cli import main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: "DictConfig") -> None:
    """Write a checkpoint with the model and the tokenizer of the source."""
    from performer_lm.cli.converting import write_converted

    write_converted(cfg)


if __name__ == "__main__":
    main(
        run,
        config_name="convert",
        config_path=Path(__file__).parent / "configs",
        keys={"source": str | None, "out": str},
    )
