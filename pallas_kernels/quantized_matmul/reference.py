"""The product in plain jnp: the specification."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.packing import Packed, restore


def dequantized(w: Packed, dtype=jnp.float32) -> jax.Array:
    """The dense matrix [D, F]: float32 arithmetic, rounded once to `dtype`."""
    codes, step, offset = (a.astype(jnp.float32) for a in restore(w))
    dense = codes * step[:, None] + offset[:, None]
    return dense.reshape(w.shape).astype(dtype)


def quantized_matmul_reference(x_MD, w: Packed, out_dtype=None) -> jax.Array:
    """x @ dequantized(w), [M, F] in `out_dtype` (x's)."""
    # The barrier ties the words to x, which changes in a loop: without it a compiler may move the
    # dequantization out of the loop and keep every dense matrix alive.
    x, w = jax.lax.optimization_barrier((x_MD, w))
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, dequantized(w, x.dtype), precision=exact, preferred_element_type=out_dtype)
