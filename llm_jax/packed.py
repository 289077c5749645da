"""Low-bit matrices in the form that the fused kernels read, as one more kind of `linear`."""

import jax.numpy as jnp

from llm_jax.linear import linear
from llm_jax.quantize import Quantized, unpack
from pallas_kernels.quantized_matmul import Packed, quantized_matmul, repack


def packed(*matrices: Quantized) -> Packed:
    """The matrices [D, F], [D, F'] ... joined along their outputs, [D, F + F' + ...].

    Done once at load: one product then gives what several gave, in order. For q, k and v:
    q, k, v = jnp.split(linear(packed(q, k, v), x), (F_q, F_q + F_k), axis=-1).
    """
    kinds = {(w.shape[0], w.bits, w.group) for w in matrices}
    if len(kinds) != 1:
        raise ValueError(f"matrices of different (inputs, bits, group) do not join: {kinds}")
    join = lambda parts: jnp.concatenate(list(parts), axis=-1)
    return repack(
        join(unpack(w) for w in matrices),
        join(w.step_QF for w in matrices),
        join(w.offset_QF for w in matrices),
        matrices[0].bits,
    )


@linear.register
def _(w: Packed, x):
    return quantized_matmul(x, w)
