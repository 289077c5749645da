"""GPU kernels behind plain functions, each with a jnp reference that is its specification.

    from pallas_kernels.tree_attention import tree_attention, why_not

A kernel has a package of its own, with a function of the same name and `why_not`, which says why
the Triton kernel cannot do a call. XLA computes the same on any device, and without any Triton.
"""

import importlib
from types import ModuleType

__all__ = [
    "lowrank_attention",
    "quantized_matmul",
    "residual_decode",
    "rotary_cache",
    "tree_attention",
]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
