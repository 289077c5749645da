"""Arrays of qwix and low-bit arrays of this project, one as the other, where the numbers agree.

A `qwix.QArray` is code * scale. Here 8 bits with one scale for each output are `llm_jax.int8`; all
else is code * step + offset in bfloat16, with the offset that puts the middle code at zero. qwix is
imported when an array of its kind is made, not before.
"""

import functools
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.int8 import Int8
from llm_jax.lowbit_array import LowBitArray, matrix_axes
from pallas_kernels.quantized_matmul.packing import codes_and_scales, repack
from subspec_jax import SubspecError

_QTYPES = {"int2": 2, "int3": 3, "int4": 4, "int8": 8}
_LARGEST = 256
"""The largest group that the kernels take."""
_CUTS = (128, 64, 32, 16)


class QwixError(SubspecError):
    """An array whose numbers the other library has no form for; the message says what differs."""


def qarray_of(leaf: Any) -> Any:
    """The QArray that this is, or that qwix wraps for its own layers; None for all else."""
    qwix = sys.modules.get("qwix")
    if qwix is None:
        return None
    inner = getattr(leaf, "array", None)
    return next((a for a in (leaf, inner) if isinstance(a, qwix.QArray)), None)


def from_qwix(
    array: Any, summed: tuple[int, ...] = (0,), stacked: int = 0, *, round_scales: bool = False
) -> LowBitArray:
    """The same numbers as a low-bit array: int2, int3, int4 and int8 without zero points.

    `summed` and `stacked` are those of `subspec_jax.Rule`. int8 with one scale for each output
    keeps its scales in float32, and its products round activations to 8 bits, too. All others need
    scales that bfloat16 holds: `round_scales=True` rounds them, by at most 2^-9 of a weight. Scales
    for tiles of outputs, or of an axis before the last summed one, are repeated; so are those of
    more than 256 inputs, for groups that the kernels take. Not under `jit`.

    Raises QwixError for zero points, other types of codes, fewer than 8 inputs a scale, and scales
    that would be rounded.
    """
    found = qarray_of(array)
    if found is None:
        raise QwixError(f"a {type(array).__name__} is no qwix.QArray")
    bits = _QTYPES.get(_name(found.qtype))
    if bits is None:
        raise QwixError(f"codes of {_name(found.qtype)}; possible are {', '.join(_QTYPES)}")
    if found.zero_point is not None:
        raise QwixError("the array has zero points; quantize it with absmax, which has none")
    shape = tuple(found.qvalue.shape)
    lead, own = shape[:stacked], shape[stacked:]
    axes = matrix_axes(own, summed)
    if axes is None:
        raise QwixError(f"shape {shape}: {stacked} axes of a stack and sums over {summed} do not "
                        "leave a matrix")  # fmt: skip
    group, kept = _tiles(own, found.scale.shape[stacked:], axes)
    D = math.prod(own[i] for i in axes)
    by_output = bits == 8 and group == D
    order = [*range(stacked), *(stacked + i for i in (*axes, *_others(own, axes)))]
    scale = found.scale
    for axis, size in enumerate((*lead, *kept)):
        scale = jnp.repeat(scale, size // scale.shape[axis], axis)
    scale_QF = scale.transpose(order).reshape(*lead, D // group, -1)
    if group > _LARGEST and not by_output:
        cut = next((g for g in _CUTS if group % g == 0), group)
        scale_QF, group = jnp.repeat(scale_QF, group // cut, -2), cut
    code_DF = found.qvalue.transpose(order).reshape(*lead, D, -1).astype(jnp.int8)
    if by_output:
        matrix = Int8(code_DF, scale_QF[..., 0, :].astype(jnp.float32))
    else:
        step_QF = _in_bfloat16(scale_QF, group, round_scales)
        half = 2 ** (bits - 1)
        codes = (code_DF.astype(jnp.int16) + half).astype(jnp.uint8)
        each = functools.partial(repack, bits=bits)
        for _ in lead:
            each = jax.vmap(each)
        matrix = each(codes.reshape(*lead, D // group, group, -1), step_QF, -half * step_QF)
    return LowBitArray(matrix, own, axes, jnp.dtype(found.scale.dtype))


def to_qwix(low: LowBitArray) -> Any:
    """The same numbers as a `qwix.QArray`, with a tile for each group. Not under `jit`.

    Its scales have the array's dtype where that holds them, otherwise float32; the dtype of a
    QArray is that of its scales. Raises QwixError for offsets other than the middle code's, which
    `subspec_jax.foreign.substitutes.symmetric` avoids, and for groups that are no tiles of the
    array's axes.
    """
    import qwix

    w, lead = low.matrix, low.lead
    if isinstance(w, Int8):
        bits, group = 8, w.code_DF.shape[-2]
        code, scale_QF = w.code_DF, w.scale_F[..., None, :]
    else:
        bits, group = w.bits, w.group
        each, half = codes_and_scales, 2 ** (bits - 1)
        for _ in lead:
            each = jax.vmap(each)
        codes, step_QF, offset_QF = each(w)
        if not (offset_QF == -half * step_QF).all():
            raise QwixError(
                "the array's groups have offsets, which a QArray without zero points has not; "
                "make it with quantizer=symmetric"
            )
        code = (codes.astype(jnp.int16) - half).astype(jnp.int8)
        scale_QF = step_QF.astype(jnp.float32)
    order = (*low.summed, *low.outputs)
    back = [*range(len(lead)), *(len(lead) + order.index(i) for i in range(len(order)))]
    sizes, tiles = [low.own_shape[i] for i in low.summed], []
    for size in reversed(sizes):
        if group % size and size % group:
            raise QwixError(f"groups of {w.group} inputs are no tiles of axes of {sizes}")
        tiles.insert(0, max(1, size // group))
        group = max(1, group // size)
    outputs = [low.own_shape[i] for i in low.outputs]
    turned = lambda a, inputs: a.reshape(*lead, *inputs, *outputs).transpose(back)
    narrow = scale_QF.astype(low.dtype)
    scale = narrow if (narrow.astype(jnp.float32) == scale_QF).all() else scale_QF
    qtype = {2: "int2", 3: "int3", 4: jnp.dtype("int4"), 8: jnp.dtype("int8")}[bits]
    codes = turned(code, sizes).astype(jnp.int8 if bits == 8 else jnp.int4)
    return qwix.QArray(codes, turned(scale, tiles), None, qtype)


def _name(qtype: Any) -> str:
    return qtype if isinstance(qtype, str) else jnp.dtype(qtype).name


def _others(own: tuple[int, ...], axes: tuple[int, ...]) -> list[int]:
    return [i for i in range(len(own)) if i not in axes]


def _tiles(own, scales, axes) -> tuple[int, list[int]]:
    """(the inputs in a row that have the same scale, how many scales each axis has for that)."""
    group, kept, whole = 1, list(own), True
    for i in reversed(axes):
        if whole:
            group *= own[i] // scales[i]
            kept[i], whole = scales[i], scales[i] == 1
    return group, kept


def _in_bfloat16(scale_QF: jax.Array, group: int, rounded: bool) -> jax.Array:
    """The scales as steps of groups; raises QwixError."""
    if group % 8:
        raise QwixError(f"{group} inputs share a scale; a group has a multiple of 8 inputs")
    step = scale_QF.astype(jnp.bfloat16)
    if not rounded and not (step.astype(scale_QF.dtype) == scale_QF).all():
        raise QwixError(
            f"scales of {scale_QF.dtype} that bfloat16 does not hold; quantize with "
            "scale_dtype=jnp.bfloat16, or let from_qwix(…, round_scales=True) round them"
        )
    return step
