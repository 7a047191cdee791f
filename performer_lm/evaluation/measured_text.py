"""The text that a model is measured on: one given, or what the model's own run held out."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from performer_lm.building import TARGET, build
from performer_lm.checkpoint import Checkpoint, holder
from performer_lm.data.module import WindowData
from performer_lm.data.run_config import TOKENIZER, read_data_section
from performer_lm.data.tokenizer import Tokenizer
from performer_lm.data.tokenizer.recipes import Restored

TEXT_HASHES: Final = ("corpus", "head")  # of a fingerprint
PART: Final = "data.validation_fraction="
ANOTHER: Final = "data=files data.path=FILE measures another text"


def open_data(
    given: Mapping[str, Any], checkpoint: Checkpoint, tokenizer: Tokenizer, *, typed: Sequence[str] = ()
) -> WindowData:
    """Return the text to measure, prepared with a checkpoint's tokenizer.

    Args:
        given: the plain section `data`. Where it builds something, all of its text is measured; else the text that the
            checkpoint's run held out.
        checkpoint: of `read`.
        tokenizer: the checkpoint's.
        typed: the overrides of the command line; with `data.validation_fraction` among them, the part of a given text
            is measured that a run would hold out.

    Raises:
        ValueError: for text that is not there, that brings a vocabulary of its own, or that is no longer what the run
            was trained on.
    """
    if TARGET in given:
        return _prepare(given, tokenizer, whole=not any(PART in override for override in typed))
    run = holder(checkpoint.path)
    if not (run / "config.yaml").exists():
        raise ValueError(f"{checkpoint.path} lies in no run folder, whose config.yaml names its text; {ANOTHER}")
    own = read_data_section(run / "config.yaml")
    changed = {key: value for key, value in given.items() if value is not None}
    try:
        data = _prepare({**own, **changed}, tokenizer, whole=False)
    except ValueError as error:
        raise ValueError(f"the text of {run}: {error}; {ANOTHER}") from error
    trained_on = checkpoint.section.get("fingerprint") or {}
    measured = data.fingerprint()
    if any(measured.get(name) != trained_on[name] for name in TEXT_HASHES if name in trained_on):
        raise ValueError(f"the text of {run} is no longer what the run was trained on; {ANOTHER}")
    return data


def _prepare(section: Mapping[str, Any], tokenizer: Tokenizer, *, whole: bool) -> WindowData:
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
