"""Exact matrices in two parts: the draft's substitute and the residual that completes it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llm_jax.config import Config
from llm_jax.linear import linear
from llm_jax.packed import packed
from llm_jax.params import Layer, abstract, joined
from llm_jax.quantize import quantize
from pallas_kernels.quantized_matmul import Packed
from pallas_kernels.quantized_matmul.packing import fields_of
from pallas_kernels.residual_decode import Residual, residual_decode
from pallas_kernels.residual_decode.api import parts_here
from pallas_kernels.residual_decode.code import COLUMNS, LANES, MAX_WEIGHTS, tiles


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
    """An exact matrix [D, F] in two parts: the low-bit substitute for the draft, and the residual.

    The substitute is always on the device; the residual may be in host memory. Both may have more
    columns than F (`width_of`).
    """

    substitute: Packed
    residual: Residual

    @property
    def shape(self) -> tuple[int, int]:
        """(D, F)."""
        return self.substitute.shape

    @property
    def pair(self) -> tuple[Residual, Packed]:
        """What is decoded, with all columns."""
        wide = dataclasses.replace(self.substitute, columns=self.residual.shape[1])
        return self.residual, wide

    @property
    def ndim(self) -> int:
        """2."""
        return 2


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitExperts:
    """A layer's experts in two parts: stacks of substitutes, and a residual array for each expert.

    Like `llm_jax.params.SeparateExperts` it takes the place of both stacks. The words of an
    expert's two residuals are one array, those of gate_up before those of down.
    """

    gate_up: Packed
    down: Packed
    each: tuple[jax.Array, ...]
    """uint32 [rows, LANES]."""
    shapes: tuple[tuple[int, int], tuple[int, int]] = dataclasses.field(metadata=dict(static=True))
    dtype: str = dataclasses.field(metadata=dict(static=True))
    rows: int = dataclasses.field(metadata=dict(static=True))
    """Rows of words of gate_up."""
    patches: tuple[int, int] = dataclasses.field(metadata=dict(static=True))

    def matrices(self, words: jax.Array, number: Any) -> tuple[Split, Split]:
        """(gate_up, down) of an expert whose words are on the device."""
        take = lambda a: jax.lax.dynamic_index_in_dim(a, number, 0, keepdims=False)
        low = jax.tree.map(take, (self.gate_up, self.down))
        return tuple(
            Split(low, Residual(part, None, shape, self.dtype, patches))
            for low, part, shape, patches in zip(
                low,
                (words[: self.rows], words[self.rows :]),
                self.shapes,
                self.patches,
                strict=True,
            )
        )


def width_of(columns: int, bits: int) -> int:
    """Columns of a matrix in two parts: as many as the kernel decodes, if few have to be added."""
    whole = COLUMNS * fields_of(bits)
    wide = -(-columns // whole) * whole
    return wide if 8 * (wide - columns) <= columns else columns


def widened(w: Any, bits: int) -> Any:
    """The array with more columns, up to `width_of`; of NumPy NumPy.

    The first ones again: zeros would cost more bits, for they are no likely numbers of a matrix.
    """
    more = width_of(w.shape[1], bits) - w.shape[1]
    join = np.concatenate if isinstance(w, np.ndarray) else jnp.concatenate
    return join([w, w[:, :more]], axis=1) if more else w


def split_experts(low: tuple[Packed, Packed], pairs: Sequence[tuple[Residual, Residual]]):
    """`SplitExperts` of stacks of substitutes and of each expert's residuals, padded alike."""
    first, second = pairs[0]
    words = lambda pair: np.concatenate([np.asarray(r.words) for r in pair])
    return SplitExperts(
        *low,
        tuple(map(words, pairs)),
        (first.shape, second.shape),
        first.dtype,
        first.words.shape[0],
        (first.patches, second.patches),
    )


def is_split(w: Any) -> bool:
    """Whether this is a matrix, or a stack of experts, in two parts."""
    return isinstance(w, Split | SplitExperts)


def has_split(tree: Any) -> bool:
    """Whether any matrix of the tree is in two parts."""
    return any(map(is_split, jax.tree.leaves(tree, is_leaf=is_split)))


def split_shapes(
    cfg: Config,
    bits: int,
    group: int,
    room: dict[str, tuple[int, int]],
    code: str = "levels",
    index: int = 0,
) -> Layer:
    """Layer `index` of `Split` matrices, as shapes. `room`: (rows of words, patches) of each."""
    names = iter(cfg.joined_matrices)
    split = lambda *matrices: _split(matrices, bits, group, room[next(names)], code)
    plain = abstract(cfg).layers[index]
    if cfg.has_experts(index):
        return _split_expert_shapes(plain, bits, group, room)
    return jax.eval_shape(lambda layer: joined(layer, split), plain)


def _split_expert_shapes(plain: Layer, bits, group, room) -> Layer:
    """The layer with its experts in two parts, as shapes; its other matrices stay as they are."""
    array = jax.ShapeDtypeStruct
    stacks = plain.mlp.expert_gate_up, plain.mlp.expert_down
    rooms = [room[name] for name in ("expert_gate_up", "expert_down")]
    low = lambda w: packed(quantize(w, bits, group, 0))
    rows = sum(rows for rows, _ in rooms)
    experts = SplitExperts(
        *(jax.eval_shape(jax.vmap(low), stack) for stack in stacks),
        (array((rows, LANES), jnp.uint32),) * stacks[0].shape[0],
        tuple(stack.shape[1:] for stack in stacks),
        stacks[0].dtype.name,
        rooms[0][0],
        tuple(patches for _, patches in rooms),
    )
    mlp = dataclasses.replace(plain.mlp, expert_gate_up=experts, expert_down=None)
    return dataclasses.replace(plain, mlp=mlp)


