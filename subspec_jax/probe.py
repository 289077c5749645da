"""Measured bandwidths of the link from pinned host memory, of device memory, and of the disk."""

import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.cards import together
from llm_jax.disk import DiskArray, DiskReader, Slot, slot_bytes
from llm_jax.stream import to_device


def link_bandwidth(size: int = 2**30, repeats: int = 4, cards: int = 1) -> float:
    """Bytes per second from pinned host memory to a device: the best of `repeats` copies of `size`
    bytes to each of `cards` devices at the same time."""
    part = np.zeros(size, np.uint8)
    host = jax.block_until_ready(together([part] * cards, "pinned_host"))
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(to_device(host))
        times.append(time.perf_counter() - began)
    return size / min(times[1:])


def memory_bandwidth(size: int = 2**28, repeats: int = 4) -> float:
    """Bytes per second, read plus written, of a pass over `size` bytes of device memory."""
    flip = jax.jit(lambda x: x ^ jnp.uint32(1), donate_argnums=0)
    x = jax.block_until_ready(flip(jnp.zeros(max(1, size // 4), jnp.uint32)))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(8):
            x = flip(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - began) / 8)
    return 2 * x.nbytes / min(times)


def disk_bandwidth(arrays: Iterable[DiskArray], seconds: float = 0.5) -> tuple[float, bool]:
    """(bytes per second that these arrays are read with, whether past the page cache). Ends after
    about `seconds`."""
    arrays = list(arrays)
    reader, slot = DiskReader(), Slot(max(slot_bytes([a]) for a in arrays))
    began = time.perf_counter()
    try:
        for a in arrays:
            reader.read([a], slot)
            if time.perf_counter() - began > seconds:
                break
        return reader.reads.bytes_per_s, reader.reads.direct
    finally:
        reader.close()
