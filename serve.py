"""Serve a trained model over HTTP, as OpenAI's clients ask: `python serve.py ckpt=runs/latest`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from performer_lm.cli import main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: "DictConfig") -> None:
    """Serve the model that a config names, until Ctrl-C."""
    from performer_lm.cli.serving import serve

    serve(cfg)


if __name__ == "__main__":
    main(
        run,
        config_name="serve",
        config_path=Path(__file__).parent / "configs",
        keys={
            "ckpt": str,
            "model_name": str | None,
            "host": str,
            "port": Annotated[int, Ge(0), Le(65535)],
            "max_rows": int,
            "max_waiting": int,
            "max_prompt_tokens": int,
            "max_new_tokens": int,
            "max_body_bytes": int,
            "prefix_bytes": int,
            "timeout": float,
            "device": str,
        },
    )
