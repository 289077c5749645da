"""The floats of a pytree as one vector, so that one kernel changes all of them.

A network of 100 convolutions has 600 arrays. Optimizer and moving average, array by array, were
half of the fusions of a training step.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each array of a tree is: float32 in the vector, others beside it."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    """Indices of leaves in the order of the vector: kernels (two or more axes) first."""
    beside: tuple[int, ...]
    """Indices of the leaves that are not in the vector."""
    kernels: int
    """This many first values of the vector belong to kernels."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlatTree:
    """A tree of arrays as one float32 vector, and the arrays of other types; see `tree`."""

    vector: jax.Array
    beside: list[jax.Array]
    layout: Layout = dataclasses.field(metadata=dict(static=True))

    @property
    def tree(self) -> Any:
        """The original tree; its arrays are NumPy's where the vector is."""
        layout = self.layout
        cut = _cut if isinstance(self.vector, np.ndarray) else _split
        found: list = [None] * len(layout.shapes)
        for at, a in zip(layout.order, cut(layout, self.vector), strict=True):
            found[at] = a
        for at, a in zip(layout.beside, self.beside, strict=True):
            found[at] = a
        return jax.tree.unflatten(layout.treedef, found)


def flatten(tree: Any) -> FlatTree:
    """The `FlatTree` of a tree of arrays."""
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [jnp.asarray(a) for a in leaves]
    real = [i for i, a in enumerate(leaves) if a.dtype == jnp.float32]
    order = sorted(real, key=lambda i: leaves[i].ndim < 2)
    beside = [i for i in range(len(leaves)) if i not in set(real)]
    kernels = sum(leaves[i].size for i in order if leaves[i].ndim > 1)
    shapes = tuple(a.shape for a in leaves)
    layout = Layout(treedef, shapes, tuple(order), tuple(beside), kernels)
    return FlatTree(_join([leaves[i] for i in order]), [leaves[i] for i in beside], layout)


def _join(arrays) -> jax.Array:
    if not arrays:
        return jnp.zeros(1, jnp.float32)  # an empty list cannot be joined
    return jnp.concatenate([a.reshape(-1) for a in arrays])


def _cut(layout: Layout, vector) -> list:
    shapes = [layout.shapes[i] for i in layout.order]
    ends = np.cumsum([0, *(math.prod(s) for s in shapes)])
    return [vector[a:b].reshape(s) for a, b, s in zip(ends, ends[1:], shapes)]


_split = jax.custom_vjp(_cut, nondiff_argnums=(0,))
# JAX's own gradient of slices pads each to the whole vector and adds them
_split.defvjp(lambda layout, v: (_cut(layout, v), None), lambda layout, _, g: (_join(g),))
