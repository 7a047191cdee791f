"""Write a trained model as a folder of Hugging Face: `python export.py ckpt=runs/latest out=DIR`."""

from pathlib import Path
from typing import TYPE_CHECKING

from performer_lm.cli import main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: "DictConfig") -> None:
    """Write the folder, and send it to the hub where that is asked for."""
    from performer_lm.cli.exporting import export

    export(cfg)


if __name__ == "__main__":
    main(
        run,
        config_name="export",
        config_path=Path(__file__).parent / "configs",
        keys={"ckpt": str, "out": str, "push": bool, "repo": str | None, "private": bool},
    )
