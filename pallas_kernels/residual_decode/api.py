"""The public function: one specification, and the choice of what computes it."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.device import takes_triton, triton_missing
from pallas_kernels.quantized_matmul import Packed
from pallas_kernels.residual_decode.code import COLUMNS, Residual, check_pair
from pallas_kernels.residual_decode.reference import residual_decode_reference

PART_WEIGHTS = 40_000_000
"""The kernel decodes a larger matrix in parts, so that what a product reads takes 80 MB."""


def why_not(residual: Residual, substitute: Packed) -> str | None:
    """Why the Triton kernel cannot decode this; None where it can.

    Does not ask whether there is a GPU.
    """
    if reason := triton_missing():
        return reason
    if residual.code != "levels":
        return f"code {residual.code}; the kernel decodes levels"
    if substitute.bits == 3:
        return "3 bits, of which the third are apart"
    group, columns = substitute.group, substitute.words
    if group & (group - 1) or not 16 <= group <= 64:
        return f"group {group} is no power of two from 16 to 64"
    if columns % COLUMNS or substitute.columns != columns * substitute.fields:
        return f"{substitute.columns} columns are no multiple of {COLUMNS * substitute.fields}"
    return None


def parts_of(shape: tuple[int, int], fields: int) -> int:
    """How many parts of its columns the kernel decodes a matrix in, for a product that reads one
    after another."""
    parts = 1
    while math.prod(shape) > parts * PART_WEIGHTS and fields % (2 * parts) == 0:
        parts *= 2
    return parts


def parts_here(residual: Residual, substitute: Packed) -> int:
    """`parts_of` this matrix where the kernel decodes it on this device; 1 where XLA does."""
    if takes_triton(None, False, lambda: why_not(residual, substitute)):
        return parts_of(residual.shape, substitute.fields)
    return 1


def residual_decode(
    residual: Residual,
    substitute: Packed,
    implementation: str | None = None,
    part: int = 0,
    parts: int = 1,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The matrix [D, F], bit by bit what was encoded; or number `part` of `parts` equal parts of
    its columns, [D, F / parts].

    Shapes depend on the shapes of the arguments and on `residual.patches` alone. So one compiled
    program serves all layers whose residuals are padded to the same size. `implementation` None
    takes Triton where `why_not` gives no reason and the device is a GPU, else XLA; "triton" raises
    NotImplementedError with the reason. `interpret` runs the kernel on a CPU. Raises ValueError
    where the residual does not belong to a matrix of the substitute's shape.
    """
    check_pair("the residual", substitute, residual.shape, residual.dtype)
    with jax.named_scope("residual_decode"):
        if takes_triton(implementation, interpret, lambda: why_not(residual, substitute)):
            from pallas_kernels.residual_decode.triton import residual_decode_triton

            pattern = residual_decode_triton(residual, substitute, part, parts, interpret)
        else:
            pattern = residual_decode_reference(residual, substitute)
            pattern = jnp.split(pattern, parts, axis=1)[part]
        return jax.lax.bitcast_convert_type(pattern, residual.dtype)
