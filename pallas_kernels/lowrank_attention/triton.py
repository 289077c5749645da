"""The two Triton kernels one after the other: scores, then averages.

Letters: B batch, T query positions, S slots, N query heads, K' kv heads of a group, H head size, R
rank, g groups, X spans.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lowrank_attention.absorb import absorbed_scores
from pallas_kernels.lowrank_attention.absorption import can_absorb
from pallas_kernels.lowrank_attention.average import average
from pallas_kernels.lowrank_attention.latents import Latents
from pallas_kernels.lowrank_attention.rebuild import Rows, rebuilt_scores
from pallas_kernels.lowrank_attention.tiles import LatentTiling, tiling


def lowrank_attention_triton(
    q_BTNH: jax.Array,
    k: Latents,
    v: Latents,
    up_k_gRKH: jax.Array,
    frequencies: Any,
    lengths_B: jax.Array,
    *,
    mask_BTS: jax.Array | None = None,
    position_BS: jax.Array | None = None,
    k_bias_KH: jax.Array | None = None,
    mean_coefficient_BS: jax.Array | None = None,
    k_mean_KH: jax.Array | None = None,
    k_norm_H: jax.Array | None = None,
    norm_eps: float = 1e-6,
    interpret: bool = False,
    cfg: LatentTiling | None = None,
    absorb: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(averaged value latents float32 [B, T, N, R_v], averaged coefficients [B, T, N])."""
    B, T, N, _ = q_BTNH.shape
    g, _, K, _ = up_k_gRKH.shape
    rows = Rows(g, K, T * N // (g * K))
    slots = k.codes_BSP.shape[1]
    cfg = cfg or tiling(B, g if rows.needed == 1 else g * K * rows.blocks, slots)
    lengths = jnp.minimum(lengths_B.astype(jnp.int32), slots)
    others = position_BS, k_bias_KH, k_mean_KH, k_norm_H
    if absorb is None:
        absorb = can_absorb(q_BTNH, K, g, frequencies, cfg.span, others)
    if absorb:
        mask = None if mask_BTS is None else mask_BTS[:, 0]
        found = absorbed_scores(
            q_BTNH[:, 0], k, up_k_gRKH, frequencies, lengths, mask, cfg, interpret
        )
        y, coefficients = average(*found, v, lengths, mean_coefficient_BS, cfg, interpret)
        return y.reshape(B, 1, N, -1), coefficients.reshape(B, 1, N)
    found = rebuilt_scores(
        q_BTNH,
        k,
        up_k_gRKH,
        frequencies,
        lengths,
        rows,
        cfg,
        mask_BTS=mask_BTS,
        position_BS=position_BS,
        k_bias_KH=k_bias_KH,
        mean_coefficient_BS=mean_coefficient_BS,
        k_mean_KH=k_mean_KH,
        k_norm_H=k_norm_H,
        norm_eps=norm_eps,
        interpret=interpret,
    )
    y, coefficients = average(*found, v, lengths, mean_coefficient_BS, cfg, interpret)
    return rows.restored(y, T), rows.restored(coefficients[..., None], T)[..., 0]
