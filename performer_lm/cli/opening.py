"""Open what a config names: a trained model, perhaps with another `attn`, on a `device`."""

from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from performer_lm import checkpoint
from performer_lm.checkpoint import Checkpoint
from performer_lm.checkpoint.backend import typed_paths
from performer_lm.cli.argv import unresolved
from performer_lm.data.tokenizer import Tokenizer
from performer_lm.language_model import LanguageModel


class Opened(NamedTuple):
    """A trained model, in evaluation mode on its device, its tokenizer, and the file they come from."""

    model: LanguageModel
    tokenizer: Tokenizer
    checkpoint: Checkpoint


def open_from(cfg: DictConfig) -> Opened:
    """Return the model that the config names.

    Where `attn` names the backend that the checkpoint has, this keeps its own options but for those that were typed.
    Random projections belong to the model, not to this process: where `attn` asks for another backend, it draws those
    of the training run's seed, whatever `seed` is here.

    Raises:
        ValueError: for a checkpoint that is not there or does not open, or a device that is not.
    """
    opened = checkpoint.read(checkpoint.find(cfg.ckpt or "latest"))
    trained = OmegaConf.create({"seed": opened.section["seed"], "attn": cfg.get("attn")})
    plain: Any = OmegaConf.to_container(trained, resolve=True)
    typed = typed_paths(typed_overrides(), "attn")
    model, tokenizer = checkpoint.open_model(opened, attn=plain["attn"], typed=typed if "attn" in typed else None)
    return Opened(model.to(find_device(cfg.device)), tokenizer, opened)


def typed_overrides() -> list[str]:
    """Return the overrides of the command line; none where no command line was read."""
    return unresolved(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def find_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is the accelerator where there is one.

    Raises:
        ValueError: for a device that this machine or this torch does not have.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    kind = [accelerator.type] if accelerator else []
    here = ["cpu", *kind, *(f"{each}:{index}" for each in kind for index in range(torch.accelerator.device_count()))]
    if name not in here:
        raise ValueError(f"device={name} is not available (this machine has {', '.join(here)})")
    return torch.device(name)
