"""One Triton kernel decodes a residual: each weight's bits are read once and written once.

A program takes one tile of the residual: a group of inputs and 64 columns, which are one field of
the same columns of the substitute's words. A tile is a prefix sum of lengths, two reads from the
stream, and the same integer arithmetic as everywhere; its patches overwrite what it stored.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.quantized_matmul import Packed
from pallas_kernels.quantized_matmul.packing import BLOCK_WORDS, scales_of
from pallas_kernels.residual_decode.code import (
    BIAS,
    COLUMNS,
    FIRST_PATCH,
    LANES,
    OCTAVES,
    Residual,
    complete,
    predict_weights,
    tiles,
)

WARPS = 1
ROWS_TOGETHER = 16
"""The most rows of a tile that are decoded together. On an H200, for 3584x9728: 16 rows and a warp
158 us, 8 and one 178, 64 and four 180, 32 and one 247."""
PATCHES_TOGETHER = 32
"""Patches of a tile that are stored together."""


def _kernel(
    words_ref, codes_ref, scale_ref, out_ref, *, S, Q, group, bits, first, dtype, interpret
):
    """One tile: a group of inputs, `COLUMNS` columns; the first three references are flat.

    `words_ref` is the residual's, of S columns of words and Q groups; the output begins with field
    `first` of the substitute's.
    """
    fields = 32 // bits
    T, K = fields * S // COLUMNS, scales_of(bits)
    s, i, q = pl.program_id(0) * COLUMNS, first + pl.program_id(1), pl.program_id(2)
    f = i * S + s
    out, tile = f - first * S, q * T + f // COLUMNS
    last = words_ref.shape[0] - 2
    together = min(ROWS_TOGETHER, group)
    counts = LANES + Q * T  # where the counts of patches begin
    column = s + jax.lax.broadcasted_iota(jnp.int32, (COLUMNS,), 0)
    # Where a column of a block of the substitute begins.
    at = (column // BLOCK_WORDS * Q + q) * BLOCK_WORDS + column % BLOCK_WORDS
    octaves = words_ref[OCTAVES].astype(jnp.int32)
    start = words_ref[LANES + tile].astype(jnp.int32)
    begin = words_ref[counts + tile].astype(jnp.int32)
    count = words_ref[counts + tile + 1].astype(jnp.int32) - begin
    patches = words_ref[FIRST_PATCH].astype(jnp.int32) + begin
    step, offset = (scale_ref[at * K + k].astype(jnp.float32)[None] for k in (i, K // 2 + i))
    word, shift = i // (fields // 2), bits * (i % (fields // 2))

    def patch(n):  # behind the last patch, the last one again
        entry = n * PATCHES_TOGETHER + jax.lax.broadcasted_iota(jnp.int32, (PATCHES_TOGETHER,), 0)
        return words_ref[jnp.clip(patches + jnp.minimum(entry, count - 1), 0, last)]

    early = patch(0)  # loaded now: few tiles have more patches

    def some(n, begun):  # rows n * together …, in front of which lie `begun` bits of the tile
        rows = pl.ds(q * group + n * together, together)
        d = jax.lax.broadcasted_iota(jnp.int32, (COLUMNS, together), 1)
        pairs = codes_ref[at[:, None] * group + n * together + d].reshape(COLUMNS, -1, 2)
        which = jax.lax.broadcasted_iota(jnp.int32, pairs.shape, 2)
        pairs = jnp.sum(jnp.where(which == word, pairs, jnp.uint32(0)), axis=2, keepdims=True)
        codes = pairs >> (shift + 16 * which).astype(jnp.uint32)
        codes = (codes & jnp.uint32(2**bits - 1)).astype(jnp.int32)
        codes = codes.reshape(COLUMNS, together).T
        p = predict_weights(codes[None], step, offset, octaves, dtype, jnp)
        entry = words_ref[p.level].astype(jnp.int32)
        length, least = entry & 255, (entry >> 8) - BIAS
        flat = length.reshape(-1)
        before = (jnp.cumsum(flat) - flat).reshape(length.shape) + begun
        place = jnp.clip(start + (before >> 5), 0, last)
        skip = (before & 31).astype(jnp.uint32)
        high = words_ref[place + 1] << jnp.uint32(1) << (jnp.uint32(31) - skip)
        two = (words_ref[place] >> skip) | high
        x = two.astype(jnp.int32) & ((1 << length) - 1)
        pattern = complete(p, x + least, jnp).reshape(together, COLUMNS)
        out_ref[rows, pl.ds(out, COLUMNS)] = pattern.astype(jnp.uint16)
        return begun + jnp.sum(flat)

    jax.lax.fori_loop(0, group // together, some, jnp.int32(0))
    if not interpret:
        plgpu.debug_barrier()  # patches come after what they overwrite

    def store(found):
        place = jnp.minimum((found >> jnp.uint32(16)).astype(jnp.int32), group * COLUMNS - 1)
        row, column = q * group + place // COLUMNS, out + place % COLUMNS
        out_ref[row, column] = found.astype(jnp.uint16)

    turns = pl.cdiv(jnp.clip(count, 0, group * COLUMNS), PATCHES_TOGETHER)
    pl.when(turns > 0)(lambda: store(early))
    jax.lax.fori_loop(1, turns, lambda n, _: store(patch(n)), None)


def residual_decode_triton(
    residual: Residual, substitute: Packed, part: int = 0, parts: int = 1, interpret: bool = False
) -> jax.Array:
    """The bit patterns [D, F / parts], uint16, of one of `parts` equal parts of the columns.

    `parts` divides the fields of a word, neighbouring columns being in neighbouring words.
    """
    group, bits, (D, F) = substitute.group, substitute.bits, residual.shape
    Q, _ = tiles(residual.shape, group)
    each = substitute.fields // parts
    first = part * each
    known = dict(S=substitute.words, Q=Q, group=group, bits=bits, first=first)
    known |= dict(dtype=residual.dtype, interpret=interpret)
    return pl.pallas_call(
        functools.partial(_kernel, **known),
        out_shape=jax.ShapeDtypeStruct((D, F // parts), jnp.uint16),
        grid=(substitute.words // COLUMNS, each, Q),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="residual_decode",
    )(*(a.reshape(-1) for a in (residual.words, substitute.words_BNSc, substitute.scale_BQSK)))