def _split(matrices, bits, group, room, code) -> Split:
    whole = jnp.concatenate(matrices, axis=1)
    wide = widened(whole, bits)
    substitute = packed(quantize(wide, bits, group, 0))
    rows, patches = room
    low = jnp.zeros(substitute.shape, jnp.uint8) if code == "planes" else None
    words = jnp.zeros((rows, LANES), jnp.uint32)
    exact = Residual(words, low, substitute.shape, whole.dtype.name, patches)
    return Split(dataclasses.replace(substitute, columns=whole.shape[1]), exact)


def head_shape(cfg: Config, bits: int, group: int) -> tuple[int, int] | None:
    """The shape [D, V] of a split output head, with columns added so that the kernel can decode it.

    None if the head cannot be split: it is tied to the embedding, its rows do not fill whole
    groups, or it has more weights than a residual can count.
    """
    whole = COLUMNS * fields_of(bits)
    shape = cfg.d_model, -(-cfg.head_columns // whole) * whole
    fits = cfg.d_model % group == 0 and math.prod(shape) < MAX_WEIGHTS
    return None if cfg.tied or not fits else shape


def split_head_shapes(
    cfg: Config, bits: int, group: int, room: tuple[int, int], code: str = "levels"
) -> Split:
    """The output head as a `Split`, as shapes."""
    whole = jax.ShapeDtypeStruct(head_shape(cfg, bits, group), cfg.dtype)
    return jax.eval_shape(lambda w: _split((w,), bits, group, room, code), whole)


def gaussian_room(cfg: Config, bits: int, group: int) -> dict[str, tuple[int, int]]:
    """By matrix, (rows of words, patches) that are enough for normally distributed weights.

    This is for the code "levels". The output head, if it can be split, has the name "head".
    """
    head = head_shape(cfg, bits, group)
    shapes = cfg.joined_matrices | ({} if head is None else {"head": head})
    if (e := cfg.experts) is not None:
        shapes |= dict(expert_gate_up=(cfg.d_model, 2 * e.d_ff), expert_down=(e.d_ff, cfg.d_model))
    room = {}
    for name, (D, F) in shapes.items():
        F = F if name in ("head", "expert_gate_up", "expert_down") else width_of(F, bits)
        Q, T = tiles((D, F), group)
        stream, patched = GAUSSIAN[bits]
        stream += FINER_BITS[cfg.dtype]
        words = D * F * stream / 32 + 2 * Q * T
        room[name] = 8 + math.ceil(words / LANES), 1024 + math.ceil(D * F * patched)
    return room


GAUSSIAN = {2: (9.95, 0.012), 3: (8.6, 0.008), 4: (7.53, 0.0085), 8: (3.83, 0.0125)}
"""By bits of the substitute: (bits per weight with patches, patches per weight). Both depend on the
position of the weights' standard deviation within an octave (4 bits: 7.37 to 7.49, 0.2% to 0.7%);
these values are always enough."""
FINER_BITS = {"bfloat16": 0, "float16": 3}
"""Bits of a significand beyond those of bfloat16. The code does not see that they are zero in a
checkpoint of bfloat16 weights."""


@linear.register
def _(w: Split, x, out_dtype=None):
    # Filled part by part: joining all parts at the end would need twice the room.
    y = jnp.zeros((*x.shape[:-1], w.residual.shape[1]), out_dtype or x.dtype)
    fill = lambda y, found, at: jax.lax.dynamic_update_slice_in_dim(y, found, at, axis=-1)
    return over_parts(w, x, fill, y, y.dtype)[..., : w.shape[1]]


def over_parts(
    w: Split, x: jax.Array, fold: Callable[[Any, jax.Array, int], Any], state: Any, dtype: Any
) -> Any:
    """The last state of state = fold(state, x @ part, first column of the part).

    Parts are equal and contain all columns of w, from the first to the last. Products are in
    `dtype`.
    """
    exact, low = w.pair
    words, parts = exact.words, parts_here(exact, low)
    for part in range(parts):
        # The barrier makes the words depend on x and on the previous part. Without it, a compiler
        # may decode all matrices of a layer before it uses the first.
        words, x, state = jax.lax.optimization_barrier((words, x, state))
        residual = dataclasses.replace(exact, words=words)
        found = linear(residual_decode(residual, low, None, part, parts), x, dtype)
        state = fold(state, found, part * found.shape[-1])
    return state


def decode_layer(layer: Layer) -> Layer:
    """The layer with every `Split` decoded to a plain matrix. Other arrays are unchanged.

    It must not have experts in two parts, which `subspec_jax.residual.stacks` decodes.
    """
    whole = lambda w: residual_decode(*w.pair)[:, : w.shape[1]] if is_split(w) else w
    return jax.tree.map(whole, layer, is_leaf=is_split)
