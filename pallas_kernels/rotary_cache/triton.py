"""One Triton kernel: a program takes one head of one token, its lower and its upper half."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def _kernel(*refs, heads, kv_heads, biased):
    y_ref, *refs = refs
    bias_ref = refs.pop(0) if biased else None
    cos_ref, sin_ref, at_ref, _, _, q_ref, k_ref, v_ref = refs
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

    def store(ref, row, head):
        for half, value in zip(halves, turned, strict=True):
            ref[row, head, half] = value.astype(ref.dtype)

    slot = at_ref[0] + t
    pl.when(n < heads)(lambda: store(q_ref, t, n))
    pl.when((n >= heads) & ~values)(lambda: store(k_ref, slot, n - heads))
    pl.when(values)(lambda: store(v_ref, slot, n - heads - kv_heads))


def rotary_cache_triton(
    y_XTF: jax.Array,
    bias_F: jax.Array | None,
    cos_Th: jax.Array,
    sin_Th: jax.Array,
    k_SKH: jax.Array,
    v_SKH: jax.Array,
    at: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `api.rotary_cache`; the caches are written in place."""
    (T, h), (_, K, H) = cos_Th.shape, k_SKH.shape
    N = y_XTF.shape[2] // H - 2 * K
    bias = [] if bias_F is None else [bias_F]
    inputs = y_XTF, *bias, cos_Th, sin_Th, at.reshape(1).astype(jnp.int32), k_SKH, v_SKH
    array = jax.ShapeDtypeStruct
    return pl.pallas_call(
        functools.partial(_kernel, heads=N, kv_heads=K, biased=bool(bias)),
        out_shape=(
            array((T, N, H), k_SKH.dtype),
            array(k_SKH.shape, k_SKH.dtype),
            array(v_SKH.shape, v_SKH.dtype),
        ),
        grid=(N + 2 * K, T),
        input_output_aliases={len(inputs) - 2: 1, len(inputs) - 1: 2},
        compiler_params=plgpu.CompilerParams(num_warps=max(1, h // 32), num_stages=1),
        interpret=interpret,
        name="rotary_cache",
    )(*inputs)
