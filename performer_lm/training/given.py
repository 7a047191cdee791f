"""A new run from given weights: model and tokenizer of `init=`, with the changes of the command line.

The model is the checkpoint's, with the backend and the options that were typed; the tokenizer is the checkpoint's.
Data, objective, optimizer, schedule and all else are the command line's, and the run begins at step 0.
"""

from collections.abc import Sequence
from urllib.parse import quote

from omegaconf import DictConfig, open_dict
from torch import nn

from performer_lm import checkpoint
from performer_lm.checkpoint import Checkpoint
from performer_lm.checkpoint.backend import set_path, typed_paths, with_backend
from performer_lm.checkpoint.opening import fit_backend
from performer_lm.data.module import WindowData
from performer_lm.data.tokenizer import Tokenizer, tokenizer_from_dict
from performer_lm.training.run import plain


def open_given(name: str) -> Checkpoint:
    """Return the checkpoint that `init=name` means: of a run folder the best one, with the averages of its weights."""
    return checkpoint.read(checkpoint.find(name, key="init"))


def describe_given(name: str) -> str:
    """Return `init=name` as a checkpoint keeps it: characters that could mean more are spelled out."""
    return quote(name, safe="/=,.+-_~ ", errors="surrogateescape")


def take_model(cfg: DictConfig, source: Checkpoint, *, overrides: Sequence[str]) -> None:
    """Make a checkpoint's model the config's, but for options that were typed; `model=NAME` chooses another altogether.

    Raises:
        ValueError: for a checkpoint that generate.py would not open; for an option of another backend than its own.
    """
    checkpoint.open_model(source)  # what declares more than it holds is refused before it is built from elsewhere
    typed = typed_paths(overrides, "model")
    if "model" not in typed:
        section = {name: value for name, value in source.section["model"].items() if name != "vocab_size"}
        for path in typed:
            set_path(path.split(".")[1:], plain(cfg.model), section)
        if typed_attn := typed_paths(overrides, "attn"):
            section = with_backend(section, plain(cfg.attn), typed=typed_attn, source=source.path)
        with open_dict(cfg):
            cfg.model = section
            cfg.attn = cfg.model.get("attn", cfg.attn)


def take_tokenizer(source: Checkpoint, *, overrides: Sequence[str]) -> Tokenizer | None:
    """Return a checkpoint's tokenizer; None where one was typed, which is then to be the same."""
    return None if typed_paths(overrides, "tokenizer") else tokenizer_from_dict(source.section["tokenizer"])


def check_tokenizer(data: WindowData, source: Checkpoint) -> None:
    """Raise ValueError for data whose ids mean something else than those that the weights know."""
    known = tokenizer_from_dict(source.section["tokenizer"])
    if data.tokenizer.to_dict() != known.to_dict():
        raise ValueError(
            f"the data are tokenized by {_name(data.tokenizer)}, and {source.path} knows the ids of {_name(known)}: "
            f"leave tokenizer= out, for init= brings its own"
        )


def load_given(model: nn.Module, given: Checkpoint) -> list[str]:
    """Load a checkpoint's weights into the model of a new run, and return notes on them."""
    weights, changed = fit_backend(given.weights, model, source=str(given.path))
    model.load_state_dict(weights)
    averaged = "averages of the weights" if given.content.get(checkpoint.AVERAGES) else "weights"
    return [f"starts from {given.path}, the {averaged} at step {given.content.get('global_step', 0)}", *changed]


def _name(tokenizer: Tokenizer) -> str:
    return f"{type(tokenizer).__name__} ({tokenizer.vocab_size} ids)"
