"""Rules that choose arrays of a tree by a pattern of their path, and what is said of wrong ones."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from llm_jax import LLMError

_NEAREST = 3
"""Paths that an error names."""


class RuleError(LLMError):
    """A rule that is no pattern, or chooses nothing; the message names the nearest paths."""


class Rule(Protocol):
    """What a rule of any transform has."""

    @property
    def path(self) -> str:
        """A regular expression for the whole path of an array, such as `layers/.*/kernel`."""
        ...


R = TypeVar("R", bound=Rule)


def chosen(rules: Sequence[R], paths: Iterable[str]) -> dict[str, R]:
    """Path -> the first rule whose pattern is the whole path; paths of no rule are left out.

    Raises RuleError for a pattern that is no regular expression, and for a rule that gets no path.
    """
    paths, found = list(paths), {}
    used: set[int] = set()
    patterns = [_compiled(rule.path) for rule in rules]
    for path in paths:
        for i, pattern in enumerate(patterns):
            if pattern.fullmatch(path):
                found[path] = rules[i]
                used.add(i)
                break
    for i, pattern in enumerate(patterns):
        if i in used:
            continue
        if any(map(pattern.fullmatch, paths)):
            raise RuleError(
                f"rule {rules[i].path!r} comes too late: earlier rules have all of its paths"
            )
        raise RuleError(f"rule {rules[i].path!r} matches nothing; {_nearest(rules[i].path, paths)}")
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RuleError(f"rule {pattern!r} is no regular expression: {error}") from error


def _nearest(pattern: str, paths: list[str]) -> str:
    if not paths:
        return "the tree has no arrays that it could choose"
    words = re.sub(r"\\([dws])[+*]?|\.[*+]|[\\^$()\[\]?+*|]", "", pattern)
    near = difflib.get_close_matches(words, paths, _NEAREST, cutoff=0)
    return f"the nearest paths are {', '.join(near)}"
