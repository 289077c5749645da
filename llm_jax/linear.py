"""`linear(w, x)` and its like: open functions that dispatch on the type of the weight."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.precision import precision


@functools.singledispatch
def linear(w_DF: Any, x: jax.Array, out_dtype: Any = None) -> jax.Array:
    """x[..., D] times a weight of any kind, [..., F]. The default kind is a plain array [D, F].

    The result has x's dtype, or `out_dtype`; then it is not rounded to x's dtype first.
    """
    options = dict(precision=precision(x.dtype), preferred_element_type=out_dtype)
    return jnp.matmul(x, w_DF, **options)


@functools.singledispatch
def terms(w: Any, x: jax.Array) -> jax.Array:
    """[X, ..., F] whose sum over X is `linear(w, x)`, for a kernel that adds while it reads. One
    term in x's dtype, unless a kind of weight computes its products in parts."""
    return linear(w, x)[None]


@functools.singledispatch
def embedding_rows(table_VD: Any, tokens: jax.Array) -> jax.Array:
    """Rows of an embedding table of any kind: tokens[...] -> [..., D]."""
    return table_VD[tokens]
