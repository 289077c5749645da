"""Attention over latents: the types that a Palu model's parameters and caches have.

Letters: B batch, T query positions, S cache slots, D model, N query heads, K kv heads (K' in a
group), G = N/K, H head size, R rank, g groups.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llm_jax.attention import (
    Step,
    along_last,
    attend,
    attention,
    empty_cache,
    projected,
    rope_angles,
    rope_frequencies,
    rotated,
    windowed,
)
from llm_jax.config import FULL, SLIDING, UNROTATED, Config
from llm_jax.linear import linear
from llm_jax.model import scaled
from pallas_kernels.lowrank_attention import lowrank_attention
from pallas_kernels.lowrank_attention.reference import rebuilt_heads
from pallas_kernels.precision import precision
from palu_jax.format import LatentFormat
from palu_jax.latent import PaluCache

_static = functools.partial(dataclasses.field, metadata=dict(static=True))

FEW = 16
"""Up to this many query positions go through the fused kernel. For more of them, keys and values
are rebuilt once."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """A key or value projection as a product, x @ down @ up, for each group of heads."""

    down_DR: jax.Array
    """[D, sum of the groups' ranks]: the groups' latents side by side."""
    up_gRKH: jax.Array | None
    """[groups, largest rank, kv heads in a group, head size]; zero beyond a group's own rank and
    heads. None where it is multiplied into the output projection."""
    mean_F: jax.Array | None
    """[K * H]: the projection of the mean direction of the inputs, for the mean split."""
    ranks: tuple[int, ...] = _static()
    """The rank of each group."""
    heads: tuple[int, ...] = _static()
    """The number of kv heads in each group."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class PaluAttention:
    """Attention whose cache holds latents; made by `palu_jax.convert.to_palu`."""

    q: jax.Array
    k: Factors
    v: Factors
    o: jax.Array
    """[N * H, D], or [N * R_v, D] where the value factors are multiplied into it."""
    q_bias: jax.Array | None
    k_bias: jax.Array | None
    v_bias: jax.Array | None
    q_norm: jax.Array | None
    k_norm: jax.Array | None
    mean_probe_D: jax.Array | None
    """For the mean split: its product with an input is the input's coefficient of the mean."""
    o_bias: jax.Array | None
    """Of the output projection; the value bias behind one that holds the value factors is in it."""
    format: LatentFormat = dataclasses.field(metadata=dict(static=True))
    kind: str = dataclasses.field(default=FULL, metadata=dict(static=True))
    """As in `llm_jax.params.Attention`."""


def why_not(cfg: Config) -> str | None:
    """What a model's attention has and Palu's has not; None where any recipe fits.

    All else is right as it is: windows, two bases of rotary positions, layers without rotation,
    biases, scales, norms around branches, experts.
    """
    lacking = dict(
        sinks="sinks in its softmax",
        attn_softcap="a cap of its scores",
        rotary_dim="heads that rotate in part",
        qk_norm_whole="norms over all queries and keys together",
    )
    found = [words for field, words in lacking.items() if getattr(cfg, field)]
    found += ["heads on several cards"] if cfg.cards > 1 else []
    return f"{cfg.family} models have {' and '.join(found)}" if found else None


@empty_cache.register
def _(p: PaluAttention, cfg: Config, batch: int, slots: int, scratch: int = 0) -> PaluCache:
    ranks, mean_split = (p.k.ranks, p.v.ranks), p.mean_probe_D is not None
    return PaluCache.empty(p.format, ranks, mean_split, batch, slots, scratch, cfg.dtype)


def rebuild(
    f: Factors,
    z_BSR: jax.Array,
    mean_coefficient_BS: jax.Array | None,
    bias: jax.Array | None,
    head_dim: int,
) -> jax.Array:
    """The projection's output from its latents: [B, S, K, H] in the latents' dtype."""
    heads = lambda vector: None if vector is None else vector.reshape(-1, head_dim)
    addends = mean_coefficient_BS, heads(f.mean_F), heads(bias)
    with jax.named_scope("rebuild"):
        return rebuilt_heads(z_BSR, f.up_gRKH, f.ranks, f.heads, *addends, z_BSR.dtype)


def slot_positions(step: Step, slots: int) -> jax.Array:
    """[B or 1, S]: the rotary position of every slot."""
    return jnp.arange(slots, dtype=jnp.int32)[None] if step.slot_BS is None else step.slot_BS


def query_scaled(q: jax.Array, cfg: Config) -> jax.Array:
    """Queries whose scores, over sqrt(H), are those of the family's own scale."""
    return q if cfg.query_scale is None else scaled(q, cfg.query_scale * cfg.head_dim**0.5)


@attention.register
def _(p: PaluAttention, x_BTD, cache: PaluCache, step: Step, cfg: Config):
    B, T, _ = x_BTD.shape
    q = projected(p.q, p.q_bias, x_BTD, cfg.head_dim)
    q = query_scaled(rotated(q, p.q_norm, step.position_BT, cfg, p.kind), cfg)
    mask_BTS = windowed(step, cfg, p.kind)
    zk, zv = linear(p.k.down_DR, x_BTD), linear(p.v.down_DR, x_BTD)
    coefficient = None
    if p.mean_probe_D is not None:
        products = precision(x_BTD.dtype)
        coefficient = jnp.einsum("BTD,D->BT", x_BTD, p.mean_probe_D, precision=products)
    before, cache = cache, cache.write(zk, zv, coefficient, step.at, step.real)
    if p.format.keeps_exact:
        y = _mixed(p, q, before, cache, (zk, zv), step, mask_BTS, cfg)
    elif T <= FEW:
        y = _fused(p, q, cache, step, mask_BTS, cfg)
    else:
        y = _rebuilt(p, q, cache, step, mask_BTS, cfg)
    y = linear(p.o, y.reshape(B, T, -1))
    return (y if p.o_bias is None else y + along_last(p.o_bias, y)), cache


def frequencies_of(cfg: Config, kind: str) -> np.ndarray:
    """`rope_frequencies` of all pairs of a head: zeros where nothing rotates."""
    if kind == UNROTATED:
        return np.zeros(cfg.head_dim // 2, np.float32)
    return rope_frequencies(cfg, kind)


def _fused(p, q_BTNH, cache, step, mask_BTS, cfg):
    """One kernel over the packed latents: [B, T, N, H], or [B, T, N, R_v] where o holds the value
    factors."""
    heads = lambda vector: None if vector is None else vector.reshape(-1, cfg.head_dim)
    unmasked = step.causal and q_BTNH.shape[1] == 1 and p.kind != SLIDING
    return lowrank_attention(
        scaled(q_BTNH, _magnitude(cfg, p.kind)),  # the kernel's keys only turn
        cache.k,
        cache.v,
        p.k.up_gRKH,
        p.v.up_gRKH,
        frequencies_of(cfg, p.kind),
        jnp.broadcast_to(step.at + q_BTNH.shape[1], q_BTNH.shape[:1]).astype(jnp.int32),
        mask_BTS=None if unmasked else mask_BTS,
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


def _magnitude(cfg: Config, kind: str) -> float:
    """What the rotation multiplies heads by (yarn and longrope)."""
    if kind == UNROTATED:
        return 1.0
    with jax.ensure_compile_time_eval():
        cos, _ = rope_angles(jnp.zeros((1, 1), jnp.int32), cfg, kind)
        return float(cos[0, 0, 0])


def _rebuilt(p, q_BTNH, cache, step, mask_BTS, cfg):
    """Keys and values rebuilt for all slots, then dense attention: for prefill."""
    zk, zv = cache.stored(q_BTNH.dtype)
    k = _keys(p, zk, cache.mean_coefficient_BS, slot_positions(step, cache.slots), cfg)
    return dense_attention(q_BTNH, k, _values(p, zv, cache.mean_coefficient_BS, cfg), mask_BTS)


def _keys(p, z_BSR, mean_coefficient_BS, position_BS, cfg):
    """Normed and rotated keys from latents, [B, S, K, H]."""
    k_BSKH = rebuild(p.k, z_BSR, mean_coefficient_BS, p.k_bias, cfg.head_dim)
    return rotated(k_BSKH, p.k_norm, position_BS, cfg, p.kind)


def _values(p, zv_BSR, mean_coefficient_BS, cfg):
    """What the attention weights average: values, or latents where o holds the value factors."""
    if p.v.up_gRKH is not None:
        return rebuild(p.v, zv_BSR, mean_coefficient_BS, p.v_bias, cfg.head_dim)
    B, S, _ = zv_BSR.shape
    groups = len(p.v.ranks)
    return jnp.repeat(zv_BSR.reshape(B, S, groups, -1), cfg.kv_heads // groups, axis=2)


def dense_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKX: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Attention over rebuilt keys and values, [B, T, N, width of v].

    A long bfloat16 prefill on a GPU takes cuDNN's attention, which never holds all scores.
    """
    flash = q_BTNH.dtype == jnp.bfloat16 and jax.default_backend() == "gpu"
    flash &= k_BSKH.shape == v_BSKX.shape and q_BTNH.shape[-1] in (64, 128)
    if not flash or q_BTNH.shape[1] % 64 or k_BSKH.shape[1] % 64:
        return attend(q_BTNH, k_BSKH, v_BSKX, mask_BTS)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKX, mask=mask_BTS[:, None], implementation="cudnn"
    )


def _mixed(p, q_BTNH, before, cache, new, step, mask_BTS, cfg):
    """Attention where the first and the newest tokens count with their exact latents.

    The distance between token and query decides. So the queries of one chunk see different tokens
    exactly: scores are computed with both kinds of keys, and each pair takes one of the two.
    """
    f, slots, dtype = p.format, cache.slots, q_BTNH.dtype
    position_BS = slot_positions(step, slots)
    behind_BTS = step.position_BT[:, :, None] - position_BS[:, None]
    old_BTS = (behind_BTS >= f.window) & (jnp.arange(slots) >= f.sinks)[None, None]
    kinds = cache.stored(dtype), before.recent(*new, step.at, dtype)
    mean = cache.mean_coefficient_BS
    k_old, k_exact = (_keys(p, zk, mean, position_BS, cfg) for zk, _ in kinds)
    v_old, v_exact = (_values(p, zv, mean, cfg) for _, zv in kinds)
    return attend_either(q_BTNH, (k_old, v_old), (k_exact, v_exact), mask_BTS, old_BTS)


def attend_either(
    q_BTNH: jax.Array,
    old: tuple[jax.Array, jax.Array],
    exact: tuple[jax.Array, jax.Array],
    mask_BTS: jax.Array,
    old_BTS: jax.Array,
) -> jax.Array:
    """`attend` over two versions of keys and values [B, S, K, H].

    A query sees the version `old` of a slot where `old_BTS` is True, otherwise `exact`.
    """
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
