"""What the default device can run."""

import os

import jax


def switched_off() -> bool:
    """THIMBLE_KERNELS=off in the environment leaves everything to XLA, for comparison."""
    return os.environ.get("THIMBLE_KERNELS") == "off"


def on_gpu() -> bool:
    """Whether it runs Triton kernels (an NVIDIA GPU of compute capability 8.0 or newer)."""
    if jax.default_backend() != "gpu" or switched_off():
        return False
    return float(getattr(jax.devices()[0], "compute_capability", "0")) >= 8
