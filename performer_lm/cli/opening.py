"""Open what a config names: a trained model, perhaps with another `attn`, on a `device`, and text for it."""

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from performer_lm.cli.argv import unresolved
from performer_lm.cli.run_data import TOKENIZER, read_data_section

if TYPE_CHECKING:
    import torch

    from performer_lm.checkpoint import Checkpoint
    from performer_lm.data.module import WindowData
    from performer_lm.data.tokenizer import Tokenizer
    from performer_lm.language_model import LanguageModel

TEXT_HASHES: Final = ("corpus", "head")  # of a fingerprint
PART: Final = "data.validation_fraction="
ANOTHER: Final = "data=files data.path=FILE measures another text"


class Opened(NamedTuple):
    """A trained model, in evaluation mode on its device, its tokenizer, and the file they come from."""

    model: "LanguageModel"
    tokenizer: "Tokenizer"
    checkpoint: "Checkpoint"


def open_from(cfg: DictConfig) -> Opened:
    """Return the model that the config names.

    Where `attn` names the backend that the checkpoint has, this keeps its own options but for those that were typed.
    Random projections belong to the model, not to this process: where `attn` asks for another backend, it draws those
    of the training run's seed, whatever `seed` is here.

    Raises:
        ValueError: for a checkpoint that is not there or does not open, or a device that is not.
    """
    from performer_lm import checkpoint
    from performer_lm.checkpoint.backend import typed_paths

    opened = checkpoint.read(checkpoint.find(cfg.ckpt or "latest"))
    trained = OmegaConf.create({"seed": opened.section["seed"], "attn": cfg.get("attn")})
    plain: Any = OmegaConf.to_container(trained, resolve=True)
    overrides = unresolved(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    typed = typed_paths(overrides, "attn")
    model, tokenizer = checkpoint.open_model(opened, attn=plain["attn"], typed=typed if "attn" in typed else None)
    return Opened(model.to(find_device(cfg.device)), tokenizer, opened)


def open_data(cfg: DictConfig, opened: Opened) -> "WindowData":
    """Return the text to measure, prepared with a checkpoint's tokenizer.

    With `data=`, that is all of the text given; where `data.validation_fraction` was typed, the part that a run would
    hold out. Without, it is what the checkpoint's run held out.

    Raises:
        ValueError: for text that is not there, that brings a vocabulary of its own, or that is no longer what the run
            was trained on.
    """
    from performer_lm import checkpoint

    given: Any = OmegaConf.to_container(cfg.data, resolve=True)
    if "_target_" in given:
        typed = unresolved(HydraConfig.get().overrides.task)
        return _prepare(given, opened.tokenizer, whole=not any(PART in override for override in typed))
    run = checkpoint.holder(opened.checkpoint.path)
    if not (run / "config.yaml").exists():
        raise ValueError(f"{opened.checkpoint.path} lies in no run folder, whose config.yaml names its text; {ANOTHER}")
    own = read_data_section(run / "config.yaml")
    changed = {key: value for key, value in given.items() if value is not None}
    try:
        data = _prepare({**own, **changed}, opened.tokenizer, whole=False)
    except ValueError as error:
        raise ValueError(f"the text of {run}: {error}; {ANOTHER}") from error
    trained_on = opened.checkpoint.section.get("fingerprint") or {}
    measured = data.fingerprint()
    if any(measured.get(name) != trained_on[name] for name in TEXT_HASHES if name in trained_on):
        raise ValueError(f"the text of {run} is no longer what the run was trained on; {ANOTHER}")
    return data


def _prepare(section: dict[str, Any], tokenizer: "Tokenizer", *, whole: bool) -> "WindowData":
    from performer_lm.building import build
    from performer_lm.data.tokenizer.recipes import Restored

    own = {key: value for key, value in section.items() if key != TOKENIZER}
    more = {TOKENIZER: Restored(plain=tokenizer.to_dict())} if TOKENIZER in section else {}
    data: WindowData = build(own, key="data", more=more)
    data.prepare_held_out(whole=whole)
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
