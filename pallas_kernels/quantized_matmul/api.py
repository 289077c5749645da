"""The public function: one specification, and the choice of what computes it."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.quantized_matmul.packing import Packed
from pallas_kernels.quantized_matmul.reference import (
    quantized_matmul_by_parts,
    quantized_matmul_reference,
)
from pallas_kernels.quantized_matmul.tiling import Tiling, choose_tiling, why_not_tiling

LARGEST = 128
"""Rows beyond which XLA dequantizes into memory instead, in parts that bound it. The kernel unpacks
the matrix once for 64 rows."""


def why_not(x: jax.Array, w: Packed) -> str | None:
    """Why Triton kernels cannot do this product; None where they can.

    Does not ask whether there is a GPU.
    """
    if reason := device.triton_missing():
        return reason
    rows = math.prod(x.shape[:-1])
    if x.dtype != jnp.bfloat16:
        return f"{x.dtype} rows; the kernels multiply bfloat16"
    if rows > LARGEST:
        return f"{rows} rows; the kernels are for at most {LARGEST}"
    if w.group < 16 or w.group & (w.group - 1) or w.group > 256:
        return f"group {w.group} is no power of two from 16 to 256"
    if w.words_BNSc.size >= 2**29:
        return f"{w.words_BNSc.size} words of 4 bytes, which 32-bit offsets do not reach"
    return None


def _check(x, w: Packed):
    if x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"x {x.shape} does not fit a matrix {w.shape}")
    if not x.size:
        raise ValueError(f"x {x.shape} is empty")


def quantized_matmul(
    x: jax.Array,
    w: Packed,
    *,
    out_dtype: Any = None,
    implementation: str | None = None,
    tiling: Tiling | None = None,
    interpret: bool = False,
    terms: bool = False,
) -> jax.Array:
    """x[..., D] @ (code * step + offset), [..., F]; sums in float32, rounded to `out_dtype` (x's).

    `implementation` None takes Triton where `why_not` gives no reason and the device is a GPU, else
    XLA, for many rows in parts of the matrix; "triton" raises NotImplementedError with the reason.
    `tiling` overrides the tuned one. `interpret` runs the kernel on a CPU. `terms` returns the
    terms before the last sum, [X, ..., F], float32 unless X is 1: for a kernel that adds them.
    Where x is infinite the kernel may give NaN instead of an infinity, because it subtracts a
    common part of the codes after the sum. A NaN in x stays in its row. A scale that is NaN or
    infinite reaches the outputs that share its column of words (`packing.Packed`).
    """
    _check(x, w)
    x_MD, out_dtype = x.reshape(-1, x.shape[-1]), out_dtype or x.dtype
    if device.takes_triton(implementation, interpret, lambda: why_not(x, w)):
        from pallas_kernels.quantized_matmul.triton import quantized_matmul_triton

        if tiling is None:
            tiling = choose_tiling(x_MD.shape[0], w, jax.devices()[0].device_kind)
        elif wrong := why_not_tiling(tiling, w.words_BNSc.shape[1]):
            raise ValueError(wrong)
        y = quantized_matmul_triton(x_MD, w, tiling, interpret, out_dtype, terms)
    else:
        by_parts = implementation is None and device.on_gpu() and x_MD.shape[0] > LARGEST
        y = (quantized_matmul_by_parts if by_parts else quantized_matmul_reference)(
            x_MD, w, out_dtype
        )
        y = y[None] if terms else y
    return y.reshape(*y.shape[:-2], *x.shape[:-1], y.shape[-1])
