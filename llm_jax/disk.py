"""Arrays that lie in files, and their bytes read past the page cache into buffers of our own.

A `DiskArray` takes the place of an array in a tree. Files are read with O_DIRECT in whole blocks,
and the blocks of each array get a place of their own in a `Slot`: the processor copies no byte.
"""

import concurrent.futures
import dataclasses
import errno
import fcntl
import math
import mmap
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import LLMError
from llm_jax.digest import array_digest

BLOCK = 4096
"""Files are read in blocks of this many bytes, at multiples of it."""
PART = 2**22
"""Bytes of one read."""
READERS = 4
"""Reads at the same time."""


class DiskError(LLMError):
    """A file that weights are read from while decoding is not what it was; the message names it."""


@dataclasses.dataclass(frozen=True)
class DiskArray:
    """An array in a file: a leaf of a tree, like the array itself."""

    file: Path
    offset: int
    """Of its first byte in the file."""
    shape: tuple[int, ...]
    dtype: np.dtype
    digest: str
    """`array_digest` of what is stored."""
    stored: int
    """Bytes in the file; what the shape needs beyond them is zeros."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def on_disk(tree: Any) -> bool:
    """Whether any array of the tree lies in a file."""
    return any(isinstance(a, DiskArray) for a in jax.tree.leaves(tree))


def slot_bytes(arrays: Sequence[DiskArray]) -> int:
    """Bytes of a slot that these arrays are read into."""
    return sum(_room(a) for a in arrays)


def _room(a: DiskArray) -> int:
    return -(-(a.offset % BLOCK + max(a.nbytes, a.stored)) // BLOCK) * BLOCK


class Slot:
    """A buffer of whole pages, which arrays are read into again and again."""

    def __init__(self, size: int):
        pages = mmap.mmap(-1, max(size, BLOCK), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = np.frombuffer(pages, np.uint8)


@dataclasses.dataclass
class Reads:
    """What was read: bytes, and the seconds in which at least one read was running."""

    bytes: int = 0
    seconds: float = 0.0
    direct: bool = True
    """Past the page cache; False where a file system refused that at least once."""

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0


class DiskReader:
    """Threads that read arrays. They end with `close`, or when nobody refers to it any more."""

    def __init__(self, readers: int = READERS, check: bool = True):
        self.readers, self.check, self.reads = readers, check, Reads()
        self._lock, self._running, self._since = threading.Lock(), 0, 0.0
        self._handles: dict[Path, int] = {}
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def read(self, arrays: Sequence[DiskArray], slot: Slot) -> list[np.ndarray]:
        """The arrays as views of the slot, compared with their digests unless `check` is False.

        Raises DiskError for a file that is missing, too short, unreadable or different.
        """
        with self._lock:
            if self._pool is None:
                self._pool = concurrent.futures.ThreadPoolExecutor(self.readers, "disk")
            pool = self._pool
        views, coming, at = [], [], 0
        for a in arrays:
            first = a.offset // BLOCK * BLOCK
            last = -(-(a.offset + a.stored) // BLOCK) * BLOCK
            parts = []
            for start in range(first, last, PART):
                size = min(PART, last - start)
                place = slot.bytes[at + start - first :][:size]
                least = min(size, a.offset + a.stored - start)
                parts.append(pool.submit(self._part, a.file, start, place, least))
            coming.append(parts)
            views.append(slot.bytes[at + a.offset - first :][: max(a.nbytes, a.stored)])
            at += _room(a)
        found = []
        try:
            for a, view, parts in zip(arrays, views, coming, strict=True):
                for part in parts:
                    part.result()
                found.append(self._checked(a, view))  # while the next arrays are read
        finally:  # the slot must not be written to any more
            left = [part for parts in coming for part in parts]
            for part in left:
                part.cancel()
            concurrent.futures.wait(left)
        return found

    def _checked(self, a: DiskArray, view: np.ndarray) -> np.ndarray:
        if self.check and array_digest(view[: a.stored]) != a.digest:
            raise DiskError(
                f"{a.file} is damaged: what was read at byte {a.offset} differs from what was "
                "written; check the disk, delete the file and start again"
            )
        view[a.stored :] = 0
        return view[: a.nbytes].view(a.dtype).reshape(a.shape)

    def _part(self, file: Path, start: int, place: np.ndarray, least: int) -> None:
        """Reads blocks into their place; at least `least` bytes must be there."""
        self._count(1, 0)
        got = 0
        try:
            while got < least and (n := self._some(file, start + got, place[got:])):
                got += n
        except OSError as error:
            raise DiskError(
                f"{file} cannot be read: {os.strerror(error.errno or errno.EIO)}; "
                "check the disk and start again"
            ) from error
        finally:
            self._count(-1, got)
        if got < least:
            raise DiskError(
                f"{file} is shorter than it was: it ends at byte {start + got}; delete it and "
                "start again"
            )

    def _some(self, file: Path, start: int, place: np.ndarray) -> int:
        handle = self._handle(file)
        if self.reads.direct:
            try:
                return os.preadv(handle, [place], start)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._refused(file)
                handle = self._handle(file)
        n = os.preadv(handle, [place], start)
        os.posix_fadvise(handle, start, n, os.POSIX_FADV_DONTNEED)
        return n

    def _handle(self, file: Path) -> int:
        with self._lock:
            if file not in self._handles:
                flags = os.O_RDONLY | os.O_CLOEXEC
                try:
                    self._handles[file] = os.open(file, flags | os.O_DIRECT)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self.reads.direct = False
                    self._handles[file] = os.open(file, flags)
            return self._handles[file]

    def _refused(self, file: Path) -> None:
        """The file system opens files for direct reads and then refuses them."""
        with self._lock:
            self.reads.direct = False
            flags = fcntl.fcntl(self._handles[file], fcntl.F_GETFL)
            fcntl.fcntl(self._handles[file], fcntl.F_SETFL, flags & ~os.O_DIRECT)

    def _count(self, running: int, got: int) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._running:
                self.reads.seconds += now - self._since
            self._running, self._since = self._running + running, now
            self.reads.bytes += got

    def close(self) -> None:
        """Ends the threads and closes the files. A later read starts again."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def __del__(self):
        for handle in self._handles.values():
            os.close(handle)


def loaded(tree: Any, reader: DiskReader | None = None) -> Any:
    """The tree with arrays from files as NumPy arrays, each in fresh pages of its own."""
    own = reader or DiskReader()

    def fresh(a):
        return own.read([a], Slot(slot_bytes([a])))[0] if isinstance(a, DiskArray) else a

    try:
        return jax.tree.map(fresh, tree)
    finally:
        if reader is None:
            own.close()
