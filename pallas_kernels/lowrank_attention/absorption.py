"""A query absorbed into the key factors, for one query row a kv head.

With k = z U and RoPE's pairs (a, b), a score is a sum over pairs j of cos(s w_j) C_j plus
sin(s w_j) D_j, where C = z (U_a q_a + U_b q_b) and D = z (U_a q_b - U_b q_a): the query goes into
two matrices of H/2 columns, and nothing is rotated. Fast pairs keep their two columns. All slow
pairs together move so little within a span of slots that a few functions of the place in it (the
leading singular vectors of their table of cosines and sines) stand in for them.

Letters: B batch, g groups, K' kv heads of a group, H head size, R rank, J slow pairs (cosines, then
sines), U functions of the place, X spans.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FAST = 16
"""Rotary pairs that keep two columns of their own."""
SLOW = 32
"""Columns for all others."""
TOLERANCE = 1e-3
"""The largest error of a cosine that absorption may cause; rounding to bfloat16 causes 4e-3."""


@functools.cache
def basis(
    frequencies: tuple[float, ...], span: int, count: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """(functions [span, U], their parts [J, U], largest error) for the slow pairs' cos | sin."""
    angle = np.arange(span)[:, None] * np.asarray(frequencies, np.float64)[None]
    table = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    left, size, right = np.linalg.svd(table, full_matrices=False)
    left, size, right = left[:, :count], size[:count], right[:count]
    largest = np.abs(left).max(axis=0)
    place, parts = left / largest, (right * (size * largest)[:, None]).T
    return place, parts, np.abs(place @ parts.T - table).max()


def absorbed(q_BgKH: jax.Array, up_gRKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The matrices of cosines and of sines, each float32 [B, g, R, K', H/2]."""
    qa, qb = jnp.split(q_BgKH[:, :, None].astype(jnp.float32), 2, axis=-1)
    ua, ub = jnp.split(up_gRKH[None].astype(jnp.float32), 2, axis=-1)
    return ua * qa + ub * qb, ua * qb - ub * qa


def slow_parts(frequencies: np.ndarray, span: int, spans: int) -> tuple[np.ndarray, jax.Array]:
    """(functions of the place [span, U], float32 [J, X, U]: the slow pairs of each span in them).

    `frequencies` are those of all pairs, of which the first `FAST` are left out.
    """
    slow = frequencies[FAST:]
    place, parts, _ = basis(tuple(slow.tolist()), span, SLOW)
    start = jnp.arange(spans, dtype=jnp.float32)[:, None] * span * slow[None]
    cos, sin = jnp.cos(start).T[..., None], jnp.sin(start).T[..., None]
    pc, ps = (p[:, None] for p in np.split(parts.astype(np.float32), 2))
    return place, jnp.concatenate([cos * pc - sin * ps, sin * pc + cos * ps], axis=0)


def can_absorb(
    q_BTNH: jax.Array,
    heads: int,
    groups: int,
    frequencies: Any,
    span: int,
    others: Sequence[jax.Array | None],
) -> bool:
    """Whether queries may be absorbed: one row a kv head, and keys that are only rotated."""
    _, T, N, H = q_BTNH.shape
    one_row = T == 1 and heads * groups == N
    if not one_row or heads & (heads - 1) or heads > 8 or FAST > H // 4:
        return False
    if any(a is not None for a in others) or isinstance(frequencies, jax.Array):
        return False
    slow = tuple(np.asarray(frequencies, np.float32)[FAST:].tolist())
    return basis(slow, span, SLOW)[2] < TOLERANCE
