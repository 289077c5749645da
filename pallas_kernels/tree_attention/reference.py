"""The attention in plain jnp: the specification."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.precision import precision


def tree_attention_reference(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKX: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the slots the mask allows, [B, T, N, X], in q's dtype."""
    k_BSKH, v_BSKX = (a[:, : mask_BTS.shape[-1]] for a in (k_BSKH, v_BSKX))
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, k_BSKH.shape[2], -1, H)
    exact = precision(q_BTNH.dtype)
    product = functools.partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    logits = product("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * (H**-0.5)
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], logits, -1e30), axis=-1)
    y_BTKGX = product("BKGTS,BSKX->BTKGX", weights.astype(v_BSKX.dtype), v_BSKX)
    return y_BTKGX.astype(q_BTNH.dtype).reshape(B, T, N, -1)
