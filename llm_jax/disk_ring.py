"""Layers read from disk ahead of their use, into a ring of few buffers.

Passes follow each other, so the layers are read in a circle: behind the last one the first ones
of the next pass. The disk waits only while all buffers are full.
"""

import collections
import concurrent.futures
import dataclasses
import queue
from collections.abc import Sequence

import jax

from llm_jax.disk import DiskArray, DiskReader, Slot, slot_bytes

STAGES = 2
"""Layers that are read, checked and copied to pinned memory at the same time."""


@dataclasses.dataclass
class Filled:
    """A layer's arrays in host memory, and the slot that they are views of, if they are."""

    arrays: list[jax.Array]
    slot: Slot | None


class DiskRing:
    """At most `room` layers in memory: being read, waiting, or in use.

    `place` is where arrays go. On a CPU that is the slot itself, and `copies` is False: then a slot
    is read into again when its layer is given back. Elsewhere `device_put` copies them, such as to
    pinned memory, from one of two slots.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[DiskArray]],
        room: int,
        place: jax.sharding.Sharding,
        copies: bool,
    ):
        self.layers, self.room, self._place, self._copies = layers, room, place, copies
        self.reader = DiskReader()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._size = max(map(slot_bytes, layers))
        self._slots: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for _ in range(STAGES if copies else room):
            self._slots.put(Slot(self._size))
        self._coming: collections.deque[tuple[int, concurrent.futures.Future[Filled]]]
        self._coming = collections.deque()
        self._out: list[Filled] = []
        self._next = 0

    @property
    def bytes(self) -> int:
        """Bytes of slots."""
        return self._size * (STAGES if self._copies else self.room)

    def start(self) -> None:
        """Begins a pass: the first layer is the next one to be taken."""
        for left in self._out:  # by a pass that was given up; its block may still run
            if left.slot is not None:
                self._slots.put(Slot(self._size))
        self._out.clear()
        if self._coming and self._coming[0][0] != 0:
            self._drop()
        self._next = self._next if self._coming else 0
        self._fill()

    def _fill(self) -> None:
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(STAGES, "disk-ring")
        while len(self._coming) + len(self._out) < self.room:
            self._coming.append((self._next, self._pool.submit(self._read, self._next)))
            self._next = (self._next + 1) % len(self.layers)

    def _read(self, number: int) -> Filled:
        slot, kept = self._slots.get(), False
        try:
            views = self.reader.read(self.layers[number], slot)
            arrays = jax.block_until_ready(jax.device_put(views, self._place))
            kept = not self._copies
            return Filled(arrays, slot if kept else None)
        finally:
            if not kept:
                self._slots.put(slot)

    def ready(self) -> bool:
        """Whether the next layer can be taken without waiting."""
        return bool(self._coming) and self._coming[0][1].done()

    def take(self) -> Filled:
        """The next layer; waits for the disk. Raises DiskError, and then no thread is left."""
        try:
            found = self._coming.popleft()[1].result()
        except BaseException:
            self.close()
            raise
        self._out.append(found)
        return found

    def give_back(self, used: Filled) -> None:
        """Lets a layer go; nothing may use its arrays any more. The next one is read."""
        self._out.remove(used)
        for a in used.arrays:
            a.delete()
        if used.slot is not None:
            self._slots.put(used.slot)
        self._fill()

    def _drop(self) -> None:
        """Lets all layers go that nobody took."""
        waiting, self._coming = self._coming, collections.deque()
        for _, future in waiting:
            if not future.cancel() and future.exception() is None:
                filled = future.result()
                for a in filled.arrays:
                    a.delete()
                if filled.slot is not None:
                    self._slots.put(filled.slot)

    def close(self) -> None:
        """Ends the threads. A later `start` begins again."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self.reader.close()
