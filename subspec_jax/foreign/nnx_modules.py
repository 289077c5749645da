"""Flax NNX modules with low-bit weights. Flax is imported for its own models, not before."""

import functools
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.lowbit_array import LowBitArray, dot_general


def is_nnx(model: Any) -> bool:
    """Whether it is an NNX module; then Flax is imported already."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)


@functools.cache
def low_bit_variable() -> type:
    """The type of the variables that hold low-bit weights. It is no Param, so `nnx.grad` and
    optimizers that ask for Param leave them out."""
    from flax import nnx

    return type("LowBitWeight", (nnx.Variable,), {"__doc__": "A low-bit weight."})


class Part:
    """A leaf of a tree: an array, or an NNX module with arrays at paths of its own."""

    def __init__(self, path: str, leaf: Any):
        self._leaf, self._nodes = leaf, None
        if not is_nnx(leaf):
            self.arrays = {path: leaf}
            return
        from flax import nnx

        self._leaf = nnx.clone(leaf)
        self._nodes = [node for _, node in nnx.iter_graph(self._leaf)]
        name = lambda keys: "/".join([*([path] if path else []), *map(str, keys)])
        of = {name(p): v for p, v in nnx.iter_graph(self._leaf) if isinstance(v, nnx.Variable)}
        self._variables = of
        self.arrays = {path: variable.get_value() for path, variable in of.items()}

    def changed(self, found: Mapping[str, LowBitArray]) -> Any:
        """The array, or a clone of the module whose variables hold the substitutes by their paths.

        Layers that have a `dot_general` of JAX's (Linear, LinearGeneral) multiply by the low-bit
        matrix itself; every other module gets the dequantized array where it uses its variable.
        """
        if self._nodes is None:
            (path,) = self.arrays
            return found.get(path, self._leaf)
        new = {
            id(self._variables[path]): low_bit_variable()(array)
            for path, array in found.items()
            if path in self._variables
        }
        for node in self._nodes:
            children = [(n, c) for n, c in _children(node) if id(c) in new]
            for name, child in children:
                _put(node, name, new[id(child)])
            if children:
                _use_low_bit_products(node)
        return self._leaf


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, list):
        return list(enumerate(node))
    held = vars(node) if hasattr(node, "__dict__") else {}
    return [(name, child) for name, child in held.items() if not name.startswith("_")]


def _put(node: Any, name: Any, child: Any) -> None:
    if isinstance(node, dict | list):
        node[name] = child
    else:
        setattr(node, name, child)


def _use_low_bit_products(module: Any) -> None:
    """Lets a layer with a `dot_general` see the low-bit matrix, not its dequantized array."""
    if getattr(module, "dot_general", None) is jax.lax.dot_general and hasattr(
        module, "promote_dtype"
    ):
        module.dot_general = dot_general
        module.promote_dtype = promote_dtype


def promote_dtype(arrays: Any, /, *, dtype: Any = None, inexact: bool = True) -> tuple:
    """The arrays in one dtype, as Flax's function of this name gives them; low-bit ones stay so."""
    given = [a for a in arrays if a is not None]
    common = jnp.result_type(*given) if dtype is None else jnp.dtype(dtype)
    if dtype is None and inexact and not jnp.issubdtype(common, jnp.inexact):
        common = jnp.promote_types(jnp.float32, common)
    cast = lambda a: a.astype(common) if isinstance(a, LowBitArray) else jnp.asarray(a, common)
    return tuple(None if a is None else cast(a) for a in arrays)
