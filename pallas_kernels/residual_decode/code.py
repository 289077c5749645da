"""The format of residuals: the exact difference of 16-bit weights and low-bit substitutes.

The device holds a substitute of every streamed matrix, so a pass needs only the residual, which
takes about half the bits. A substitute predicts its weight: the prediction is the substitute's
value in the weight's own 16-bit format. The code says how many numbers of that format lie between
prediction and weight.

Magnitudes are taken as their bit patterns, which order numbers by size: from 1.0 to 2.0 is one
`unit`, 128 numbers of bfloat16. Numbers below `floor`, some octaves under the step of the group,
are left out, so that small numbers of both signs are near each other (bfloat16, floor 0x3000):

    pattern     b001   b000   8000   0000   3000   3001
    place         -3     -2     -1      0      1      2     (~place is the number's negative)

The bits a weight needs depend on |prediction| / step: far from zero a cell one step wide holds few
numbers, around zero many. `LEVELS` levels, a quarter of an octave each, have their own length and
first difference, chosen for each matrix. Two codes share all this:

- "levels": as many bits as the level says, packed; a position is a prefix sum of lengths.
- "planes": the low byte of every weight in order, and a second byte where the level asks for one; a
  position is a prefix count. Easier to decode, about 1.4 bits more.

A weight outside its level's range is patched: place in its tile and pattern, one word. Exactness
does not depend on the choices: the encoder patches every weight that its own decoding would not
give back.

Letters as in `llm_jax.quantize`: D inputs, F outputs, Q groups of g; p packed rows of a group;
C columns of a tile, T tiles across the matrix. Substitutes are from SubSpec (arXiv 2509.18344);
the code is this project's own.
"""

import dataclasses
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import register_dataclass

CODES = ("planes", "levels")
FRACTION = {"bfloat16": 7, "float16": 10}
"""Stored bits of the significand, for the formats that can be coded."""
LEVELS = 32
COLUMNS = 64
"""A tile is one group deep and 64 columns wide, row after row in the stream."""
LANES = 128
"""Words are kept in rows of 128, because only matrices are streamed."""
MAX_WEIGHTS = 2**30
"""Weights of a matrix: places are counted in 32 bits."""

# The first row of words, the head: the table of levels, then these.
OCTAVES, FIRST_PATCH = LEVELS, LEVELS + 1
BIAS = 1 << 17
"""A word of the table is length + (first difference + BIAS) * 256."""

_static = functools.partial(dataclasses.field, metadata=dict(static=True))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
    """The exact complement of a low-bit matrix of the same shape.

    `words` holds one after another: the head (one row); the start of each tile's part of the
    stream, counted from the first word, in words for "levels" and in bytes for "planes"; the
    number of patches before each tile, and of all; the packed stream; the patches, place in the
    tile * 2^16 + pattern. Rows of zeros may follow, so that all layers of a model have the same
    shapes.
    """

    words: jax.Array
    """uint32 [n, 128]"""
    low_DF: jax.Array | None
    """uint8, the first plane; None for "levels"."""
    shape: tuple[int, int] = _static()
    dtype: str = _static()
    patches: int = _static()
    """Room for patches; their number is in `words`."""

    @property
    def code(self) -> str:
        return "levels" if self.low_DF is None else "planes"

    @property
    def nbytes(self) -> int:
        """Bytes that are streamed, with overhead and padding."""
        return self.words.nbytes + (0 if self.low_DF is None else self.low_DF.nbytes)


class Prediction(NamedTuple):
    """What a substitute says of its weights, int32 [Q, g, F]; `floor` is [Q, 1, F]."""

    negative: Any
    """bool"""
    ordered: Any
    """The place of its magnitude: counted from the floor, 0 below it."""
    floor: Any
    level: Any


