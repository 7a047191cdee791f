"""Open what a config names: a trained model, perhaps with another `attn`, on a `device`, and text for it."""

from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    import torch

    from performer_lm.checkpoint import Checkpoint
    from performer_lm.data.module import WindowData
    from performer_lm.data.tokenizer import Tokenizer
    from performer_lm.language_model import LanguageModel


class Opened(NamedTuple):
    """A trained model, in evaluation mode on its device, its tokenizer, and the file they come from."""

    model: "LanguageModel"
    tokenizer: "Tokenizer"
    checkpoint: "Checkpoint"


def open_from(cfg: DictConfig) -> Opened:
    """Return the model that the config names.

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
    return Opened(model.to(find_device(cfg.device)), tokenizer, opened)


def open_data(cfg: DictConfig, tokenizer: "Tokenizer") -> "WindowData":
    """Return the data of the config, prepared with a checkpoint's tokenizer.

    Raises:
        ValueError: for data that are not there, or that bring a vocabulary of their own.
    """
    from performer_lm.building import build

    section: Any = OmegaConf.to_container(cfg.data, resolve=True)
    if "tokenizer" in section:
        section["tokenizer"]["plain"] = tokenizer.to_dict()
    data: WindowData = build(section, key="data")
    data.prepare()
    if data.tokenizer.to_dict() != tokenizer.to_dict():
        raise ValueError(
            f"the data have a vocabulary of their own, of {data.tokenizer.vocab_size} ids, and not the "
            f"checkpoint's, of {tokenizer.vocab_size}"
        )
    return data


def find_device(name: str) -> "torch.device":
    """Return the device called `name`; `auto` is the accelerator where there is one.

    Raises:
        ValueError: for a device that this machine or this torch does not have.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    kind = [accelerator.type] if accelerator else []
    here = ["cpu", *kind, *(f"{each}:{index}" for each in kind for index in range(torch.accelerator.device_count()))]
    if name not in here:
        raise ValueError(f"device={name} is not available (this machine has {', '.join(here)})")
    return torch.device(name)
