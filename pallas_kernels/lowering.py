"""Triton IR of Pallas kernels, made without a GPU."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax


def lower_for(f: Callable[..., Any], *arguments: Any, device: str = "NVIDIA H200") -> str:
    """The program that `f` becomes for that GPU, as text; kernels are custom calls in it.

    Raises what compiling there would: block sizes that are no powers of two, operations that the
    Triton backend lacks. `arguments` may be shapes.
    """
    with _abstract(device):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def _abstract(device: str):
    """A mesh of one such device, which jax needs from 0.11 on; nothing before."""
    try:
        from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

        kind = AbstractDevice(device_kind=device, num_cores=None, platform="gpu")
        # Automatic, as outside of a mesh: explicit axes would have to be named by the programs.
        mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=kind)
    except (ImportError, TypeError):
        return contextlib.nullcontext()
    return use_abstract_mesh(mesh)
