"""Where arrays are, for assertions."""

import jax

from subspec_jax.offload import on_host


def is_offloaded(layer) -> bool:
    """Whether any array of the layer is in host memory."""
    return any(map(on_host, jax.tree.leaves(layer)))
