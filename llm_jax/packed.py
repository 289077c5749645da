"""Low-bit matrices as the kernels read them: one more kind of weight for `linear`."""

import jax
import jax.numpy as jnp

from llm_jax import LLMError
from llm_jax.linear import linear, terms
from llm_jax.quantize import Quantized, codes_of
from pallas_kernels.quantized_matmul import Packed, quantized_matmul, repack


def joined_quantized(*matrices: Quantized) -> Quantized:
    """The matrices [D, F], [D, F'] ... side by side, [D, F + F' + ...]."""
    kinds = {(w.shape[0], w.bits, w.group) for w in matrices}
    if len(kinds) != 1:
        raise LLMError(f"matrices of different (inputs, bits, group) do not join: {kinds}")
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *matrices)


@jax.jit
def packed(*matrices: Quantized) -> Packed:
    """The matrices joined along their outputs, as the kernels read them.

    Done once, at load. One product then gives the results of several, side by side. For q, k and v:
    q, k, v = jnp.split(linear(packed(q, k, v), x), (F_q, F_q + F_k), axis=-1).
    """
    w = joined_quantized(*matrices)
    return repack(codes_of(w), w.step_QF, w.offset_QF, w.bits)


@linear.register
def _(w: Packed, x, out_dtype=None):
    return quantized_matmul(x, w, out_dtype=out_dtype)


@terms.register
def _(w: Packed, x):
    return quantized_matmul(x, w, terms=True)
