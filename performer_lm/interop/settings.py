"""The settings of a foreign model, read by name and type, and those that nothing here can hold, refused by name."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from performer_lm.wording import short

MISSING: Final = object()


class Settings:
    """Settings by name; what is absent or null has the default that is asked for with it.

    Args:
        values: plain data.
        source: the file they come from, for messages.
    """

    def __init__(self, values: Mapping[str, Any], *, source: str) -> None:
        self.values = values
        self.source = source

    def count(self, name: str, default: Any = MISSING) -> int:
        """Return a whole number of at least 1."""
        value = self._get(name, default)
        if type(value) is not int or not 1 <= value <= 2**30:
            raise self.refusal(f"{name} ({short(value)}) must be a whole number from 1 to 2^30")
        return value

    def number(self, name: str, default: Any = MISSING) -> float:
        """Return a number above 0, rounded as its file rounded it."""
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.refusal(f"{name} ({short(value)}) must be a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._get(name, default)
        if type(value) is not bool:
            raise self.refusal(f"{name} ({short(value)}) must be true or false")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value as it is."""
        return self._get(name, default)

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Refuse the first of some settings, by name, that is on; the reason says what it asks for."""
        for name, reason in reasons.items():
            if value := self.values.get(name):
                raise self.refusal(f"{reason} ({name}={short(value)}), which has no counterpart here")

    def refusal(self, reason: str) -> ValueError:
        """Return a refusal that names the file."""
        return ValueError(f"{self.source}: {reason}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if value is MISSING:
            raise self.refusal(f"it has no {name}")
        return value


def as_written(value: float) -> float:
    """Return a number of float32 as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
