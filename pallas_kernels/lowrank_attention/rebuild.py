"""The general first kernel: rebuilds keys tile by tile, rotates them, and scores the queries.

A program has one kv head and up to 64 query rows (positions times query heads that share it). The
rows of several heads of a group lie side by side in one array of scores, so that the second kernel
reads value latents once for all of them.

Letters: B batch, T query positions, S slots, N query heads, K' kv heads of a group, H head size,
h = H/2, R rank, g groups, M query rows side by side, i sets of such rows, X spans.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lowrank_attention.latents import Latents
from pallas_kernels.lowrank_attention.reference import HIDDEN
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

MOST_ROWS = 64
"""Query rows of a program, at most."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """How the T * G query rows of each of g * K' kv heads are arranged."""

    groups: int
    heads: int
    """K'"""
    needed: int
    """T * G"""

    @property
    def each(self) -> int:
        """Columns of a head, a power of two."""
        return min(MOST_ROWS, max(8, 1 << (self.needed - 1).bit_length()))

    @property
    def blocks(self) -> int:
        """Sets that one head's rows fill."""
        return -(-self.needed // self.each)

    @property
    def together(self) -> int:
        """Heads in a set."""
        fits = (t for t in (1, 2, 4, 8) if self.heads % t == 0 and t * self.each <= MOST_ROWS)
        return max(fits, default=1)

    @property
    def sets(self) -> int:
        """Sets of rows of a group."""
        return self.heads // self.together * self.blocks

    def arranged(self, q_BTNH: jax.Array) -> jax.Array:
        """Queries [B, g, K', blocks, rows, H]."""
        B, T, _, H = q_BTNH.shape
        q = q_BTNH.reshape(B, T, self.groups, self.heads, -1, H).transpose(0, 2, 3, 1, 4, 5)
        q = q.reshape(B, self.groups, self.heads, self.needed, H)
        more = self.blocks * self.each - self.needed
        q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, more), (0, 0)))
        return q.reshape(B, self.groups, self.heads, self.blocks, self.each, H)

    def restored(self, y_BiMR: jax.Array, T: int) -> jax.Array:
        """[B, T, N, R] from what the second kernel gives, [B, i, M, R]."""
        B, _, _, R = y_BiMR.shape
        g, t = self.groups, self.together
        y = y_BiMR.reshape(B, g, self.heads // t, self.blocks, t, self.each, R)
        y = y.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, g, self.heads, -1, R)[
            :, :, :, : self.needed
        ]
        y = y.reshape(B, g, self.heads, T, -1, R).transpose(0, 3, 1, 2, 4, 5)
        return y.reshape(B, T, -1, R)


