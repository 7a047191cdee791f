"""Continue a prompt with a trained model: `python generate.py ckpt=runs/latest prompt="def main("`."""

from pathlib import Path
from typing import TYPE_CHECKING

from performer_lm.cli import main

if TYPE_CHECKING:
    from omegaconf import DictConfig

SAMPLING = {
    "temperature": float,
    "top_k": int | None,
    "top_p": float | None,
    "min_p": float | None,
    "typical_p": float | None,
    "repetition_penalty": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "repetition_window": int,
    "no_repeat_ngram_size": int | None,
    "banned_tokens": list[int] | None,
    "logit_bias": dict[int, float] | None,
}


def run(cfg: "DictConfig") -> None:
    """Print the prompt and its continuation, or continuations as jsonl."""
    from performer_lm.cli.generating import generate

    generate(cfg)


if __name__ == "__main__":
    main(
        run,
        config_name="generate",
        config_path=Path(__file__).parent / "configs",
        keys={
            "ckpt": str,
            "prompt": str,
            "prompts": str | None,
            "out": str | None,
            "max_new_tokens": int,
            "stop": str | None,
            "num_samples": int,
            "best_of": int | None,
            "beams": int | None,
            "batch_size": int,
            "state": str | None,
            "save_state": str | None,
            "interactive": bool,
            "seed": int,
            "device": str,
            **SAMPLING,
        },
    )
