"""How the kernels read a low-bit matrix: blocks of words, in reading order.

Letters: D inputs, F outputs, Q groups of inputs (D = Q * group); a word holds codes of `fields`
outputs, so F = fields * columns of words; B blocks of S = 32 such columns, N chunks of c inputs (a
group, or 64 of it), K numbers that scale a column of words in a group.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

BITS = (2, 3, 4, 8)
BLOCK_WORDS = 32
"""Columns of words in a block."""
CHUNK = 64
"""The most inputs of a block."""
_static = functools.partial(dataclasses.field, metadata=dict(static=True))


def fields_of(bits: int) -> int:
    """Codes in a word. With 3 bits a word holds their two low bits, another array the third."""
    return 32 // (2 if bits == 3 else bits)


def scales_of(bits: int) -> int:
    """K: steps in its first half, offsets in its second; 16 is the smallest side of a product."""
    return max(16, 2 * fields_of(bits))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix [D, F], w = code * step + offset, as the kernels read it.

    Output f = i * columns + 32 b + s is field i of column s in block b. Two inputs share two words:
    the first has both inputs' fields of the lower half, the second those of the upper. With 4 bits
    words[b, n, s, 0] = code[d, 0] | code[d, 1] << 4 | … | code[d + 1, 0] << 16 | …, d = n * c,
    where code[d, i] is the code of output i * columns + 32 b + s; words[b, n, s, 1] has the
    fields 4 to 7. So a shift and a mask give two neighbouring inputs, which tensor cores take as
    one register, and a program that sums over inputs reads memory in order.
    """

    words_BNSc: jax.Array
    """uint32."""
    top_BNSc: jax.Array | None
    """3 bits only, uint16: bit i is the third bit of field i of one input."""
    scale_BQSK: jax.Array
    """bfloat16: the step of field i at K = i, its offset at K = K / 2 + i."""
    columns: int = _static()
    """F without padding."""
    bits: int = _static()
    group: int = _static()

    @property
    def shape(self) -> tuple[int, int]:
        return self.words_BNSc.shape[1] * self.words_BNSc.shape[3], self.columns

    @property
    def ndim(self) -> int:
        return 2

    @property
    def fields(self) -> int:
        return fields_of(self.bits)

    @property
    def words(self) -> int:
        """Columns of words, padding included."""
        return self.words_BNSc.shape[0] * BLOCK_WORDS

    @property
    def size_bytes(self) -> int:
        """Bytes that a product reads."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))


def padded_columns(columns: int, bits: int) -> int:
    """Columns with padding."""
    whole = BLOCK_WORDS * fields_of(bits)
    return -(-columns // whole) * whole


def packed_bytes(rows: int, columns: int, bits: int, group: int) -> int:
    """Bytes of a matrix [rows, columns] as `Packed`."""
    F = padded_columns(columns, bits)
    return rows * F * bits // 8 + 2 * scales_of(bits) * (rows // group) * F // fields_of(bits)


def chunk_of(group: int) -> int:
    """c, the inputs of a block: a whole group, or 64 where 64 divides a larger group."""
    return CHUNK if group % CHUNK == 0 else group


def _joined(parts, width: int, dtype) -> jax.Array:
    """parts[0] | parts[1] << width | …"""
    shifted = (part.astype(dtype) << (i * width) for i, part in enumerate(parts))
    return functools.reduce(jnp.bitwise_or, shifted)


@functools.partial(jax.jit, static_argnames="bits")
def repack(codes_QgF: jax.Array, step_QF: jax.Array, offset_QF: jax.Array, bits: int) -> Packed:
    """Packed from codes (uint8, below 2**bits) and the bfloat16 step and offset of each group.

    To join several matrices with the same inputs, join their arrays along F first.
    """
    if bits not in BITS:
        raise ValueError(f"{bits} bits a weight are not supported; choose one of {BITS}")
    Q, group, F = codes_QgF.shape
    if not (Q and group and F):
        raise ValueError(f"an empty matrix cannot be packed: {Q} groups of {group}, {F} columns")
    if group % 2:
        raise ValueError(f"groups of {group} inputs cannot be packed: words are of two inputs each")
    if step_QF.shape != (Q, F) or offset_QF.shape != (Q, F):
        raise ValueError(f"steps {step_QF.shape}, offsets {offset_QF.shape}; expected {(Q, F)}")
    more, fields, c = padded_columns(F, bits) - F, fields_of(bits), chunk_of(group)
    wide = lambda a: jnp.pad(a, ((0, 0), (0, more)))
    in_fields = lambda a: wide(a).reshape(len(a), fields, -1, BLOCK_WORDS)
    blocks = lambda a_DBS: jnp.transpose(a_DBS.reshape(-1, c, *a_DBS.shape[1:]), (2, 0, 3, 1))
    codes_DiBS = in_fields(codes_QgF.reshape(Q * group, F))
    top = None
    if bits == 3:
        top = blocks(_joined(jnp.moveaxis(codes_DiBS >> 2, 1, 0), 1, jnp.uint16))
        codes_DiBS = codes_DiBS & 3
    # Pairs of inputs, halves of the fields: [pair, which input, which half, field in it, B, S].
    pairs = codes_DiBS.reshape(-1, 2, 2, fields // 2, *codes_DiBS.shape[2:])
    halves = _joined(jnp.moveaxis(pairs, 3, 0), 32 // fields, jnp.uint32)
    words_DBS = _joined(jnp.moveaxis(halves, 1, 0), 16, jnp.uint32).reshape(-1, *halves.shape[3:])
    room = ((0, 0), (0, scales_of(bits) // 2 - fields), (0, 0), (0, 0))
    scale = (jnp.pad(in_fields(v.astype(jnp.bfloat16)), room) for v in (step_QF, offset_QF))
    scale_BQSK = jnp.transpose(jnp.concatenate(list(scale), axis=1), (2, 0, 3, 1))
    return Packed(blocks(words_DBS), top, scale_BQSK, F, bits, group)


def codes(w: Packed) -> jax.Array:
    """The codes, uint8 [F, D]; in this order inputs stay side by side, as in the words."""
    B, N, _, c = w.words_BNSc.shape
    half, width = w.fields // 2, 32 // w.fields
    count = lambda n: jnp.arange(n, dtype=jnp.uint32)
    pairs = jnp.transpose(w.words_BNSc.reshape(B, N, BLOCK_WORDS, c // 2, 2), (4, 0, 2, 1, 3))
    pairs = pairs.reshape(2, 1, w.words, N * c // 2, 1)  # which word, field in it, column, pair, -
    shift = width * count(half)[:, None, None, None] + 16 * count(2)[None, None, None]
    found = ((pairs >> shift[None]) & (2**width - 1)).reshape(w.fields, w.words, N * c)
    if w.bits == 3:
        top = jnp.transpose(w.top_BNSc, (0, 2, 1, 3)).reshape(1, w.words, N * c)
        found = found | ((top.astype(jnp.uint32) >> count(w.fields)[:, None, None]) & 1) << 2
    return found.reshape(-1, N * c)[: w.columns].astype(jnp.uint8)


def scales(w: Packed) -> tuple[jax.Array, jax.Array]:
    """(step, offset), bfloat16 [F, Q]."""
    scale = jnp.transpose(w.scale_BQSK, (3, 0, 2, 1))  # K B S Q
    own = lambda half: half[: w.fields].reshape(-1, half.shape[-1])[: w.columns]
    return tuple(map(own, jnp.split(scale, 2)))


def codes_and_scales(w: Packed) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `repack` was given: (codes uint8 [Q, group, F], step, offset)."""
    return codes(w).T.reshape(-1, w.group, w.columns), *(v.T for v in scales(w))
