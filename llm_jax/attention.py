"""Attention: rotary positions, masks, and one open function dispatched on the parameters' type.

Letters: B batch, T query positions, S cache slots, D model, N query heads, K kv heads, G = N/K,
H head size.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llm_jax.cache import KV, one_row, places, put_row, write_each, write_first_rows, write_rows
from llm_jax.cards import summed
from llm_jax.config import FULL, SLIDING, UNROTATED, Config
from llm_jax.linear import linear, terms
from llm_jax.ordered import ordered_attention
from llm_jax.params import Attention, JoinedAttention, Params, Weight
from llm_jax.rope import frequencies
from pallas_kernels.rotary_cache import rotary_cache
from pallas_kernels.tree_attention import tree_attention


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """Where T new tokens are: the only difference of prefill, decoding and tree verification."""

    at: jax.Array
    """[]: the first of the T consecutive cache slots that they fill; with `row_B`, [B]."""
    position_BT: jax.Array
    """Rotary position of each; in a tree it follows the depth, not the slot."""
    mask_BTS: jax.Array
    """True where a query may look at a slot; B may be 1. Every row needs one True. For plain caches
    it may cover the first slots only; then nothing behind them is read."""
    slot_BS: jax.Array | None = None
    """Rotary position of every slot, for caches whose keys are not rotated yet; B may be 1.
    None: a slot's position is its number."""
    causal: bool = dataclasses.field(default=False, metadata=dict(static=True))
    """Known when compiling: tokens see all slots up to their own, and positions are slots. So a
    kernel for one query need not read the mask."""
    real: jax.Array | None = None
    """[]: how many of the T tokens are text; None: all. The others only fill a program's shape, and
    caches that keep the newest tokens apart must ignore them. With `row_B`, [B]."""
    row_B: jax.Array | None = None
    """Several sequences: the row of each in caches that may have more rows. All rows differ; in one
    that does not exist, nothing is written. None: one sequence, or rows in order."""
    live_B: jax.Array | None = None
    """With `row_B`: how many of its first slots each sequence may look at."""
    slot_TW: jax.Array | None = None
    """The slots of each query's W newest positions, for attention that adds in their order
    (`llm_jax.ordered`) in plain caches; the mask is empty then, and only `real` tokens are written.
    None: it adds in the order of slots."""

    @property
    def rows(self) -> tuple[jax.Array, jax.Array] | None:
        """`rows` of `tree_attention`."""
        return None if self.row_B is None else (self.row_B, self.live_B)

    def of(self, b: int) -> "Step":
        """The step of one sequence alone."""
        one = lambda a: a if a is None or a.shape[0] == 1 else a[b : b + 1]
        real = None if self.real is None else self.real[b]
        position_1T, mask_1TS = self.position_BT[b : b + 1], one(self.mask_BTS)
        return Step(self.at[b], position_1T, mask_1TS, one(self.slot_BS), self.causal, real)


def causal_step(
    at: jax.Array | int, length: int, slots: int, real: jax.Array | int | None = None
) -> Step:
    """`length` consecutive tokens behind `at` earlier ones, for a cache of `slots` slots."""
    at = jnp.asarray(at, jnp.int32)
    position_T = at + jnp.arange(length, dtype=jnp.int32)
    seen = jnp.arange(slots, dtype=jnp.int32)[None, None, :] <= position_T[None, :, None]
    real = None if real is None else jnp.asarray(real, jnp.int32)
    return Step(at, position_T[None], seen, causal=True, real=real)


