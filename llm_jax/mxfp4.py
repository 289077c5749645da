"""MXFP4 matrices in their own form: 4.25 bits a weight, as gpt-oss is published.

Groups of 32 inputs of one output share a power of two; a weight is one of 0, 0.5, 1, 1.5, 2, 3, 4
and 6 times it, or the negative of one (OCP Microscaling Formats 1.0). All of them are bfloat16
numbers, so the dense matrix is exact.

Letters: D inputs, F outputs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llm_jax.linear import linear

GROUP = 32
BIAS = 127
"""A scale byte s means 2 ** (s - 127)."""
_HALVES = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice the value of codes 0 to 7; codes 8 to 15 are their negatives."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """A matrix [D, F] of four-bit floats."""

    codes_pF: jax.Array
    """uint8 [D / 2, F]: the code of the even input in the lower half of a byte."""
    scale_QF: jax.Array
    """uint8 [D / 32, F]."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes_pF.shape[0] * 2, self.codes_pF.shape[1]

    @property
    def ndim(self) -> int:
        return 2


def mxfp4_bytes(shape: tuple[int, int]) -> int:
    """Bytes of a matrix [D, F] in this form."""
    D, F = shape
    return D * F // 2 + D // GROUP * F


def encode(w_DF: jax.Array) -> Mxfp4:
    """The matrix in this form: exactly, if its numbers have it; otherwise the nearest codes.

    A group's scale is that of its largest number, which becomes 4 or 6.
    """
    D, F = w_DF.shape
    w = w_DF.astype(jnp.float32).reshape(D // GROUP, GROUP, F)
    largest = jnp.max(jnp.abs(w), axis=1, keepdims=True)
    _, power = jnp.frexp(largest)  # largest = m 2 ** power, m in [0.5, 1)
    power = jnp.where(largest > 0, power - 3, -BIAS)
    halves = jnp.abs(w) * jnp.exp2(1.0 - power.astype(jnp.float32))
    known = jnp.asarray(_HALVES, jnp.float32)
    middle = (known[1:] + known[:-1]) / 2
    code = jnp.sum(halves[..., None] > middle[None, None, None], axis=-1).astype(jnp.uint8)
    code = jnp.where(w < 0, code | 8, code).reshape(D // 2, 2, F)
    return Mxfp4(code[:, 0] | code[:, 1] << 4, (power[:, 0] + BIAS).astype(jnp.uint8))


def dense(w: Mxfp4, dtype: Any = jnp.float32) -> jax.Array:
    """The matrix [D, F]; exact in float32 and bfloat16."""
    D, F = w.shape
    code = jnp.stack([w.codes_pF & 15, w.codes_pF >> 4], axis=1).reshape(D // GROUP, GROUP, F)
    # Of codes 2 to 7 the halves are (2 + lowest bit) << (exponent - 1); 0 and 1 are themselves.
    low, exponent = (code & 1).astype(jnp.int32), (code >> 1 & 3).astype(jnp.int32)
    halves = jnp.where(exponent == 0, low, (2 + low) << jnp.maximum(exponent - 1, 0))
    value = halves.astype(jnp.float32) * jnp.where(code > 7, -0.5, 0.5)
    power = w.scale_QF.astype(jnp.int32)[:, None] - BIAS
    return jnp.ldexp(value, power).astype(dtype).reshape(D, F)


@linear.register
def _(w: Mxfp4, x, out_dtype=None):
    return linear(dense(w, x.dtype), x, out_dtype)
