"""Prefixes as files: a text that was read once is continued later, or in several ways (`fork`), bit for bit.

A file is one of safetensors: the tokens, the logits of the next one, and the tensors of the decoding state by their
place in it. Its metadata tell, in hashes, which model it is of: a state means nothing to another one.

Letters: `b` batch, `n` tokens.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from performer_lm.attention.base import fork
from performer_lm.attention.kv_cache import KVCache
from performer_lm.data.tokenizer import Tokenizer
from performer_lm.generation.decode import Prefix
from performer_lm.language_model import LanguageModel
from performer_lm.wording import first_line
from performer_lm.writing import replacing

__all__ = ["fork", "load_state", "save_state"]

KEY, FORMAT = "performer_lm_state", 1
BACKEND: Final = ".backend."
Tensors = dict[str, Tensor]


def save_state(path: Path, prefix: Prefix, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Write rows that a model has read to a file, whole or not at all; the prefix stays as it is.

    Raises:
        OSError: naming `path`, where it cannot be written.
    """
    tensors = {"tokens": prefix.tokens.int(), "mask": prefix.mask, "logits": prefix.logits}
    tensors |= dict(_leaves(prefix.state, "state"))
    tensors = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "content": _hash_tensors(tensors.items()), **_fingerprint(model, tokenizer)}
    with replacing(path) as file:
        file.write(save(tensors, {KEY: json.dumps(metadata)}))  # one key: those of a file come in any order


@torch.inference_mode()
def load_state(path: Path, model: LanguageModel, tokenizer: Tokenizer) -> Prefix:
    """Return the rows that `save_state` wrote, on the model's device.

    Raises:
        ValueError: for a file that is no state, is damaged, or is a state of another model, naming what differs.
        OSError: where it cannot be read.
    """
    metadata, tensors = _read(path)
    for part, own in _fingerprint(model, tokenizer).items():
        if metadata.get(part) != own:
            raise ValueError(f"{path} is a state of another model: its {part} differ{'s' * (part[-1] != 's')}")
    if metadata.get("content") != _hash_tensors(tensors.items()):
        raise ValueError(f"{path} is damaged: its content does not match its hash")
    device = model.head.weight.device
    found = _Found(path, {name: tensor.to(device) for name, tensor in tensors.items()})
    logits, state = model.start(torch.zeros(1, 1, device=device, dtype=torch.int64))  # one of the same structure
    tokens = found.take("tokens", torch.zeros(1, found.size("tokens", 1), dtype=torch.int32))
    mask = found.take("mask", torch.ones_like(tokens[:1], dtype=torch.bool))
    prefix = Prefix(tokens.long(), mask, found.take("logits", logits[:, -1]), found.restore(state, "state"))
    if found.tensors or not tokens.numel() or not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.vocab_size:
        raise found.misfit(next(iter(found.tensors), "tokens"))
    return prefix


class _Found:
    """The tensors of a file that no part of a prefix has taken yet."""

    def __init__(self, path: Path, tensors: Tensors) -> None:
        self.path, self.tensors = path, tensors
        self.batch = self.size("tokens", 0)

    def misfit(self, name: str) -> ValueError:
        return ValueError(f"{self.path} does not fit the model: its {name} is missing, unknown or of another shape")

    def size(self, name: str, dim: int) -> int:
        """Return a size of a tensor; 0 where there is none."""
        tensor = self.tensors.get(name)
        return 0 if tensor is None or tensor.dim() <= dim else tensor.shape[dim]

    def take(self, name: str, like: Tensor) -> Tensor:
        """Return a tensor of the dtype and the shape, but for the batch, of another."""
        tensor = self.tensors.pop(name, None)
        if tensor is None or tensor.dtype != like.dtype or tensor.shape != (self.batch, *like.shape[1:]):
            raise self.misfit(name)
        return tensor

    def restore(self, like: Any, name: str) -> Any:
        """Return a state of the structure of another."""
        if isinstance(like, KVCache):
            return self._restore_cache(like, name)
        if isinstance(like, tuple):
            items = [self.restore(item, place) for place, item in _items(like, name)]
            return type(like)(*items) if hasattr(like, "_fields") else tuple(items)
        return like if like is None else self.take(name, like)

    def _restore_cache(self, like: KVCache, name: str) -> KVCache:
        """Return a cache of as many tokens as were saved, where `like` holds one."""
        length = self.size(f"{name}.k", 2)

        def longer(part: str, one: Tensor) -> Tensor:
            return self.take(f"{name}.{part}", one.new_empty(*one.shape[:2], length, *one.shape[3:], device="meta"))

        k, v, _, log_decay = like.filled()
        mask = None
        if f"{name}.mask" in self.tensors:
            mask = self.take(f"{name}.mask", k.new_empty(1, length, dtype=torch.bool, device="meta"))
        log_decay = None if log_decay is None else longer("log_decay", log_decay)
        return KVCache(longer("k", k), longer("v", v), mask, log_decay, length)


def _leaves(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state by their place in it; of a cache what is filled."""
    if isinstance(state, KVCache):
        filled = zip(("k", "v", "mask", "log_decay"), state.filled(), strict=True)
        yield from ((f"{name}.{part}", tensor) for part, tensor in filled if tensor is not None)
    elif isinstance(state, tuple):
        for place, item in _items(state, name):
            yield from _leaves(item, place)
    elif isinstance(state, Tensor):
        yield name, state
    elif state is not None:
        raise ValueError(f"a state that holds {type(state).__name__} cannot be saved: {name}")


def _items(state: tuple[Any, ...], name: str) -> Iterator[tuple[str, Any]]:
    fields = getattr(state, "_fields", range(len(state)))
    yield from ((f"{name}.{field}", item) for field, item in zip(fields, state, strict=True))


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Return the metadata and the tensors of a file, which runs nothing."""
    path.open("rb").close()  # for an error that names the file
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no state of performer_lm, or is cut short ({first_line(error)[:120]})") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no state of performer_lm in format {FORMAT}")
    return metadata, tensors


def _fingerprint(model: LanguageModel, tokenizer: Tokenizer) -> dict[str, str]:
    """Return a hash of each part of a model that gives meaning to a state."""
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    layers = [(name, *_describe(module)) for name, module in model.named_modules()]
    return {
        "tokenizer": _hash_plain(tokenizer.to_dict()),
        "layers": _hash_plain([layer for layer in layers if BACKEND not in f"{layer[0]}."]),
        "attention backend": _hash_plain([layer for layer in layers if BACKEND in f"{layer[0]}."]),
        "weights": _hash_tensors((name, tensor) for name, tensor in tensors.items() if BACKEND not in name),
        "projections": _hash_tensors((name, tensor) for name, tensor in tensors.items() if BACKEND in name),
    }


def _describe(module: torch.nn.Module) -> tuple[str, dict[str, Any]]:
    """Return a module's type and options, as plain data; of others the name."""
    options = {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}
    plain = (bool, int, float, str, list, type(None))
    named = {name: getattr(value, "__qualname__", type(value).__qualname__) for name, value in options.items()}
    return type(module).__qualname__, {
        name: value if isinstance(value, plain) else named[name] for name, value in options.items()
    }


def _hash_plain(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def _hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
