"""Attention that adds in the order of positions, whatever slots they are in: the same bits for a
token that is alone and for one that is a node of a tree.

A query at position q sees the position p either in the slot of that number, or in the slot of an
ancestor. Which of the two it is depends on the round. So the first q - W + 1 positions, which are
in slots of their number in every round, are read there, in blocks. The W newest ones are gathered
into their order for each query. Both parts and their order depend on q alone.

Letters: T queries, S slots, W positions of a window, K kv heads, G query heads of each, N = K G, H
head size.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.precision import precision
from pallas_kernels.tree_attention.reference import capped

BLOCK = 1024
"""Most slots of a block: with 28 heads and 320 queries its scores are 37 MB."""
LOWEST = -1e30


def block_slots(slots: int) -> int:
    """Slots of a block; the last one may begin earlier, so that it ends with the cache."""
    blocks = -(-slots // BLOCK)
    return min(slots, -(-slots // (64 * blocks)) * 64)


def window_start(position_T: jax.Array, window: int) -> jax.Array:
    """[T] the first of the `window` positions that end with each query's own; not below 0."""
    return jnp.maximum(position_T - (window - 1), 0)


def ordered_attention(
    q_TNH: jax.Array,
    k_SKH: jax.Array,
    v_SKH: jax.Array,
    position_T: jax.Array,
    slot_TW: jax.Array,
    *,
    sinks_N: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(q k * scale) v over all positions up to each query's own, [T, N, H], in q's dtype.

    `slot_TW` are the slots of the W positions from `window_start` on, for each query; what is
    behind its own position is not looked at. Lower positions are in slots of their number.
    `window`: only so many positions are seen. The others are as in `tree_attention`. Scores and
    sums are float32.

    A query's result is a function of its numbers and of the keys and values of its positions:
    within one compiled program no bit depends on its place, on other queries or on the slots.
    """
    T, N, H = q_TNH.shape
    (S, K, _), W = k_SKH.shape, slot_TW.shape[1]
    q_TKGH, exact = q_TNH.reshape(T, K, N // K, H), precision(q_TNH.dtype)
    product = functools.partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    scale, size = H**-0.5 if scale is None else scale, block_slots(S)
    first_T = window_start(position_T, W)

    def seen(of_TS):
        behind_TS = position_T[:, None] - of_TS
        near_TS = behind_TS >= 0
        return near_TS if window is None else near_TS & (behind_TS < window)

    def add(carry, score_KGTS, seen_TS, weighted):
        """The carry with more positions. Those that are not seen add exact zeros, and leave the
        rest as it is: so it does not matter how many of them there are."""
        top_KGT1, total_KGT1, y_KGTH = carry
        score_KGTS = capped(score_KGTS * scale, softcap)
        score_KGTS = jnp.where(seen_TS[None, None], score_KGTS, LOWEST)
        higher_KGT1 = jnp.maximum(top_KGT1, score_KGTS.max(-1, keepdims=True))
        weight_KGTS = jnp.where(seen_TS[None, None], jnp.exp(score_KGTS - higher_KGT1), 0.0)
        less_KGT1 = jnp.exp(top_KGT1 - higher_KGT1)
        total_KGT1 = total_KGT1 * less_KGT1 + weight_KGTS.sum(-1, keepdims=True)
        return (
            higher_KGT1,
            total_KGT1,
            y_KGTH * less_KGT1 + weighted(weight_KGTS.astype(v_SKH.dtype)),
        )

    def block(n, carry):
        start = jnp.minimum(n * size, S - size)
        k, v = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (k_SKH, v_SKH))
        slot_1S = (start + jnp.arange(size, dtype=jnp.int32))[None]
        seen_TS = seen(slot_1S) & (slot_1S >= n * size) & (slot_1S < first_T[:, None])
        score = product("TKGH,SKH->KGTS", q_TKGH, k)
        return add(carry, score, seen_TS, lambda w: product("KGTS,SKH->KGTH", w, v))

    shape = K, N // K, T
    top, total = jnp.full((*shape, 1), LOWEST, jnp.float32), jnp.zeros((*shape, 1), jnp.float32)
    if sinks_N is not None:
        top = jnp.broadcast_to(sinks_N.astype(jnp.float32).reshape(K, -1, 1, 1), top.shape)
        total = jnp.ones_like(total)
    # A GPU's loop is launched ahead of its numbers only if its length is known before.
    used = -(-S // size)
    if jax.default_backend() == "cpu":
        used = (first_T.max() + size - 1) // size
    carry = jax.lax.fori_loop(0, used, block, (top, total, jnp.zeros((*shape, H), jnp.float32)))

    k_TWKH, v_TWKH = (jnp.take(a, slot_TW, axis=0, mode="clip") for a in (k_SKH, v_SKH))
    position_TW = first_T[:, None] + jnp.arange(W, dtype=jnp.int32)[None]
    score = product("TKGH,TWKH->KGTW", q_TKGH, k_TWKH)
    weighted = lambda w: product("KGTW,TWKH->KGTH", w, v_TWKH)
    _, total, y_KGTH = add(carry, score, seen(position_TW), weighted)
    y_TKGH = jnp.transpose((y_KGTH / total).astype(q_TNH.dtype), (2, 0, 1, 3))
    return y_TKGH.reshape(T, N, H)