def _kernel(
    *refs, tile, span, rows, shared, half, packing, near, mask, mean, bias, norm, eps,
    interpret,
):  # fmt: skip
    refs = list(refs)
    take = lambda n=1: [refs.pop(0) for _ in range(n)]
    length_ref, up_ref, q_ref = take(3)
    turn_refs = take(4 if near else 2)
    (mask_ref,) = take() if mask else (None,)
    (coefficient_ref,) = take() if mean else (None,)
    (mean_ref,) = take() if mean else (None,)
    (bias_ref,) = take() if bias else (None,)
    (norm_ref,) = take() if norm else (None,)
    (sums_ref,) = take() if packing.bits < 16 else (None,)
    k_ref, *k_scale = take(3 if packing.bits < 16 else 1)
    score_ref, top_ref = take(2)
    program, x, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    block, k = program % rows.blocks, program // rows.blocks % rows.heads
    g = program // (rows.blocks * rows.heads)
    i = (g * (rows.heads // rows.together) + k // rows.together) * rows.blocks + block
    own = pl.ds(k % rows.together * rows.each, rows.each)
    length = length_ref[b]
    first, full, last = tile_range(length, x, tile, span)
    every, sides = pl.ds(0, half), range(2)
    ups = [
        [up_ref[g, k, side, pl.ds(c, packing.chunk), every] for c in packing.firsts()]
        for side in sides
    ]
    queries = [q_ref[b, g, k, block, side, every, pl.ds(0, rows.each)] for side in sides]
    if near:
        close = [ref[...] for ref in turn_refs[:2]]
    if mask and len(mask_ref.shape) == 3:
        row_M = block * rows.each + jax.lax.broadcasted_iota(jnp.int32, (rows.each,), 0)
        place_M = jnp.minimum(row_M // shared, mask_ref.shape[1] - 1)
    row = lambda ref: jnp.minimum(b, ref.shape[0] - 1)  # of arrays that may be the same for all B

    def body(n, high, whole):
        at = n * tile
        slots = at + jax.lax.broadcasted_iota(jnp.int32, (tile,), 0)
        ok, index = None if whole else slots < length, (b, pl.ds(at, tile))
        z = read_latents(k_ref, index, g * packing.size, ok, packing, interpret)
        if near:
            c0, s0 = (ref[n, :][None] for ref in turn_refs[2:])
            cos, sin = c0 * close[0] - s0 * close[1], s0 * close[0] + c0 * close[1]
        else:
            there = pl.ds(at, tile)
            cos, sin = (masked_load(ref, (row(ref), there, every), ok) for ref in turn_refs)
        if k_scale:
            step, offset = read_scale(k_scale, (*index, g), ok)
            lift = offset / step - packing.magic
        coefficient = masked_load(coefficient_ref, index, ok) if mean else None
        keys = []
        for side in sides:
            key = sum(plgpu.dot(part, up) for part, up in zip(z, ups[side], strict=True))
            if k_scale:
                key = (key + lift[:, None] * sums_ref[g, k, side, :][None]) * step[:, None]
            if mean:
                key += coefficient[:, None] * mean_ref[g, k, side, :][None]
            if bias:
                key += bias_ref[g, k, side, :][None]
            keys.append(key)
        if norm:
            square = sum(jnp.sum(key * key, axis=1) for key in keys)
            scale = jax.lax.rsqrt(square / (2 * half) + eps)[:, None]
            keys = [key * scale * norm_ref[side, :][None] for side, key in enumerate(keys)]
        ka, kb = keys
        qa, qb = queries
        score = plgpu.dot((ka * cos - kb * sin).astype(qa.dtype), qa)
        score += plgpu.dot((kb * cos + ka * sin).astype(qb.dtype), qb)
        if mask:
            if len(mask_ref.shape) == 2:  # one query position
                seen = masked_load(mask_ref, (row(mask_ref), pl.ds(at, tile)), ok, False)[:, None]
            else:
                slot = slots if whole else jnp.minimum(slots, length - 1)
                seen = mask_ref[row(mask_ref), place_M[None, :], slot[:, None]]
            score = jnp.where(seen, score, HIDDEN)
        if not whole:
            score = jnp.where(ok[:, None], score, HIDDEN)
        score_ref[b, i, pl.ds(at, tile), own] = score
        return jnp.maximum(high, score)

    high = jnp.full((tile, rows.each), HIDDEN, jnp.float32)
    high = jax.lax.fori_loop(first, full, functools.partial(body, whole=True), high)
    high = jax.lax.fori_loop(full, last, functools.partial(body, whole=False), high)
    top_ref[b, i, x, own] = jnp.max(high, axis=0)


def _turns(position, frequencies):
    frequencies = jnp.asarray(frequencies, jnp.float32).reshape((1,) * position.ndim + (-1,))
    angle = position.astype(jnp.float32)[..., None] * frequencies
    return [jnp.cos(angle), jnp.sin(angle)]


def rebuilt_scores(
    q_BTNH: jax.Array,
    k: Latents,
    up_k_gRKH: jax.Array,
    frequencies: Any,
    lengths_B: jax.Array,
    rows: Rows,
    cfg: LatentTiling,
    *,
    mask_BTS: jax.Array | None = None,
    position_BS: jax.Array | None = None,
    k_bias_KH: jax.Array | None = None,
    mean_coefficient_BS: jax.Array | None = None,
    k_mean_KH: jax.Array | None = None,
    k_norm_H: jax.Array | None = None,
    norm_eps: float = 1e-6,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(scores [B, i, spans * span, M], largest of each span [B, i, X, M]), base 2, float32."""
    B, T, N, H = q_BTNH.shape
    (g, _, K, _), S, half = up_k_gRKH.shape, k.codes_BSP.shape[1], H // 2
    packing, dtype, f32 = Packing(k.bits, k.blocks[0]), operand_dtype(k), jnp.float32
    up = up_k_gRKH[:, : packing.rank].reshape(g, packing.rank, K, 2, half)
    up = up.transpose(0, 2, 3, 1, 4).astype(dtype)
    q = rows.arranged(q_BTNH.astype(f32) * (H**-0.5 * np.log2(np.e)))
    q = jnp.moveaxis(q.reshape(*q.shape[:-1], 2, half), 4, -1).astype(dtype)
    spans = pl.cdiv(S, cfg.span)
    heads = lambda a: a.astype(f32).reshape(g, K, 2, half)
    inputs = [lengths_B, up, q]
    if position_BS is None:
        starts = jnp.arange(spans * (cfg.span // cfg.tile), dtype=jnp.int32) * cfg.tile
        inputs += _turns(jnp.arange(cfg.tile, dtype=jnp.int32), frequencies)
        inputs += _turns(starts, frequencies)
    else:
        inputs += _turns(position_BS, frequencies)
    if mask_BTS is not None:
        inputs.append(mask_BTS[:, 0] if T == 1 else mask_BTS)
    inputs += [] if k_mean_KH is None else [mean_coefficient_BS.astype(f32)]
    inputs += [heads(a) for a in (k_mean_KH, k_bias_KH) if a is not None]
    if k_norm_H is not None:
        inputs.append(k_norm_H.astype(f32).reshape(2, half))
    if k.bits < 16:
        inputs.append(jnp.sum(up.astype(f32), axis=3))
    kernel = functools.partial(
        _kernel, tile=cfg.tile, span=cfg.span, rows=rows, shared=N // (g * K), half=half,
        packing=packing, near=position_BS is None, mask=mask_BTS is not None,
        mean=k_mean_KH is not None, bias=k_bias_KH is not None,
        norm=k_norm_H is not None, eps=norm_eps, interpret=interpret,
    )  # fmt: skip
    i, M = g * rows.sets, rows.together * rows.each
    return pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((B, i, spans * cfg.span, M), f32),
            jax.ShapeDtypeStruct((B, i, spans, M), f32),
        ),
        grid=(g * K * rows.blocks, spans, B),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3 if rows.each <= 16 else 2),
        interpret=interpret,
        name="lowrank_rebuilt_scores",
    )(*inputs, *stored(k))
