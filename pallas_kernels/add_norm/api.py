"""The public function: one specification, and the choice of what computes it."""

import jax
import jax.numpy as jnp

from pallas_kernels.add_norm.reference import add_norm_reference
from pallas_kernels.add_norm.triton import add_norm_triton, chunk
from pallas_kernels.device import on_gpu

IMPLEMENTATIONS = ("xla", "triton")


def why_not(x_TD, y_XTD) -> str | None:
    """Why the Triton kernel cannot do this; None where it can. Not asked: is there a GPU?"""
    if x_TD.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{x_TD.dtype} rows; the kernel takes 16 bits"
    if x_TD.shape[0] > 64:
        return f"{x_TD.shape[0]} rows; the kernel is for at most 64"
    if y_XTD.shape[0] > 64:
        return f"{y_XTD.shape[0]} terms; the kernel adds at most 64"
    D = x_TD.shape[1]
    if D > 16384 or D // chunk(D) > 32:
        return f"rows of {D}, which are no 32 or fewer equal powers of two, 16384 in all"
    return None


def add_norm(
    x_TD: jax.Array,
    y_XTD: jax.Array,
    gain_D: jax.Array,
    eps: float,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(x + y, its root-mean-square norm times the gain), both [T, D] and of x's dtype.

    `y_XTD` are X terms of a product, which are added in float32; like a product's, their sum is
    rounded to x's dtype before x is added. `implementation` None takes Triton on a GPU where
    `why_not` gives no reason, else XLA; "triton" raises NotImplementedError with the reason.
    `interpret` runs the kernel on a CPU. The kernel has no derivative.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation is {implementation!r}; one of {IMPLEMENTATIONS} or None")
    if y_XTD.ndim != 3 or y_XTD.shape[1:] != x_TD.shape or gain_D.shape != x_TD.shape[1:]:
        raise ValueError(f"rows {x_TD.shape}, terms {y_XTD.shape}, gain {gain_D.shape} do not fit")
    if implementation != "xla" and (implementation or interpret or on_gpu()):
        reason = why_not(x_TD, y_XTD)
        if reason is None:
            return add_norm_triton(x_TD, y_XTD, gain_D, eps, interpret)
        if implementation == "triton":
            raise NotImplementedError(reason)
    return add_norm_reference(x_TD, y_XTD, gain_D, eps)
