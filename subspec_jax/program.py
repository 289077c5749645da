"""Compiled programs that take one dataclass, so that every caller names what it gives."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax

from llm_jax.cards import ALIKE, on_each

Inputs = TypeVar("Inputs")
Result = TypeVar("Result")


def program(results: Any) -> Callable[[Callable], "Program"]:
    """The decorator `Program`, with its `results`."""
    return functools.partial(Program, results=results)


static = functools.partial(dataclasses.field, metadata=dict(static=True))
"""A field that is part of the program, not of its data: it must be hashable."""
donated = functools.partial(dataclasses.field, metadata=dict(donated=True))
"""A field whose buffers the program may use for its results."""


class Program(Generic[Inputs, Result]):
    """`f(inputs)` compiled, for inputs that are a dataclass registered as a pytree.

    Fields made by `static` select the program. Buffers of fields made by `donated` may be used for
    the results, so the caller must not use them afterwards. `lower` takes the same inputs with
    shapes in place of arrays. Where several cards share the model (`cfg.cards`), each runs `f`, and
    `results` says how what it returns lies on them (`llm_jax.cards.on_each`).
    """

    def __init__(self, f: Callable[[Inputs], Result], results: Any = ALIKE):
        def run(given_away: dict[str, Any], rest):
            cards = rest.cfg.cards if hasattr(rest, "cfg") else 1
            return on_each(f, cards, results)(dataclasses.replace(rest, **given_away))

        run.__name__ = run.__qualname__ = f.__name__  # profiles and logs show this name
        self.function = f
        self._run = jax.jit(run, donate_argnums=0)
        functools.update_wrapper(self, f)

    def __call__(self, inputs: Inputs) -> Result:
        return self._run(*_split(inputs))

    def _cache_size(self) -> int:
        """Programs compiled so far, as `jax.jit`'s own functions tell it."""
        return self._run._cache_size()

    def lower(self, inputs: Inputs) -> jax.stages.Lowered:
        return self._run.lower(*_split(inputs))


def _split(inputs):
    """(what is donated, by name; the inputs without it)."""
    fields = dataclasses.fields(inputs)
    given_away = {f.name: getattr(inputs, f.name) for f in fields if f.metadata.get("donated")}
    return given_away, dataclasses.replace(inputs, **dict.fromkeys(given_away))
