"""Train and sample Performer language models: one model, any attention, exactly causal, constant-state decoding.

`PerformerLM` and `performer_lm.ops` import neither Lightning nor Hydra.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from performer_lm.model import PerformerLM

__all__ = ["PerformerLM"]


def __getattr__(name: str) -> Any:
    """Import the model on first use, so that `--help` does not wait for torch."""
    if name == "PerformerLM":
        from performer_lm.model import PerformerLM

        return PerformerLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
