"""Train and sample Performer language models: one model, any attention, exactly causal, constant-state decoding.

The models and `performer_lm.ops` import neither Lightning nor Hydra.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from performer_lm.encoder_decoder import PerformerEncoderDecoder
    from performer_lm.model import PerformerLM
    from performer_lm.performer import Performer

__all__ = ["Performer", "PerformerEncoderDecoder", "PerformerLM"]

_HOMES = {
    "Performer": "performer_lm.performer",
    "PerformerEncoderDecoder": "performer_lm.encoder_decoder",
    "PerformerLM": "performer_lm.model",
}


def __getattr__(name: str) -> Any:
    """Import a model on first use, so that `--help` does not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
