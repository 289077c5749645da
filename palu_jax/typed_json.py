"""Dataclasses from JSON, every field of the type that its annotation says."""

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def from_json(kind: Any, found: Any, where: str) -> Any:
    """A value of this type: a dataclass, a tuple or dict, a Literal, a union, or a plain type.

    A tuple is a list in JSON. Numbers must be finite and below 2^63, and True is no number. Raises
    ValueError, which says where the value is and what was expected.
    """
    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, found, where)
    if origin in (Union, types.UnionType):
        for one in args:
            if one is type(None) and found is None:
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
    elif _plain(kind, found):
        return found
    raise ValueError(f"{where} is {_shown(found)}; expected {_words(kind)}")


def _plain(kind, found) -> bool:
    """Whether this is a value of the type int, float, str or bool."""
    if type(found) is int and abs(found) >= 2**63:
        return False
    if kind is float:
        return type(found) in (int, float) and math.isfinite(found)
    return kind in (int, str, bool) and type(found) is kind


def _dataclass(kind, found, where):
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {_shown(found)}; expected an object")
    wanted = get_type_hints(kind)
    for name in (*wanted, *found):
        if (name in wanted) != (name in found):
            word = "missing" if name in wanted else "not known"
            raise ValueError(f"{where} is wrong: {name!r} is {word}")
    values = {n: from_json(one, found[n], f"{where}.{n}") for n, one in wanted.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"


def _words(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
