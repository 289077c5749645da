"""Device memory: amounts as people write them, what a card has, and the limit that is enforced."""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import subprocess
from pathlib import Path

import jax
from jax._src import xla_bridge

from llm_jax.stream import on_host
from subspec_jax import SubspecError

MOST_BYTES = 2**60
UNITS = {"KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}


class AmountError(SubspecError):
    """Text that is not an amount of memory."""


def parse_bytes(text: str) -> int:
    """Bytes meant by "8GB", "7.5 GiB" or "500MB". As on graphics cards, 1 GB is 2**30 bytes."""
    compact = text.replace(" ", "").upper().replace("I", "")
    for unit, size in UNITS.items():
        if compact.endswith(unit):
            try:
                value = float(compact.removesuffix(unit))
            except ValueError:
                break
            if 0 < value * size < MOST_BYTES:
                return round(value * size)
    raise AmountError(f"{text!r} is not an amount of memory; write for example 8GB, 7.5GB or 500MB")


def show_bytes(count: float) -> str:
    """ "7.93 GB", in the same units as `parse_bytes`."""
    for unit in ("GB", "MB", "KB"):
        if abs(count) >= UNITS[unit]:
            return f"{count / UNITS[unit]:.2f} {unit}"
    return f"{count:.0f} B"


def device_bytes() -> int:
    """Bytes of all live arrays in device memory, each buffer once; for devices without
    statistics."""
    buffers = {}
    for a in jax.live_arrays():
        if not a.is_deleted() and not on_host(a):
            for shard in a.addressable_shards:
                buffers[shard.device.id, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(buffers.values())


HOST_RESERVE = 2 * 2**30
"""Host memory that is left to the rest of the process and to others, beside a tenth of it all."""


def host_bytes() -> int:
    """Host memory that layers may take: what the machine, or this process's cgroup, has, less a
    tenth and `HOST_RESERVE`."""
    least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no cgroups, or "max"
            least = min(least, int(Path("/sys/fs/cgroup", file).read_text()))
    return max(least * 9 // 10 - HOST_RESERVE, least // 2)


PROCESS_BYTES = 450 * 2**20
"""What a process on a CPU takes beside its memory limit: Python, JAX and compiled programs. A test
holds the sum; measured were 330 MB, with programs of 18 layers."""


def return_free_memory() -> None:
    """Gives memory that nobody uses any more back to the system, which the C library may keep."""
    with contextlib.suppress(AttributeError, OSError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def jax_for_cuda() -> bool:
    """Whether a CUDA plugin of JAX is installed, and not switched off by JAX_PLATFORMS."""
    if os.environ.get("JAX_PLATFORMS", "").lower() == "cpu":
        return False
    names = (d.metadata["Name"] or "" for d in importlib.metadata.distributions())
    return any(name.lower().replace("_", "-").startswith("jax-cuda") for name in names)


def card_bytes() -> int | None:
    """Memory of the first visible NVIDIA card that JAX will use; None without one.

    Asked without starting JAX.
    """
    answer = _ask_card("memory.total") if jax_for_cuda() else None
    return None if answer is None else int(float(answer)) * 2**20


def card_count() -> int:
    """Visible NVIDIA cards that JAX will use. Asked without starting JAX."""
    if card_bytes() is None:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    return len(_query("memory.total") or [])


def card_is_idle() -> bool:
    """Whether there is a card that this installation of JAX cannot use."""
    return not jax_for_cuda() and _ask_card("memory.total") is not None


def card_has_kernels() -> bool:
    """Whether JAX will use an NVIDIA card of compute capability 8.0 or more: it has bfloat16 and
    runs Triton kernels."""
    return jax_for_cuda() and float(_ask_card("compute_cap") or 0) >= 8


def card_dtype() -> str:
    """What 16-bit weights the card multiplies: bfloat16, or float16 on older ones."""
    return "bfloat16" if card_has_kernels() else "float16"


@functools.cache
def _ask_card(field: str) -> str | None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    found = _query(field, "-i", visible)
    return found[0] if found else None


def _query(field: str, *more: str) -> list[str] | None:
    """What nvidia-smi says of each card; None without one."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", *more]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        float(out.split()[0])
        return out.split()
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


CONTEXT_BYTES = 600 * 2**20
"""Memory outside of the pool, for the CUDA context and the workspaces of libraries."""


def backends_started() -> bool:
    """Whether JAX has touched a device, after which no limit can be set."""
    return xla_bridge.backends_are_initialized()


PINNED_SPARE = 2**30
"""Pinned memory beyond what a limit of host memory asks for: for copies to and from the device."""


def enforce_limit(limit: int, host_limit: int | None = None) -> int | None:
    """Bytes of the pool that JAX will get on the card: `limit`, or less where the card is smaller.

    Sets the allocator's fraction in the environment, and how much memory may be pinned: 64 GB by
    itself, here 0.9 of the machine's, or `host_limit` and `PINNED_SPARE`. (The allocator doubles
    what it takes, so without a limit it may pin far more than is used.) So it must run before JAX
    touches a device, and raises RuntimeError if that has happened.
    Returns None, and enforces nothing, on a machine without an NVIDIA card.
    """
    total = card_bytes()
    if total is None:
        return None
    if backends_started():
        raise RuntimeError("the memory limit must be set before JAX uses a device")
    pool = min(limit, total - CONTEXT_BYTES)
    os.environ["XLA_CLIENT_MEM_FRACTION"] = repr(pool / total)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
    pinned = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.9)
    if host_limit is not None:
        pinned = min(pinned, host_limit + PINNED_SPARE + 2**30 - 1)
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(pinned >> 30))
    return pool
