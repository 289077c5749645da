"""What a model is made of: a digest of each of its tensors, and whether their numbers are finite.

Two models are one where every tensor has the same content. A model may be read in several dtypes,
so its tensors also have digests of their 16-bit versions. Two models are one, too, where they agree
in the dtype of either: what was lost by rounding is not known.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.digest import array_digest
from llm_jax.params import Layer, Params

SHORT = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Identity:
    """The digests of a model's tensors, or of some of them."""

    dtype: str
    """The dtype that the tensors had."""
    digests: dict[str, dict[str, str]]
    """dtype -> name of a tensor -> digest; `dtype` is among the dtypes."""

    def difference(self, other: "Identity") -> str | None:
        """The name of the first tensor that differs; None where both are of one model."""
        found = []
        for dtype in dict.fromkeys((other.dtype, self.dtype)):
            one, two = self.digests.get(dtype, {}), other.digests.get(dtype, {})
            names = dict.fromkeys((*one, *two))
            found.append(next((n for n in names if one.get(n) != two.get(n)), None))
        return None if None in found else found[0]


class Identifier:
    """Makes an `Identity` from tensors that are added one after another."""

    def __init__(self, dtype: str, more: Sequence[str] = SHORT):
        """`more` are dtypes in which tensors get a digest, too."""
        self.dtype = dtype
        self._digests: dict[str, dict[str, str]] = {name: {} for name in (dtype, *more)}

    def add(self, name: str, tensor: Any) -> None:
        """Takes a tensor: an array, or a weight that is made of several."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(tensor):
            array, full = np.asarray(jax.device_get(leaf)), name + _name(path)
            floating = jnp.issubdtype(array.dtype, jnp.floating)
            for dtype, found in self._digests.items():
                with np.errstate(over="ignore"):  # float16 has infinities where others have numbers
                    found[full] = array_digest(array.astype(np.dtype(dtype), copy=False)
                                               if floating else array)  # fmt: skip

    def add_layer(self, index: int, parts: Mapping[str, Any]) -> None:
        """Takes the tensors of a layer by name."""
        for name, tensor in parts.items():
            self.add(f"layer {index}, {name}", tensor)

    def identity(self) -> Identity:
        """That of all tensors so far."""
        return Identity(self.dtype, self._digests)


def tensors(*owners: Any) -> dict[str, Any]:
    """The tensors of these dataclasses by name; what is None or holds layers is left out."""
    every = {f.name: getattr(owner, f.name) for owner in owners for f in dataclasses.fields(owner)}
    others = ("attn", "mlp", "layers", "kind")
    return {n: w for n, w in every.items() if w is not None and n not in others}


def layer_tensors(layer: Layer) -> dict[str, Any]:
    """All tensors of a layer by name."""
    return tensors(layer, layer.attn, layer.mlp)


def identity(params: Params, dtype: str, more: Sequence[str] = SHORT) -> Identity:
    """The identity of a whole model."""
    found = Identifier(dtype, more)
    for name, tensor in tensors(params).items():
        found.add(name, tensor)
    for index, layer in enumerate(params.layers):
        found.add_layer(index, layer_tensors(layer))
    return found.identity()


def not_finite(tree: Any) -> str | None:
    """The name of the first array that holds NaN or infinity, or None."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(jax.device_get(leaf))
        if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
            return _name(path).strip(".")
    return None


def _name(path: Sequence[Any]) -> str:
    """Where an array is in a tree: .attn.q"""
    return "".join(f".{getattr(key, 'name', getattr(key, 'key', key))}" for key in path)
