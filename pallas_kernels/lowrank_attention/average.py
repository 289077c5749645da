"""The second kernel: the softmax of stored scores, and the average of value latents.

A program takes one span of slots and M query rows of a group. The first kernel left the scores
(base 2) and the largest one of the span, so weights need no correction on the way. The output is
kept transposed: tensor cores have 64 rows on one side, which latents fill and queries do not.

Letters: B batch, S slots, R latents of a group, M query rows side by side, i sets of such rows, X
spans, C columns of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lowrank_attention.latents import Latents
from pallas_kernels.lowrank_attention.tiles import (
    LatentTiling,
    Packing,
    masked_load,
    operand_dtype,
    read_latents,
    read_scale,
    stored,
    tile_range,
)


def _kernel(*refs, tile, span, M, rows, sets, chunks, packing, weighted, dtype, interpret):
    refs = list(refs)
    length_ref, top_ref, score_ref = refs[:3]
    coefficient_ref = refs.pop(3) if weighted else None
    v_ref, *scales, y_ref, stats_ref = refs[3:]
    program, x, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    many = len(packing.chunks) // chunks
    i, own = program // many, program % many * chunks * packing.chunk
    g = i // sets
    length = length_ref[b]
    first, full, last = tile_range(length, x, tile, span)
    shift = top_ref[b, i, x, :]
    zero = jnp.zeros((tile, M), jnp.float32)
    part = jnp.zeros((packing.chunk, rows), jnp.float32)

    def repeated(a):
        """[tile, M] with every column rows / M times."""
        if rows == M:
            return a
        return jnp.broadcast_to(a[:, :, None], (tile, M, rows // M)).reshape(tile, rows)

    def body(n, carry, whole):
        total, offsets, coefficients, parts = carry
        at = n * tile
        slots = at + jax.lax.broadcasted_iota(jnp.int32, (tile,), 0)
        ok, index = None if whole else slots < length, (b, pl.ds(at, tile))
        z = read_latents(v_ref, index, g * packing.size + own, ok, packing, interpret, chunks)
        weight = jnp.exp2(score_ref[b, i, pl.ds(at, tile), :] - shift[None])
        if not whole:
            weight = jnp.where(ok[:, None], weight, 0.0)
        total += weight
        if weighted:
            coefficients += weight * masked_load(coefficient_ref, index, ok)[:, None]
        narrow = weight.astype(dtype)
        if scales:
            step, offset = read_scale(scales, (*index, g), ok)
            narrow = (weight * step[:, None]).astype(dtype)
            offsets += weight * offset[:, None]
            if packing.magic:
                offsets -= packing.magic * narrow.astype(jnp.float32)
        narrow = repeated(narrow)
        parts = [p + plgpu.dot(a.T, narrow) for p, a in zip(parts, z, strict=True)]
        return total, offsets, coefficients, parts

    carry = zero, zero, zero, [part] * len(packing.firsts(chunks))
    carry = jax.lax.fori_loop(first, full, functools.partial(body, whole=True), carry)
    *sums, parts = jax.lax.fori_loop(full, last, functools.partial(body, whole=False), carry)
    for n, some in enumerate([shift, *(jnp.sum(a, axis=0) for a in sums)]):
        stats_ref[b, i, x, n, :] = some
    for start, part in zip(packing.firsts(chunks), parts, strict=True):
        if rows != M:  # all repetitions are equal
            part = jnp.max(part.reshape(packing.chunk, M, rows // M), axis=2)
        y_ref[b, i, x, pl.ds(own + start, packing.chunk), :] = part


def average(
    score_BiSM: jax.Array,
    top_BiXM: jax.Array,
    v: Latents,
    lengths_B: jax.Array,
    mean_coefficient_BS: jax.Array | None,
    cfg: LatentTiling,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(averaged value latents float32 [B, i, M, R], averaged coefficients [B, i, M])."""
    B, i, _, M = score_BiSM.shape
    X, packing = top_BiXM.shape[2], Packing(v.bits, v.blocks[0])
    rows = max(cfg.rows(v.bits, M), M)
    chunks = len(packing.chunks) if M <= 16 else 1
    # codes of few bits are unpacked in registers: nothing to copy ahead
    stages = 1 if v.bits < 16 else 3 if chunks == 1 else 2
    inputs = [lengths_B, top_BiXM, score_BiSM]
    inputs += [] if mean_coefficient_BS is None else [mean_coefficient_BS.astype(jnp.float32)]
    kernel = functools.partial(
        _kernel, tile=cfg.tile, span=cfg.span, M=M, rows=rows, sets=i // len(v.blocks),
        chunks=chunks, packing=packing, weighted=mean_coefficient_BS is not None,
        dtype=operand_dtype(v), interpret=interpret,
    )  # fmt: skip
    y, stats = pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((B, i, X, packing.rank, M), jnp.float32),
            jax.ShapeDtypeStruct((B, i, X, 4, M), jnp.float32),
        ),
        grid=(i * len(packing.chunks) // chunks, X, B),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=stages),
        interpret=interpret,
        name="lowrank_average",
    )(*inputs, *stored(v))
    return join(stats, y)


def join(stats_BiX4M: jax.Array, y_BiXRM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(averaged latents [B, i, M, R], averaged coefficients [B, i, M]) of all spans together."""
    with jax.named_scope("join"):
        high, total, offsets, coefficients = (stats_BiX4M[:, :, :, n] for n in range(4))
        weight = jnp.exp2(high - jnp.max(high, axis=2, keepdims=True))
        total = jnp.sum(weight * total, axis=2, keepdims=True)
        weight = weight / jnp.maximum(total, 1e-30)
        gather = lambda a: jnp.sum(weight * a, axis=2)
        y_BiRM = jnp.sum(weight[:, :, :, None] * y_BiXRM, axis=2) + gather(offsets)[:, :, None]
        return jnp.swapaxes(y_BiRM, 2, 3), gather(coefficients)
