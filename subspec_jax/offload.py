"""Which parts of a layer are in pinned host memory, and layers moved there and back.

`llm_jax.stream` brings them to the device one after another. Only matrices move. Norms and biases
of an offloaded layer stay on the device, where the draft uses them too. If a matrix is in two parts
(`Split`), only its residual moves.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import LLMError
from llm_jax.cards import place_of
from llm_jax.mxfp4 import dense, encode, mxfp4_bytes
from llm_jax.params import Experts, Layer, SeparateExperts
from llm_jax.stream import to_device
from subspec_jax.residual.split import Split, SplitExperts, is_split


def moving(layer: Layer) -> Layer:
    """The layer with a bool in place of each array: True if it moves when the layer is streamed.

    Of a layer with experts only those move: they are most of it.
    """
    every = lambda value, tree: jax.tree.map(lambda _: value, tree)
    if isinstance(layer.mlp, Experts):
        stay = every(False, layer)
        return dataclasses.replace(stay, mlp=dataclasses.replace(stay.mlp, **_moving(layer.mlp)))
    split = lambda w: Split(every(False, w.substitute), every(True, w.residual))
    return jax.tree.map(lambda w: split(w) if is_split(w) else w.ndim > 1, layer, is_leaf=is_split)


def _moving(m: Experts) -> dict[str, Any]:
    """By name, the experts with a bool in place of each array."""
    every = lambda value, tree: jax.tree.map(lambda _: value, tree)
    if isinstance(m.expert_gate_up, SplitExperts):
        w = every(False, m.expert_gate_up)
        return dict(expert_gate_up=dataclasses.replace(w, each=every(True, w.each)))
    names = ("expert_gate_up", "expert_down")
    return {name: every(True, getattr(m, name)) for name in names}


def streamed_bytes(layer: Layer) -> int:
    """Bytes that move when the layer is streamed. It may be anywhere, and may consist of shapes."""
    pairs = zip(*map(jax.tree.leaves, (layer, moving(layer))), strict=True)
    return sum(a.size * a.dtype.itemsize for a, moves in pairs if moves)


def offload(layer: Layer) -> Layer:
    """The layer with its streamed arrays in pinned host memory and the others on the device."""
    layer = separate_experts(layer)
    kind = lambda moves: "pinned_host" if moves else "device"
    places = jax.tree.map(lambda a, moves: place_of(a, 1, kind(moves)), layer, moving(layer))
    return jax.device_put(layer, places)


def separate_experts(layer: Layer, mxfp4: bool = False, exact: bool = True) -> Layer:
    """The layer with its stacks of experts taken apart: an array for each expert, with the numbers
    as they are or in MXFP4's own form. Raises LLMError for `exact` numbers that do not have it."""
    m = layer.mlp
    if not isinstance(m, Experts) or m.expert_down is None:
        return layer
    stacks = m.expert_gate_up, m.expert_down
    join = np.concatenate if isinstance(stacks[0], np.ndarray) else jnp.concatenate
    flat = lambda some: join([w.reshape(-1) for w in some])
    shapes = tuple(w.shape[1:] for w in stacks)
    if mxfp4:
        each = tuple(_mxfp4([w[e] for w in stacks], exact) for e in range(m.router.shape[1]))
    else:
        each = tuple(flat([w[e] for w in stacks]) for e in range(m.router.shape[1]))
    experts = SeparateExperts(each, shapes, mxfp4)
    mlp = dataclasses.replace(m, expert_gate_up=experts, expert_down=None)
    return dataclasses.replace(layer, mlp=mlp)


def separate_shapes(layer: Layer, mxfp4: bool = False) -> Layer:
    """`separate_experts` of a layer of shapes."""
    m = layer.mlp
    if not isinstance(m, Experts) or m.expert_down is None:
        return layer
    stacks = m.expert_gate_up, m.expert_down
    shapes = tuple(w.shape[1:] for w in stacks)
    size = sum(map(mxfp4_bytes if mxfp4 else math.prod, shapes))
    flat = jax.ShapeDtypeStruct((size,), jnp.uint8 if mxfp4 else stacks[0].dtype)
    experts = SeparateExperts((flat,) * stacks[0].shape[0], shapes, mxfp4)
    mlp = dataclasses.replace(m, expert_gate_up=experts, expert_down=None)
    return dataclasses.replace(layer, mlp=mlp)


def _mxfp4(matrices: Sequence[Any], exact: bool) -> np.ndarray:
    """An expert's matrices as one array of bytes."""
    parts = []
    for w in matrices:
        found, same = _encode(jnp.asarray(w))
        if exact and not same:
            raise LLMError("an expert has numbers that are not MXFP4's, though its file says so")
        parts += jax.tree.leaves(found)
    return np.concatenate([np.asarray(a).reshape(-1) for a in parts])


@jax.jit
def _encode(w):
    found = encode(w)
    return found, (dense(found, w.dtype) == w).all()


def place(layers: Sequence[Layer], resident: int | Collection[int]) -> tuple[Layer, ...]:
    """The layers, with the resident ones on the device and the others offloaded.

    `resident` is a number of first layers, or a collection of layer numbers. A layer that is
    already in its place is returned unchanged. One layer moves at a time, and moves to the host
    come first. So the device never holds more than the larger of before and after.
    """
    placed = list(layers)
    stay = range(resident) if isinstance(resident, int) else resident
    order = sorted(range(len(layers)), key=lambda i: (i in stay, i if i in stay else -i))
    for i in order:
        placed[i] = jax.block_until_ready((to_device if i in stay else offload)(layers[i]))
    return tuple(placed)


def rows_of(table: np.ndarray, tokens: Any) -> np.ndarray:
    """Rows of an embedding table kept in host memory as a NumPy array: tokens[...] -> [..., D]."""
    return table[np.asarray(tokens)]
