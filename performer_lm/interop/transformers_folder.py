"""A folder of transformers: `config.json`, weights in safetensors, `tokenizer.json` and what lies beside it."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from performer_lm.data.reading import check_regular
from performer_lm.interop.llama import LlamaShape, check_shapes
from performer_lm.interop.settings import Settings
from performer_lm.interop.source import Source, build_tokenizer
from performer_lm.wording import first_line, short

MOST_BYTES: Final = 1 << 28  # of a file of JSON
FLOATS: Final = {"F64", "F32", "F16", "BF16"}
ACTIVATIONS: Final = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "sigmoid": "sigmoid"}
DEFAULTS: Final[dict[str, dict[str, Any]]] = {  # of transformers' configs, where they differ between kinds
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "attention_bias": True, "o_bias": False},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "head_norms": True},
}
REFUSED: Final = {
    "quantization_config": "its weights are quantised",
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "it is a mixture of experts"),
    "rope_scaling": "its rotary positions are scaled",
    "use_sliding_window": "it attends within a sliding window",
}
UNUSED: Final = ".rotary_emb.inv_freq"  # tables of older files, which are computed


def open_folder(folder: Path) -> Source:
    """Look at a folder of transformers, and return the model in it; no weight is read.

    Raises:
        ValueError: in one line, for a folder that holds no model, or one that cannot be held here.
    """
    shape = read_shape(Settings(_read_json(folder / "config.json"), source=str(folder / "config.json")))
    found, files = _list_tensors(folder)
    if shape.tied:
        found.pop("lm_head.weight", None)
    check_shapes(shape, found, source=str(folder))
    return Source(str(folder), shape, _read_tokenizer(folder, size=shape.vocab), partial(_read_tensor, files))


def read_shape(config: Settings) -> LlamaShape:
    """Return the shape that a `config.json` describes.

    Raises:
        ValueError: naming the setting that cannot be held here.
    """
    kind = config.get("model_type")
    config.refuse({name: REFUSED[name] for name in REFUSED if name != "rope_scaling"})
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise config.refusal(f"model_type ({short(kind)}) must be one of {', '.join(DEFAULTS)}")
    default = DEFAULTS[kind]
    if kind == "mistral" and config.values.get("sliding_window", default["sliding_window"]) is not None:
        raise config.refusal("it attends within a sliding window (sliding_window), which has no counterpart here")
    if others := {*config.get("layer_types", [])} - {"full_attention"}:
        raise config.refusal(f"it has layers of {short(sorted(others)[0])}, which have no counterpart here")
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise config.refusal(f"hidden_act ({short(activation)}) must be one of {', '.join(ACTIVATIONS)}")
    dim, heads = config.count("hidden_size"), config.count("num_attention_heads")
    has_bias = default.get("attention_bias", False) or (
        kind in ("llama", "qwen3") and config.flag("attention_bias", False)
    )
    return LlamaShape(
        vocab=config.count("vocab_size"),
        dim=dim,
        depth=config.count("num_hidden_layers"),
        heads=heads,
        key_heads=config.count("num_key_value_heads", default.get("num_key_value_heads", heads)),
        dim_head=config.count("head_dim", default.get("head_dim", dim // heads)),
        hidden=config.count("intermediate_size"),
        eps=config.number("rms_norm_eps", 1e-6),
        base=_rotary_base(config),
        activation=ACTIVATIONS[activation],
        tied=config.flag("tie_word_embeddings", False),
        qkv_bias=has_bias,
        out_bias=has_bias and default.get("o_bias", True),
        feed_forward_bias=kind == "llama" and config.flag("mlp_bias", False),
        head_norms=default.get("head_norms", False),
    )


def _rotary_base(config: Settings) -> float:
    """Return the base of the rotary positions, of which there are two spellings; they may not be scaled."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise config.refusal(f"rope_parameters ({short(given)}) must be a section")
    kind = given.get("rope_type", given.get("type", "default"))
    whole = [section.get("partial_rotary_factor") for section in (given, config.values)]
    if kind != "default" or any(share not in (None, 1, 1.0) for share in whole) or "factor" in given:
        raise config.refusal(f"its rotary positions are scaled or partial ({short(given)}), which is not held here")
    theta = config.number("rope_theta", 10_000.0)
    return Settings(given, source=config.source).number("rope_theta", theta)


def _list_tensors(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    """Return the shapes and the files of all weights in a folder."""
    found: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for path in _weight_files(folder):
        check_regular(path)
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    part = tensors.get_slice(name)
                    if name.endswith(UNUSED):
                        continue
                    if part.get_dtype() not in FLOATS:
                        raise ValueError(f"{name} holds {part.get_dtype()}: quantised weights are not read")
                    if name in found:
                        raise ValueError(f"{name} stands in {files[name].name} as well")
                    found[name], files[name] = tuple(part.get_shape()), path
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path}: {first_line(error)[:200]}") from error
    return found, files


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        return [single]
    if index.exists():
        listed = _read_json(index).get("weight_map")
        names: list[Any] = [*listed.values()] if isinstance(listed, dict) else [listed]
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: weight_map names {short(name)}, which is no file of safetensors beside it")
            if not (folder / name).exists():
                raise ValueError(f"{index}: it names {name}, which is not there")
        return [folder / name for name in sorted({*names})]
    if pickled := sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt*"))):
        raise ValueError(f"{folder}: {pickled[0]} is a pickle, which may run anything: give safetensors or GGUF")
    raise ValueError(f"{folder}: it has no model.safetensors")


def _read_tensor(files: Mapping[str, Path], name: str) -> Tensor:
    with safe_open(files[name], framework="pt") as tensors:
        value: Tensor = tensors.get_tensor(name)
    return value.to(torch.float32, copy=True)  # not a view of the file


def _read_tokenizer(folder: Path, *, size: int) -> Any:
    path = folder / "tokenizer.json"
    content = _read_json(path)
    options = [_read_json(folder / f"{name}.json", optional=True) for name in ("generation_config", "config")]
    settings = _read_json(folder / "tokenizer_config.json", optional=True)
    marks = {name: _spelling(settings.get(name)) for name in ("bos_token", "eos_token")}
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library has no errors of its own
        raise ValueError(f"{path}: {first_line(error)[:200]}") from error
    known = {name: None if text is None else library.token_to_id(text) for name, text in marks.items()}
    stated = next((found for found in options if found.get("eos_token_id") is not None), {}).get("eos_token_id")
    ends = [*(stated if isinstance(stated, list) else [stated])]
    if not all(token is None or type(token) is int for token in ends):
        raise ValueError(f"{folder}: eos_token_id ({short(stated)}) must be ids")
    begins = library.encode("").ids[:1] == [known["bos_token"]] or settings.get("add_bos_token") is True
    return build_tokenizer(
        content,
        size=size,
        ends=[*ends, known["eos_token"]] if ends == [None] else ends,
        begin=known["bos_token"] if begins else None,
        chat_template=_read_template(folder, settings),
        marks=marks,
        source=str(folder),
    )


def _read_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the chat template, from a file of its own or the tokenizer's config; of several the default."""
    path = folder / "chat_template.jinja"
    if path.exists():
        check_regular(path)
        return path.read_bytes()[:MOST_BYTES].decode("utf-8", errors="replace")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _spelling(token: Any) -> str | None:
    """Return the text of a special token, which may be described by a section."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    if path.exists():
        check_regular(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it is longer than {MOST_BYTES:,} bytes")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {short(str(error))}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no section")
    return content
