"""What the default device can run, and the choice between XLA and a Triton kernel."""

import importlib
import os
from collections.abc import Callable

import jax

IMPLEMENTATIONS = ("xla", "triton")


def switched_off() -> bool:
    """THIMBLE_KERNELS=off in the environment leaves everything to XLA, for comparison."""
    return os.environ.get("THIMBLE_KERNELS") == "off"


def on_gpu() -> bool:
    """Whether the default device runs Triton kernels: an NVIDIA GPU of compute capability 8.0 or
    newer."""
    if jax.default_backend() != "gpu" or switched_off():
        return False
    return float(getattr(jax.devices()[0], "compute_capability", "0")) >= 8


def triton_missing() -> str | None:
    """Why no Triton kernel can run with this jax, whatever the device; None where they can.

    The Triton backend of Pallas is deprecated and may leave jax in any release. So no module of
    this package imports it but those with kernels in them, and those are imported where a kernel is
    chosen.
    """
    try:
        importlib.import_module("jax.experimental.pallas.triton")
    except ImportError:
        return "this jax has no Triton backend for Pallas (jax.experimental.pallas.triton)"
    return None


def mosaic_missing() -> str | None:
    """Why no Mosaic GPU kernel can run with this jax, whatever the device; None where they can."""
    if jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__}; Mosaic GPU kernels need 0.11 (and Python 3.12)"
    try:
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    except ImportError:
        return "this jax has no Mosaic GPU backend (jax.experimental.pallas.mosaic_gpu)"
    return None


def on_hopper() -> bool:
    """Whether the default device is an NVIDIA GPU of compute capability 9.0 (H100, H200)."""
    return on_gpu() and getattr(jax.devices()[0], "compute_capability", "0") == "9.0"


def takes_triton(
    implementation: str | None, interpret: bool, why_not: Callable[[], str | None]
) -> bool:
    """Whether a Triton kernel computes a call; otherwise XLA does.

    `implementation` None takes the kernel on a GPU where `why_not()` gives no reason. "triton"
    raises NotImplementedError with the reason. `interpret` runs the kernel on a CPU; without a
    Triton backend that raises too. Any implementation but "xla" and "triton" is a ValueError.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation is {implementation!r}; one of 'xla', 'triton' or None")
    if implementation == "xla" or not (implementation or interpret or on_gpu()):
        return False
    reason = why_not()
    if reason and (implementation == "triton" or (interpret and triton_missing())):
        raise NotImplementedError(reason)
    return reason is None
