"""Attention over latents: the types that a Palu model's parameters and caches have.

Letters: B batch, T query positions, S cache slots, D model, N query heads, K kv heads (K' in a
group), G = N/K, H head size, R rank, g groups.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llm_jax.attention import (
    Step,
    along_last,
    attend,
    attention,
    empty_cache,
    projected,
    rope_frequencies,
    rotated,
)
from llm_jax.config import Config
from llm_jax.linear import linear, precision
from pallas_kernels.lowrank_attention import lowrank_attention
from palu_jax.latent import LatentFormat, PaluCache

_static = functools.partial(dataclasses.field, metadata=dict(static=True))

FEW = 16
"""Up to so many query positions go through the fused kernel; more rebuild keys and values once."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """A key or value projection x @ down @ up, group of heads by group of heads."""

    down_DR: jax.Array
    """The groups' latents side by side."""
    up_gRKH: jax.Array | None
    """[groups, largest rank, kv heads a group, head size]; zero beyond a group's rank or heads.
    None where it is fused into the output projection."""
    mean_F: jax.Array | None
    """[K * H]: what the mean direction of the inputs gives, for the mean split."""
    ranks: tuple[int, ...] = _static()
    heads: tuple[int, ...] = _static()
    """kv heads of each group."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class PaluAttention:
    """Attention whose cache holds latents; made by `palu_jax.convert.to_palu`."""

    q: jax.Array
    k: Factors
    v: Factors
    o: jax.Array
    """[N * H, D]; with fused values [N * R_v, D]."""
    q_bias: jax.Array | None
    k_bias: jax.Array | None
    v_bias: jax.Array | None
    q_norm: jax.Array | None
    k_norm: jax.Array | None
    lead_D: jax.Array | None
    """The mean split's coefficient of an input is its product with this."""
    o_bias: jax.Array | None
    """What the value bias gives behind a fused output projection."""
    format: LatentFormat = dataclasses.field(metadata=dict(static=True))


@empty_cache.register
def _(p: PaluAttention, cfg: Config, batch: int, slots: int, scratch: int = 0) -> PaluCache:
    ranks = p.k.ranks, p.v.ranks
    lead = p.lead_D is not None
    return PaluCache.empty(p.format, ranks, lead, batch, slots, scratch, cfg.dtype)


def rebuild(f: Factors, z_BSR, mean_coefficient_BS, bias, head_dim: int):
    """The projection's output from its latents, [B, S, K, H]."""
    with jax.named_scope("rebuild"):
        parts, at = [], 0
        product = functools.partial(jnp.einsum, precision=precision(z_BSR.dtype))
        for up_RKH, rank, heads in zip(f.up_gRKH, f.ranks, f.heads, strict=True):
            z = z_BSR[..., at : at + rank]
            parts.append(product("BSR,RKH->BSKH", z, up_RKH[:rank, :heads]))
            at += rank
        y_BSKH = jnp.concatenate(parts, axis=2)
        if f.mean_F is not None:
            mean = f.mean_F.reshape(1, 1, -1, head_dim)
            y_BSKH = y_BSKH + mean_coefficient_BS[..., None, None].astype(y_BSKH.dtype) * mean
        if bias is not None:
            y_BSKH = y_BSKH + bias.reshape(1, 1, -1, head_dim)
        return y_BSKH


def keys(p: PaluAttention, z_BSR, mean_coefficient_BS, position_BS, cfg: Config):
    """Rotated keys from latents, [B, S, K, H]."""
    k_BSKH = rebuild(p.k, z_BSR, mean_coefficient_BS, p.k_bias, cfg.head_dim)
    return rotated(k_BSKH, p.k_norm, position_BS, cfg)


def slot_positions(step: Step, slots: int):
    """[B or 1, S]: the rotary position of every slot."""
    return jnp.arange(slots, dtype=jnp.int32)[None] if step.slot_BS is None else step.slot_BS


@attention.register
def _(p: PaluAttention, x_BTD, cache: PaluCache, step: Step, cfg: Config):
    B, T, _ = x_BTD.shape
    q = projected(p.q, p.q_bias, x_BTD, cfg.head_dim)
    q = rotated(q, p.q_norm, step.position_BT, cfg)
    zk, zv = linear(p.k.down_DR, x_BTD), linear(p.v.down_DR, x_BTD)
    lead = None
    if p.lead_D is not None:
        lead = jnp.einsum("BTD,D->BT", x_BTD, p.lead_D, precision=precision(x_BTD.dtype))
    before, cache = cache, cache.write(zk, zv, lead, step.at, step.real)
    if p.format.keeps_exact:
        y = _mixed(p, q, before, cache, (zk, zv), step, cfg)
    elif T <= FEW:
        y = _fused(p, q, cache, step, cfg)
    else:
        y = _rebuilt(p, q, cache, step, cfg)
    y = linear(p.o, y.reshape(B, T, -1))
    return (y if p.o_bias is None else y + along_last(p.o_bias, y)), cache


