"""Low-bit matrices that stand where a plain array stood, in anybody's tree of parameters.

What JAX lets such a thing be: `jnp` functions and the operators of arrays take it through
`__jax_array__`, which dequantizes it where it is used; functions of `jax.lax` take arrays alone
(`dot_general` of this module is the one to hand to layers that ask for one). Its arrays are leaves,
so `jit`, `vmap`, `scan` and `device_put` see them as they see any tree.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llm_jax.int8 import Int8
from llm_jax.linear import linear
from pallas_kernels.quantized_matmul import Packed
from pallas_kernels.quantized_matmul.reference import dequantized

_static = functools.partial(dataclasses.field, metadata=dict(static=True))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LowBitArray:
    """A low-bit matrix [D, F] that has the shape and the dtype of the array it stands for."""

    matrix: Packed | Int8
    """Of D inputs and F outputs. In a stack of layers its arrays have more axes in front."""
    own_shape: tuple[int, ...] = _static()
    """The array's shape, without those of a stack."""
    summed: tuple[int, ...] = _static()
    """The axes of `own_shape` that a product sums over; in this order they are D, all others F."""
    dtype: Any = dataclasses.field(metadata=dict(static=True))

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes of a stack."""
        array, axes = (
            (self.matrix.code_DF, 2)
            if isinstance(self.matrix, Int8)
            else (self.matrix.words_BNSc, 4)
        )
        return array.shape[: array.ndim - axes]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, *self.own_shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the low-bit form."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self.matrix))

    @property
    def outputs(self) -> tuple[int, ...]:
        """The axes of `own_shape` that are F."""
        return tuple(i for i in range(len(self.own_shape)) if i not in self.summed)

    def dense(self) -> jax.Array:
        """The array that this stands for, dequantized."""
        each = functools.partial(_dense, dtype=self.dtype)
        for _ in self.lead:
            each = jax.vmap(each)
        order = (*self.summed, *self.outputs)
        sizes = [self.own_shape[i] for i in order]
        turned = each(self.matrix).reshape(*self.lead, *sizes)
        stack = len(self.lead)
        back = [stack + order.index(i) for i in range(len(order))]
        return jnp.transpose(turned, [*range(stack), *back])

    def __jax_array__(self) -> jax.Array:
        return self.dense()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.dense(), dtype)

    def astype(self, dtype: Any) -> "LowBitArray":
        """The same numbers, dequantized to another dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def __getitem__(self, index: Any) -> Any:
        """Of a stack and one number, that layer, still in its low-bit form; otherwise a part of the
        dequantized array."""
        if index is Ellipsis:
            return self
        if self.lead and not isinstance(index, tuple | slice) and np.ndim(index) == 0:
            return jax.tree.map(lambda a: a[index], self)
        return self.dense()[index]

    @property
    def T(self) -> jax.Array:
        return self.dense().T

    def reshape(self, *shape: Any) -> jax.Array:
        return self.dense().reshape(*shape)

    def __matmul__(self, other: Any) -> jax.Array:
        return self.dense() @ other

    def __rmatmul__(self, x: Any) -> jax.Array:
        """x[..., D] @ this. An NNX variable asks for it; JAX's own arrays ask `__jax_array__`."""
        if self.ndim == 2 and self.summed == (0,):
            return linear(self, x)
        return x @ self.dense()

    def __mul__(self, other: Any) -> jax.Array:
        return self.dense() * other

    __rmul__ = __mul__

    # How Flax Linen takes it for a box around an array (`subspec_jax.linen`).

    def unbox(self) -> jax.Array:
        return self.dense()

    def replace_boxed(self, value: Any) -> Any:
        return value

    def add_axis(self, index: int, params: Any) -> "LowBitArray":
        return self

    def remove_axis(self, index: int, params: Any) -> "LowBitArray":
        return self


def matrix_axes(shape: tuple[int, ...], summed: tuple[int, ...]) -> tuple[int, ...] | None:
    """The summed axes counted from the front; None where they do not make a matrix of the shape."""
    axes = tuple(i % len(shape) if shape else i for i in summed)
    fit = len(set(axes)) == len(axes) and 0 < len(axes) < len(shape)
    return axes if fit else None


def _dense(w: Packed | Int8, dtype: Any) -> jax.Array:
    """The dense matrix [D, F]."""
    if isinstance(w, Int8):
        return (w.code_DF.astype(jnp.float32) * w.scale_F[None]).astype(dtype)
    return dequantized(w, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(w: Packed | Int8, x: jax.Array, out_dtype: Any) -> jax.Array:
    return linear(w, x, out_dtype)


def _forward(w, x, out_dtype):
    return linear(w, x, out_dtype), (w, jnp.zeros(0, x.dtype))


def _backward(out_dtype, kept, g):
    w, like = kept
    no_gradient = lambda a: (
        jnp.zeros_like(a)
        if jnp.issubdtype(a.dtype, jnp.inexact)
        else np.zeros(a.shape, jax.dtypes.float0)
    )
    g = g.astype(like.dtype)
    return jax.tree.map(no_gradient, w), linear(_dense(w, like.dtype).T, g)


_product.defvjp(_forward, _backward)


@linear.register
def _(w: LowBitArray, x, out_dtype=None):
    return _product(w.matrix, x, out_dtype)


def dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> jax.Array:
    """`jax.lax.dot_general`, whose right operand may be a `LowBitArray`.

    Where the product sums over just the array's `summed` axes, the low-bit matrix is multiplied as
    it is, with the kernel where there is one; otherwise it is dequantized first. The gradient with
    respect to the left operand is that of the dequantized matrix, and that with respect to the
    low-bit numbers is zero. For the parameter `dot_general` of Flax's layers; `options` are those
    of `jax.lax.dot_general`.
    """
    given = dict(precision=precision, preferred_element_type=preferred_element_type, **options)
    if not isinstance(rhs, LowBitArray):
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, **given)
    (left, right), (batch, _) = dimension_numbers
    left, right = ([int(i) for i in axes] for axes in (left, right))
    if batch or rhs.lead or sorted(right) != sorted(rhs.summed):
        return jax.lax.dot_general(lhs, rhs.dense(), dimension_numbers, **given)
    ordered = [left[right.index(i)] for i in rhs.summed]
    x = jnp.moveaxis(lhs, ordered, range(lhs.ndim - len(ordered), lhs.ndim))
    free = x.shape[: x.ndim - len(ordered)]
    y = _product(rhs.matrix, x.reshape(*free, -1), preferred_element_type)
    return y.reshape(*free, *(rhs.own_shape[i] for i in rhs.outputs))