def predict_weights(
    codes_QgF: Any, step_QF: Any, offset_QF: Any, octaves: Any, dtype: str, xp: ModuleType
) -> Prediction:
    """The prediction of every weight, the same bits in NumPy and in any compiled program.

    code * step is exact in float32 (see `llm_jax.quantize`), so that fusing it with the sum changes
    nothing. Steps and offsets beyond 2^+-100, infinite or NaN count as 0: then no product
    overflows, and no difference is subnormal, which some devices flush. Rounding to the weight's
    format, to nearest even, is done in integers.
    """
    unit = 1 << FRACTION[dtype]
    step = _tame(step_QF, xp)[:, None]
    offset = _tame(offset_QF, xp)[:, None]
    value = (codes_QgF.astype(np.float32) * step + offset).view(np.int32)
    size = _round(value & 0x7FFFFFFF, dtype, xp)
    step_size = _round(step.view(np.int32), dtype, xp)
    floor = xp.maximum(step_size - octaves * unit, 0)
    ordered = xp.where(size >= floor, size - floor + 1, 0)
    # From a quarter of a step to 64 steps away from zero.
    level = xp.clip((size - step_size + 2 * unit) >> (FRACTION[dtype] - 2), 0, LEVELS - 1)
    return Prediction(value < 0, ordered, floor, level)


def _tame(scale_QF, xp):
    """Float32 scales without what devices treat differently."""
    scale = scale_QF.astype(np.float32)
    size = xp.abs(scale)
    return xp.where((size >= 2.0**-100) & (size <= 2.0**100), scale, np.float32(0))


def _round(size, dtype: str, xp):
    """Bits of non-negative float32 numbers, rounded to even, as bits of `dtype`, int32.

    float16: its subnormals become 0 and its overflows infinite. A prediction may be anything, as
    long as it is always the same.
    """
    drop = 23 - FRACTION[dtype]
    if dtype == "float16":
        size = xp.maximum(size - (112 << 23), 0)
        size = xp.where(size < 1 << 23, 0, size)
    bits = (size + ((1 << (drop - 1)) - 1) + ((size >> drop) & 1)) >> drop
    return xp.minimum(bits, 0x7C00) if dtype == "float16" else bits


def complete(prediction: Prediction, difference: Any, xp: ModuleType) -> Any:
    """The bit patterns, int32, of weights that lie `difference` numbers further from zero."""
    place = prediction.ordered + difference
    turned = place < 0
    size = xp.where(turned, ~place, place)
    sign = xp.where(prediction.negative != turned, 1 << 15, 0)
    return (xp.where(size > 0, size - 1 + prediction.floor, 0) & 0x7FFF) | sign


def differ(prediction: Prediction, pattern: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(difference, whether there is one) of NumPy bit patterns, int32; `complete` undoes it."""
    size = pattern & 0x7FFF
    place = np.where(size >= prediction.floor, size - prediction.floor + 1, 0)
    place = np.where((pattern >> 15 > 0) != prediction.negative, ~place, place)
    return place - prediction.ordered, (size >= prediction.floor) | (size == 0)


def tiles(shape: tuple[int, int], group: int) -> tuple[int, int]:
    """(Q, T): rows and columns of tiles."""
    return shape[0] // group, -(-shape[1] // COLUMNS)


def check_pair(name: str, substitute: Any, shape: Sequence[int], dtype: str) -> None:
    """Raises ValueError where a matrix cannot be the one that `substitute` stands for."""
    if dtype not in FRACTION:
        raise ValueError(f"{name} is {dtype}; residuals are of {' and '.join(FRACTION)} weights")
    if tuple(shape) != tuple(substitute.shape):
        raise ValueError(
            f"{name} has shape {list(shape)}, its substitute {list(substitute.shape)}; "
            "a residual completes the substitute of the same matrix"
        )
    if substitute.group * COLUMNS > 2**16:
        raise ValueError(f"{name}: group {substitute.group} is above {2**16 // COLUMNS}")
    if shape[0] * shape[1] >= MAX_WEIGHTS:
        count = shape[0] * shape[1]
        raise ValueError(f"{name} has {count} weights; a residual counts to {MAX_WEIGHTS}")


def pad(residual: Residual, rows: int, patches: int) -> Residual:
    """The same residual with `rows` rows of words and room for `patches`."""
    missing = rows - residual.words.shape[0]
    if missing < 0 or patches < residual.patches:
        raise ValueError(
            f"a residual of {residual.words.shape[0]} rows and {residual.patches} patches does not "
            f"fit into {rows} rows and {patches} patches"
        )
    words = np.zeros((rows, LANES), np.uint32)
    words[: residual.words.shape[0]] = residual.words
    return dataclasses.replace(residual, words=words, patches=patches)
