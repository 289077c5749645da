"""Two Triton kernels. The first: a block of query rows of one kv head against a part of the slots.

Rows are (token, head of the group) pairs, so that all heads of a group share what is read of the
cache. The softmax is computed while the slots are read, in powers of two. Where slots are split
among programs, each writes its highest score, its sum and its average, and a second kernel joins
them.

Letters: B sequences, T query tokens, G query heads of a kv head, M = T * G rows, R rows of caches,
S slots, K kv heads, H head size, X splits.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tree_attention.tiles import TILE, cut

LOWEST = -1e30
LOG2_E = math.log2(math.e)


def _tanh(x):
    """tanh from one exponential: 1 - 2 / (exp(2x) + 1), which is right at both ends."""
    return 1 - 2 / (jnp.exp2(x * (2 * LOG2_E)) + 1)


def _kernel(*refs, rows, blocks, G, splits, scale, softcap, placed, sunk):
    q_ref, k_ref, v_ref, mask_ref, *refs = refs
    row_ref, live_ref = (refs.pop(0), refs.pop(0)) if placed else (None, None)
    sinks_ref = refs.pop(0) if sunk else None
    y_ref, top_ref, sum_ref = refs
    (B, T, S), H = mask_ref.shape, q_ref.shape[-1]
    head, x = pl.program_id(1), pl.program_id(2)
    own = pl.ds(pl.program_id(0) * rows, rows)
    b, block = pl.program_id(0) // blocks, pl.program_id(0) % blocks
    at = b if row_ref is None else row_ref[b]
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32)
    row = block * rows + iota((rows, H), 0)
    row = jnp.minimum(row, T * G - 1)  # those behind the last are it again
    q = q_ref[b, row // G, head * G + row % G, iota((rows, H), 1)]
    row = block * rows + iota((rows, TILE), 0)
    token = jnp.minimum(row // G, T - 1)
    seen = b if B > 1 else 0
    tiles = S // TILE if live_ref is None else pl.cdiv(jnp.minimum(live_ref[b], S), TILE)
    each = pl.cdiv(tiles, splits)
    if softcap is None:
        scale = scale * LOG2_E

    def turn(n, carry):
        top, total, y = carry
        slots = pl.ds(n * TILE, TILE)
        slot = n * TILE + iota((rows, TILE), 1)
        score = plgpu.dot(q, k_ref[at, slots, head].T) * scale
        if softcap is not None:
            score = _tanh(score / softcap) * (softcap * LOG2_E)
        score = jnp.where(mask_ref[seen, token, slot] != 0, score, LOWEST)
        higher = jnp.maximum(top, jnp.max(score, axis=1))
        weight = jnp.exp2(score - higher[:, None])
        less = jnp.exp2(top - higher)
        total = total * less + jnp.sum(weight, axis=1)
        y = y * less[:, None] + plgpu.dot(weight.astype(q.dtype), v_ref[at, slots, head])
        return higher, total, y

    start = (
        jnp.full((rows,), LOWEST, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    if sunk:  # one more score, which the first part sees and which has no value
        of_row = jnp.minimum(block * rows + iota((rows,), 0), T * G - 1)
        sink = sinks_ref[head * G + of_row % G] * LOG2_E
        first = x == 0
        start = (
            jnp.where(first, sink, start[0]),
            jnp.where(first, 1.0, start[1]),
            start[2],
        )
    last = jnp.minimum((x + 1) * each, tiles)
    top, total, y = jax.lax.fori_loop(x * each, last, turn, start)
    share = jnp.where(total > 0, total, 1.0) if placed else total  # a part may have no slots
    y_ref[x, head, own] = (y / share[:, None]).astype(y_ref.dtype)
    top_ref[x, head, own] = top
    sum_ref[x, head, own] = total


def _combine(y_ref, top_ref, sum_ref, out_ref, *, G, M):
    """A row's average from those of the parts: weighted by their sums, on one scale."""
    T, head = out_ref.shape[1], pl.program_id(1)
    b, own = pl.program_id(0) // (T * G), pl.program_id(0) % (T * G)
    row = b * M + own
    parts = range(y_ref.shape[0])
    top = [top_ref[x, head, row] for x in parts]
    highest = functools.reduce(jnp.maximum, top)
    weight = [sum_ref[x, head, row] * jnp.exp2(top[x] - highest) for x in parts]
    y = sum(y_ref[x, head, row] * weight[x] for x in parts) / sum(weight)
    out_ref[b, own // G, head * G + own % G] = y.astype(out_ref.dtype)


def tree_attention_triton(
    q_BTNH: jax.Array,
    k_RSKH: jax.Array,
    v_RSKH: jax.Array,
    mask_BTS: jax.Array,
    sinks_N: jax.Array | None = None,
    rows: tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """[B, T, N, H] in q's dtype. `rows`: (the cache row of each sequence, how many of its first
    slots to read), int32 [B]; None: one sequence, which reads all."""
    B, T, N, H = q_BTNH.shape
    S, K = mask_BTS.shape[-1], k_RSKH.shape[2]
    G = N // K
    height, blocks, X = cut(T * G, K, S, B)
    M = height * blocks
    array = jax.ShapeDtypeStruct
    scale = H**-0.5 if scale is None else scale
    more = [] if sinks_N is None else [sinks_N.astype(jnp.float32)]
    if rows is not None:
        row_B, live_B = (a.astype(jnp.int32) for a in rows)
        more = [jnp.clip(row_B, 0, k_RSKH.shape[0] - 1), live_B, *more]
    y_XKMH, top_XKM, sum_XKM = pl.pallas_call(
        functools.partial(
            _kernel,
            rows=height,
            blocks=blocks,
            G=G,
            splits=X,
            scale=scale,
            softcap=softcap,
            placed=rows is not None,
            sunk=sinks_N is not None,
        ),
        out_shape=(
            array((X, K, B * M, H), q_BTNH.dtype if X == 1 else jnp.float32),
            array((X, K, B * M), jnp.float32),
            array((X, K, B * M), jnp.float32),
        ),
        grid=(B * blocks, K, X),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="tree_attention",
    )(q_BTNH, k_RSKH, v_RSKH, mask_BTS.astype(jnp.int8), *more)
    if X == 1:
        y_KBTGH = y_XKMH[0].reshape(K, B, M, H)[:, :, : T * G].reshape(K, B, T, G, H)
        return jnp.moveaxis(y_KBTGH, 0, 2).reshape(B, T, N, H)
    return pl.pallas_call(
        functools.partial(_combine, G=G, M=M),
        out_shape=array((B, T, N, H), q_BTNH.dtype),
        grid=(B * T * G, K),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="tree_attention_parts",
    )(y_XKMH, top_XKM, sum_XKM)
