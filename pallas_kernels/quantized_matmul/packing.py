"""How the kernels want a low-bit matrix: 32-bit words, each with one input of several outputs.

Letters: D inputs, F outputs, Q groups of inputs (D = Q * group), S columns of words.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

BITS = (2, 3, 4, 8)
TILE = 16
"""Columns of words are padded to a multiple of this, the smallest side of a product."""
_static = functools.partial(dataclasses.field, metadata=dict(static=True))


def fields_of(bits: int) -> int:
    """Codes in a word. With 3 bits a word holds their two low bits, another array the third."""
    return 32 // (2 if bits == 3 else bits)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix [D, F], w = code * step + offset, as the kernels read it.

    With 4 bits, 20 columns, padded to S = 16 words: field i of word [d, s] is the code of input d
    and output s + 16 i, so words[d, 3] = code[d, 3] | code[d, 19] << 4 | 0 (padding) << 8 | ...
    A tile of words thus unpacks without any exchange between threads into as many tiles of codes
    as a word has fields, every read is whole and coalesced, results lie in natural order, and
    copies into shared memory move words of 4 bytes, which single bytes could not do in the
    background.
    """

    words_DS: jax.Array
    """uint32."""
    top_DS: jax.Array | None
    """3 bits only, uint16: bit i is the third bit of field i."""
    scale_QF: jax.Array
    """uint32, F padded: bfloat16 step in the low half, bfloat16 offset in the high half."""
    columns: int = _static()
    """F without padding."""
    bits: int = _static()
    group: int = _static()

    @property
    def shape(self) -> tuple[int, int]:
        return self.words_DS.shape[0], self.columns

    @property
    def ndim(self) -> int:
        return 2

    @property
    def fields(self) -> int:
        return fields_of(self.bits)

    @property
    def size_bytes(self) -> int:
        """Bytes that a product has to read."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))


def padded(columns: int, bits: int) -> int:
    """Columns with padding."""
    whole = TILE * fields_of(bits)
    return -(-columns // whole) * whole


def packed_bytes(rows: int, columns: int, bits: int, group: int) -> int:
    """Bytes of a matrix [rows, columns] as `Packed`."""
    F = padded(columns, bits)
    return rows * F * bits // 8 + 4 * (rows // group) * F


def _words(codes_DF, fields: int, width: int, dtype):
    parts = jnp.split(codes_DF, fields, axis=1)
    shifted = (part.astype(dtype) << (i * width) for i, part in enumerate(parts))
    return functools.reduce(jnp.bitwise_or, shifted)


@functools.partial(jax.jit, static_argnames="bits")
def repack(codes_QgF, step_QF, offset_QF, bits: int) -> Packed:
    """Packed from codes (uint8, below 2**bits) and the bfloat16 step and offset of each group.

    Several matrices with the same inputs become one by joining their arrays along F before.
    """
    if bits not in BITS:
        raise ValueError(f"{bits} bits a weight are not supported; choose one of {BITS}")
    Q, group, F = codes_QgF.shape
    if not (Q and group and F):
        raise ValueError(f"an empty matrix cannot be packed: {Q} groups of {group}, {F} columns")
    if step_QF.shape != (Q, F) or offset_QF.shape != (Q, F):
        raise ValueError(f"steps {step_QF.shape}, offsets {offset_QF.shape}; expected {(Q, F)}")
    more = ((0, 0), (0, padded(F, bits) - F))
    codes = jnp.pad(codes_QgF.reshape(Q * group, F), more)
    fields, top = fields_of(bits), None
    if bits == 3:
        top = _words(codes >> 2, fields, 1, jnp.uint16)
        codes = codes & 3
    halves = (
        jax.lax.bitcast_convert_type(jnp.pad(v.astype(jnp.bfloat16), more), jnp.uint16)
        for v in (step_QF, offset_QF)
    )
    low, high = (half.astype(jnp.uint32) for half in halves)
    words = _words(codes, fields, 32 // fields, jnp.uint32)
    return Packed(words, top, low | (high << 16), F, bits, group)


def codes(w: Packed) -> jax.Array:
    """uint8 [D, F]."""
    width = 32 // w.fields
    parts = [(w.words_DS >> (i * width)) & (2**width - 1) for i in range(w.fields)]
    if w.bits == 3:
        parts = [
            part | (((w.top_DS.astype(jnp.uint32) >> i) & 1) << 2) for i, part in enumerate(parts)
        ]
    return jnp.concatenate(parts, axis=1)[:, : w.columns].astype(jnp.uint8)


def scales(w: Packed) -> tuple[jax.Array, jax.Array]:
    """(step, offset), bfloat16 [Q, F]."""
    scale = w.scale_QF[:, : w.columns]
    halves = (scale & 0xFFFF, scale >> 16)
    return tuple(
        jax.lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.bfloat16) for half in halves
    )


def restore(w: Packed) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `repack` was given: (codes uint8 [Q, group, F], step, offset)."""
    return codes(w).reshape(-1, w.group, w.columns), *scales(w)
