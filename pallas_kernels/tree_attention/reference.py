"""The attention in plain jnp: the specification."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.precision import precision


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap tanh(x / cap), which lies between -cap and cap; x itself where there is no cap."""
    return x if cap is None else jnp.tanh(x / cap) * cap


def tree_attention_reference(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKX: jax.Array,
    mask_BTS: jax.Array,
    sinks_N: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rows: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """softmax(q k * scale) v over the slots the mask allows, [B, T, N, X], in q's dtype.

    `rows` as in `tree_attention`; all slots are read, and the mask says which count."""
    if rows is not None:
        k_BSKH, v_BSKX = (jnp.take(a, rows[0], axis=0, mode="clip") for a in (k_BSKH, v_BSKX))
    k_BSKH, v_BSKX = (a[:, : mask_BTS.shape[-1]] for a in (k_BSKH, v_BSKX))
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, k_BSKH.shape[2], -1, H)
    exact = precision(q_BTNH.dtype)
    product = functools.partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    logits = product("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * (H**-0.5 if scale is None else scale)
    logits = jnp.where(mask_BTS[:, None, None], capped(logits, softcap), -1e30)
    if sinks_N is None:
        weights = jax.nn.softmax(logits, axis=-1)
    else:
        sink_KG = sinks_N.astype(jnp.float32).reshape(1, *q_BTKGH.shape[2:4], 1, 1)
        sink = jnp.broadcast_to(sink_KG, (*logits.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([logits, sink], -1), axis=-1)[..., :-1]
    y_BTKGX = product("BKGTS,BSKX->BTKGX", weights.astype(v_BSKX.dtype), v_BSKX)
    return y_BTKGX.astype(q_BTNH.dtype).reshape(B, T, N, -1)
