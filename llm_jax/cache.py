"""The key/value cache of one layer: fixed slots, written in place when donated.

Letters: B batch, S slots, K kv heads, H head size, T new positions.
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

    def move(self, source: jax.Array, at: jax.Array) -> "KV":
        return jax.tree.map(lambda buffer: move_rows(buffer, source, at), self)

    @classmethod
    def empty(cls, cfg: Config, batch: int, slots: int) -> "KV":
        """Zeroed slots on the default device."""
        shape = (batch, slots, cfg.kv_heads, cfg.head_dim)
        return cls(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))


def empty_caches(cfg: Config, batch: int, slots: int) -> tuple[KV, ...]:
    """One empty `KV` for each layer. For converted layers use `llm_jax.attention.caches_for`."""
    return tuple(KV.empty(cfg, batch, slots) for _ in range(cfg.layers))


def write_rows(buffer_BS: jax.Array, new_BT: jax.Array, at: jax.Array) -> jax.Array:
    """`buffer` with T new entries in slots at … at+T-1. All of these slots must exist."""
    return jax.lax.dynamic_update_slice_in_dim(
        buffer_BS, new_BT.astype(buffer_BS.dtype), at, axis=1
    )


def move_rows(buffer_BS: jax.Array, source: jax.Array, at: jax.Array) -> jax.Array:
    """`buffer` with the rows of slots `source[R]` copied to slots at … at+R-1.

    All rows are read before any is written, so source and destination may overlap:
    source [5, 7, 8] at 5 turns slots 5 6 7 8 9 from a b c d e into a c d d e.
    """
    return write_rows(buffer_BS, jnp.take(buffer_BS, source, axis=1, mode="clip"), at)


def move(caches: Any, source: jax.Array, at: jax.Array) -> Any:
    """Caches of any kind with slots `source[R]` copied to slots at … at+R-1; no others change."""
    return jax.tree.map(lambda c: c.move(source, at), caches, is_leaf=lambda c: hasattr(c, "move"))
