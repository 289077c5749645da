"""The first kernel for one query row a kv head: scores of absorbed queries (`absorption.py`).

Letters: B batch, g groups, K' kv heads of a group, H head size, R rank, U functions of the place,
X spans.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lowrank_attention.absorption import FAST, SLOW, absorbed, slow_parts
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


def _kernel(*refs, tile, span, heads, width, slow, packing, masked, interpret):
    refs = list(refs)
    take = lambda n=1: [refs.pop(0) for _ in range(n)]
    (length_ref,) = take()
    mask_ref = take()[0] if masked else None
    fast_ref, turn_ref = take(2)
    slow_ref, place_ref = take(2) if slow else (None, None)
    k_ref, *k_scale = take(3 if packing.bits < 16 else 1)
    score_ref, top_ref = take(2)
    g, x, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    length, every = length_ref[b], pl.ds(0, heads)
    first, full, last = tile_range(length, x, tile, span)
    columns = lambda ref: range(0, ref.shape[-1], width)
    rows = [pl.ds(r, packing.chunk) for r in packing.firsts()]
    flat = lambda a: a.reshape(packing.chunk, heads * width)
    mats = [
        [flat(fast_ref[b, g, r, every, pl.ds(c, width)]) for r in rows] for c in columns(fast_ref)
    ]
    if slow:
        mats += [
            [flat(slow_ref[b, g, r, every, x, pl.ds(c, width)]) for r in rows]
            for c in columns(slow_ref)
        ]
    if k_scale:
        sums = [sum(jnp.sum(m.astype(jnp.float32), axis=0) for m in some) for some in mats]

    def body(n, high, whole):
        at = n * tile
        slots = at + jax.lax.broadcasted_iota(jnp.int32, (tile,), 0)
        ok, index = None if whole else slots < length, (b, pl.ds(at, tile))
        z = read_latents(k_ref, index, g * packing.size, ok, packing, interpret)
        if k_scale:
            step, offset = read_scale(k_scale, (*index, g), ok)
            lift = (offset / step - packing.magic)[:, None]
        tables = [turn_ref[pl.ds(at, tile), pl.ds(c, width)] for c in columns(turn_ref)]
        if slow:
            near = pl.ds(at - x * span, tile)
            tables += [place_ref[near, pl.ds(c, width)] for c in columns(place_ref)]
        terms = 0.0
        for i, table in enumerate(tables):
            found = sum(plgpu.dot(part, m) for part, m in zip(z, mats[i], strict=True))
            if k_scale:
                found += lift * sums[i][None]
            terms += found.reshape(tile, heads, width) * table.astype(jnp.float32)[:, None]
        score = jnp.sum(terms, axis=2)
        if k_scale:
            score *= step[:, None]
        if masked:
            seen = masked_load(mask_ref, index, ok, False)
            score = jnp.where(seen[:, None], score, HIDDEN)
        if not whole:
            score = jnp.where(ok[:, None], score, HIDDEN)
        score_ref[b, g, pl.ds(at, tile), :] = score
        return jnp.maximum(high, score)

    high = jnp.full((tile, heads), HIDDEN, jnp.float32)
    high = jax.lax.fori_loop(first, full, functools.partial(body, whole=True), high)
    high = jax.lax.fori_loop(full, last, functools.partial(body, whole=False), high)
    top_ref[b, g, x, :] = jnp.max(high, axis=0)


def absorbed_scores(
    q_BNH: jax.Array,
    k: Latents,
    up_k_gRKH: jax.Array,
    frequencies: Any,
    lengths_B: jax.Array,
    mask_BS: jax.Array | None,
    cfg: LatentTiling,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(scores [B, g, spans * span, K'], largest of each span [B, g, X, K']), base 2, float32."""
    g, _, K, H = up_k_gRKH.shape
    B, S = k.codes_BSP.shape[:2]
    packing = Packing(k.bits, k.blocks[0])
    dtype, f32 = operand_dtype(k), jnp.float32
    tile, span, fast = cfg.tile, cfg.span, FAST
    slow = SLOW if fast < H // 2 else 0
    spans = pl.cdiv(S, span)
    frequencies = np.asarray(frequencies, np.float32)
    q = q_BNH.reshape(B, g, K, H).astype(f32) * (H**-0.5 * np.log2(np.e))
    up = up_k_gRKH[:, : packing.rank]
    cos_BgRKh, sin_BgRKh = absorbed(q, up)
    both = lambda own: jnp.concatenate([cos_BgRKh[..., own], sin_BgRKh[..., own]], -1).astype(dtype)
    angle = jnp.arange(spans * span, dtype=f32)[:, None] * frequencies[None, :fast]
    inputs = [lengths_B]
    inputs += [] if mask_BS is None else [jnp.broadcast_to(mask_BS, (B, S))]
    inputs += [
        both(slice(fast)),
        jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], 1).astype(jnp.bfloat16),
    ]
    if slow:
        place, w_JXU = slow_parts(frequencies, span, spans)
        w_JXU = w_JXU.astype(dtype)
        m = jnp.dot(
            both(slice(fast, None)).reshape(-1, w_JXU.shape[0]),
            w_JXU.reshape(w_JXU.shape[0], -1),
            preferred_element_type=f32,
        ).astype(dtype)
        inputs += [m.reshape(B, g, packing.rank, K, spans, slow), jnp.asarray(place, jnp.bfloat16)]
    kernel = functools.partial(
        _kernel, tile=tile, span=span, heads=K, width=cfg.width, slow=slow, packing=packing,
        masked=mask_BS is not None, interpret=interpret,
    )  # fmt: skip
    return pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((B, g, spans * span, K), f32),
            jax.ShapeDtypeStruct((B, g, spans, K), f32),
        ),
        grid=(g, spans, B),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="lowrank_absorbed_scores",
    )(*inputs, *stored(k))
