"""Named values of a file (config.json, GGUF metadata), each checked when it is used.

Nothing is converted: true is no number and "12" is no whole number. Every number has a range, so
that nothing is allocated for a size that cannot be meant.
"""

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from llm_jax import LLMError

REQUIRED: Any = object()
"""As a default: the value must be there."""


class ConfigError(LLMError):
    """A model description this package cannot run; the message says which field and why."""


class Values:
    """A mapping of named values. With a default of None, null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str = ""):
        self._values = values
        self._where = where
        """What messages put in front of a name, such as "rope_scaling."."""

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def is_list(self, name: str) -> bool:
        """Whether the value is a list."""
        return isinstance(self._values.get(name), list)

    def number(self, name: str, low: float, high: float, default: Any = REQUIRED) -> Any:
        """A number between low and high, as a float."""
        value = self._get(name, default)
        if value is None and default is None:
            return None
        known = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not known or not low <= value <= high:  # NaN is in no range
            self.refuse(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, low: int, high: int, default: Any = REQUIRED) -> Any:
        """A whole number between low and high."""
        value = self._get(name, default)
        if value is None and default is None:
            return None
        known = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not known or not low <= value <= high:
            self.refuse(name, f"a whole number from {low:,} to {high:,}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false; null is the default."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "true or false, without quotes")
        return default if value is None else value

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        """A string."""
        value = self._get(name, default)
        if not isinstance(value, str) and not (value is None and default is None):
            self.refuse(name, "a string")
        return value

    def list_of(self, kind: type, name: str) -> list[Any]:
        """A list whose entries are of one type; empty where there is none."""
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or any(type(entry) is not kind for entry in value):
            self.refuse(name, f"a list, each entry of type {kind.__name__}")
        return value

    def numbers(self, name: str, low: float, high: float) -> list[float]:
        """A list of numbers between low and high; it must be there."""
        value = self._get(name, REQUIRED)
        known = lambda x: (
            isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high
        )
        if not isinstance(value, list) or not all(map(known, value)):
            self.refuse(name, f"a list of numbers from {low:g} to {high:g}")
        return [float(x) for x in value]

    def mapping(self, name: str) -> "Values | None":
        """An object with values of its own; None where it is absent or empty."""
        value = self._values.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            self.refuse(name, "an object")
        return Values(value, f"{self._where}{name}.")

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raises the ConfigError of a value that is not what was expected."""
        found = short(self._values.get(name))
        raise ConfigError(f"{self._where}{name} is {found}; expected {expected}")

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name, default)
        if value is REQUIRED:
            raise ConfigError(f"{self._where}{name} is missing")
        return value


def short(value: Any) -> str:
    """A value of a file for a message: on one line, escaped, and cut where it is long."""
    cut = reprlib.Repr()
    cut.maxstring = cut.maxother = 60
    return cut.repr(value)
