"""Continue a prompt with a trained model: `python generate.py ckpt=runs/latest prompt="def main("`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from performer_lm.cli import main, usage_errors

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig


def run(cfg: "DictConfig") -> None:
    """Print the prompt, then what the model makes of it, piece by piece as it is made."""
    from omegaconf import OmegaConf

    from performer_lm import checkpoint
    from performer_lm.generation.decode import stream_text
    from performer_lm.generation.sampling import Sampler

    prompt = sys.stdin.read() if cfg.prompt == "-" else cfg.prompt
    with usage_errors():
        sampler = Sampler(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
        if cfg.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {cfg.max_new_tokens}")
        opened = checkpoint.read(checkpoint.find(cfg.ckpt))
        # Projections belong to the model: another backend draws those of the training run's seed.
        trained = OmegaConf.create({"seed": opened.section["seed"], "attn": cfg.get("attn")})
        attn = OmegaConf.to_container(trained, resolve=True)["attn"]
        model, tokenizer = checkpoint.open_model(opened, attn=attn)
        model = model.to(_device(cfg.device))
    print(prompt, end="", flush=True)
    for piece in stream_text(
        model, tokenizer, prompt, max_new_tokens=cfg.max_new_tokens, sampler=sampler, seed=cfg.seed
    ):
        print(piece, end="", flush=True)
    print()


def _device(name: str) -> "torch.device":
    """Return the device called `name`; `auto` is the accelerator where there is one."""
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name} is not available: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    main(
        run,
        config_name="generate",
        config_path=Path(__file__).parent / "configs",
        free_text=("ckpt", "prompt"),
        keys={
            "ckpt": str,
            "prompt": str,
            "max_new_tokens": int,
            "temperature": float,
            "top_k": int | None,
            "top_p": float | None,
            "seed": int,
            "device": str,
        },
    )
