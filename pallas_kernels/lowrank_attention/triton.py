"""Two Triton kernels, scores and averages, put together; and what they cannot do.

Letters: B batch, T query positions, S slots, N query heads, K' kv heads of a group, H head size, R
rank, g groups, X spans.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lowrank_attention.absorb import absorbed_scores, basis
from pallas_kernels.lowrank_attention.average import average
from pallas_kernels.lowrank_attention.rebuild import Rows, rebuilt_scores

TOLERANCE = 1e-3
"""Largest error of a cosine that absorption may make; bfloat16's rounding is 4e-3."""


@dataclasses.dataclass(frozen=True)
class LatentTiling:
    """How the slots are cut up, and how queries are absorbed."""

    tile: int = 64
    span: int = 1024
    """Slots of a program."""
    fast: int = 16
    """Rotary pairs that keep two columns of their own."""
    slow: int = 32
    """Columns for all others."""
    width: int = 32
    """Columns of a head in one product."""

    def rows(self, bits: int, columns: int) -> int:
        """Columns of weights that a product gets, at least."""
        return 16 if bits == 16 else 8


def tiling(batch: int, programs: int, slots: int) -> LatentTiling:
    """Long spans, unless too few programs for a GPU would come of it."""
    cfg = LatentTiling()
    while cfg.span > 256 and batch * programs * -(-slots // cfg.span) < 256:
        cfg = dataclasses.replace(cfg, span=cfg.span // 2)
    return cfg


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def can_absorb(q_BTNH, heads: int, groups: int, frequencies, span: int, others) -> bool:
    """Whether queries may be absorbed: one row a kv head, and keys that are only rotated."""
    _, T, N, H = q_BTNH.shape
    cfg = LatentTiling()
    one_row = T == 1 and heads * groups == N
    if not one_row or not _power_of_two(heads) or heads > 8 or cfg.fast > H // 4:
        return False
    if any(a is not None for a in others) or isinstance(frequencies, jax.Array):
        return False
    slow = tuple(np.asarray(frequencies, np.float32)[cfg.fast :].tolist())
    return basis(slow, span, cfg.slow)[2] < TOLERANCE


def lowrank_attention_triton(
    q_BTNH, k, v, up_k_gRKH, frequencies, lengths_B, *, mask_BTS=None, position_BS=None,
    k_bias_KH=None, mean_coefficient_BS=None, k_mean_KH=None, k_norm_H=None, norm_eps=1e-6,
    interpret=False, cfg: LatentTiling | None = None, absorb: bool | None = None,
):  # fmt: skip
    """(averaged value latents float32 [B, T, N, R_v], averaged leads [B, T, N])."""
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
        y, leads = average(*found, v, lengths, mean_coefficient_BS, cfg, interpret)
        return y.reshape(B, 1, N, -1), leads.reshape(B, 1, N)
    found = rebuilt_scores(
        q_BTNH, k, up_k_gRKH, frequencies, lengths, rows, cfg, mask_BTS=mask_BTS,
        position_BS=position_BS, k_bias_KH=k_bias_KH, mean_coefficient_BS=mean_coefficient_BS,
        k_mean_KH=k_mean_KH, k_norm_H=k_norm_H, norm_eps=norm_eps, interpret=interpret,
    )  # fmt: skip
    y, leads = average(*found, v, lengths, mean_coefficient_BS, cfg, interpret)
    return rows.restored(y, T), rows.restored(leads[..., None], T)[..., 0]
