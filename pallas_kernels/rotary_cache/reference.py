"""The same in plain jnp: the specification."""

import jax
import jax.numpy as jnp


def rotary_cache_reference(
    y_XTF: jax.Array,
    bias_F: jax.Array | None,
    cos_Th: jax.Array,
    sin_Th: jax.Array,
    k_RSKH: jax.Array,
    v_RSKH: jax.Array,
    place: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `api.rotary_cache`."""
    K, H = k_RSKH.shape[2:]
    y = y_XTF.astype(jnp.float32).sum(0)
    y = y if bias_F is None else y + bias_F.astype(jnp.float32)[None]
    heads = y.reshape(cos_Th.shape[0], -1, H)
    N = heads.shape[1] - 2 * K
    turned, values = heads[:, : N + K], heads[:, N + K :]
    a, b = jnp.split(turned, 2, axis=-1)
    cos, sin = cos_Th[:, None], sin_Th[:, None]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    put = lambda cache, new: cache.at[place].set(new.astype(cache.dtype), mode="drop")
    return turned[:, :N].astype(k_RSKH.dtype), put(k_RSKH, turned[:, N:]), put(v_RSKH, values)
