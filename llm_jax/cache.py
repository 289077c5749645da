"""The key/value cache of one layer: fixed slots, written in place when donated.

Letters: B batch, R rows (a sequence each), S slots, K kv heads, H head size, T new positions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llm_jax.config import Config


@register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
    """Keys (already rotated) and values of one layer. A mask says which slots are valid."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array

    @property
    def slots(self) -> int:
        return self.k_BSKH.shape[1]

    @property
    def rewinds(self) -> bool:
        """Whether the first slots are the same, whatever was written behind them."""
        return True

    def move(self, source: jax.Array, at: jax.Array) -> "KV":
        return jax.tree.map(lambda buffer: move_rows(buffer, source, at), self)

    def move_each(self, source_BX: jax.Array, at_B: jax.Array, row_B: jax.Array) -> "KV":
        take = lambda buffer: buffer.at[
            jnp.broadcast_to(row_B[:, None], source_BX.shape), source_BX
        ].get(mode="clip")
        return jax.tree.map(lambda buffer: write_each(buffer, take(buffer), row_B, at_B), self)

    @classmethod
    def empty(cls, cfg: Config, batch: int, slots: int) -> "KV":
        """Zeroed slots on the default device, of all cards' heads."""
        shape = (batch, slots, cfg.kv_heads * cfg.cards, cfg.head_dim)
        return cls(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))


def empty_caches(cfg: Config, batch: int, slots: int) -> tuple[KV, ...]:
    """One empty `KV` for each layer. For converted layers use `llm_jax.attention.caches_for`."""
    return tuple(KV.empty(cfg, batch, slots) for _ in range(cfg.layers))


def write_rows(buffer_BS: jax.Array, new_BT: jax.Array, at: jax.Array) -> jax.Array:
    """`buffer` with T new entries in slots at … at+T-1. All of these slots must exist."""
    return jax.lax.dynamic_update_slice_in_dim(
        buffer_BS, new_BT.astype(buffer_BS.dtype), at, axis=1
    )


def write_first_rows(
    buffer_BS: jax.Array, new_BT: jax.Array, at: jax.Array, real: jax.Array
) -> jax.Array:
    """`write_rows` of the first `real` entries; the slots of the others stay as they are."""
    old_BT = jax.lax.dynamic_slice_in_dim(buffer_BS, at, new_BT.shape[1], axis=1)
    real_T = (jnp.arange(new_BT.shape[1]) < real).reshape(1, -1, *[1] * (new_BT.ndim - 2))
    return write_rows(buffer_BS, jnp.where(real_T, new_BT.astype(old_BT.dtype), old_BT), at)


def move_rows(buffer_BS: jax.Array, source: jax.Array, at: jax.Array) -> jax.Array:
    """`buffer` with the rows of slots `source[R]` copied to slots at … at+R-1.

    All rows are read before any is written, so source and destination may overlap:
    source [5, 7, 8] at 5 turns slots 5 6 7 8 9 from a b c d e into a c d d e.
    """
    return write_rows(buffer_BS, jnp.take(buffer_BS, source, axis=1, mode="clip"), at)


def move(caches: Any, source: jax.Array, at: jax.Array) -> Any:
    """Caches of any kind with slots `source[R]` copied to slots at … at+R-1; no others change."""
    return jax.tree.map(lambda c: c.move(source, at), caches, is_leaf=lambda c: hasattr(c, "move"))


def places(row_B: jax.Array, at_B: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """(rows, slots) [B, length] of `length` tokens of each sequence, from slot `at_B` on."""
    slot_BT = at_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    return jnp.broadcast_to(row_B[:, None], slot_BT.shape), slot_BT


def write_each(
    buffer_RS: jax.Array, new_BT: jax.Array, row_B: jax.Array, at_B: jax.Array
) -> jax.Array:
    """`buffer` with T new entries of each sequence in its row, in slots at … at+T-1.

    Rows and slots that do not exist are left out."""
    place = places(row_B, at_B, new_BT.shape[1])
    return buffer_RS.at[place].set(new_BT.astype(buffer_RS.dtype), mode="drop", unique_indices=True)


def one_row(cache: Any, row: jax.Array) -> Any:
    """The cache of one row, batch 1; of a row that does not exist, the nearest one."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, row, 1, axis=0), cache)


def put_row(cache: Any, one: Any, row: jax.Array) -> Any:
    """The cache with a row replaced; a row that does not exist is left out."""
    return jax.tree.map(lambda a, b: a.at[row].set(b[0], mode="drop"), cache, one)


def move_each(caches: Any, source_BX: jax.Array, at_B: jax.Array, row_B: jax.Array) -> Any:
    """`move` of each sequence in its own row of caches of any kind."""

    def moved(cache):
        if hasattr(cache, "move_each"):
            return cache.move_each(source_BX, at_B, row_B)
        for b in range(len(row_B)):
            one = one_row(cache, row_B[b]).move(source_BX[b], at_B[b])
            cache = put_row(cache, one, row_B[b])
        return cache

    return jax.tree.map(moved, caches, is_leaf=lambda c: hasattr(c, "move"))
