"""The public function: one specification, and the choice of what computes it."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.device import takes_triton, triton_missing
from pallas_kernels.tree_attention.reference import tree_attention_reference
from pallas_kernels.tree_attention.tiles import TILE

HEADS = (32, 64, 128)
"""Head sizes the kernel takes."""


def why_not(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKX: jax.Array,
    mask_BTS: jax.Array,
    rows: tuple[jax.Array, jax.Array] | None = None,
) -> str | None:
    """Why the Triton kernel cannot do this attention; None where it can.

    Does not ask whether there is a GPU.
    """
    if reason := triton_missing():
        return reason
    B, _, _, H = q_BTNH.shape
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16) or k_BSKH.dtype != q_BTNH.dtype:
        return f"{q_BTNH.dtype} queries and {k_BSKH.dtype} keys; the kernel takes 16 bits"
    if rows is None and (B != 1 or mask_BTS.shape[0] != 1):
        return f"a batch of {B} without the rows of its caches"
    if v_BSKX.shape != k_BSKH.shape:
        return f"values {v_BSKX.shape} unlike keys {k_BSKH.shape}"
    if H not in HEADS:
        return f"heads of {H}; the kernel takes 32, 64 and 128"
    if (L := mask_BTS.shape[-1]) % TILE:
        return f"{L} slots, no multiple of {TILE}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _kernel(q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N, rows, how):
    from pallas_kernels.tree_attention.triton import tree_attention_triton

    return tree_attention_triton(q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N, rows, *how)


def _forward(q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N, rows, how):
    y_BTNH = _kernel(q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N, rows, how)
    return y_BTNH, (q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N, rows)


def _backward(how, kept, dy_BTNH):
    q, k, v, mask_BTS, sinks_N, rows = kept
    scale, softcap, _ = how
    attend = lambda q, k, v, sinks: tree_attention_reference(
        q, k, v, mask_BTS, sinks, scale, softcap, rows
    )
    _, pull = jax.vjp(attend, q, k, v, sinks_N)
    dq, dk, dv, dsinks = pull(dy_BTNH)
    return dq, dk, dv, None, dsinks, None


_kernel.defvjp(_forward, _backward)


def tree_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKX: jax.Array,
    mask_BTS: jax.Array,
    *,
    sinks_N: jax.Array | None = None,
    rows: tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k * scale) v over the slots the mask allows, [B, T, N, X], in q's dtype.

    `scale` None is 1 / sqrt(H). `softcap` makes scores cap tanh(score / cap) (Gemma 2). `sinks_N`
    are logits that take part in the softmax of their query heads and have no value (gpt-oss).
    Query head n reads kv head n // (N / K). Every row of the mask needs one True; B of the mask may
    be 1, and it may be of the first slots only: nothing behind them is read. Scores and sums are
    float32. `implementation` None takes Triton on a GPU for more than one token where `why_not`
    gives no reason, else XLA, which writes scores [N, T, S] to memory; "triton" raises
    NotImplementedError with the reason. `interpret` runs the kernel on a CPU. Gradients are always
    XLA's.

    `rows` is for caches of more rows than there are sequences: (the row of each sequence, how many
    of its first slots to read), int32 [B] each. The mask is False behind them. A row that does not
    exist is the nearest one. So each sequence costs its own length, not that of the longest.
    """
    (_, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    if sinks_N is not None and sinks_N.shape != (N,):
        raise ValueError(f"sinks {sinks_N.shape} do not fit {N} query heads")
    if N % K or k_BSKH.shape[-1] != H or mask_BTS.shape[1] != T or mask_BTS.shape[2] > S:
        raise ValueError(
            f"queries {q_BTNH.shape}, keys {k_BSKH.shape} and mask {mask_BTS.shape} do not fit"
        )
    reason = lambda: why_not(q_BTNH, k_BSKH, v_BSKX, mask_BTS, rows)
    if T == 1 and rows is None and implementation is None and not interpret:
        implementation = "xla"
    if takes_triton(implementation, interpret, reason):
        how = scale, softcap, interpret
        return _kernel(q_BTNH, k_BSKH, v_BSKX, mask_BTS, sinks_N, rows, how)
    given = q_BTNH, k_BSKH, v_BSKX, mask_BTS, sinks_N
    return tree_attention_reference(*given, scale, softcap, rows)