def causal_steps(
    at_B: jax.Array, length: int, slots: int, row_B: jax.Array, real_B: jax.Array
) -> Step:
    """`causal_step` of several sequences, each behind its own `at_B` tokens, in its own row."""
    position_BT = at_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    seen = jnp.arange(slots, dtype=jnp.int32)[None, None, :] <= position_BT[:, :, None]
    live_B = jnp.minimum(at_B + length, slots)
    return Step(at_B, position_BT, seen, None, True, real_B, row_B, live_B)


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """The vector with leading axes of size 1, so that it broadcasts along x's last axis."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """x divided by its root mean square (in float32), times the gain; same dtype as x.

    Rounded before the gain, or after it where the gain is float32, as its family does it.
    """
    x32 = x.astype(jnp.float32)
    scaled = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return (scaled.astype(gain.dtype) * along_last(gain, x)).astype(x.dtype)


def rope_frequencies(cfg: Config, kind: str = FULL) -> np.ndarray:
    """Radians per position of each rotated pair of a head, float32, in attention of that kind."""
    if kind == UNROTATED:
        return np.zeros(0, np.float32)
    rotated = cfg.rotary_dim or cfg.head_dim
    if kind == SLIDING and cfg.sliding_theta is not None:
        return frequencies(rotated, cfg.sliding_theta, None)
    return frequencies(rotated, cfg.rope_theta, cfg.rope_scaling)


def rope_angles(
    position_BT: jax.Array, cfg: Config, kind: str = FULL
) -> tuple[jax.Array, jax.Array]:
    """(cosine, sine) of position x frequency, float32 [B, T, pairs], magnitude included."""
    freq = jnp.asarray(rope_frequencies(cfg, kind))[None, None]
    angle_BTh = position_BT.astype(jnp.float32)[:, :, None] * freq
    cos, sin = jnp.cos(angle_BTh), jnp.sin(angle_BTh)
    own_base = kind == SLIDING and cfg.sliding_theta is not None
    if cfg.rope_scaling is None or own_base or cfg.rope_scaling.magnitude == 1:
        return cos, sin
    magnitude = jnp.float32(cfg.rope_scaling.magnitude)
    return cos * magnitude, sin * magnitude


def rope(x_BTNH: jax.Array, position_BT: jax.Array, cfg: Config, kind: str = FULL) -> jax.Array:
    """x with pairs (i, i + R/2) of each head's first R dimensions rotated by position x frequency
    (the half-split layout); R is `cfg.rotary_dim`, or all of the head."""
    if kind == UNROTATED:
        return x_BTNH
    with jax.named_scope("rope"):
        cos, sin = (part[:, :, None] for part in rope_angles(position_BT, cfg, kind))
        width = 2 * cos.shape[-1]
        rotated, rest = x_BTNH[..., :width], x_BTNH[..., width:]
        a, b = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTNH.dtype)
        return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], -1)


def windowed(step: Step, cfg: Config, kind: str) -> jax.Array:
    """`step.mask_BTS`, and in SLIDING attention only slots less than a window behind the query."""
    if kind != SLIDING:
        return step.mask_BTS
    slots = step.mask_BTS.shape[-1]
    slot_BS = step.slot_BS
    if slot_BS is None:
        slot_BS = jnp.arange(slots, dtype=jnp.int32)[None]
    behind_BTS = step.position_BT[:, :, None] - slot_BS[:, None, :slots]
    return step.mask_BTS & (behind_BTS < cfg.window)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    cfg: Config | None = None,
    sinks_N: jax.Array | None = None,
    rows: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the slots the mask allows, [B, T, N, width of v]; softmax in
    float32. The mask may cover the first slots only; then nothing behind them is read. A `cfg` may
    give scores another scale and a cap; `sinks_N` are logits without values, one a query head;
    `rows` is `Step.rows`."""
    more = {} if cfg is None else dict(scale=cfg.query_scale, softcap=cfg.attn_softcap)
    with jax.named_scope("attend"):
        return tree_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N=sinks_N, rows=rows, **more)


def caches_for(params: Params, cfg: Config, batch: int, slots: int, scratch: int = 0) -> tuple:
    """An empty cache for every layer, of the kind that its attention fills.

    `scratch` is the most slots behind the text that are used at once, by a draft tree.
    """
    return tuple(empty_cache(layer.attn, cfg, batch, slots, scratch) for layer in params.layers)


@functools.singledispatch
def empty_cache(p: Any, cfg: Config, batch: int, slots: int, scratch: int = 0) -> Any:
    """The empty cache that `attention` with these parameters fills; `KV` unless registered."""
    return KV.empty(cfg, batch, slots)


@functools.singledispatch
def attention(
    p: Any, x_BTD: jax.Array, cache: Any, step: Step, cfg: Config
) -> tuple[jax.Array, Any]:
    """Self-attention of the T tokens of `step`: (y_BTD, the cache with these tokens written)."""
    raise TypeError(
        f"no attention is registered for parameters of type {type(p).__name__}; "
        "register one with @llm_jax.attention.attention.register"
    )


def attention_of_each(
    p: Any, x_BTD: jax.Array, cache: Any, step: Step, cfg: Config
) -> tuple[jax.Array, Any]:
    """`attention`, also of several sequences in rows of caches.

    Kinds that know only one sequence do them one after another.
    """
    if step.row_B is None or isinstance(p, Attention | JoinedAttention):
        return attention(p, x_BTD, cache, step, cfg)
    found = []
    for b in range(x_BTD.shape[0]):
        row, alone = step.row_B[b], step.of(b)
        y, one = attention(p, x_BTD[b : b + 1], one_row(cache, row), alone, cfg)
        found.append(y)
        cache = put_row(cache, one, row)
    return jnp.concatenate(found), cache


def projected(w: Weight, bias: jax.Array | None, x_BTD: jax.Array, head_dim: int) -> jax.Array:
    """A projection and its bias, split into heads: [B, T, heads, H]."""
    return split_heads(linear(w, x_BTD), bias, head_dim)


def split_heads(y_BTF: jax.Array, bias: jax.Array | None, head_dim: int) -> jax.Array:
    """A product with its bias added, split into heads: [B, T, heads, H]."""
    if bias is not None:
        y_BTF = y_BTF + along_last(bias, y_BTF)
    return y_BTF.reshape(*y_BTF.shape[:2], -1, head_dim)


