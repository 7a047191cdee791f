"""Open the trained model that an entry point's config names: `ckpt`, perhaps another `attn`, and a `device`."""

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    import torch

    from performer_lm.data.tokenizer import Tokenizer
    from performer_lm.language_model import LanguageModel


def open_from(cfg: DictConfig) -> "tuple[LanguageModel, Tokenizer]":
    """Return the model, in evaluation mode on its device, and its tokenizer.

    Random projections belong to the model, not to this process: where `attn` asks for another backend, it draws those
    of the training run's seed, whatever `seed` is here.

    Raises:
        ValueError: for a checkpoint that is not there or does not open, or a device that is not.
    """
    from performer_lm import checkpoint

    opened = checkpoint.read(checkpoint.find(cfg.ckpt or "latest"))
    trained = OmegaConf.create({"seed": opened.section["seed"], "attn": cfg.get("attn")})
    plain: Any = OmegaConf.to_container(trained, resolve=True)
    model, tokenizer = checkpoint.open_model(opened, attn=plain["attn"])
    return model.to(find_device(cfg.device)), tokenizer


def find_device(name: str) -> "torch.device":
    """Return the device called `name`; `auto` is the accelerator where there is one.

    Raises:
        ValueError: for a device that this machine or this torch does not have.
    """
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={name} is not available: {str(error).splitlines()[0]}") from error
