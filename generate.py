"""Continue a prompt with a trained model: `python generate.py ckpt=runs/latest prompt="def main("`."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from performer_lm.cli import main, usage_errors
from performer_lm.cli.opening import open_from

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
    """Print the prompt, then its continuation, piece by piece as it is made; notes go to stderr."""
    from omegaconf import OmegaConf

    from performer_lm.generation.sampling import Sampler
    from performer_lm.generation.session import stream_text

    with usage_errors():
        sampler = Sampler(**{name: OmegaConf.to_container(cfg)[name] for name in SAMPLING})
        with redirect_stdout(sys.stderr):
            model, tokenizer, _ = open_from(cfg)
        prompt = sys.stdin.read() if cfg.prompt == "-" else cfg.prompt
        pieces = stream_text(
            model, tokenizer, prompt, max_new_tokens=cfg.max_new_tokens, sampler=sampler, seed=cfg.seed
        )
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main(
        run,
        config_name="generate",
        config_path=Path(__file__).parent / "configs",
        keys={
            "ckpt": str,
            "prompt": str,
            "max_new_tokens": int,
            "seed": int,
            "device": str,
            **SAMPLING,
        },
    )
