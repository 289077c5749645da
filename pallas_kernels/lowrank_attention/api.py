"""The public function: one specification, and the choice of what computes it.

Letters: B batch, T query positions, S slots, N query heads, K kv heads (K' of a group), G = N/K, H
head size, R rank, g groups.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.device import mosaic_missing, on_hopper, takes_triton, triton_missing
from pallas_kernels.lowrank_attention.latents import Latents
from pallas_kernels.lowrank_attention.reference import (
    finish,
    group_heads,
    lowrank_attention_reference,
)

PREFER_MOSAIC = False
"""Whether implementation None takes the Mosaic kernel before Triton's where both can be used."""


def _ranks(name: str, latents: Latents, groups: int, ranks) -> tuple[int, ...]:
    if ranks is None:
        ranks = latents.blocks
        if len(ranks) != groups and latents.rank % groups == 0 and len(set(ranks)) == 1:
            ranks = (latents.rank // groups,) * groups  # blocks smaller than a group's latents
    if len(ranks) != groups or sum(ranks) != latents.rank:
        raise ValueError(
            f"{name} latents in blocks of {latents.blocks} do not fit {groups} groups; pass "
            f"{name}_ranks"
        )
    return tuple(ranks)


def _layout(q_BTNH, k, v, up_k_gRKH, k_ranks, v_ranks, kv_heads):
    groups, most = up_k_gRKH.shape[0], up_k_gRKH.shape[2]
    heads = group_heads(q_BTNH.shape[2], groups, most, kv_heads)
    return (_ranks("k", k, groups, k_ranks), _ranks("v", v, groups, v_ranks)), heads


def why_not(
    q_BTNH: jax.Array,
    k: Latents,
    v: Latents,
    up_k_gRKH: jax.Array,
    *_: Any,
    k_ranks: tuple[int, ...] | None = None,
    v_ranks: tuple[int, ...] | None = None,
    kv_heads: int | None = None,
    **__: Any,
) -> str | None:
    """Why Triton kernels cannot do this call of `lowrank_attention`; None where they can.

    Takes the same arguments. Does not ask whether there is a GPU.
    """
    ranks, heads = _layout(q_BTNH, k, v, up_k_gRKH, k_ranks, v_ranks, kv_heads)
    return _why_not(q_BTNH, k, v, up_k_gRKH, ranks, heads)


def why_not_mosaic(
    q_BTNH: jax.Array,
    k: Latents,
    v: Latents,
    up_k_gRKH: jax.Array,
    up_v_gRKH: jax.Array | None,
    frequencies: Any,
    *_: Any,
    k_ranks: tuple[int, ...] | None = None,
    v_ranks: tuple[int, ...] | None = None,
    kv_heads: int | None = None,
    **options: Any,
) -> str | None:
    """Why the Mosaic kernel cannot do this call of `lowrank_attention`; None where it can.

    Takes the same arguments. Does not ask whether there is a GPU of compute capability 9.0.
    """
    ranks, heads = _layout(q_BTNH, k, v, up_k_gRKH, k_ranks, v_ranks, kv_heads)
    if reason := mosaic_missing() or _why_neither(q_BTNH, k, v, ranks, heads):
        return reason
    from pallas_kernels.lowrank_attention.mosaic import why_not_fused

    others = "position_BS", "k_bias_KH", "k_mean_KH", "v_mean_KH", "k_norm_H"
    given = {name: options.get(name) for name in others}
    return why_not_fused(q_BTNH, k, v, heads[0], frequencies, given)


def _why_not(q_BTNH, k: Latents, v: Latents, up_k_gRKH, ranks, heads) -> str | None:
    """The first thing in a call that the Triton kernels cannot do; None where there is none."""
    if reason := triton_missing() or _why_neither(q_BTNH, k, v, ranks, heads):
        return reason
    for name, z in (("k", k), ("v", v)):
        if z.bits < 16 and 2**31 <= z.codes_BSP.size <= 2**32:
            return f"{z.codes_BSP.size} bytes of {name} codes, which 32-bit offsets do not reach"
    half = q_BTNH.shape[-1] // 2
    if half < 16 or half & (half - 1):
        return f"head size {q_BTNH.shape[-1]} is no power of two from 32 on"
    return None


def _why_neither(q_BTNH, k: Latents, v: Latents, ranks, heads) -> str | None:
    """The first thing that neither kind of kernel can do."""
    for name, z, some in (("k", k, ranks[0]), ("v", v, ranks[1])):
        if isinstance(z.bits, tuple):
            words = " and ".join(map(str, sorted(set(z.bits), reverse=True)))
            return f"{name} latents of {words} bits side by side; the kernels read one size"
        if z.bits not in (4, 8, 16):
            return f"{z.bits}-bit {name} latents; the kernels read 4, 8 and 16 bits"
        if z.bits == 16 and z.codes_BSP.dtype not in (jnp.bfloat16, jnp.float16):
            return f"{z.codes_BSP.dtype} {name} latents; the kernels take 16-bit ones"
        if len(set(some)) != 1:
            return f"{name} ranks {some} differ between groups"
        if z.blocks != tuple(some):
            return f"{name} has more than one quantization block a group"
        least = 32 if z.bits == 4 else 16
        if some[0] % least:
            return f"{name} rank {some[0]} is not a multiple of {least}"
    if len(set(heads)) != 1:
        return f"groups of {heads} kv heads differ"
    if q_BTNH.dtype == jnp.float32:
        return "float32 queries; the kernels multiply 16-bit numbers"
    return None


def _takes_mosaic(implementation: str | None, interpret: bool, why_not) -> bool:
    if implementation == "mosaic":
        if reason := why_not():
            raise NotImplementedError(reason)
        return True
    wanted = PREFER_MOSAIC and implementation is None and not interpret and on_hopper()
    return wanted and why_not() is None


def lowrank_attention(
    q_BTNH: jax.Array,
    k: Latents,
    v: Latents,
    up_k_gRKH: jax.Array,
    up_v_gRKH: jax.Array | None,
    frequencies: Any,
    lengths_B: jax.Array,
    *,
    mask_BTS: jax.Array | None = None,
    position_BS: jax.Array | None = None,
    k_bias_KH: jax.Array | None = None,
    v_bias_KH: jax.Array | None = None,
    mean_coefficient_BS: jax.Array | None = None,
    k_mean_KH: jax.Array | None = None,
    v_mean_KH: jax.Array | None = None,
    k_norm_H: jax.Array | None = None,
    norm_eps: float = 1e-6,
    k_ranks: tuple[int, ...] | None = None,
    v_ranks: tuple[int, ...] | None = None,
    kv_heads: int | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of T query positions over latents, [B, T, N, H], in q's dtype.

    score[b,t,n,s] = q[b,t,n] . RoPE(z_k[b,s,group] @ up_k[group,:,head] + bias + c * mean) over
    sqrt(H); with p its softmax over s, y[b,t,n] = (sum_s p z_v[b,s,group]) @ up_v[group,:,head] +
    v_bias + (sum_s p c) v_mean, where c is `mean_coefficient_BS[b,s]`.

    Queries are already rotated and not scaled. Slots s < lengths_B[b] exist; no others are read.
    `mask_BTS` (B may be 1) says which of them a query sees. kv head i is in group
    i // K'; rows of `up_*` beyond a group's rank are zero. Without `up_v_gRKH` the result stays in
    latents, [B, T, N, R_v]. `position_BS` (B may be 1) is the rotary position of each slot, by
    default its number; `frequencies` are radians a position for the pairs (i, i + H/2). `k_norm_H`
    is the gain of an rms-norm of every rebuilt key before its rotation. A row that sees no slot
    gives finite numbers. `k_ranks` and `v_ranks` are needed where quantization blocks are smaller
    than groups of unequal ranks, `kv_heads` where the last group has fewer heads.

    `implementation` None takes Triton where `why_not` gives no reason and the device is a GPU, else
    XLA; with `PREFER_MOSAIC`, before both, "mosaic" where `why_not_mosaic` gives no reason and the
    GPU has compute capability 9.0. "triton" and "mosaic" raise NotImplementedError with the reason.
    `interpret` runs the kernels on a CPU.
    """
    ranks, heads = _layout(q_BTNH, k, v, up_k_gRKH, k_ranks, v_ranks, kv_heads)
    if (k_mean_KH is not None or v_mean_KH is not None) and mean_coefficient_BS is None:
        raise ValueError("means without coefficients: pass mean_coefficient_BS")
    keys = dict(
        mask_BTS=mask_BTS, position_BS=position_BS, k_bias_KH=k_bias_KH,
        mean_coefficient_BS=mean_coefficient_BS, k_mean_KH=k_mean_KH, k_norm_H=k_norm_H,
        norm_eps=norm_eps,
    )  # fmt: skip
    if _takes_mosaic(
        implementation,
        interpret,
        lambda: why_not_mosaic(
            q_BTNH, k, v, up_k_gRKH, up_v_gRKH, frequencies, k_ranks=k_ranks, v_ranks=v_ranks,
            kv_heads=kv_heads, v_mean_KH=v_mean_KH, **keys,
        ),
    ):  # fmt: skip
        from pallas_kernels.lowrank_attention.mosaic import lowrank_attention_mosaic

        y = lowrank_attention_mosaic(
            q_BTNH, k, v, up_k_gRKH, frequencies, lengths_B, mask_BTS=mask_BTS, interpret=interpret
        )
        return finish(y, None, up_v_gRKH, heads, v_bias_KH, None, q_BTNH.dtype)
    reason = lambda: _why_not(q_BTNH, k, v, up_k_gRKH, ranks, heads)
    if takes_triton(implementation, interpret, reason):
        from pallas_kernels.lowrank_attention.triton import lowrank_attention_triton

        if k_mean_KH is None and v_mean_KH is None:
            keys["mean_coefficient_BS"] = None
        y, coefficients = lowrank_attention_triton(
            q_BTNH, k, v, up_k_gRKH, frequencies, lengths_B, interpret=interpret, **keys
        )
        return finish(y, coefficients, up_v_gRKH, heads, v_bias_KH, v_mean_KH, q_BTNH.dtype)
    frequencies = jnp.asarray(frequencies, jnp.float32)
    return lowrank_attention_reference(
        q_BTNH, k, v, up_k_gRKH, up_v_gRKH, frequencies, lengths_B, ranks=ranks, heads=heads,
        v_bias_KH=v_bias_KH, v_mean_KH=v_mean_KH, **keys,
    )  # fmt: skip
