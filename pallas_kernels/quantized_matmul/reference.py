"""The product in plain jnp: the specification."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.precision import precision
from pallas_kernels.quantized_matmul.packing import BLOCK_WORDS, Packed, codes, scales

DENSE_WEIGHTS = 40_000_000
"""Weights that are dense at a time where many rows are multiplied: 80 MB."""


def dequantized(w: Packed, dtype: Any = jnp.float32) -> jax.Array:
    """The dense matrix [D, F]: float32 arithmetic, rounded once to `dtype`."""
    return _dense_FD(w, dtype).T


def _dense_FD(w: Packed, dtype) -> jax.Array:
    # With the inputs last nothing is transposed but the order of blocks.
    step, offset = (v.astype(jnp.float32)[..., None] for v in scales(w))
    codes_FQg = codes(w).reshape(w.columns, -1, w.group).astype(jnp.float32)
    return (codes_FQg * step + offset).reshape(w.columns, -1).astype(dtype)


def quantized_matmul_reference(x_MD: jax.Array, w: Packed, out_dtype: Any = None) -> jax.Array:
    """x @ dequantized(w), [M, F] in `out_dtype` (x's)."""
    # The barrier ties the words to x, which changes in a loop. Without it a compiler may move the
    # dequantization out of the loop and keep every dense matrix.
    x, w = jax.lax.optimization_barrier((x_MD, w))
    exact = precision(x.dtype)
    return jnp.einsum(
        "MD,FD->MF", x, _dense_FD(w, x.dtype), precision=exact, preferred_element_type=out_dtype
    )


def quantized_matmul_by_parts(x_MD: jax.Array, w: Packed, out_dtype: Any = None) -> jax.Array:
    """The same, with some blocks of the matrix dense at a time, one part after another."""
    (M, D), B, F = x_MD.shape, w.words_BNSc.shape[0], w.shape[1]
    each = max(1, DENSE_WEIGHTS // (D * BLOCK_WORDS * w.fields))
    y_MiS = jnp.zeros((M, w.fields, w.words), out_dtype or x_MD.dtype)
    for b in range(0, B, each):
        w, x_MD, y_MiS = jax.lax.optimization_barrier((w, x_MD, y_MiS))
        some = jax.tree.map(lambda a, b=b: a[b : b + each], w)
        some = dataclasses.replace(some, columns=some.words * w.fields)
        y = quantized_matmul_reference(x_MD, some, y_MiS.dtype).reshape(M, w.fields, some.words)
        y_MiS = jax.lax.dynamic_update_slice_in_dim(y_MiS, y, b * BLOCK_WORDS, axis=2)
    return y_MiS.reshape(M, -1)[:, :F]