def qkv_heads(
    p: Attention | JoinedAttention, x_BTD: jax.Array, cfg: Config
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(q_BTNH, k_BTKH, v_BTKH): the three projections with their biases, neither normed nor
    rotated."""
    if isinstance(p, JoinedAttention):
        return _joined_heads(p, terms(p.qkv, x_BTD), x_BTD.dtype, cfg)
    pairs = ((p.q, p.q_bias), (p.k, p.k_bias), (p.v, p.v_bias))
    q, k, v = (projected(w, bias, x_BTD, cfg.head_dim) for w, bias in pairs)
    return q, k, v


def normed(x_BTNH: jax.Array, gain: jax.Array | None, cfg: Config) -> jax.Array:
    """The heads with their RMS norm, or as they are where `gain` is None. A gain as long as all
    heads together norms them together (OLMo 2)."""
    if gain is None:
        return x_BTNH
    if cfg.qk_norm_whole:
        flat = x_BTNH.reshape(*x_BTNH.shape[:2], -1)
        return rms_norm(flat, gain, cfg.norm_eps).reshape(x_BTNH.shape)
    return rms_norm(x_BTNH, gain, cfg.norm_eps)


def rotated(
    x_BTNH: jax.Array,
    gain: jax.Array | None,
    position_BT: jax.Array,
    cfg: Config,
    kind: str = FULL,
) -> jax.Array:
    """Queries or keys ready for attention: normed where there is a gain, then rotated."""
    return rope(normed(x_BTNH, gain, cfg), position_BT, cfg, kind)


@attention.register
def _(p: Attention, x_BTD, cache: KV, step: Step, cfg: Config):
    return _over_cache(p, *qkv_heads(p, x_BTD, cfg), cache, step, cfg)


@attention.register
def _(p: JoinedAttention, x_BTD, cache: KV, step: Step, cfg: Config):
    y_XBTF = terms(p.qkv, x_BTD)
    one_kernel = p.q_norm is None and p.kind != UNROTATED and cfg.rotary_dim is None
    alone = (len(x_BTD) == 1 and step.slot_TW is None) or step.row_B is not None
    if len(y_XBTF) > 1 and alone and one_kernel:
        return _in_one_go(p, y_XBTF, cache, step, cfg)
    return _over_cache(p, *_joined_heads(p, y_XBTF, x_BTD.dtype, cfg), cache, step, cfg)


def _joined_heads(p: JoinedAttention, y_XBTF, dtype, cfg: Config):
    """`qkv_heads` from the terms of the joined product."""
    heads = split_heads(sum(y_XBTF[1:], y_XBTF[0]).astype(dtype), p.qkv_bias, cfg.head_dim)
    return jnp.split(heads, (cfg.heads, cfg.heads + cfg.kv_heads), axis=2)


def _over_cache(p, q, k, v, cache: KV, step: Step, cfg: Config):
    q = rotated(q, p.q_norm, step.position_BT, cfg, p.kind)
    k = rotated(k, p.k_norm, step.position_BT, cfg, p.kind)
    if step.slot_TW is not None:
        put = lambda buffer, new: write_first_rows(buffer, new, step.at, step.real)
    elif step.row_B is None:
        put = lambda buffer, new: write_rows(buffer, new, step.at)
    else:
        put = lambda buffer, new: write_each(buffer, new, step.row_B, step.at)
    return _read(p, q, KV(put(cache.k_BSKH, k), put(cache.v_BSKH, v)), step, cfg)


def _in_one_go(p, y_XBTF, cache: KV, step: Step, cfg: Config):
    """A low-bit product in terms: one kernel adds them, rotates heads and writes the cache."""
    (X, B, T, F), flat = y_XBTF.shape, lambda a: a.reshape(-1, *a.shape[2:])
    cos, sin = map(flat, rope_angles(step.position_BT, cfg, p.kind))
    row_B, at_B = (jnp.zeros(1, jnp.int32), step.at[None]) if step.row_B is None else (
        step.row_B, step.at)  # fmt: skip
    place = tuple(map(jnp.ravel, places(row_B, at_B, T)))
    given = y_XBTF.reshape(X, B * T, F), p.qkv_bias, cos, sin, cache.k_BSKH, cache.v_BSKH, place
    q, k, v = rotary_cache(*given)
    return _read(p, q.reshape(B, T, *q.shape[1:]), KV(k, v), step, cfg)


def _read(p, q_BTNH, cache: KV, step: Step, cfg: Config):
    if step.slot_TW is None:
        mask_BTS = windowed(step, cfg, p.kind)
        y_BTNH = attend(q_BTNH, cache.k_BSKH, cache.v_BSKH, mask_BTS, cfg, p.sinks, step.rows)
    else:
        window = cfg.window if p.kind == SLIDING else None
        more = dict(window=window, scale=cfg.query_scale, softcap=cfg.attn_softcap)
        with jax.named_scope("attend"):
            given = q_BTNH[0], cache.k_BSKH[0], cache.v_BSKH[0], step.position_BT[0], step.slot_TW
            y_BTNH = ordered_attention(*given, sinks_N=p.sinks, **more)[None]
    y_BTD = summed(linear(p.o, y_BTNH.reshape(*y_BTNH.shape[:2], -1)), cfg)
    return (y_BTD if p.o_bias is None else y_BTD + along_last(p.o_bias, y_BTD)), cache
