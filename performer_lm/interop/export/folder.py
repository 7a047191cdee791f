"""The folder of an exported model, which transformers opens: written beside its place and moved there whole.

config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json  README.md
modeling_performer.py      but for a model that is Llama's by another name
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save_file
from torch import Tensor

from performer_lm.attention.base import Attention
from performer_lm.attention.hybrid import HybridAttention
from performer_lm.attention.kv_cache import CachedAttention
from performer_lm.attention.local import LocalAttention
from performer_lm.attention.split import SplitAttention
from performer_lm.data.tokenizer import Tokenizer
from performer_lm.interop.export.card import Training, write_card
from performer_lm.interop.export.library import export_tokenizer
from performer_lm.interop.export.llama import describe_llama, is_llama, llama_weights
from performer_lm.interop.export.sources import assemble
from performer_lm.language_model import LanguageModel
from performer_lm.model import PerformerLM
from performer_lm.nn.attention import MultiHeadAttention
from performer_lm.writing import temporary_of

CODE: Final = "modeling_performer.py"
FILES: Final = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("README.md", CODE),
}
LONGEST: Final = 2048  # tokens that a model is said to take where nothing tells


def check_place(out: Path) -> None:
    """Refuse a place for an export where something else is.

    Raises:
        ValueError: for a file, or a folder that holds anything but an earlier export.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"out={out} is a file: give the name of a folder")
    others = sorted({path.name for path in out.iterdir()} - FILES) if out.is_dir() else []
    if others:
        raise ValueError(f"out={out} holds {others[0]}, which is of no earlier export: give the name of a new folder")


def check_model(model: LanguageModel) -> PerformerLM:
    """Return a model that can be exported.

    Raises:
        ValueError: for one that is no causal language model, naming its kind.
    """
    if not isinstance(model, PerformerLM):
        kind = "an encoder and a decoder (seq2seq)"
    elif model.performer.cross_attend:
        kind = "a decoder with cross-attention"
    elif not model.performer.causal:
        kind = "an encoder (causal=false)"
    else:
        return model
    raise ValueError(f"the model is {kind}, and export.py writes causal language models, such as model=performer")


def export(
    model: LanguageModel, tokenizer: Tokenizer, section: Mapping[str, Any], out: Path, *, training: Training
) -> dict[str, Any]:
    """Write the folder of a model, and return its config.

    Args:
        model: a causal language model.
        tokenizer: of its ids.
        section: the plain config section that the model was built from.
        out: the folder: a new or empty one, or that of an earlier export.
        training: what is known of it, for the model card.

    Raises:
        ValueError: for a model or tokenizer that cannot be exported, or a place where something else is.
        OSError: where the files cannot be written; nothing of them is left.
    """
    out = Path(os.path.realpath(out))
    check_place(out)
    model = check_model(model)
    exported = export_tokenizer(tokenizer)
    plain = is_llama(model)
    marks = {"bos_token_id": exported.begin_id, "eos_token_id": exported.end_ids, "pad_token_id": exported.end_ids[0]}
    marks |= {"eos_token_id": exported.end_ids[0]} if len(exported.end_ids) == 1 else {}
    config = describe(model, section, context=training.context) | marks
    parameters = sum(parameter.numel() for parameter in model.parameters())
    card = write_card(out.name, config=config, model=section, parameters=parameters, training=training)
    length = {"model_max_length": config["max_position_embeddings"]}
    texts = {
        "config.json": _as_json(config),
        "generation_config.json": _as_json(marks),
        "tokenizer.json": exported.library.to_str(pretty=True),
        "tokenizer_config.json": _as_json(exported.config | length),
        "README.md": card,
        **({} if plain else {CODE: assemble()}),
    }
    weights = {name: value.detach().clone() for name, value in (llama_weights if plain else own_weights)(model).items()}
    _write(out, texts, weights)
    return config


def describe(model: PerformerLM, section: Mapping[str, Any], *, context: int | None) -> dict[str, Any]:
    """Return what config.json says of a model, but for its special tokens."""
    attention = [branch.body for branch in model.performer.branches if isinstance(branch.body, MultiHeadAttention)]
    backends: list[Attention[Any]] = [body.backend for body in attention]
    windows = [part.window for part in map(_local_part, backends) if part is not None]
    config: dict[str, Any] = {
        "vocab_size": model.embedding.num_embeddings,
        "hidden_size": model.performer.dim,
        "num_hidden_layers": len(model.performer.layers),
        "max_position_embeddings": model.performer.max_len or context or LONGEST,
        "layer_types": [layer_type(backend) for backend in backends],
        "tie_word_embeddings": model.head.weight is model.embedding.weight,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "use_cache": True,
    }
    if is_llama(model):
        return describe_llama(model) | config
    own = {
        "architectures": ["PerformerForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_performer.PerformerConfig",
            "AutoModelForCausalLM": "modeling_performer.PerformerForCausalLM",
            # by this name alone `transformers serve` finds a model that brings its own code
            "AutoModelForDecision": "modeling_performer.PerformerForCausalLM",
        },
        "model_type": "performer_lm",
        "num_attention_heads": backends[0].heads,
        **({"sliding_window": windows[0]} if windows else {}),
    }
    return own | config | {"performer": dict(section)}


def layer_type(backend: Attention[Any]) -> str:
    """Return the word of transformers for what the heads of a layer run."""
    if isinstance(backend, HybridAttention):
        return layer_type(backend.chosen)
    if isinstance(backend, SplitAttention):
        kind = layer_type(backend.everywhere)
        return "hybrid_sliding" if kind == "linear_attention" else kind
    if isinstance(backend, LocalAttention):
        return "sliding_attention"
    return "full_attention" if isinstance(backend, CachedAttention) else "linear_attention"


def _local_part(backend: Attention[Any]) -> LocalAttention | None:
    return next((part for part in backend.modules() if isinstance(part, LocalAttention)), None)


def own_weights(model: PerformerLM) -> dict[str, Tensor]:
    """Return weights and buffers of a model as `PerformerForCausalLM` names them, projections and constants among them.

    The output layer is left out where it shares the embedding's weight.
    """
    found = {**dict(model.named_buffers()), **model.state_dict()}
    if model.head.weight is model.embedding.weight:
        del found["head.weight"]
    return {f"model.{name}": value for name, value in found.items()}


def _write(out: Path, texts: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
    """Write a folder beside its place, and move it there whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new, old = temporary_of(out), temporary_of(out.with_name(f"{out.name}.old"))
    try:
        new.mkdir()
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        save_file(dict(weights), new / "model.safetensors", metadata={"format": "pt"})
        (new / "model.safetensors").chmod((new / "config.json").stat().st_mode)  # safetensors lets nobody else read it
        if out.is_dir():
            os.replace(out, old)
        os.replace(new, out)
    except BaseException:
        if old.is_dir() and not out.exists():
            os.replace(old, out)
        raise
    finally:
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
