"""Residuals decoded by one Triton kernel: each weight's bits are read once and written once.

A program takes one group of inputs and 64 columns of the substitute's words, which are as many
tiles of the residual as a word has fields. A tile is a prefix sum of lengths, two reads from the
stream, and the same integer arithmetic as everywhere; its patches overwrite what it stored.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.quantized_matmul import Packed
from pallas_kernels.quantized_matmul.unpack import step_offset
from subspec_jax.residual import (
    BIAS,
    COLUMNS,
    FIRST_PATCH,
    LANES,
    OCTAVES,
    Residual,
    complete,
    predict,
    tiles,
)

WARPS = 4
ROWS = 16
"""Rows of a tile that are decoded together: 95 registers a thread and some 80 instructions a weight
(Triton 3.9 for sm_90, compiled without a GPU); the whole tile at once took 162."""
AT_ONCE = 32
"""Patches of a tile that are stored together."""


def why_not(residual: Residual, substitute: Packed) -> str | None:
    """Why the kernel cannot decode this; None where it can. Whether there is a GPU is not asked."""
    if residual.code != "levels":
        return f"code {residual.code}; the kernel decodes levels"
    if substitute.bits == 3:
        return "3 bits, of which the third are apart"
    group, columns = substitute.group, substitute.words_DS.shape[1]
    if group & (group - 1) or not 16 <= group <= 64:
        return f"group {group} is no power of two from 16 to 64"
    if columns % COLUMNS or substitute.columns != columns * substitute.fields:
        return f"{substitute.columns} columns are no multiple of {COLUMNS * substitute.fields}"
    return None


def _kernel(words_ref, codes_ref, scale_ref, out_ref, *, group, bits, fields, dtype, interpret):
    """One group of inputs, `COLUMNS` words wide, some `fields` of each; `words_ref` is flat."""
    S, width, T = codes_ref.shape[1], bits, scale_ref.shape[1] // COLUMNS
    q, s = pl.program_id(0), pl.program_id(1) * COLUMNS
    last = words_ref.shape[0] - 2
    octaves = words_ref[OCTAVES].astype(jnp.int32)
    patches = words_ref[FIRST_PATCH].astype(jnp.int32)
    counts = LANES + (codes_ref.shape[0] // group) * T  # where the counts of patches begin

    def one(i, _):
        f = i * S + s
        tile, columns = q * T + f // COLUMNS, pl.ds(f, COLUMNS)
        step, offset = (v[None] for v in step_offset(scale_ref[q, columns]))
        start = words_ref[LANES + tile].astype(jnp.int32)

        def some(n, begun):  # rows n * ROWS …, in front of which lie `begun` bits of the tile
            rows = pl.ds(q * group + n * ROWS, ROWS)
            codes = codes_ref[rows, pl.ds(s, COLUMNS)] >> (i * width).astype(jnp.uint32)
            codes = (codes & jnp.uint32(2**width - 1)).astype(jnp.int32)
            p = predict(codes[None], step, offset, octaves, dtype, jnp)
            entry = words_ref[p.level].astype(jnp.int32)
            length, first = entry & 255, (entry >> 8) - BIAS
            row = jnp.sum(length, axis=2)
            above = jnp.cumsum(row, axis=1) - row
            before = begun + above[..., None] + jnp.cumsum(length, axis=2) - length
            word = jnp.clip(start + (before >> 5), 0, last)
            shift = (before & 31).astype(jnp.uint32)
            high = words_ref[word + 1] << jnp.uint32(1) << (jnp.uint32(31) - shift)
            two = (words_ref[word] >> shift) | high
            x = two.astype(jnp.int32) & ((1 << length) - 1)
            pattern = complete(p, x + first, jnp).reshape(ROWS, COLUMNS)
            out_ref[rows, pl.ds(f - fields[0] * S, COLUMNS)] = pattern.astype(jnp.uint16)
            return begun + jnp.sum(row)

        jax.lax.fori_loop(0, group // ROWS, some, jnp.int32(0))
        if not interpret:
            plgpu.debug_barrier()  # patches come after what they overwrite

        begin = words_ref[counts + tile].astype(jnp.int32)
        count = words_ref[counts + tile + 1].astype(jnp.int32) - begin

        def patch(n, _):  # behind the last one it is stored again
            entry = n * AT_ONCE + jax.lax.broadcasted_iota(jnp.int32, (AT_ONCE,), 0)
            at = jnp.clip(patches + begin + jnp.minimum(entry, count - 1), 0, last)
            found = words_ref[at]
            place = jnp.minimum((found >> jnp.uint32(16)).astype(jnp.int32), group * COLUMNS - 1)
            row, column = q * group + place // COLUMNS, f + place % COLUMNS
            out_ref[row, column - fields[0] * S] = found.astype(jnp.uint16)

        turns = pl.cdiv(jnp.clip(count, 0, group * COLUMNS), AT_ONCE)
        jax.lax.fori_loop(0, turns, patch, None)

    jax.lax.fori_loop(*fields, one, None)


def decode_triton(
    residual: Residual, substitute: Packed, part: int = 0, parts: int = 1, interpret: bool = False
) -> jax.Array:
    """The bit patterns [D, F / parts], uint16, of one of `parts` equal parts of the columns.

    `parts` divides the fields of a word, neighbouring columns being in neighbouring words.
    """
    group, bits, (D, F) = substitute.group, substitute.bits, residual.shape
    Q, _ = tiles(residual.shape, group)
    each = substitute.fields // parts
    fields = part * each, (part + 1) * each
    known = dict(group=group, bits=bits, fields=fields, dtype=residual.dtype, interpret=interpret)
    return pl.pallas_call(
        functools.partial(_kernel, **known),
        out_shape=jax.ShapeDtypeStruct((D, F // parts), jnp.uint16),
        grid=(Q, substitute.words_DS.shape[1] // COLUMNS),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="residual_decode",
    )(residual.words.reshape(-1), substitute.words_DS, substitute.scale_QF)
