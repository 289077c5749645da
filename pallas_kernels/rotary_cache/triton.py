"""One Triton kernel: a program takes one head of one token, its lower and its upper half."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def _kernel(*refs, heads, kv_heads, biased):
    y_ref, *refs = refs
    bias_ref = refs.pop(0) if biased else None
    cos_ref, sin_ref, row_ref, slot_ref, _, _, q_ref, k_ref, v_ref = refs
    n, t = pl.program_id(0), pl.program_id(1)
    h = cos_ref.shape[1]
    halves = pl.ds(0, h), pl.ds(h, h)

    def total(half):
        columns = pl.ds(2 * n * h + half * h, h)
        value = jnp.zeros((h,), jnp.float32)
        for x in range(y_ref.shape[0]):
            value += y_ref[x, t, columns].astype(jnp.float32)
        return value if bias_ref is None else value + bias_ref[columns].astype(jnp.float32)

    a, b, values = total(0), total(1), n >= heads + kv_heads
    cos, sin = jnp.where(values, 1.0, cos_ref[t]), jnp.where(values, 0.0, sin_ref[t])
    turned = a * cos - b * sin, b * cos + a * sin

    def store(ref, *at):
        for half, value in zip(halves, turned, strict=True):
            ref[(*at, half)] = value.astype(ref.dtype)

    row, slot = row_ref[t], slot_ref[t]
    there = (row < k_ref.shape[0]) & (slot < k_ref.shape[1])
    pl.when(n < heads)(lambda: store(q_ref, t, n))
    pl.when((n >= heads) & ~values & there)(lambda: store(k_ref, row, slot, n - heads))
    pl.when(values & there)(lambda: store(v_ref, row, slot, n - heads - kv_heads))


def rotary_cache_triton(
    y_XTF: jax.Array,
    bias_F: jax.Array | None,
    cos_Th: jax.Array,
    sin_Th: jax.Array,
    k_RSKH: jax.Array,
    v_RSKH: jax.Array,
    place: tuple[jax.Array, jax.Array],
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `api.rotary_cache`; the caches are written in place."""
    (T, h), (K, H) = cos_Th.shape, k_RSKH.shape[2:]
    N = y_XTF.shape[2] // H - 2 * K
    bias = [] if bias_F is None else [bias_F]
    inputs = y_XTF, *bias, cos_Th, sin_Th, *(a.astype(jnp.int32) for a in place), k_RSKH, v_RSKH
    array = jax.ShapeDtypeStruct
    return pl.pallas_call(
        functools.partial(_kernel, heads=N, kv_heads=K, biased=bool(bias)),
        out_shape=(
            array((T, N, H), k_RSKH.dtype),
            array(k_RSKH.shape, k_RSKH.dtype),
            array(v_RSKH.shape, v_RSKH.dtype),
        ),
        grid=(N + 2 * K, T),
        input_output_aliases={len(inputs) - 2: 1, len(inputs) - 1: 2},
        compiler_params=plgpu.CompilerParams(num_warps=max(1, h // 32), num_stages=1),
        interpret=interpret,
        name="rotary_cache",
    )(*inputs)
