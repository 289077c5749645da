"""Residuals in NumPy: the choice of a table, the encoder, and the reference decoder.

One slab of groups is done at a time. So the work space is about 100 MB for any matrix.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator

import jax
import numpy as np

from llm_jax.quantize import Quantized, codes_of
from pallas_kernels.residual_decode.code import (
    BIAS,
    CODES,
    COLUMNS,
    FIRST_PATCH,
    LANES,
    LEVELS,
    OCTAVES,
    Residual,
    check_pair,
    complete,
    differ,
    predict_weights,
    tiles,
)

SLAB = 2**19
"""Weights per slab. This is small enough that the arrays stay in the CPU's caches."""
AT_ONCE = 2**26
"""Most weights that all threads encode at a time, with about 50 bytes of work space each. A slab is
at least one row of groups; in an output head this is 10 million weights."""
SAMPLE = 2**17
"""Number of weights used to choose a table, from columns all over the matrix."""
DEPTHS = (6, 7, 8, 10, 255)
"""Octaves below the step at which numbers may be cut off. 255 keeps all bfloat16 numbers."""
PATCH_BITS = 32
"""Bits of one patch."""


@dataclasses.dataclass(frozen=True)
class Table:
    """How the levels of one matrix are coded: `lengths` and `firsts` are int32 [LEVELS]."""

    octaves: int
    lengths: np.ndarray
    firsts: np.ndarray

    @property
    def head(self) -> np.ndarray:
        """The first row of words, without the place of the patches."""
        head = np.zeros(LANES, np.uint32)
        head[:LEVELS] = self.lengths + ((self.firsts + BIAS) << 8)
        head[OCTAVES] = self.octaves
        return head

    @classmethod
    def of(cls, head: np.ndarray) -> "Table":
        """The table that a first row of words holds."""
        entries = np.asarray(head[:LEVELS]).astype(np.int32)
        return cls(int(head[OCTAVES]), entries & 255, (entries >> 8) - BIAS)


def patterns(w: np.ndarray) -> np.ndarray:
    """The bits of 16-bit numbers, int32."""
    return np.ascontiguousarray(w).view(np.uint16).astype(np.int32)


def _host(q: Quantized) -> Quantized:
    return jax.tree.map(np.asarray, q)


