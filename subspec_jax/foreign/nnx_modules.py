"""Flax NNX modules with low-bit weights. Flax is imported for its own models, not before."""

import functools
import sys
from collections.abc import Callable
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


def substitute_nnx(
    model: Any, substitutes: Callable[[dict[str, Any]], dict[str, LowBitArray]]
) -> Any:
    """A clone of the module whose variables hold what `substitutes` makes of its arrays by path.

    Layers that have a `dot_general` of JAX's (Linear, LinearGeneral) multiply by the low-bit matrix
    itself; every other module gets the dequantized array where it uses its variable.
    """
    from flax import nnx

    clone = nnx.clone(model)
    nodes = [(path, node) for path, node in nnx.iter_graph(clone)]
    variables = {
        "/".join(map(str, path)): node for path, node in nodes if isinstance(node, nnx.Variable)
    }
    found = substitutes({path: variable.get_value() for path, variable in variables.items()})
    new = {id(variables[path]): low_bit_variable()(array) for path, array in found.items()}
    for _, node in nodes:
        if isinstance(node, nnx.Variable):
            continue
        changed = False
        for name, child in _children(node):
            if id(child) in new:
                _put(node, name, new[id(child)])
                changed = True
        if changed:
            _use_low_bit_products(node)
    return clone


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, list | tuple):
        return list(enumerate(node))
    return list(vars(node).items()) if hasattr(node, "__dict__") else []


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
