"""`linear(w, x)`: an open function, dispatched on the type of the weight, and others like it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.precision import precision


@functools.singledispatch
def linear(w_DF: Any, x: jax.Array, out_dtype: Any = None) -> jax.Array:
    """x[..., D] times a weight of any kind, [..., F]. The default kind is a plain array [D, F].

    The result has x's dtype, or `out_dtype` without being rounded to x's before.
    """
    options = dict(precision=precision(x.dtype), preferred_element_type=out_dtype)
    return jnp.matmul(x, w_DF, **options)


@functools.singledispatch
def terms(w: Any, x: jax.Array) -> jax.Array:
    """[X, ..., F] that add up to `linear(w, x)`, for a kernel that can add as it reads; one term,
    in x's dtype, unless a kind of weight comes by its products in parts."""
    return linear(w, x)[None]


@functools.singledispatch
def embedding_rows(table_VD: Any, tokens: jax.Array) -> jax.Array:
    """Rows of an embedding table of any kind: tokens[...] -> [..., D]."""
    return table_VD[tokens]