def _slabs(q: Quantized) -> Iterator[tuple[int, Quantized]]:
    """(first group, the substitute's groups of this slab), as NumPy arrays, slab by slab."""
    count = max(1, SLAB // (q.group * q.shape[1]))
    for start in range(0, q.step_QF.shape[0], count):
        yield start, jax.tree.map(lambda a: a[start : start + count], q)  # noqa: B023 - used at once


def _predict(q: Quantized, octaves: int, dtype: str):
    return predict_weights(codes_of(q, np), q.step_QF, q.offset_QF, octaves, dtype, np)


def sample(w_DF: np.ndarray, q: Quantized, size: int = SAMPLE) -> tuple[np.ndarray, Quantized]:
    """Evenly spaced columns of (a matrix, its substitute), with about `size` weights."""
    apart = max(1, w_DF.size // size)
    some = jax.tree.map(lambda a: np.ascontiguousarray(np.asarray(a)[..., ::apart]), q)
    return np.ascontiguousarray(w_DF[:, ::apart]), some


def choose(w_DF: np.ndarray, q: Quantized, code: str) -> Table:
    """The table with which these weights take the fewest bits, with patches.

    For each level it takes the window of differences with the least count * length + PATCH_BITS *
    (weights outside). A window has 2**length values; with planes, `length` is 8 or 16 bits.
    """
    best = None
    bits = patterns(w_DF).reshape(-1, q.group, q.shape[1])
    for octaves in DEPTHS:
        p = _predict(q, octaves, w_DF.dtype.name)
        difference, possible = differ(p, bits)
        lengths, firsts, total = np.empty(LEVELS, np.int32), np.empty(LEVELS, np.int32), 0
        # One sort by level; then the differences of a level are next to each other.
        order = np.argsort(p.level, axis=None, kind="stable")
        ends = np.searchsorted(p.level.ravel()[order], np.arange(1, LEVELS + 1))
        difference, possible = difference.ravel()[order], possible.ravel()[order]
        for level, part in enumerate(map(slice, [0, *ends[:-1]], ends)):
            of_level = difference[part][possible[part]]
            lost = part.stop - part.start - of_level.size
            lengths[level], firsts[level], cost = _window(of_level, lost, code)
            total += cost
        if best is None or total < best[0]:
            best = total, Table(octaves, lengths, firsts)
    return best[1]


def _window(difference: np.ndarray, lost: int, code: str) -> tuple[int, int, int]:
    """(length, first difference, bits) of one level's best window.

    `lost` is the number of weights that no window can hold.
    """
    allowed = (8, 16) if code == "planes" else range(17)
    if difference.size == 0:
        return allowed[0], -(1 << allowed[0] >> 1), (allowed[0] + PATCH_BITS) * lost
    low = int(difference.min())
    counts = np.bincount(difference - low)
    upto = np.concatenate([[0], np.cumsum(counts)])
    found = None
    for length in allowed:
        spare = (1 << length) - counts.size
        if spare >= 0:  # all fit: centre them, because the sample does not have all values
            first, inside = low - spare // 2, difference.size
        else:
            held = upto[1 << length :] - upto[: -(1 << length)]
            inside = int(held.max())
            # Of equally good windows, the middle one.
            first = low + int(np.median(np.flatnonzero(held == inside)))
        cost = (difference.size + lost) * length + PATCH_BITS * (difference.size + lost - inside)
        if found is None or cost < found[2]:
            found = length, first, cost
        if spare >= 0:
            break
    return found


def encode(
    w_DF: np.ndarray, substitute: Quantized, code: str = "levels", name: str = "the matrix"
) -> Residual:
    """The residual, as NumPy arrays, that restores every bit of `w_DF` [in, out].

    Raises ValueError if the matrix and the substitute do not fit together, or for an unknown code.
    """
    if code not in CODES:
        raise ValueError(f"code {code!r} is not one of {', '.join(CODES)}")
    check_pair(name, substitute, w_DF.shape, w_DF.dtype.name)
    q, w_DF = _host(substitute), np.asarray(w_DF)
    table = choose(*sample(w_DF, q), code)
    rows, across = tiles(q.shape, q.group)
    planes, F = code == "planes", q.shape[1]
    low = np.empty((rows, q.group, F), np.uint8) if planes else None

    def one(slab):
        start, part = slab
        p = _predict(part, table.octaves, w_DF.dtype.name)
        count = p.level.shape[0]
        bits = patterns(w_DF[start * q.group : (start + count) * q.group]).reshape(p.level.shape)
        difference, possible = differ(p, bits)
        length = table.lengths[p.level]
        x = difference - table.firsts[p.level]
        x[(x >> length != 0) | ~possible] = 0
        wrong = np.nonzero(complete(p, x + table.firsts[p.level], np) != bits)
        found, each = _patches(wrong, bits[wrong], count, across)
        if planes:
            low[start : start + count] = x & 255
            x, length = x >> 8, length - 8
        position, words = _positions(length, across, 8 if planes else 32)
        return _packed(x, position, int(words[-1]), planes), words[:-1], found, each

    threads = max(1, min(os.cpu_count(), AT_ONCE // max(SLAB, q.group * F)))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        stream, offsets, patches, patched = map(list, zip(*pool.map(one, _slabs(q)), strict=True))
    words = _assemble(table, stream, offsets, patches, patched, planes)
    low = low.reshape(q.shape) if planes else None
    return Residual(words, low, tuple(q.shape), w_DF.dtype.name, sum(map(len, patches)))


def _patches(wrong, bits, count: int, across: int) -> tuple[np.ndarray, np.ndarray]:
    """(patches of a slab, in the order of its tiles; the number of patches of each tile)."""
    group, row, column = wrong
    tile = group * across + column // COLUMNS
    order = np.argsort(tile, kind="stable")
    found = ((row * COLUMNS + column % COLUMNS) << 16 | bits).astype(np.uint32)
    return found[order], np.bincount(tile, minlength=count * across)


def _positions(length_QgF: np.ndarray, across: int, unit: int):
    """(first bit of every weight in the slab's stream, first unit of every tile and the end)."""
    Q, g, F = length_QgF.shape
    padded = np.pad(length_QgF, ((0, 0), (0, 0), (0, across * COLUMNS - F)))
    upto = np.cumsum(padded.reshape(Q, g, across, COLUMNS), axis=-1, dtype=np.int32)
    row = upto[..., -1]
    before = np.cumsum(row, axis=1, dtype=np.int32) - row
    units = -(-row.sum(axis=1) // unit).ravel()
    starts = np.concatenate([[0], np.cumsum(units)])
    tile = starts[:-1].reshape(Q, 1, across) * unit
    upto += (before + tile).astype(np.int32)[..., None]
    return upto.reshape(Q, g, -1)[..., :F] - length_QgF, starts


def _packed(x, position, units: int, planes: bool) -> np.ndarray:
    """The stream of a slab: bytes for planes, else words in which each weight has its own bits."""
    x, position = x.ravel(), position.ravel()
    if planes:
        out = np.zeros(units, np.uint8)
        out[position[x > 0] >> 3] = x[x > 0]
        return out
    # Sums below 2^32 are exact in the float64 of bincount.
    word, shifted = position >> 5, x.astype(np.uint64) << (position & 31).astype(np.uint64)
    low = np.bincount(word, (shifted & 0xFFFFFFFF).astype(np.float64), units + 1)
    high = np.bincount(word + 1, (shifted >> 32).astype(np.float64), units + 2)
    return (low[:units] + high[:units]).astype(np.uint32)


def _assemble(table, stream, offsets, patches, patched, planes) -> np.ndarray:
    """All parts of `Residual.words`, [n, LANES]."""
    sizes = np.cumsum([0] + [len(part) for part in stream])
    patched = np.cumsum(np.concatenate([[0], *patched]))
    begin = LANES + 2 * len(patched) - 1
    first = begin * (4 if planes else 1)
    offsets = np.concatenate([part + base for part, base in zip(offsets, sizes)]) + first
    stream = np.concatenate(stream)
    if planes:
        stream = np.pad(stream, (0, -len(stream) % 4)).view(np.uint32)
    head, patches = table.head, np.concatenate(patches)
    head[FIRST_PATCH] = begin + len(stream)
    parts = head, offsets.astype(np.uint32), patched.astype(np.uint32), stream, patches
    words = np.concatenate(parts)
    # At least one more word: a decoder that reads a weight's last bits may read the next word too.
    return np.pad(words, (0, LANES - len(words) % LANES)).reshape(-1, LANES)


def decode_numpy(residual: Residual, substitute: Quantized) -> np.ndarray:
    """The matrix [D, F], bit by bit as it was encoded. All decoders must give the same result."""
    q = _host(substitute)
    check_pair("the residual", q, residual.shape, residual.dtype)
    words = np.asarray(residual.words).ravel()
    table, planes = Table.of(words), residual.code == "planes"
    rows, across = tiles(q.shape, q.group)
    offsets = words[LANES : LANES + rows * across].astype(np.int64).reshape(rows, 1, across)
    out = np.empty((rows, q.group, q.shape[1]), np.uint16)
    for start, part in _slabs(q):
        p = _predict(part, table.octaves, residual.dtype)
        count = p.level.shape[0]
        length = table.lengths[p.level] - (8 if planes else 0)
        position, starts = _positions(length, across, 8 if planes else 32)
        # From places in the slab's own stream to the places that the offsets give for each tile.
        unit = 8 if planes else 32
        tile = starts[:-1].reshape(count, 1, across)
        moved = (offsets[start : start + count] - tile) * unit
        position = position + np.repeat(moved, COLUMNS, axis=-1)[..., : q.shape[1]]
        two = words[position >> 5].astype(np.uint64)
        two |= words[(position >> 5) + 1].astype(np.uint64) << np.uint64(32)
        x = (two >> (position & 31).astype(np.uint64)).astype(np.int32) & ((1 << length) - 1)
        if planes:
            low = residual.low_DF[start * q.group : (start + count) * q.group]
            x = (x << 8) | np.asarray(low).reshape(x.shape).astype(np.int32)
        out[start : start + count] = complete(p, x + table.firsts[p.level], np)
    count, first = rows * across, int(words[FIRST_PATCH])
    patched = words[LANES + count : LANES + 2 * count + 1].astype(np.int64)
    patch = words[first : first + patched[-1]].astype(np.int64)
    tile = np.repeat(np.arange(count), np.diff(patched))
    row, column = (patch >> 16) // COLUMNS, (patch >> 16) % COLUMNS
    out[tile // across, row, tile % across * COLUMNS + column] = patch & 0xFFFF
    return out.view(jax.numpy.dtype(residual.dtype)).reshape(q.shape)
