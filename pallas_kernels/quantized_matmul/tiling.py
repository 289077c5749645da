"""How a product is split among programs: a measured table, and a guess for other shapes."""

import dataclasses
import functools
import json
import math
import pathlib

from pallas_kernels.quantized_matmul.packing import BLOCK_WORDS, Packed

TABLE = pathlib.Path(__file__).with_name("tuned.json")
ROW_BUCKETS = (8, 16, 32, 64, 128)
"""Buckets: a product is tuned for the smallest that holds its rows."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is split among programs. Each has one block's columns of words."""

    rows: int = 8
    """Rows a program takes."""
    splits: int = 4
    """Parts of the inputs, each summed by programs of its own."""
    warps: int = 2
    stages: int = 3


def bucket(rows: int) -> int | None:
    """The smallest of ROW_BUCKETS that holds this many rows; None beyond the largest."""
    return next((n for n in ROW_BUCKETS if rows <= n), None)


def why_not_tiling(cfg: Tiling, chunks: int) -> str | None:
    """Why a product over this many chunks of inputs cannot have this tiling; None where it can."""
    power = lambda n: n > 0 and n & (n - 1) == 0
    if not power(cfg.rows) or not 8 <= cfg.rows <= 64:
        return f"{cfg.rows} rows a program; a program takes 8, 16, 32 or 64"
    if not 0 < cfg.splits <= chunks:
        return f"{cfg.splits} splits of {chunks} chunks of inputs"
    if not power(cfg.warps) or cfg.warps > 8 or cfg.stages < 1:
        return f"{cfg.warps} warps and {cfg.stages} stages; 1, 2, 4 or 8 warps share a block"
    return None


@functools.cache
def _table() -> dict:
    """{(device, inputs, outputs, bits, group, rows): Tiling}."""
    entries = json.loads(TABLE.read_text()) if TABLE.exists() else []
    names = ("device", "inputs", "outputs", "bits", "group", "rows")
    return {tuple(e[n] for n in names): Tiling(**e["tiling"]) for e in entries}


BUSY_PROGRAMS = 528
"""Programs that keep an H200 busy, four a multiprocessor of its 132: the best numbers of splits of
seven matrices make 400 to 750 of them. Other devices get the same number."""


def guess(rows: int, blocks: int, chunks: int) -> Tiling:
    """For a shape that was not timed: four programs a multiprocessor, each with four chunks."""
    height = 8 if rows <= 8 else 16 if rows <= 64 else 32
    wanted = round(BUSY_PROGRAMS / (blocks * math.ceil(rows / height)))
    return Tiling(height, max(1, min(wanted, chunks // 4)))


def choose_tiling(rows: int, w: Packed, device: str) -> Tiling:
    """The tuned entry for this device and bucket of rows, else the guess."""
    _, chunks, *_ = w.words_BNSc.shape
    found = _table().get((device, *w.shape, w.bits, w.group, bucket(rows)))
    if found and why_not_tiling(found, chunks) is None:
        return found
    return guess(rows, w.words // BLOCK_WORDS, chunks)