def _fused(p, q_BTNH, cache, step, cfg):
    """One kernel over the packed latents; heads [B, T, N, H], or [B, T, N, R_v] if fused into o."""
    heads = lambda vector: None if vector is None else vector.reshape(-1, cfg.head_dim)
    return lowrank_attention(
        q_BTNH,
        cache.k,
        cache.v,
        p.k.up_gRKH,
        p.v.up_gRKH,
        rope_frequencies(cfg),
        jnp.broadcast_to(step.at + q_BTNH.shape[1], q_BTNH.shape[:1]).astype(jnp.int32),
        mask_BTS=None if step.causal and q_BTNH.shape[1] == 1 else step.mask_BTS,
        position_BS=step.slot_BS,
        k_bias_KH=heads(p.k_bias),
        v_bias_KH=heads(p.v_bias),
        mean_coefficient_BS=cache.mean_coefficient_BS,
        k_mean_KH=heads(p.k.mean_F),
        v_mean_KH=heads(p.v.mean_F),
        k_norm_H=p.k_norm,
        norm_eps=cfg.norm_eps,
        k_ranks=p.k.ranks,
        v_ranks=p.v.ranks,
        kv_heads=cfg.kv_heads,
    )


def _rebuilt(p, q_BTNH, cache, step, cfg):
    """Keys and values rebuilt for all slots, then dense attention: for prefill."""
    zk, zv = cache.stored(q_BTNH.dtype)
    k = keys(p, zk, cache.mean_coefficient_BS, slot_positions(step, cache.slots), cfg)
    return dense_attention(q_BTNH, k, _values(p, zv, cache.mean_coefficient_BS, cfg), step.mask_BTS)


def _values(p, zv_BSR, mean_coefficient_BS, cfg):
    """What the attention weights average: values, or with a fused output projection latents."""
    if p.v.up_gRKH is not None:
        return rebuild(p.v, zv_BSR, mean_coefficient_BS, p.v_bias, cfg.head_dim)
    B, S, _ = zv_BSR.shape
    groups = len(p.v.ranks)
    return jnp.repeat(zv_BSR.reshape(B, S, groups, -1), cfg.kv_heads // groups, axis=2)


def dense_attention(q_BTNH, k_BSKH, v_BSKX, mask_BTS):
    """Attention over rebuilt keys and values; cuDNN's for long bfloat16 prefill on a GPU, which
    never holds all scores."""
    flash = q_BTNH.dtype == jnp.bfloat16 and jax.default_backend() == "gpu"
    flash &= k_BSKH.shape == v_BSKX.shape and q_BTNH.shape[-1] in (64, 128)
    if not flash or q_BTNH.shape[1] % 64 or k_BSKH.shape[1] % 64:
        return attend(q_BTNH, k_BSKH, v_BSKX, mask_BTS)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKX, mask=mask_BTS[:, None], implementation="cudnn"
    )


def _mixed(p, q_BTNH, before, cache, new, step, cfg):
    """Attention where the first and the newest tokens count with their exact latents.

    A token's distance to the query decides, so queries of one chunk see different sets: scores are
    made from both kinds of keys and chosen one by one.
    """
    f, slots, dtype = p.format, cache.slots, q_BTNH.dtype
    position_BS = slot_positions(step, slots)
    behind_BTS = step.position_BT[:, :, None] - position_BS[:, None]
    old_BTS = (behind_BTS >= f.window) & (jnp.arange(slots) >= f.sinks)[None, None]
    kinds = cache.stored(dtype), before.recent(*new, step.at, dtype)
    k_old, k_exact = (keys(p, zk, cache.mean_coefficient_BS, position_BS, cfg) for zk, _ in kinds)
    v_old, v_exact = (_values(p, zv, cache.mean_coefficient_BS, cfg) for _, zv in kinds)
    return attend_either(q_BTNH, (k_old, v_old), (k_exact, v_exact), step.mask_BTS, old_BTS)


def attend_either(q_BTNH, old, exact, mask_BTS, old_BTS):
    """`attend` over two versions of keys and values; `old_BTS` says which one a query sees."""
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, old[0].shape[2], -1, H)
    product = functools.partial(
        jnp.einsum, precision=precision(q_BTNH.dtype), preferred_element_type=jnp.float32
    )
    one, two = (product("BTKGH,BSKH->BKGTS", q_BTKGH, k) for k, _ in (old, exact))
    choose = old_BTS[:, None, None]
    logits = jnp.where(choose, one, two) * (H**-0.5)
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], logits, -1e30), axis=-1)
    parts = (
        product("BKGTS,BSKX->BTKGX", jnp.where(c, weights, 0.0).astype(v.dtype), v)
        for c, v in ((choose, old[1]), (~choose, exact[1]))
    )
    y = sum(parts)
    return y.astype(q_BTNH.dtype).reshape(B, T, N, -1)
