"""The public function: one specification, and the choice of what computes it."""

import jax
import jax.numpy as jnp

from pallas_kernels.device import takes_triton, triton_missing
from pallas_kernels.rotary_cache.reference import rotary_cache_reference


def why_not(y_XTF: jax.Array, k_RSKH: jax.Array, v_RSKH: jax.Array) -> str | None:
    """Why the Triton kernel cannot do this; None where it can.

    Does not ask whether there is a GPU.
    """
    if reason := triton_missing():
        return reason
    H = k_RSKH.shape[-1]
    if k_RSKH.dtype not in (jnp.bfloat16, jnp.float16) or v_RSKH.dtype != k_RSKH.dtype:
        return f"a cache of {k_RSKH.dtype} and {v_RSKH.dtype}; the kernel takes 16 bits"
    if v_RSKH.shape != k_RSKH.shape:
        return f"values {v_RSKH.shape} unlike keys {k_RSKH.shape}"
    if H not in (32, 64, 128, 256):
        return f"heads of {H}; the kernel takes 32, 64, 128 and 256"
    if y_XTF.shape[0] > 64:
        return f"{y_XTF.shape[0]} terms; the kernel adds at most 64"
    return None


def rotary_cache(
    y_XTF: jax.Array,
    bias_F: jax.Array | None,
    cos_Th: jax.Array,
    sin_Th: jax.Array,
    k_RSKH: jax.Array,
    v_RSKH: jax.Array,
    place: tuple[jax.Array, jax.Array],
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(q_TNH, k_RSKH, v_RSKH): the rotated queries of T tokens, and the caches with their rotated
    keys and their values.

    `y_XTF` are X terms of the product with q, k and v side by side, F = (N + 2 K) H; they are added
    in float32, with the bias. Pairs (i, i + H/2) of q and k are rotated; `cos_Th` and
    `sin_Th` are cosine and sine of their angles, h = H/2, float32. `place` is the row and the slot
    of each token in the caches, int32 [T], not negative; a token whose place does not exist is not
    written, and no two have the same one. `implementation` None takes Triton on a GPU where
    `why_not` gives no reason, else XLA; "triton" raises NotImplementedError with the reason.
    `interpret` runs the kernel on a CPU.
    """
    (_, T, F), (K, H) = y_XTF.shape, k_RSKH.shape[2:]
    if F % H or F // H <= 2 * K or cos_Th.shape != (T, H // 2) or sin_Th.shape != (T, H // 2):
        raise ValueError(
            f"products {y_XTF.shape}, angles {cos_Th.shape} and keys {k_RSKH.shape} do not fit"
        )
    arguments = y_XTF, bias_F, cos_Th, sin_Th, k_RSKH, v_RSKH, place
    if takes_triton(implementation, interpret, lambda: why_not(y_XTF, k_RSKH, v_RSKH)):
        from pallas_kernels.rotary_cache.triton import rotary_cache_triton

        return rotary_cache_triton(*arguments, interpret)
    return rotary_cache_reference(*arguments)
