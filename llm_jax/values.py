"""Values of files that others may have changed, each checked for its type before it is used.

`Values` asks for one named value after another, with a range for every number, so that nothing is
allocated for a size that cannot be meant: for files that others define (config.json, GGUF
metadata). `from_json` reads a whole dataclass: for files that this project writes itself. Nothing
is converted: true is no number and "12" is no whole number.
"""

import dataclasses
import math
import reprlib
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

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
        if not is_plain(float, value) or not low <= value <= high:
            self.refuse(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, low: int, high: int, default: Any = REQUIRED) -> Any:
        """A whole number between low and high."""
        value = self._get(name, default)
        if value is None and default is None:
            return None
        if not is_plain(int, value) or not low <= value <= high:
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
        _refuse(f"{self._where}{name}", self._values.get(name), expected)

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name, default)
        if value is REQUIRED:
            raise ConfigError(f"{self._where}{name} is missing")
        return value


def from_json(kind: Any, found: Any, where: str) -> Any:
    """A value of this type: a dataclass, a tuple or dict, a Literal, a union, or a plain type.

    A tuple is a list in JSON. An object has all fields of its dataclass, or of a direct subclass,
    and no others. `where` names the value in the ConfigError for one of another type.
    """
    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, found, where)
    if origin in (Union, types.UnionType):
        if found is None and type(None) in args:
            return None
        rest = [one for one in args if one is not type(None)]
        if len(rest) == 1:
            return from_json(rest[0], found, where)
    elif origin is Literal:
        if any(type(found) is type(one) and found == one for one in args):
            return found
    elif origin is tuple and isinstance(found, list):
        each = args[:1] * len(found) if args[1:] == (...,) else args
        if len(each) == len(found):
            pairs = enumerate(zip(each, found, strict=True))
            return tuple(from_json(one, value, f"{where}[{i}]") for i, (one, value) in pairs)
    elif origin is dict and isinstance(found, dict):
        return {key: from_json(args[1], value, f"{where}.{key}") for key, value in found.items()}
    elif is_plain(kind, found):
        return found
    words = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    _refuse(where, found, words)


def _dataclass(kind: Any, found: Any, where: str) -> Any:
    if not isinstance(found, dict):
        _refuse(where, found, "an object")
    kinds = (kind, *kind.__subclasses__())
    kind = next((one for one in kinds if _fields(one).keys() == found.keys()), kind)
    wanted = _fields(kind)
    for name in (*wanted, *found):
        if (name in wanted) != (name in found):
            word = "missing" if name in wanted else "not known"
            raise ConfigError(f"{where} is wrong: {name!r} is {word}")
    values = {n: from_json(one, found[n], f"{where}.{n}") for n, one in wanted.items()}
    try:
        return kind(**values)
    except ValueError as error:  # from its own checks
        raise ConfigError(f"{where}: {error}") from error


def _fields(kind: Any) -> dict[str, Any]:
    """Name -> type of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def is_plain(kind: Any, value: Any) -> bool:
    """Whether it is a value of the type int, float, str or bool; finite, and an int below 2^63.

    A whole number is a float, too, and NumPy's numbers count.
    """
    if kind not in (int, float):
        return kind in (str, bool) and type(value) is kind
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return abs(int(value)) < 2**63
    return kind is float and isinstance(value, float | np.floating) and math.isfinite(value)


def _refuse(where: str, found: Any, expected: str) -> NoReturn:
    raise ConfigError(f"{where} is {short(found)}; expected {expected}")


def short(value: Any) -> str:
    """A value of a file for a message: on one line, escaped, and cut where it is long."""
    cut = reprlib.Repr()
    cut.maxstring = cut.maxother = 60
    return cut.repr(value)
