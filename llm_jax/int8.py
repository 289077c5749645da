"""8-bit matrices with a scale for each output: a CPU multiplies them in whole numbers.

Rows are rounded to 8 bits, too, each with a scale of its own, so one product of int8 numbers with
int32 sums is all there is to do. A CPU takes 0.1 ns a weight for it, where unpacking 4 bits takes 1
(two cores, few rows). Both roundings cost accuracy: this is for a draft, which only guesses.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llm_jax.linear import linear

LARGEST = 127


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A matrix [D, F], w = code * scale of its output."""

    code_DF: jax.Array
    """int8; `int8` gives -127 to 127."""
    scale_F: jax.Array
    """float32."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.code_DF.shape

    @property
    def ndim(self) -> int:
        return 2


def _rounded(a: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """(codes int8, scales) of each row or column; zeros where it is all zero."""
    a = a.astype(jnp.float32)
    scale = jnp.max(jnp.abs(a), axis=axis, keepdims=True) / LARGEST
    scale = jnp.where(scale == 0, 1.0, scale)
    return jnp.round(a / scale).astype(jnp.int8), jnp.squeeze(scale, axis)


@jax.jit
def int8(w_DF: jax.Array) -> Int8:
    """The nearest numbers of each output, whose largest weight becomes 127."""
    return Int8(*_rounded(w_DF, 0))


@linear.register
def _(w: Int8, x, out_dtype=None):
    code_XD, scale_X = _rounded(x.reshape(-1, x.shape[-1]), -1)
    X = len(code_XD)
    # XLA's CPU takes 3 ns a weight for one row, and 0.1 for two.
    code_XD = jnp.pad(code_XD, ((0, 2 - X), (0, 0))) if X == 1 else code_XD
    contract = (((1,), (0,)), ((), ()))
    sums_XF = jax.lax.dot_general(code_XD, w.code_DF, contract, preferred_element_type=jnp.int32)[
        :X
    ]
    y_XF = sums_XF.astype(jnp.float32) * scale_X[:, None] * w.scale_F[None]
    return y_XF.reshape(*x.shape[:-1], -1).astype(out_dtype or x.dtype)
