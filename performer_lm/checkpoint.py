"""A checkpoint file: how it is written so that a kill never costs the last one, and opened without trusting it.

Beside what the trainer keeps, a file holds one plain-data key:

    performer_lm: {format: 1, model: {...}, tokenizer: {...}, fingerprint: {...}, seed: 0}

`model` is the config section the model was built from. Opening a file reads plain data and tensors only
(`weights_only=True`) and builds only model classes that this package defines.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from performer_lm.data.tokenizer import Tokenizer, tokenizer_from_dict
from performer_lm.language_model import LanguageModel

FORMAT = 1
BUILDABLE = (
    "performer_lm.model",
    "performer_lm.performer",
    "performer_lm.encoder_decoder",
    "performer_lm.nn.",
    "performer_lm.attention.",
)
AVERAGES = "averages"  # key of a checkpoint: running averages of the model's parameters by name
BACKEND = ".backend."  # keys of what a backend owns: it may change between saving and opening


class Checkpoint(NamedTuple):
    """A file as read: the project's own section, the weights, and all the trainer keeps.

    The weights are for use: where training kept a running average of them, that. `content` has those that training
    goes on from.
    """

    path: Path
    section: dict[str, Any]
    weights: dict[str, Tensor]
    content: dict[str, Any]


# --- what a file says -------------------------------------------------------------------------------------------------


def describe(*, model: Mapping[str, Any], tokenizer: Tokenizer, fingerprint: Mapping[str, Any], seed: int) -> dict:
    """Return the plain-data section that makes a file enough to rebuild model and tokenizer."""
    return {
        "format": FORMAT,
        "model": dict(model),
        "tokenizer": tokenizer.to_dict(),
        "fingerprint": dict(fingerprint),
        "seed": seed,
    }


def build(section: Any) -> Any:
    """Build what a plain config section names: `_target_` called with the rest, or a factory where `_partial_`.

    Raises:
        ValueError: for a target that is not a model class defined in this package, or values that its constructor
            refuses.
    """
    if isinstance(section, Mapping):
        values = {key: build(value) for key, value in section.items() if key not in ("_target_", "_partial_")}
        if "_target_" not in section:
            return values
        target = _find_class(section["_target_"])
        if section.get("_partial_", False):
            return partial(target, **values)
        try:
            return target(**values)
        except TypeError as error:
            raise ValueError(f"{section['_target_']}: {error}") from error
    if isinstance(section, list | tuple):
        return [build(item) for item in section]
    return section


def _find_class(name: object) -> Callable[..., nn.Module]:
    """Return the class that a dotted name stands for, if this package defines it as part of a model."""
    refusal = ValueError(f"{name!r} is not a model class of performer_lm, so it is not built")
    module_name, _, class_name = str(name).rpartition(".")
    if not f"{module_name}.".startswith(tuple(f"{allowed.rstrip('.')}." for allowed in BUILDABLE)):
        raise refusal
    try:
        found = getattr(import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise refusal from None
        raise
    if not isinstance(found, type) or not issubclass(found, nn.Module) or found.__module__ != module_name:
        raise refusal
    return found


# --- writing and reading ----------------------------------------------------------------------------------------------


def save(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint and its `.sha256`, atomically: whenever this is killed, a good file stands at `path`.

    The new file is complete on disk before it takes the old one's name. The sidecar lists both digests while the name
    changes hands, so it is right before and after.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f"{path.name}.*.tmp"):
        stale.unlink(missing_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    digest = _digest(temporary)
    sidecar = _sidecar(path)
    known = sidecar.read_text().splitlines()[:1] if sidecar.exists() else []
    _write(sidecar, [f"{digest}  {path.name}", *known])
    os.replace(temporary, path)
    _write(sidecar, [f"{digest}  {path.name}"])
    _sync(path.parent)


def read(path: Path) -> Checkpoint:
    """Read a checkpoint on the CPU, executing nothing from it.

    Raises:
        ValueError: for a file that is damaged, foreign, of another format, or holds more than plain data and tensors.
    """
    sidecar = _sidecar(path)
    if sidecar.exists() and _digest(path) not in sidecar.read_text():
        raise ValueError(f"{path} is damaged: its content does not match {sidecar.name}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever the unpickler and the zip reader raise on foreign bytes
        raise ValueError(
            f"{path} is not a checkpoint of performer_lm, or is cut short ({_first_line(error)})"
        ) from error
    section = content.get("performer_lm") if isinstance(content, dict) else None
    if not isinstance(section, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is not a checkpoint of performer_lm: it has no `performer_lm` section")
    if section.get("format") != FORMAT:
        raise ValueError(f"{path} has checkpoint format {section.get('format')!r}; this version reads format {FORMAT}")
    weights = {name.removeprefix("model."): value for name, value in content["state_dict"].items()}
    return Checkpoint(path, section, weights | content.get(AVERAGES, {}), content)


def open_model(checkpoint: Checkpoint, *, attn: Mapping[str, Any] | None = None) -> tuple[LanguageModel, Tokenizer]:
    """Rebuild model and tokenizer from a checkpoint, on the CPU, in evaluation mode.

    Args:
        checkpoint: of `read`.
        attn: a plain config section of another attention backend; None for the one it was trained with.

    Raises:
        ValueError: for weights that do not fit the model that the file describes.
    """
    section = dict(checkpoint.section["model"])
    if attn is not None:
        section["attn"] = attn
    with torch.device("meta"):
        checked = build(section)
    if not isinstance(checked, LanguageModel):
        raise ValueError(f"{checkpoint.path} describes {type(checked).__name__}, which is no language model")
    model = cast(LanguageModel, build(section))
    model.redraw(int(checkpoint.content.get("global_step", 0)))
    load_weights(model, checkpoint.weights, source=str(checkpoint.path))
    return model.eval(), tokenizer_from_dict(checkpoint.section["tokenizer"])


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Load weights strictly, but for what the attention backend itself owns: that may have changed.

    Prints a line where backend weights were left out or kept at their initial values.

    Raises:
        ValueError: naming the first key or shape that does not fit.
    """
    own = model.state_dict()
    kept = {name: value for name, value in weights.items() if name in own or BACKEND not in name}
    drawn = {name for name in own if name not in weights and BACKEND in name}
    try:
        model.load_state_dict({**kept, **{name: own[name] for name in drawn}})
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit the model: {str(error).splitlines()[1].strip()}") from error
    dropped = len(weights) - len(kept)
    if dropped or drawn:
        print(f"note: the attention backend changed: {dropped} of its tensors left out, {len(drawn)} drawn anew")


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, lines: list[str]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:120] if lines else type(error).__name__


# --- finding ----------------------------------------------------------------------------------------------------------


def find(name: str, *, prefer: tuple[str, ...] = ("best", "last"), runs: Path = Path("runs")) -> Path:
    """Return the checkpoint file that `name` means: a file, a run folder, or `latest` for the newest run.

    Args:
        name: as the user typed it.
        prefer: which file of a run folder, first choice first.
        runs: where runs lie.

    Raises:
        ValueError: when there is none, listing the nearest checkpoints.
    """
    path = runs / "latest" if name == "latest" else Path(name)
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        for choice in prefer:
            if (folder / f"{choice}.ckpt").is_file():
                return folder / f"{choice}.ckpt"
    wanted = "holds no checkpoint" if path.is_dir() else "does not exist"
    existing = sorted({str(found) for found in (*runs.glob("**/*.ckpt"), *path.parent.glob("*.ckpt"))})
    nearest = get_close_matches(name, existing, n=3, cutoff=0.3) or existing[-3:]
    hint = f"; nearest: {', '.join(nearest)}" if nearest else "; there are no checkpoints yet: run train.py first"
    raise ValueError(f"ckpt={name} {wanted}{hint}")
