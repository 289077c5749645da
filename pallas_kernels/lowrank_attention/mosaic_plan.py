"""How the Mosaic kernel cuts up a call: numbers that are known when it is traced."""

import dataclasses
from typing import Any

from pallas_kernels.lowrank_attention.absorption import SLOW

TILE = 64
"""Slots of a step: what a product has on its side of 64 rows."""
COLUMNS = 8
"""Heads of a group at most: the least columns of a product."""
SHARED_MEMORY = 232448
"""Bytes of a multiprocessor that a program may have."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Latents of one group as the kernel reads them: `parts` blocks of `width` columns of codes.

    With 4 bits a column of codes holds two latents, of which the second is half a rank further on.
    """

    bits: int
    size: int
    """Columns of codes that a group takes."""
    width: int
    parts: int
    row: int = 0
    """Of the table of scales, where a row for each group has its steps; then come its offsets."""

    @property
    def halves(self) -> int:
        return 2 if self.bits == 4 else 1

    @property
    def slot_bytes(self) -> int:
        """Bytes of a tile as it is copied."""
        scales = 0 if self.bits == 16 else 2 * 2 * TILE
        return self.parts * TILE * self.width * (2 if self.bits == 16 else 1) + scales


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when a kernel is traced."""

    batch: int
    groups: int
    heads: int
    """kv heads of a group, at most `COLUMNS` // 2."""
    span: int
    spans: int
    each: int
    """Spans of a program."""
    k: Stored
    v: Stored
    dtype: Any
    masked: bool
    slots: int = 2
    """Tiles that are in flight or in use, an even number: each warpgroup has its own."""

    @property
    def runs(self) -> int:
        return -(-self.spans // self.each)

    @property
    def rank(self) -> int:
        """Latents of a key."""
        return self.k.width * self.k.halves

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory, barriers and their alignment generously counted."""
        matrices = 2 * 2 * self.rank * self.heads * SLOW
        tables = 2 * TILE * SLOW * 2 + (4 * TILE if self.masked else 0)
        slots = self.slots * (self.k.slot_bytes + self.v.slot_bytes + tables)
        opened = 2 * 2 * TILE * (self.rank if self.k.bits < 16 else 0)
        opened += 2 * 2 * TILE * (128 if self.v.bits < 16 else 0)
        return matrices + slots + opened + 4 * COLUMNS * TILE * 2 + 2 * 16 * TILE + 8192
