"""Where arrays are, for assertions."""

import jax

from llm_jax.stream import on_host


def is_offloaded(layer) -> bool:
    """Whether any array of the layer is in host memory."""
    return any(map(on_host, jax.tree.leaves(layer)))
