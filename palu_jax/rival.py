"""What Palu is compared with, in the same engine: quantized caches of ordinary keys and values.

KIVI (arXiv 2402.02750) quantizes keys per channel, `group` tokens at a time, and values per token;
the newest tokens stay in 16 bits. Plain integer caches quantize both per token and head.

Letters: B batch, T new tokens, S slots, X exact slots, K kv heads, H head size, C = S / group,
P packed bytes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llm_jax.attention import (
    Step,
    along_last,
    attention,
    empty_cache,
    qkv_heads,
    rotated,
    windowed,
)
from llm_jax.cache import write_rows
from llm_jax.config import DTYPES, Config
from llm_jax.linear import linear
from llm_jax.params import Attention, Params
from pallas_kernels.lowrank_attention.latents import LATENT_BITS, Latents, dense
from palu_jax.attention import attend_either, dense_attention, query_scaled, slot_positions, why_not
from palu_jax.format import FormatError, LatentFormat
from palu_jax.latent import Exact, PaluCache, empty_latents, quantize_latents


@dataclasses.dataclass(frozen=True)
class KVFormat:
    """How ordinary keys and values are stored."""

    bits: int = 4
    per_channel: bool = False
    """Keys per channel over `group` tokens (KIVI); otherwise per token and head."""
    group: int = 32
    """Number of tokens that share a key step (per channel), and of channels that share a value
    step."""
    window: int = 0
    """Number of newest tokens kept in 16 bits; at least `group` with per_channel."""
    clip: tuple[float, ...] = (1.0,)
    dtype: str | None = None

    def __post_init__(self):
        if self.bits not in LATENT_BITS:
            known = ", ".join(map(str, LATENT_BITS))
            raise FormatError(f"bits is {self.bits}; possible are {known}")
        if self.group < 1:
            raise FormatError(f"group is {self.group}; expected 1 or more")
        if self.dtype not in (None, *DTYPES):
            raise FormatError(f"dtype is {self.dtype!r}; possible are {', '.join(DTYPES)}")
        if self.window < 0 or (self.per_channel and self.bits < 16 and self.window < self.group):
            raise FormatError(
                f"window is {self.window}; keys per channel are quantized {self.group} tokens at a "
                "time, so at least as many must be kept exact"
            )


def kivi(bits: int, dtype: str | None = None) -> KVFormat:
    """KIVI as published: groups of 32, the 128 newest tokens exact."""
    return KVFormat(bits, True, 32, 128, dtype=dtype)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedAttention:
    """Ordinary attention over a quantized cache."""

    dense: Attention
    format: KVFormat = dataclasses.field(metadata=dict(static=True))


def to_quantized_cache(params: Params, cfg: Config, format: KVFormat) -> Params:
    """The parameters with a cache of that format in every layer; all arrays are shared.

    Raises FormatError where groups do not divide heads, or attention is not ordinary.
    """
    if reason := why_not(cfg):
        raise FormatError(f"{reason}, which attention over these caches has not")
    if cfg.head_dim % min(format.group, cfg.head_dim):
        raise FormatError(f"groups of {format.group} do not divide heads of {cfg.head_dim}")
    kinds = {type(layer.attn).__name__ for layer in params.layers} - {"Attention"}
    if kinds:
        raise FormatError(f"only ordinary attention gets another cache, not {min(kinds)}")
    layers = tuple(
        dataclasses.replace(layer, attn=CachedAttention(layer.attn, format))
        for layer in params.layers
    )
    return dataclasses.replace(params, layers=layers)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ChannelCache:
    """KIVI's cache of one layer. Keys are read from the codes only where a group is full."""

    codes_BCP: jax.Array
    """uint8: a channel's `group` key codes packed side by side, channel after channel."""
    step_BCF: jax.Array
    offset_BCF: jax.Array
    v: Latents
    exact: Exact
    """Rotated keys and values side by side."""
    format: KVFormat = dataclasses.field(metadata=dict(static=True))

    @property
    def slots(self) -> int:
        """The number of tokens that fit."""
        return self.v.codes_BSP.shape[1]

    @property
    def rewinds(self) -> bool:
        """Whether the first slots are the same, whatever was written behind them."""
        return False

    def move(self, source: jax.Array, at: Any) -> "ChannelCache":
        """Raises NotImplementedError: a token has no step of its own."""
        raise NotImplementedError(
            "keys quantized per channel cannot be moved one token at a time: speculative decoding "
            "needs another cache format"
        )

    def write(
        self, k_BTF: jax.Array, v_BTF: jax.Array, at: Any, real: Any = None
    ) -> "ChannelCache":
        """With T new tokens in slots at … at+T-1, `real` as in `llm_jax.attention.Step`.

        The groups of these tokens are quantized from exact keys. A group that is not full yet is
        not read; it is quantized again when it is full.
        """
        f, (B, T, F) = self.format, k_BTF.shape
        fresh = jnp.concatenate([k_BTF, v_BTF], -1)
        every = self.exact.view(fresh, at, self.codes_BCP.shape[1] * f.group)
        count = min((T + f.group - 2) // f.group + 1, self.codes_BCP.shape[1])
        first = jnp.minimum(at // f.group, self.codes_BCP.shape[1] - count)
        rows = jax.lax.dynamic_slice_in_dim(every, first * f.group, count * f.group, axis=1)
        by_channel = rows[..., :F].reshape(B, count, f.group, F).swapaxes(2, 3)
        new = quantize_latents(by_channel.reshape(B, count, -1), f.bits, (f.group,) * F, f.clip)
        fresh_C = (first + jnp.arange(count) >= at // f.group)[None, :, None]

        def put(old, new):
            kept = jax.lax.dynamic_slice_in_dim(old, first, count, axis=1)
            return write_rows(old, jnp.where(fresh_C, new, kept), first)

        value = quantize_latents(v_BTF, f.bits, self.v.blocks, f.clip)
        return ChannelCache(
            put(self.codes_BCP, new.codes_BSP),
            put(self.step_BCF, new.step_BSg),
            put(self.offset_BCF, new.offset_BSg),
            jax.tree.map(lambda a, b: write_rows(a, b, at), self.v, value),
            self.exact.write(fresh, at, real),
            f,
        )

    def stored(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """(keys, values) [B, S, F] of all slots, dequantized."""
        f, (B, C, F) = self.format, self.step_BCF.shape
        packed = Latents(self.codes_BCP, self.step_BCF, self.offset_BCF, f.bits, (f.group,) * F)
        k = dense(packed, dtype).reshape(B, C, F, f.group).swapaxes(2, 3).reshape(B, -1, F)
        return k[:, : self.slots], dense(self.v, dtype)


def _blocks(f: KVFormat, cfg: Config) -> int:
    return min(f.group, cfg.head_dim) if f.per_channel else cfg.head_dim


@empty_cache.register
def _(p: CachedAttention, cfg: Config, batch: int, slots: int, scratch: int = 0):
    f, width = p.format, cfg.kv_heads * cfg.head_dim
    latent = LatentFormat(f.bits, f.bits, f.clip, _blocks(f, cfg), 0, f.window, f.dtype)
    if not f.per_channel or f.bits == 16:
        ranks = (width,), (width,)
        return PaluCache.empty(latent, ranks, False, batch, slots, scratch, cfg.dtype)
    dtype = jnp.dtype(f.dtype or cfg.dtype)
    chunks = -(-slots // f.group)
    of_keys = empty_latents(batch, chunks, f.bits, (f.group,) * width, dtype)
    of_values = empty_latents(batch, slots, f.bits, latent.blocks((width,)), dtype)
    exact = Exact.empty(batch, slots, 2 * width, 0, f.window + f.group, scratch, dtype)
    meta = of_keys.step_BSg, of_keys.offset_BSg
    return ChannelCache(of_keys.codes_BSP, *meta, of_values, exact, f)


@attention.register
def _(p: CachedAttention, x_BTD, cache, step: Step, cfg: Config):
    d, f, (B, T, _) = p.dense, p.format, x_BTD.shape
    q, k, v = qkv_heads(d, x_BTD, cfg)
    q = query_scaled(rotated(q, d.q_norm, step.position_BT, cfg, d.kind), cfg)
    k = rotated(k, d.k_norm, step.position_BT, cfg, d.kind)
    mask_BTS = windowed(step, cfg, d.kind)
    k, v = k.reshape(B, T, -1), v.reshape(B, T, -1)
    before = cache
    if isinstance(cache, ChannelCache):
        cache = cache.write(k, v, step.at, step.real)
    else:
        cache = cache.write(k, v, None, step.at, step.real)
    heads = lambda pair: tuple(a.reshape(*a.shape[:2], -1, cfg.head_dim) for a in pair)
    stored = heads(cache.stored(q.dtype))
    if cache.exact is None:
        y = dense_attention(q, *stored, mask_BTS)
    else:
        both = before.exact.view(jnp.concatenate([k, v], -1), step.at, cache.slots).astype(q.dtype)
        recent = heads(jnp.split(both, 2, axis=-1))
        y = attend_either(q, stored, recent, mask_BTS, _old(f, step, cache.slots))
    y = linear(d.o, y.reshape(B, T, -1))
    return (y if d.o_bias is None else y + along_last(d.o_bias, y)), cache


def _old(f: KVFormat, step: Step, slots: int):
    """[B, T, S]: which slots a query sees quantized; per channel only those of full groups."""
    if f.per_channel:
        first = (step.position_BT + 1 - f.window) // f.group * f.group
    else:
        first = step.position_BT + 1 - f.window
    return slot_positions(step, slots)[:, None] < first[:, :, None]
