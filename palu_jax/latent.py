"""What a Palu layer keeps of its tokens: packed latents, and exact ones of the first and newest.

`quantize_latents` packs latents, `PaluCache` holds them, `palu_jax.format` says how.

Letters: B batch, T new tokens, S slots, X exact slots, R latents of a token, r latents of a block,
P packed bytes, g blocks.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llm_jax.cache import move_rows, write_rows
from pallas_kernels.bit_fields import pack_codes
from pallas_kernels.lowrank_attention.latents import (
    Bits,
    Latents,
    block_bytes,
    dense,
    each_block,
)
from palu_jax.format import LatentFormat

_static = functools.partial(dataclasses.field, metadata=dict(static=True))


def quantize_latents(
    z_BTR: jax.Array,
    bits: Bits,
    blocks: tuple[int, ...],
    clip: tuple[float, ...] | None = (1.0,),
) -> Latents:
    """The latents of T tokens as asymmetric codes of `bits` bits, with a step and an offset for
    each block; `bits` as in `Latents`.

    Offsets are rounded down and steps are rounded up in bfloat16, so that the whole range is
    covered. `clip` lists shares of a block's range, and None is as in `LatentFormat`; a smaller
    range is used where it lowers the squared error. At 2 bits the extremes of a Gaussian block cost
    more than they are worth.
    """
    if bits == 16:
        return Latents(z_BTR, None, None, bits, blocks)
    with jax.named_scope("quantize"):
        parts, at, form = [], 0, LatentFormat(clip=clip)
        for (size, own), group in itertools.groupby(each_block(bits, blocks)):
            count = len(list(group))
            z = z_BTR[..., at : at + count * size].astype(jnp.float32)
            z = z.reshape(*z.shape[:-1], count, size)
            code, step, offset = _best(z, own, form.shares(own))
            bytes_ = pack_codes(code.astype(jnp.uint8), own)
            parts.append((bytes_.reshape(*bytes_.shape[:-2], -1), step, offset))
            at += count * size
        codes, step, offset = (jnp.concatenate(p, axis=-1) for p in zip(*parts, strict=True))
        return Latents(codes, step.astype(jnp.bfloat16), offset.astype(jnp.bfloat16), bits, blocks)


def _best(z_Xr, bits, clip):
    """(codes [..., r], step [...], offset [...]) for the share of the range with least error."""
    low, high = z_Xr.min(-1, keepdims=True), z_Xr.max(-1, keepdims=True)
    best = None
    for share in clip:
        middle, half = (low + high) / 2, (high - low) / 2 * share
        offset = _round(middle - half, -1)
        floor = jnp.maximum(jnp.abs(offset) * 2.0**-20, 1e-30)  # for a block without a range
        step = _round(jnp.maximum((middle + half - offset) / (2**bits - 1), floor), 1)
        code = jnp.clip(jnp.round((z_Xr - offset) / step), 0, 2**bits - 1)
        error = jnp.sum((code * step + offset - z_Xr) ** 2, -1, keepdims=True)
        found = (error, code, step, offset)
        if best is not None:
            less = error < best[0]
            found = tuple(jnp.where(less, a, b) for a, b in zip(found, best, strict=True))
        best = found
    return best[1], best[2][..., 0], best[3][..., 0]


def _round(x, toward: int):
    """float32 rounded to a bfloat16 value: up for `toward` 1, down for -1."""
    near = x.astype(jnp.bfloat16).astype(jnp.float32)
    beyond = (x - near) * toward > 0
    return (
        jnp.where(beyond, near + toward * jnp.abs(near) * 2.0**-7, near)
        .astype(jnp.bfloat16)
        .astype(jnp.float32)
    )


def empty_latents(
    batch: int, slots: int, bits: Bits, blocks: tuple[int, ...], dtype: jnp.dtype
) -> Latents:
    """Slots that hold zeros, on the default device; `bits` as in `Latents`."""
    if bits == 16:
        return Latents(jnp.zeros((batch, slots, sum(blocks)), dtype), None, None, bits, blocks)
    count = sum(block_bytes(size, own) for size, own in each_block(bits, blocks))
    meta = lambda: jnp.zeros((batch, slots, len(blocks)), jnp.bfloat16)
    codes = jnp.zeros((batch, slots, count), jnp.uint8)
    return Latents(codes, meta(), meta(), bits, blocks)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Exact:
    """Rows kept in 16 bits: those of the first `sinks` slots, then a ring of the newest ones.

    A slot s below `sinks` is at place s, any other at place sinks + (s - sinks) % ring.
    """

    rows_BXR: jax.Array
    sinks: int = _static()

    @classmethod
    def empty(
        cls, batch: int, slots: int, width: int, sinks: int, window: int, scratch: int, dtype: Any
    ) -> "Exact":
        """Zeros; `scratch` is the largest number of slots beyond the committed text."""
        ring = min(max(window + scratch, 1), slots)
        return cls(jnp.zeros((batch, min(sinks, slots) + ring, width), dtype), min(sinks, slots))

    def place(self, slot: Any) -> jax.Array:
        """Where the rows of these slots are, if they are still there."""
        ring = self.rows_BXR.shape[1] - self.sinks
        return jnp.where(slot < self.sinks, slot, self.sinks + (slot - self.sinks) % ring)

    def write(self, fresh_BTR: jax.Array, at: Any, real: Any = None) -> "Exact":
        """With new rows for slots at … at+T-1, or for the first `real` of them. Where these are
        more than the ring holds, the last ones stay."""
        place = np.arange(self.rows_BXR.shape[1])
        last = at + (fresh_BTR.shape[1] if real is None else real) - 1
        behind = (last - place) % (len(place) - self.sinks)
        slot = jnp.where(place < self.sinks, place, last - behind)  # the newest that belongs there
        new_X = (slot >= at) & (slot <= last) & ((place < self.sinks) | (slot >= self.sinks))
        taken = jnp.take(fresh_BTR.astype(self.rows_BXR.dtype), slot - at, axis=1, mode="clip")
        return Exact(jnp.where(new_X[None, :, None], taken, self.rows_BXR), self.sinks)

    def move(self, source: jax.Array, at: Any) -> "Exact":
        """Slots `source[R]` moved to at … at+R-1."""
        taken = jnp.take(self.rows_BXR, self.place(source), axis=1)
        places = self.place(at + jnp.arange(source.shape[0]))
        return Exact(self.rows_BXR.at[:, places].set(taken), self.sinks)

    def view(self, fresh_BTR: jax.Array, at: Any, slots: int) -> jax.Array:
        """[B, S, R]: the rows of all slots before `write`, with the new rows put in.

        They are right for the sinks, the newest slots and the new rows, and arbitrary elsewhere.
        """
        every = jnp.take(self.rows_BXR, self.place(jnp.arange(slots)), axis=1)
        return write_rows(every, fresh_BTR, at)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class PaluCache:
    """Latents of the keys (before rotation) and values of one layer."""

    k: Latents
    v: Latents
    mean_coefficient_BS: jax.Array | None
    """For the mean split: each token's coefficient of the mean direction, in the dtype of 16-bit
    latents."""
    exact: Exact | None
    """Key and value latents of some tokens in 16 bits, side by side."""
    format: LatentFormat = dataclasses.field(metadata=dict(static=True))

    @property
    def slots(self) -> int:
        """The number of tokens that fit."""
        return self.k.codes_BSP.shape[1]

    @property
    def rewinds(self) -> bool:
        """Whether the first slots are the same, whatever was written behind them: not where the
        newest tokens are kept apart."""
        return self.exact is None

    @classmethod
    def empty(
        cls,
        format: LatentFormat,
        ranks: tuple[tuple[int, ...], tuple[int, ...]],
        mean_split: bool,
        batch: int,
        slots: int,
        scratch: int,
        dtype: Any,
    ) -> "PaluCache":
        """Zeros; `ranks` are those of the key groups and of the value groups. `scratch` is the
        largest number of slots beyond the committed text, such as those of a draft tree."""
        dtype = jnp.dtype(format.dtype or dtype)
        k, v = (
            empty_latents(batch, slots, *format.layout(side, r), dtype)
            for side, r in enumerate(ranks)
        )
        exact = None
        if format.keeps_exact:
            sizes = (k.rank + v.rank, format.sinks, format.window, scratch)
            exact = Exact.empty(batch, slots, *sizes, dtype)
        coefficient_BS = jnp.zeros((batch, slots), dtype) if mean_split else None
        return cls(k, v, coefficient_BS, exact, format)

    def write(
        self,
        zk_BTR: jax.Array,
        zv_BTR: jax.Array,
        mean_coefficient_BT: jax.Array | None,
        at: Any,
        real: Any = None,
    ) -> "PaluCache":
        """With T new tokens in slots at … at+T-1, `real` as in `llm_jax.attention.Step`. Tokens
        stored before stay as they are."""
        f = self.format
        put = lambda old, new: jax.tree.map(lambda a, b: write_rows(a, b, at), old, new)
        k, v = (
            put(old, quantize_latents(z, old.bits, old.blocks, f.clip))
            for old, z in ((self.k, zk_BTR), (self.v, zv_BTR))
        )
        coefficient_BS = self.mean_coefficient_BS
        if coefficient_BS is not None:
            coefficient_BS = write_rows(coefficient_BS, mean_coefficient_BT, at)
        exact = self.exact and self.exact.write(jnp.concatenate([zk_BTR, zv_BTR], -1), at, real)
        return PaluCache(k, v, coefficient_BS, exact, f)

    def move(self, source: jax.Array, at: Any) -> "PaluCache":
        """Slots `source[R]` moved to at … at+R-1, together with their exact latents."""
        rows = lambda tree: jax.tree.map(lambda a: move_rows(a, source, at), tree)
        exact = self.exact and self.exact.move(source, at)
        return PaluCache(
            rows(self.k), rows(self.v), rows(self.mean_coefficient_BS), exact, self.format
        )

    def stored(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """(key latents, value latents) [B, S, R] of all slots, dequantized."""
        return dense(self.k, dtype), dense(self.v, dtype)

    def recent(
        self, zk_BTR: jax.Array, zv_BTR: jax.Array, at: Any, dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        """(key latents, value latents) [B, S, R] of `Exact.view`; ask the cache before `write`."""
        both = self.exact.view(jnp.concatenate([zk_BTR, zv_BTR], -1), at, self.slots).astype(dtype)
        return both[..., : self.k.rank], both[..., self.k.rank :]
