"""From a model of transformers or llama.cpp to a checkpoint of ours: looked at first, then read weight by weight.

`source.py` is what a look at it finds, in a folder (`transformers_folder.py`) or a file (`gguf_file.py`); `llama.py`
describes the models that can be held here, and where their weights go.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from performer_lm import checkpoint
from performer_lm.checkpoint.contents import find_spoilt
from performer_lm.interop.gguf_file import open_file
from performer_lm.interop.llama import describe, translate
from performer_lm.interop.source import Source
from performer_lm.interop.transformers_folder import open_folder


def open_source(path: Path) -> Source:
    """Look at a model of another system, and return what may be read of it; no weight is read.

    Raises:
        ValueError: in one line, for what is no model, or one that cannot be held here.
    """
    if path.is_dir():
        return open_folder(path)
    if not path.exists():
        raise ValueError(f"source={path} does not exist: give a folder of transformers or a GGUF file")
    if path.suffix in (".bin", ".pt", ".pth"):
        raise ValueError(f"source={path} is a pickle, which may run anything: give safetensors or GGUF")
    if path.suffix == ".safetensors":
        raise ValueError(f"source={path} is weights alone: give its folder, with config.json and tokenizer.json")
    return open_file(path)


def convert(source: Source) -> dict[str, Any]:
    """Return the content of a checkpoint, at step 0, with the model of a source; one weight is read at a time.

    Raises:
        ValueError: for weights that are not finite, or do not fit.
    """
    section = describe(source.shape)
    with torch.device("meta"):
        model = checkpoint.build(section)
    weights: dict[str, Tensor] = {}
    for name, value in translate(source.shape, source.read):
        if find_spoilt({name: value}):
            raise ValueError(f"{source.name}: its weights are not finite ({name})")
        weights[name] = value
    checkpoint.check_fit(model, weights, source=source.name)
    described = checkpoint.describe(model=section, tokenizer=source.tokenizer, fingerprint={}, seed=0)
    return {
        "performer_lm": described,
        "state_dict": {f"model.{name}": value for name, value in weights.items()},
        "global_step": 0,
    }
