"""The fields of a request's JSON, each checked for its type. Nothing is converted, null is absent.

Fields that would change the answer and are not supported are refused by name, unless they have the
value that changes nothing.
"""

from collections.abc import Iterable
from typing import Any, NoReturn

from experiments.serve.errors import ApiError
from llm_jax import shown
from llm_jax.files import parse_json

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # field -> the values that change nothing
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}
MOST = 1e300
IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
    + ("parallel_tool_calls",)
)
"""Fields that have no part in the answer."""


class Body:
    """A JSON object whose fields are asked for one by one."""

    def __init__(self, text: bytes):
        try:
            found = parse_json(text)
        except ValueError as error:
            raise ApiError(400, f"the body is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise ApiError(400, f"the body is {_kind(found)}; expected a JSON object")
        self._fields = {name: value for name, value in found.items() if value is not None}

    def check_names(self, known: Iterable[str]) -> None:
        """Refuses what is not supported, and what nobody knows."""
        for name, value in self._fields.items():
            if name in known or name in IGNORED:
                continue
            if name not in UNSUPPORTED:
                raise ApiError(400, f"unknown field '{shown(name, 60)}'", shown(name, 60))
            if not any(_same(value, neutral) for neutral in UNSUPPORTED[name]):
                raise ApiError(
                    400,
                    f"{name} is not supported by this server; leave it out",
                    name,
                    "unsupported",
                )

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def get(self, name: str) -> Any:
        return self._fields.get(name)

    def text(self, name: str) -> str:
        value = self._fields.get(name)
        if not isinstance(value, str):
            self.refuse(name, "a string")
        return value

    def flag(self, name: str) -> bool:
        value = self._fields.get(name, False)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def integer(self, name: str, low: int, high: int, default: int | None) -> Any:
        value = self._fields.get(name, default)
        if name in self and (isinstance(value, bool) or not isinstance(value, int)):
            self.refuse(name, "a whole number")
        if name in self and not low <= value <= high:
            self.refuse(name, f"{low} to {high}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._fields.get(name, default)
        if not _is_number(value) or abs(value) > MOST:  # an int may be too large for a float
            self.refuse(name, "a number")
        return float(value)

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raises the error of a field."""
        value = self._fields.get(name)
        found = "is missing" if value is None else f"is {_kind(value)}"
        raise ApiError(400, f"{name} {found}; expected {expected}", name)


def _same(a: Any, b: Any) -> bool:
    """Whether two values are equal; in JSON, unlike in Python, false is not 0."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    """Such as "the number 3" or "a list", short."""
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {shown(repr(value), 40)}"
        case str():
            return f"the string '{shown(value, 40)}'"
        case list():
            return "a list"
        case dict():
            return "an object"
    return "null"
