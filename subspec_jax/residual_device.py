"""Residuals on the device: the same decoder as one jittable function of XLA's own operations."""

import jax
import jax.numpy as jnp

from llm_jax.params import Layer
from llm_jax.quantize import Quantized, unpack
from subspec_jax.residual import (
    BIAS,
    COLUMNS,
    FIRST_PATCH,
    LANES,
    LEVELS,
    OCTAVES,
    Residual,
    check_pair,
    predict,
    restore,
    tiles,
)

SLAB = 2**23
"""Weights decoded at a time: some 20 bytes of work space each."""


def decode(residual: Residual, substitute: Quantized) -> jax.Array:
    """The matrix [D, F], bit by bit what was encoded. Slabs of groups are done one after another.

    Shapes depend on the shapes of the arguments and on `residual.patches` alone, so one compiled
    program serves every layer whose residuals were padded alike.
    """
    check_pair("the residual", substitute, residual.shape, residual.dtype)
    with jax.named_scope("residual_decode"):
        Q, T = tiles(substitute.shape, substitute.group)
        fitting = max(1, SLAB // (substitute.group * substitute.shape[1]))
        count = max(c for c in range(1, min(Q, fitting) + 1) if Q % c == 0)
        offsets = residual.words.reshape(-1)[LANES : LANES + Q * T].reshape(Q, T)
        low = residual.low_DF
        if low is not None:
            low = low.reshape(Q, substitute.group, -1)
        parts = (substitute, offsets.astype(jnp.int32), low)
        if count == Q:
            pattern = _slab(residual, *parts)
        else:
            split = lambda a: a.reshape(Q // count, count, *a.shape[1:])
            pattern = jax.lax.map(lambda part: _slab(residual, *part), jax.tree.map(split, parts))
        pattern = _patched(pattern.reshape(Q, substitute.group, -1), residual)
        return jax.lax.bitcast_convert_type(pattern, residual.dtype).reshape(residual.shape)


def decode_layer(residuals: Layer, substitutes: Layer) -> Layer:
    """The layer with every `Residual` completed by its substitute and all else as it is."""
    return jax.tree.map(
        lambda r, q: decode(r, q) if isinstance(r, Residual) else r,
        residuals,
        substitutes,
        is_leaf=lambda r: isinstance(r, Residual),
    )


def _slab(residual: Residual, q: Quantized, offset_QT, low_QgF) -> jax.Array:
    """Bit patterns [Q, g, F], uint16, of some groups, without patches."""
    words = residual.words.reshape(-1)
    take = lambda index: words.at[index].get(mode="promise_in_bounds")
    octaves = words[OCTAVES].astype(jnp.int32)
    p = predict(unpack(q), q.step_QF, q.offset_QF, octaves, residual.dtype, jnp)
    entry = words[:LEVELS].astype(jnp.int32).at[p.level].get(mode="promise_in_bounds")
    length, first = entry & 255, (entry >> 8) - BIAS
    start = jnp.repeat(offset_QT, COLUMNS, axis=1)[:, None, : length.shape[-1]]
    if low_QgF is None:
        at = _before(length)
        word, shift = start + (at >> 5), (at & 31).astype(jnp.uint32)
        two = take(word) >> shift | take(word + 1) << 1 << (31 - shift)
        x = two.astype(jnp.int32) & ((1 << length) - 1)
    else:
        more = length >> 4
        at = start + _before(more)
        high = take(at >> 2) >> (8 * (at & 3)).astype(jnp.uint32)
        x = low_QgF.astype(jnp.int32) | ((high.astype(jnp.int32) & 255) * more) << 8
    return restore(p, x + first, jnp).astype(jnp.uint16)


def _before(length_QgF) -> jax.Array:
    """The sum of all lengths that come earlier in a weight's tile, int32.

    Along a row of the tile it is a product with a triangle of ones: exact, because sums stay below
    2^24, and a matrix unit does it in one pass where a scan takes six.
    """
    Q, g, F = length_QgF.shape
    T = -(-F // COLUMNS)
    tile = jnp.pad(length_QgF, ((0, 0), (0, 0), (0, T * COLUMNS - F))).reshape(Q, g, T, COLUMNS)
    earlier = jnp.triu(jnp.ones((COLUMNS, COLUMNS), jnp.bfloat16), 1)
    along = jnp.dot(tile.astype(jnp.bfloat16), earlier, preferred_element_type=jnp.float32)
    row = tile.sum(-1)
    whole = along.astype(jnp.int32) + (jnp.cumsum(row, axis=1) - row)[..., None]
    return whole.reshape(Q, g, T * COLUMNS)[..., :F]


def _patched(pattern_QgF, residual: Residual) -> jax.Array:
    """The patterns with the listed places overwritten."""
    if not residual.patches:
        return pattern_QgF
    Q, T = tiles(residual.shape, pattern_QgF.shape[1])
    count = Q * T
    words = residual.words.reshape(-1)
    before = words[LANES + count : LANES + 2 * count + 1].astype(jnp.int32)
    entry = jnp.arange(residual.patches)
    patch = words.at[words[FIRST_PATCH].astype(jnp.int32) + entry].get(mode="clip")
    tile = jnp.searchsorted(before, entry, side="right").astype(jnp.int32) - 1
    place = (patch >> 16).astype(jnp.int32)
    row, column = place // COLUMNS, tile % T * COLUMNS + place % COLUMNS
    group = jnp.where(entry < before[-1], tile // T, Q)
    return pattern_QgF.at[group, row, column].set(patch.astype(jnp.uint16), mode="drop")
