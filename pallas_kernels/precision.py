"""The precision of matrix products."""

from typing import Any

import jax
import jax.numpy as jnp


def precision(dtype: Any) -> jax.lax.Precision | None:
    """HIGHEST for float32, whose products a GPU would otherwise round to TF32; None for 16 bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
