"""Drawn road scenes with exact labels of every class."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qyolop_jax.scenes.generate import Scenes, scene

__all__ = ["Scenes", "scene"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.generate"), name)
