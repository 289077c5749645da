"""The decoder in plain jnp: the specification. Slabs of groups are decoded one after another.

Letters as in `residual_decode.code`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul import Packed, codes_and_scales
from pallas_kernels.residual_decode.code import (
    BIAS,
    COLUMNS,
    FIRST_PATCH,
    LANES,
    LEVELS,
    OCTAVES,
    Residual,
    complete,
    predict_weights,
    tiles,
)

SLAB_WEIGHTS = 2**23
"""Weights that are decoded at a time; each takes about 20 bytes of work space."""


def residual_decode_reference(residual: Residual, substitute: Packed) -> jax.Array:
    """The bit patterns [D, F], uint16."""
    (_, F), group = substitute.shape, substitute.group
    Q, T = tiles(substitute.shape, group)
    fitting = max(1, SLAB_WEIGHTS // (group * F))
    count = max(c for c in range(1, min(Q, fitting) + 1) if Q % c == 0)
    offsets = residual.words.reshape(-1)[LANES : LANES + Q * T].reshape(Q, T)
    low = residual.low_DF
    if low is not None:
        low = low.reshape(Q, group, F)
    offsets = offsets.astype(jnp.int32)
    turns = Q // count

    def cut(a, n, axis):
        size = a.shape[axis] // turns
        return jax.lax.dynamic_slice_in_dim(a, n * size, size, axis)

    def one(n):  # cut out when its turn comes: nothing is copied as a whole
        own = jax.tree.map(lambda a: cut(a, n, 1), substitute)
        return _slab(residual, own, cut(offsets, n, 0), None if low is None else cut(low, n, 0))

    pattern = jax.lax.map(one, jnp.arange(turns))
    return _patched(pattern.reshape(Q, group, F), residual).reshape(residual.shape)


def _slab(residual: Residual, substitute: Packed, offset_QT, low_QgF) -> jax.Array:
    """Bit patterns [Q, g, F], uint16, of some groups, without patches."""
    words = residual.words.reshape(-1)
    take = lambda index: words.at[index].get(mode="promise_in_bounds")
    octaves = words[OCTAVES].astype(jnp.int32)
    p = predict_weights(*codes_and_scales(substitute), octaves, residual.dtype, jnp)
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
    return complete(p, x + first, jnp).astype(jnp.uint16)


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
