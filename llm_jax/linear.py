"""`linear(w, x)`: an open function, dispatched on the type of the weight, and others like it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass


def precision(dtype) -> jax.lax.Precision | None:
    """HIGHEST for float32, whose products a GPU would otherwise round to TF32; None for 16 bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


@functools.singledispatch
def linear(w_DF, x, out_dtype=None):
    """x[..., D] times a weight of any kind, [..., F]. The default kind is a plain array [D, F].

    The result has x's dtype, or `out_dtype` without being rounded to x's before.
    """
    options = dict(precision=precision(x.dtype), preferred_element_type=out_dtype)
    return jnp.matmul(x, w_DF, **options)


@functools.singledispatch
def terms(w, x):
    """[X, ..., F] that add up to `linear(w, x)`, for a kernel that can add as it reads; one term,
    in x's dtype, unless a kind of weight comes by its products in parts."""
    return linear(w, x)[None]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """A product that is still to be added up, y_XBTF; as `terms` gives it, X > 1."""

    y_XBTF: jax.Array


def unsummed(w, x) -> jax.Array | Terms:
    """`linear(w, x)`, or what is to be added to get it, for `llm_jax.attention.add_norm`."""
    y = terms(w, x)
    return y[0] if len(y) == 1 else Terms(y)


def summed(y: jax.Array | Terms, dtype) -> jax.Array:
    """What `unsummed` gave, added up; `dtype` is that of the rows that were multiplied."""
    return y if not isinstance(y, Terms) else y.y_XBTF.sum(0).astype(dtype)


@functools.singledispatch
def lookup(table_VD, tokens):
    """Rows of an embedding table of any kind: tokens[...] -> [..., D]."""
    return table_VD[tokens]
