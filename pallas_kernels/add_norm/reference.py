"""The same in plain jnp: the specification."""

import jax
import jax.numpy as jnp


def add_norm_reference(x_TD, y_XTD, gain_D, eps: float):
    """As `api.add_norm`."""
    y = y_XTD.astype(jnp.float32).sum(0).astype(x_TD.dtype)
    x_TD = x_TD + y
    x32 = x_TD.astype(jnp.float32)
    scaled = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return x_TD, scaled.astype(x_TD.dtype) * gain_D[None]
