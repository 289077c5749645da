"""Group-wise low-bit weights: packing, and the half-quadratic (HQQ) and nearest quantizers.

A matrix [D, F] is cut along D into groups of `group` consecutive inputs of one output; a group has
a step and an offset, w = code * step + offset. HQQ's float zero point is z = -offset / step. The
product code * step is exact in float32 (8 bits x 8 bits), so the sum is rounded once. The value
does not depend on whether a compiler fuses multiply and add.

Letters: D inputs, F outputs, Q groups (D = Q * group), p packed rows of a group.
"""

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llm_jax import LLMError
from llm_jax.linear import embedding_rows, linear
from pallas_kernels.bit_fields import pack_codes, unpack_codes
from pallas_kernels.quantized_matmul.packing import BITS

_static = functools.partial(dataclasses.field, metadata=dict(static=True))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A low-bit matrix [D, F]. With 4 bits in groups of 64 it takes 4.5 bits a weight."""

    codes_QpF: jax.Array
    """uint8: the codes of each group, packed along the inputs (`pallas_kernels.bit_fields`)."""
    step_QF: jax.Array
    """bfloat16, which unlike float16 cannot underflow on the tiny groups real checkpoints have."""
    offset_QF: jax.Array
    """bfloat16: the value of code 0."""
    bits: int = _static()
    group: int = _static()

    @property
    def shape(self) -> tuple[int, int]:
        return self.step_QF.shape[0] * self.group, self.step_QF.shape[1]

    @property
    def ndim(self) -> int:
        return 2


def quantized_bytes(rows: int, columns: int, bits: int, group: int) -> int:
    """Bytes that `quantize` of a [rows, columns] matrix takes."""
    return rows * columns * bits // 8 + 2 * 2 * (rows // group) * columns


def codes_of(w: Quantized, array_module: ModuleType = jnp) -> Any:
    """The codes, uint8 [Q, group, F]; with array_module=numpy as a NumPy array."""
    return unpack_codes(w.codes_QpF, w.bits, w.group, 1, array_module)


def dequantize(w: Quantized, dtype: Any = jnp.float32) -> jax.Array:
    """The dense matrix [D, F]: float32 arithmetic, rounded once to `dtype`."""
    with jax.named_scope("dequantize"):
        step, offset = (v.astype(jnp.float32)[:, None] for v in (w.step_QF, w.offset_QF))
        dense = codes_of(w).astype(jnp.float32) * step + offset
        return dense.astype(dtype).reshape(w.shape)


@linear.register
def _(w: Quantized, x, out_dtype=None):
    # The barrier ties the codes to x, which changes in a loop. Without it a compiler may move the
    # dequantization out of the loop and keep every dense matrix.
    codes, x = jax.lax.optimization_barrier((w.codes_QpF, x))
    return linear(dequantize(dataclasses.replace(w, codes_QpF=codes), x.dtype), x, out_dtype)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTable:
    """A low-bit embedding table [V, D], grouped along D; `embedding_rows` dequantizes rows."""

    rows_DV: Quantized

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows_DV.shape[::-1]


@embedding_rows.register
def _(table: QuantizedTable, tokens):
    w, flat = table.rows_DV, tokens.reshape(-1)
    take = lambda a: jnp.take(a, flat, axis=-1)
    columns = Quantized(take(w.codes_QpF), take(w.step_QF), take(w.offset_QF), w.bits, w.group)
    return dequantize(columns).T.reshape(*tokens.shape, -1)


def check_grouping(name: str, rows: int, bits: int, group: int) -> None:
    """Raises LLMError where a matrix with `rows` inputs cannot be quantized this way."""
    if bits not in BITS:
        raise LLMError(f"{bits} bits a weight are not supported; choose one of {BITS}")
    if group < 8 or group % 8:
        raise LLMError(f"group size {group} cannot be packed; it must be a multiple of 8")
    if rows % group:
        fits = [g for g in (128, 64, 32, 16, 8) if rows % g == 0]
        raise LLMError(
            f"{name} has {rows} inputs, not a multiple of group {group}; these fit: {fits}"
        )


def quantize(w_DF: jax.Array, bits: int = 4, group: int = 64, iterations: int = 20) -> Quantized:
    """The matrix in groups of low-bit codes; needs no data.

    HQQ (half-quadratic quantization, Badri & Shaji 2023): the step covers the range of the group;
    the zero point is improved by alternating a shrinkage of the error towards sparsity
    (|e|^0.7 norm) with a least-squares zero, and the best zero of each group, by mean absolute
    error, is kept. `iterations=0` is plain round-to-nearest. Columns are done in blocks, so that
    the work space stays near 100 MB whatever the matrix. Runs on the array's own device.
    """
    check_grouping("the matrix", w_DF.shape[0], bits, group)
    return _quantize(w_DF, bits, group, iterations)


@functools.partial(jax.jit, static_argnames=("bits", "group", "iterations"))
def _quantize(w_DF, bits, group, iterations):
    D, F = w_DF.shape
    fitting = max(1, 2**22 // D)
    block = max(c for c in range(1, min(F, fitting) + 1) if F % c == 0)

    def one(start):
        w_Dc = jax.lax.dynamic_slice_in_dim(w_DF, start, block, axis=1)
        w_Qgc = w_Dc.astype(jnp.float32).reshape(D // group, group, block)
        step, offset = _affine(w_Qgc, bits, iterations)
        step, offset = step.astype(jnp.bfloat16), offset.astype(jnp.bfloat16)
        codes = _encode(w_Qgc, step.astype(jnp.float32), offset.astype(jnp.float32), bits)
        return pack_codes(codes.astype(jnp.uint8), bits, 1), step[:, 0], offset[:, 0]

    parts = jax.lax.map(one, jnp.arange(0, F, block))
    whole = lambda part_n: jnp.moveaxis(part_n, 0, -2).reshape(*part_n.shape[1:-1], F)
    return Quantized(*(whole(part) for part in parts), bits, group)


def _encode(w, step, offset, bits):
    return jnp.clip(jnp.round((w - offset) / step), 0, 2**bits - 1)


def _affine(w_Qgc, bits, iterations):
    """Step and offset of each group, [Q, 1, c]."""
    low, high = w_Qgc.min(1, keepdims=True), w_Qgc.max(1, keepdims=True)
    # A constant group has no range: its step is 1/256 of its size. An all-zero one takes any step.
    floor = jnp.maximum(jnp.maximum(jnp.abs(low), jnp.abs(high)) / 256, 1e-30)
    step = jnp.maximum((high - low) / (2**bits - 1), floor)
    step = step.astype(jnp.bfloat16).astype(jnp.float32)
    zero = jnp.round(-low / step)

    def error(zero):
        q = _encode(w_Qgc, step, -zero * step, bits)
        e = w_Qgc - (q - zero) * step
        return jnp.mean(jnp.abs(e), 1, keepdims=True), q, e

    def body(i, carry):
        zero, best_zero, best = carry
        loss, q, e = error(zero)
        best_zero = jnp.where(loss < best, zero, best_zero)
        beta = 10.0 * 1.01 ** i.astype(jnp.float32)
        sparse = jnp.sign(e) * jax.nn.relu(jnp.abs(e) - jnp.abs(e) ** -0.3 / beta)
        zero = jnp.mean(q - (w_Qgc - sparse) / step, 1, keepdims=True)
        return zero, best_zero, jnp.minimum(loss, best)

    start = (zero, zero, jnp.full_like(zero, jnp.inf))
    last, zero, best = jax.lax.fori_loop(0, iterations, body, start)
    zero = jnp.where(error(last)[0] < best, last, zero)
    return step, -zero * step
