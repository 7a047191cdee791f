"""Model, tokenizer and objective rebuilt from a checkpoint.

The size that a file declares is held against its weights on the meta device before any memory is asked for.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from performer_lm.attention.base import Attention, AttentionFactory
from performer_lm.attention.hybrid import HybridAttention
from performer_lm.building import build_model
from performer_lm.checkpoint.backend import with_backend
from performer_lm.checkpoint.files import Checkpoint
from performer_lm.checkpoint.sizes import check_memory, check_sizes
from performer_lm.data.tokenizer import Tokenizer, tokenizer_from_dict
from performer_lm.language_model import LanguageModel
from performer_lm.nn.attention import MultiHeadAttention
from performer_lm.objectives import MaskedTokens, NextToken, Objective, SourceToTarget
from performer_lm.wording import first_line, short

OBJECTIVES: dict[str, type[Objective]] = {
    f"performer_lm.objectives.{each.__name__}": each for each in (NextToken, MaskedTokens, SourceToTarget)
}
TAUGHT = "performer_lm.training.distillation."  # objectives with a teacher, which are measured by next tokens
BACKEND = ".backend."  # keys of what a backend owns: it may change between saving and opening


def open_model(
    checkpoint: Checkpoint,
    *,
    attn: Mapping[str, Any] | AttentionFactory | None = None,
    typed: Sequence[str] | None = None,
) -> tuple[LanguageModel, Tokenizer]:
    """Rebuild model and tokenizer from a checkpoint, on the CPU, in evaluation mode.

    Args:
        checkpoint: of `read`.
        attn: another attention backend, as a plain config section or a factory; None for the one it was trained with.
        typed: of `with_backend`: the options of `attn` that count where the checkpoint has this backend.

    Raises:
        ValueError: for a description that is none, weights that do not fit the model, or a tokenizer that does not.
    """
    source, weights = str(checkpoint.path), checkpoint.weights
    section = checkpoint.section["model"]
    if attn is not None:
        section = with_backend(section, attn, typed=typed, source=source)
    with _named(source):
        tokenizer = tokenizer_from_dict(checkpoint.section["tokenizer"])
    with _named(f"{source} does not fit the model"):
        check_sizes(checkpoint.section["model"], weights)
        checked = _sketch(section)
        weights = weights if attn is None else _without_unfit(weights, checked)
        _check_vocabulary(checked, tokenizer)
    check_fit(checked, weights, source=source)
    with _named(f"{source} does not fit the model"):
        check_memory(checked, checkpoint.weights, other_backend=attn is not None)
    model = cast(LanguageModel, build_model(section))
    model.redraw(int(checkpoint.content.get("global_step", 0)))
    load_weights(model, weights, source=source)
    return model.eval(), tokenizer


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Put the file before the first line of an error: each is a mistake of the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{source}: {first_line(error)[:300]}") from error


def _sketch(section: Mapping[str, Any]) -> LanguageModel:
    with torch.device("meta"):
        model = build_model(section)
    if not isinstance(model, LanguageModel):
        raise ValueError(f"{type(model).__name__} is no language model")
    return model.eval()


def _check_vocabulary(model: LanguageModel, tokenizer: Tokenizer) -> None:
    for embedding in (module for module in model.modules() if isinstance(module, nn.Embedding)):
        if embedding.num_embeddings != tokenizer.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size:,} ids, the model {embedding.num_embeddings:,}")


def open_objective(checkpoint: Checkpoint, model: LanguageModel, tokenizer: Tokenizer) -> Objective:
    """Return the objective that a checkpoint's model was trained on; next tokens where the file does not say.

    Raises:
        ValueError: for an objective that is none of this package's, or that does not fit the model.
    """
    training = checkpoint.section.get("training") or {}
    section = training.get("objective") or {"_target_": next(iter(OBJECTIVES)), "chunk_size": None}
    if not isinstance(section, dict):
        raise ValueError(f"{checkpoint.path} was trained on {short(section)}, which is no objective of performer_lm")
    section = dict(section)
    name = section.pop("_target_", None)
    if isinstance(name, str) and name.startswith(TAUGHT):
        name, section = next(iter(OBJECTIVES)), {"chunk_size": section.get("chunk_size")}
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ValueError(f"{checkpoint.path} was trained on {short(name)}, which is no objective of performer_lm")
    try:
        objective = OBJECTIVES[name](**section)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint.path}: {name}: {error}") from error
    objective.check(model, packed=False, answers=False)
    objective.adopt(tokenizer)
    return objective


def _without_unfit(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights but for those that the backend owned in another shape."""
    own = model.state_dict()
    is_other = {name for name in weights if BACKEND in name and name in own and weights[name].shape != own[name].shape}
    return {name: value for name, value in weights.items() if name not in is_other}


def fit_backend(weights: Mapping[str, Tensor], model: nn.Module, *, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return weights for a model whose backend may be another one, and a line where it is.

    Raises:
        ValueError: for the first weight that does not fit, a backend's own left aside.
    """
    own = model.state_dict()
    fitting = _without_unfit(weights, model)
    check_fit(model, fitting, source=source)
    kept = {name: value for name, value in fitting.items() if name in own}
    drawn = {name: value for name, value in own.items() if name not in kept}
    left_out = len(weights) - len(kept)
    line = f"the attention backend changed: {left_out} of its tensors left out, {len(drawn)} drawn anew"
    return {**kept, **drawn}, [line] if left_out or drawn else []


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Load weights strictly, but for names that only one of two attention backends owns; print a line on these.

    Raises:
        ValueError: naming the first key or shape that does not fit.
    """
    check_fit(model, weights, source=source)
    fitted, notes = fit_backend(weights, model, source=source)
    model.load_state_dict(fitted)
    for note in notes:
        print(f"note: {note}")


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Raise ValueError for the first weight that is missing, unknown or of another shape, a backend's own left aside.

    The model may be on the meta device.
    """
    if problem := next(_unfit(model.state_dict(), weights), None):
        raise ValueError(f"{source} does not fit the model: {problem}")


def _unfit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[str]:
    for name, value in own.items():
        given = weights.get(name)
        if given is None:
            if BACKEND not in name:
                yield f"it has no {name}"
        elif given.shape != value.shape:
            yield f"size mismatch for {name}: {tuple(given.shape)} in the file, {tuple(value.shape)} in the model"
        elif given.is_floating_point() != value.is_floating_point():
            yield f"{name} holds {given.dtype} in the file, {value.dtype} in the model"
    yield from (
        f"it has {name}, which the model has not" for name in weights if name not in own and BACKEND not in name
    )


def other_attention(model: nn.Module, other: nn.Module) -> list[int]:
    """Return the layers, counted from 0, in which two models of one shape run other backends, features or options."""
    pairs = zip(_backends(model), _backends(other), strict=True)
    return [layer for layer, (one, another) in enumerate(pairs) if _kinds(one) != _kinds(another)]


def _backends(model: nn.Module) -> list[Attention[Any]]:
    return [module.backend for module in model.modules() if isinstance(module, MultiHeadAttention)]


def _kinds(backend: nn.Module) -> list[tuple[object, ...]]:
    """Return class, plain options and own weights of a backend and its parts; a pattern is the backend it chose."""
    parts = [part for part in backend.modules() if not isinstance(part, HybridAttention)]
    return [(type(part), _plain(part), [name for name, _ in part.named_parameters(recurse=False)]) for part in parts]


def _plain(part: nn.Module) -> dict[str, object]:
    own = {name: value for name, value in vars(part).items() if name != "training" and not name.startswith("_")}
    return {name: value for name, value in own.items() if isinstance(value, bool | int | float | str | None)}
