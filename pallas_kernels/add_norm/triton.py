"""One Triton kernel, a program a row: what counts is latency, so all is read before it is used."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LARGEST = 1024
"""Elements of a row that are read together; blocks have to be powers of two, rows need not."""


def chunk(D: int) -> int:
    """The largest power of two, up to `LARGEST`, that divides a row."""
    return min(LARGEST, D & -D)


def _kernel(x_ref, y_ref, gain_ref, sum_ref, norm_ref, *, eps):
    t, (X, _, D) = pl.program_id(0), y_ref.shape
    parts = [pl.ds(start, chunk(D)) for start in range(0, D, chunk(D))]

    def total(part):
        y = y_ref[0, t, part].astype(jnp.float32)
        for x in range(1, X):
            y += y_ref[x, t, part].astype(jnp.float32)
        return x_ref[t, part] + y.astype(x_ref.dtype)

    sums = [total(part) for part in parts]
    squares = sum(jnp.square(x.astype(jnp.float32)) for x in sums)
    scale = jax.lax.rsqrt(jnp.sum(squares) / D + eps)
    for part, x in zip(parts, sums, strict=True):
        sum_ref[t, part] = x
        scaled = (x.astype(jnp.float32) * scale).astype(x.dtype)
        norm_ref[t, part] = scaled * gain_ref[part]


def add_norm_triton(x_TD, y_XTD, gain_D, eps: float, interpret: bool = False):
    """As `api.add_norm`."""
    T, D = x_TD.shape
    row = jax.ShapeDtypeStruct((T, D), x_TD.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, eps=eps),
        out_shape=(row, row),
        grid=(T,),
        compiler_params=plgpu.CompilerParams(
            num_warps=min(8, max(1, chunk(D) // 64)), num_stages=1
        ),
        interpret=interpret,
        name="add_norm",
    )(x_TD, y_XTD, gain_D)
