"""Measure a trained model on held-out text: `python evaluate.py ckpt=runs/latest [attn=exact]`."""

from pathlib import Path
from typing import TYPE_CHECKING

from performer_lm.cli import main, usage_errors
from performer_lm.cli.opening import open_from

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: "DictConfig") -> float:
    """Print loss and bits per byte over the whole held-out split, and return the bits per byte."""
    from hydra.utils import instantiate
    from omegaconf import open_dict

    from performer_lm.evaluation.bits_per_byte import measure_bits_per_byte

    with usage_errors():
        model, tokenizer = open_from(cfg)
        with open_dict(cfg):
            cfg.tokenizer.plain = tokenizer.to_dict()
        data = instantiate(cfg.data)
        data.prepare()
        if data.tokenizer.to_dict() != tokenizer.to_dict():
            raise ValueError(
                f"the data have a vocabulary of their own, of {data.tokenizer.vocab_size} ids, and not the "
                f"checkpoint's, of {tokenizer.vocab_size}"
            )
    found = measure_bits_per_byte(model, data.held_out, batch_size=data.batch_size, separator=data.separator)
    print(f"{found.tokens:,} tokens, {found.bytes:,} bytes of held-out text")
    print(f"loss {found.loss:.4f} nats per token, {found.bits_per_byte:.4f} bits per byte")
    print(f"accuracy {found.accuracy:.4f}")
    return found.bits_per_byte


if __name__ == "__main__":
    main(
        run,
        config_name="evaluate",
        config_path=Path(__file__).parent / "configs",
        free_text=("ckpt", "data.path"),
        keys={"ckpt": str, "seed": int, "device": str},
        supplied={"tokenizer": ["plain"]},
    )
