"""How model, tokenizer and objective are rebuilt from a checkpoint, with sizes before memory.

A file says how large its model is, and holds its weights: the one is held against the other on the meta device, where
nothing has values, before anything is allocated.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from performer_lm.building import build_model
from performer_lm.checkpoint.files import Checkpoint
from performer_lm.checkpoint.sizes import check_memory, check_sizes
from performer_lm.data.tokenizer import Tokenizer, tokenizer_from_dict
from performer_lm.language_model import LanguageModel
from performer_lm.objectives import MaskedTokens, NextToken, Objective, SourceToTarget
from performer_lm.wording import first_line, short

OBJECTIVES: dict[str, type[Objective]] = {
    f"performer_lm.objectives.{each.__name__}": each for each in (NextToken, MaskedTokens, SourceToTarget)
}
BACKEND = ".backend."  # keys of what a backend owns: it may change between saving and opening


def open_model(checkpoint: Checkpoint, *, attn: Mapping[str, Any] | None = None) -> tuple[LanguageModel, Tokenizer]:
    """Rebuild model and tokenizer from a checkpoint, on the CPU, in evaluation mode.

    Args:
        checkpoint: of `read`.
        attn: a plain config section of another attention backend; None for the one it was trained with.

    Raises:
        ValueError: for a description that is none, weights that do not fit the model, or a tokenizer that does not.
    """
    source, weights = str(checkpoint.path), checkpoint.weights
    section = checkpoint.section["model"] if attn is None else _with_backend(checkpoint.section["model"], attn)
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
    """Put the file before whatever is raised on a foreign description: each is a mistake of the file, in one line."""
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
    """Return what a checkpoint's model was trained to predict; next tokens where the file does not say.

    Raises:
        ValueError: for an objective that is none of this package's, or that does not fit the model.
    """
    training = checkpoint.section.get("training") or {}
    section = training.get("objective") or {"_target_": next(iter(OBJECTIVES)), "chunk_size": None}
    if not isinstance(section, dict):
        raise ValueError(f"{checkpoint.path} was trained on {short(section)}, which is no objective of performer_lm")
    section = dict(section)
    name = section.pop("_target_", None)
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ValueError(f"{checkpoint.path} was trained on {short(name)}, which is no objective of performer_lm")
    try:
        objective = OBJECTIVES[name](**section)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint.path}: {name}: {error}") from error
    objective.check(model, packed=False, answers=False)
    objective.adopt(tokenizer)
    return objective


def _with_backend(section: Mapping[str, Any], attn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's section with another backend in each of its stacks."""
    found = {
        name: _with_backend(value, attn) if isinstance(value, Mapping) else value for name, value in section.items()
    }
    return {**found, "attn": attn} if "attn" in section else found


def _without_unfit(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights but for what the backend owned in another shape: it was asked for other features."""
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
    own = model.state_dict()
    for name, value in own.items():
        if name not in weights:
            problem = "" if BACKEND in name else f"it has no {name}"
        else:
            given = weights[name]
            problem = ""
            if given.shape != value.shape:
                shapes = tuple(given.shape), tuple(value.shape)
                problem = f"size mismatch for {name}: {shapes[0]} in the file, {shapes[1]} in the model"
            elif given.is_floating_point() != value.is_floating_point():
                problem = f"{name} holds {given.dtype} in the file, {value.dtype} in the model"
        if problem:
            raise ValueError(f"{source} does not fit the model: {problem}")
    unknown = [name for name in weights if name not in own and BACKEND not in name]
    if unknown:
        raise ValueError(f"{source} does not fit the model: it has {unknown[0]}, which the model has not")
