"""One fused Mosaic GPU kernel for one new token, for compute capability 9.0 and jax >= 0.11.

Letters: B batch, T query positions, S slots, N query heads, K' kv heads of a group, H head size, R
rank, g groups, X spans, C runs of spans, J slow pairs (cosines, then sines), U functions of the
place in a span.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lowrank_attention.absorption import FAST, SLOW, absorbed, can_absorb, slow_parts
from pallas_kernels.lowrank_attention.latents import Latents, block_bytes
from pallas_kernels.lowrank_attention.mosaic_kernel import fused
from pallas_kernels.lowrank_attention.mosaic_plan import (
    COLUMNS,
    SHARED_MEMORY,
    TILE,
    Plan,
    Stored,
)
from pallas_kernels.lowrank_attention.reference import HIDDEN

PROGRAMS = 132
"""Multiprocessors of an H100 or H200, each of which holds one program."""
SPANS = (1024, 512, 256)


def _stored(z: Latents, whole: bool, row: int = 0) -> Stored:
    """`whole`: a row is one block (keys); otherwise it is cut into blocks for 128 sums (values)."""
    size = block_bytes(z.blocks[0], z.bits) if z.bits < 16 else z.blocks[0]
    width = size if whole else 64 if z.bits == 4 else 128
    return Stored(z.bits, size, width, -(-size // width), row)


def plan_of(
    k: Latents, v: Latents, heads: int, masked: bool, span: int | None, programs: int
) -> Plan:
    """Spans as long as possible that still give every multiprocessor some; runs of them."""
    batch, slots, _ = k.codes_BSP.shape
    groups = len(k.blocks)
    if span is None:
        busy = (s for s in SPANS if batch * groups * -(-slots // s) > 0.9 * programs)
        span = next(busy, SPANS[-1])
    spans = -(-slots // span)
    runs = max(1, programs // (batch * groups))
    dtype = next((z.codes_BSP.dtype for z in (k, v) if z.bits == 16), jnp.dtype(jnp.bfloat16))
    find = lambda slots: Plan(
        batch, groups, heads, span, spans, -(-spans // runs), _stored(k, True),
        _stored(v, False, 2 * groups if k.bits < 16 else 0),
        dtype, masked, slots,
    )  # fmt: skip
    return next((p for p in (find(4), find(2)) if p.shared_bytes <= SHARED_MEMORY), find(2))


def why_not_fused(
    q_BTNH: jax.Array,
    k: Latents,
    v: Latents,
    heads: int,
    frequencies: Any,
    others: dict[str, jax.Array | None],
) -> str | None:
    """What the kernel cannot do of a call that the Triton kernels' checks let pass; else None.

    `heads` are the kv heads of a group, `others` the optional inputs by name.
    """
    if q_BTNH.shape[1] > 1:
        return f"{q_BTNH.shape[1]} query positions; the Mosaic kernel takes one"
    if heads * len(k.blocks) != q_BTNH.shape[2]:
        return "grouped queries; the Mosaic kernel takes one query head a kv head"
    if heads > COLUMNS // 2:
        return f"{heads} kv heads a group; the Mosaic kernel takes up to {COLUMNS // 2}"
    for name, value in others.items():
        if value is not None:
            return f"{name}, which the Mosaic kernel does not take"
    spans = SPANS[0]
    if not can_absorb(q_BTNH, heads, len(k.blocks), frequencies, spans, ()):
        return "rotary frequencies or a head size for which queries cannot be absorbed"
    least = {16: 16, 8: 32, 4: 64}[k.bits]
    if k.blocks[0] % least or k.blocks[0] // (2 if k.bits == 4 else 1) > 256:
        return f"k rank {k.blocks[0]}; the Mosaic kernel takes multiples of {least} up to 256"
    least = {16: 64, 8: 32, 4: 64}[v.bits]
    if v.blocks[0] % least:
        return f"v rank {v.blocks[0]}; the Mosaic kernel takes multiples of {least}"
    if k.bits == 16 and v.bits == 16 and k.codes_BSP.dtype != v.codes_BSP.dtype:
        return "latents of two 16-bit types"
    if k.codes_BSP.shape[1] % 8:
        return f"{k.codes_BSP.shape[1]} slots; the Mosaic kernel copies eight rows at a time"
    for name, z in (("k", k), ("v", v)):
        if z.codes_BSP.shape[2] * z.codes_BSP.dtype.itemsize % 16:
            return f"{name} latents of a token that are no multiple of 16 bytes"
    plan = plan_of(k, v, heads, True, None, PROGRAMS)
    if plan.shared_bytes > SHARED_MEMORY:
        return f"ranks that need {plan.shared_bytes} bytes of shared memory a program"
    return None


def _matrices(q_BNH, up_gRKH, frequencies, plan: Plan):
    """(fast, slow matrices, tables of the fast and of the slow pairs); see `fused`."""
    (B, _, H), (g, _, K, _) = q_BNH.shape, up_gRKH.shape
    f32, X, R = jnp.float32, plan.spans, plan.rank
    q = q_BNH.reshape(B, g, K, H).astype(f32) * (H**-0.5 * np.log2(np.e))
    cos_BgRKh, sin_BgRKh = absorbed(q, up_gRKH[:, :R])
    both = lambda own: jnp.concatenate([cos_BgRKh[..., own], sin_BgRKh[..., own]], axis=-1)
    fast = both(slice(FAST)).astype(plan.dtype).transpose(0, 1, 3, 4, 2)
    place, w_JXU = slow_parts(frequencies, plan.span, X)
    pad = SLOW - place.shape[1]
    w_JXU = jnp.pad(w_JXU, ((0, 0), (0, 0), (0, pad))).astype(plan.dtype)
    # Rows are functions of spans: as the product leaves them, nothing is transposed.
    slow = jnp.einsum(
        "JI,BgKRJ->IBgKR",
        w_JXU.reshape(-1, X * SLOW),
        both(slice(FAST, None)).astype(plan.dtype).transpose(0, 1, 3, 2, 4),
        preferred_element_type=plan.dtype,
    )
    angle = jnp.arange(X * plan.span, dtype=f32)[:, None] * frequencies[None, :FAST]
    turn = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1).astype(jnp.bfloat16)
    place = jnp.asarray(np.pad(place, ((0, 0), (0, pad))), jnp.bfloat16)
    return fast.reshape(B * g, K * SLOW, R), slow.reshape(X * SLOW, -1), turn, place


def _stored_arrays(some: tuple[Latents, ...], lengths_B: jax.Array) -> list[jax.Array]:
    """What the kernel gets of latents: codes as signed bytes, and after them the table of scales.

    All scales are turned around together, [B, S, rows] to [B, rows, S'], 0 where no slot is.
    """
    packed = [z for z in some if z.bits < 16]
    if not packed:
        return [z.codes_BSP for z in some]
    slots = some[0].codes_BSP.shape[1]
    exists_BS1 = (jnp.arange(slots, dtype=jnp.int32)[None] < lengths_B[:, None])[..., None]
    scale_BSr = jnp.concatenate([a for z in packed for a in (z.step_BSg, z.offset_BSg)], axis=2)
    scale_BSr = jnp.where(exists_BS1, scale_BSr, 0).astype(jnp.bfloat16)
    scale_BrS = jnp.pad(scale_BSr.swapaxes(1, 2), ((0, 0), (0, 0), (0, -slots % TILE)))
    signed = lambda z: [jax.lax.bitcast_convert_type(z.codes_BSP, jnp.int8), scale_BrS]
    return [a for z in some for a in ([z.codes_BSP] if z.bits == 16 else signed(z))]


def lowrank_attention_mosaic(
    q_BTNH: jax.Array,
    k: Latents,
    v: Latents,
    up_k_gRKH: jax.Array,
    frequencies: Any,
    lengths_B: jax.Array,
    *,
    mask_BTS: jax.Array | None = None,
    interpret: bool = False,
    span: int | None = None,
    programs: int = PROGRAMS,
) -> jax.Array:
    """Averaged value latents float32 [B, 1, N, R_v].

    `span` slots have one set of matrices; a program takes some spans of one group. `interpret` runs
    the kernel on a CPU and raises where two of its warpgroups race.
    """
    B, _, N, _ = q_BTNH.shape
    slots, K = k.codes_BSP.shape[1], up_k_gRKH.shape[2]
    plan = plan_of(k, v, K, mask_BTS is not None, span, programs)
    lengths = jnp.minimum(lengths_B.astype(jnp.int32), slots)
    frequencies = np.asarray(frequencies, np.float32)
    inputs = [lengths, *_matrices(q_BTNH[:, 0], up_k_gRKH, frequencies, plan)]
    if mask_BTS is not None:
        hidden = jnp.where(mask_BTS[:, 0], 0, HIDDEN).astype(jnp.float32)
        hidden = jnp.pad(hidden, ((0, 0), (0, -slots % TILE)))
        inputs.append(jnp.broadcast_to(hidden, (B, hidden.shape[1])))
    inputs += _stored_arrays((k, v), lengths)
    sums, top, total = fused(plan, interpret)(*inputs)
    return _join(sums, top, total, plan, v.blocks[0])[:, :, :K].reshape(B, 1, N, -1)


def _join(sums, top, total, plan: Plan, rank: int) -> jax.Array:
    """Averaged latents [B, g, COLUMNS, R] of all runs and warpgroups together."""
    with jax.named_scope("join"):
        top = top[:, :, :, :, 0]
        high = jnp.max(top, axis=(2, 3), keepdims=True)
        weight = jnp.exp2(top - high)
        whole = jnp.sum(weight * jnp.sum(total, axis=4), axis=(2, 3), keepdims=True)
        weight = weight / jnp.maximum(whole, 1e-30)
        y = jnp.sum(weight[:, :, :, :, None, None] * sums, axis=(2, 3))  # [B, g, c, 128, COLUMNS]
        B, g, halves = plan.batch, plan.groups, plan.v.halves
        y = y.reshape(B, g, plan.v.parts, halves, -1, COLUMNS).transpose(0, 1, 5, 3, 2, 4)
        y = y.reshape(B, g, COLUMNS, halves, -1)[..., : rank // halves]
        return y.reshape(B, g, COLUMNS, rank)
