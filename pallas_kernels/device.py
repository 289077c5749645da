"""What the default device can run."""

import jax


def on_gpu() -> bool:
    """Whether it runs Triton kernels (an NVIDIA GPU of compute capability 8.0 or newer)."""
    if jax.default_backend() != "gpu":
        return False
    return float(getattr(jax.devices()[0], "compute_capability", "0")) >= 8
