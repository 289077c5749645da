"""Which tile sizes a product gets: a measured table, and a guess where it has no entry."""

import bisect
import dataclasses
import functools
import json
import math
import pathlib

from pallas_kernels.quantized_matmul.packing import Packed, fields_of

TABLE = pathlib.Path(__file__).with_name("tuned.json")
WAYS = ("group", "dense", "vector")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Buckets: a product is tuned for the smallest that holds its rows."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is cut up."""

    way: str = "group"
    """group: products of lifted codes, scaled once a group; dense: of dequantized weights;
    vector: multiply-adds without tensor cores."""
    tile: int = 32
    """Columns of words a program takes; times fields, of outputs."""
    rows: int = 16
    """Rows a program takes; not for vectors, which take all."""
    splits: int = 4
    """Parts of the groups, each summed by programs of its own."""
    warps: int = 4
    stages: int = 4
    together: int = 1
    """Groups a turn of the loop takes."""
    ahead: bool = False
    """Whether steps and offsets are read one group ahead; not for vectors."""
    parts: int = 1
    """Programs that share a tile of words, each with its part of the fields; for many rows."""


def bucket(rows: int) -> int | None:
    """The smallest of ROWS that holds so many; None beyond the largest."""
    return next((n for n in ROWS if rows <= n), None)


def why_not_tiling(cfg: Tiling, rows: int, columns: int, groups: int, bits: int) -> str | None:
    """Why a product of `columns` columns of words cannot be cut up so; None where it can."""
    power = lambda n: n > 0 and n & (n - 1) == 0
    if cfg.way not in WAYS:
        return f"way {cfg.way!r} is none of {WAYS}"
    if not power(cfg.tile) or columns % cfg.tile:
        return f"tile {cfg.tile} is no power of two that divides {columns} columns of words"
    if not power(cfg.together) or groups % cfg.together:
        return f"{cfg.together} groups at once, no power of two that divides {groups}"
    if not 0 < cfg.splits <= groups // cfg.together:
        return f"{cfg.splits} splits of {groups // cfg.together} turns"
    each = math.ceil(groups // cfg.together / cfg.splits)
    if (cfg.splits - 1) * each >= groups // cfg.together:
        return f"{cfg.splits} splits of {each} turns leave the last without any"
    if not power(cfg.parts) or cfg.parts > (fields_of(bits) if cfg.way != "vector" else 1):
        return f"{cfg.parts} parts of {fields_of(bits)} fields"
    if cfg.way == "vector":
        return f"{rows} rows; vectors are for at most 4" if rows > 4 else None
    if cfg.tile < 16 or not power(cfg.rows) or cfg.rows < 16:
        return f"products need tiles and rows that are powers of two from 16, not {cfg}"
    return None


@functools.cache
def _table() -> dict:
    """{(device, inputs, outputs, bits, group, rows): Tiling}."""
    entries = json.loads(TABLE.read_text()) if TABLE.exists() else []
    names = ("device", "inputs", "outputs", "bits", "group", "rows")
    return {tuple(e[n] for n in names): Tiling(**e["tiling"]) for e in entries}


AT_ONCE = 528
"""Programs of `guess` that an H200 runs at a time: by their registers four a multiprocessor."""


def guess(rows: int, columns: int, groups: int) -> Tiling:
    """Tile sizes for a shape that nobody timed: whole waves of programs, each of several groups.

    On an H200 the best splits of 3584x18944 (7), 18944x3584 (37) and 3584x4608 (14) are those of
    least waves * (turns + 2) + 0.15 splits: a program's start, and partial sums to add.
    """
    most = columns & -columns
    if rows <= 64:  # in blocks of 16: up to 48 rows blocks of 32 and 64 are no faster, most slower
        tile, blocks = min(32, most), math.ceil(rows / 16)
        waves = lambda splits: math.ceil(blocks * columns // tile * splits / AT_ONCE)
        cost = lambda splits: waves(splits) * (math.ceil(groups / splits) + 2) + 0.15 * splits
        splits = min((whole_splits(groups, s) for s in range(1, groups + 1)), key=cost)
        if tile == 32:
            return Tiling("dense", tile, 16, splits, 4, 3)
        return Tiling("group", tile, 16, splits, 1)
    tile, parts = min(64, most), 4 if most >= 64 else 1
    return Tiling("dense", tile, 128, 1, 8, 3, parts=parts)


def whole_splits(turns: int, wanted: int) -> int:
    """The largest number of splits up to `wanted` of which none is empty."""
    fits = lambda n: (n - 1) * math.ceil(turns / n) < turns
    return next(n for n in range(max(1, min(wanted, turns)), 0, -1) if fits(n))


def choose(rows: int, w: Packed, device: str) -> Tiling:
    """The tuned tile sizes for this device and the nearest bucket of rows, else the guess."""
    (D, F), columns, groups = w.shape, w.words_DS.shape[1], w.shape[0] // w.group
    own = bucket(rows)
    # One block up to 16 rows, a few up to 64, other blocks beyond; more rows before fewer.
    kind = lambda n: bisect.bisect_left((16, 64), n)
    alike = [n for n in ROWS if own and kind(n) == kind(own)]
    for n in sorted(alike, key=lambda n: (n < own, abs(n - own))):
        found = _table().get((device, D, F, w.bits, w.group, n))
        if found and why_not_tiling(found, rows, columns, groups, w.bits) is None:
            return found
    return guess(rows, columns, groups)
