"""Two classes of bits for every item: the ranks and bits of both with the least predicted error.

Every item has a list of options: one class of r1 latents in b1 bits, or behind it a second class of
r2 latents in fewer bits. Those on the convex hull of error over bytes are bought in the order of
what they save a byte, which is what one price of a byte for all items gives; what is left of the
budget then buys the best options beside the hull.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from pallas_kernels.lowrank_attention.latents import block_bytes
from palu_jax.forecast import SECOND, TRUNCATION, rounding
from palu_jax.format import GroupClasses
from palu_jax.rank import META, truncation

STEPS = 64
"""The most different ranks of an item that are weighed; wider items take larger steps."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What an item may be: none costs more than a later one, and none errs less."""

    bytes_n: np.ndarray
    error_n: np.ndarray
    choice_n4: np.ndarray
    """Rank and bits of the first class, rank and bits of the second one; the latter may be 0."""

    def classes(self, n: int) -> GroupClasses:
        """The classes of option n."""
        r1, b1, r2, b2 = map(int, self.choice_n4[n])
        return ((r1, b1), (r2, b2)) if r2 else ((r1, b1),)

    def hull(self) -> list[int]:
        """The options on the lower convex hull of error over bytes."""
        kept: list[int] = []
        slope = lambda a, b: (
            (self.error_n[b] - self.error_n[a]) / (self.bytes_n[b] - self.bytes_n[a])
        )
        for n in range(len(self.bytes_n)):
            while len(kept) > 1 and slope(kept[-2], kept[-1]) >= slope(kept[-1], n):
                kept.pop()
            kept.append(n)
        return kept


def options(energies: Sequence, multiple: int, bits: Sequence[int]) -> Options:
    """The options of groups that share their classes, from the eigenvalues of each, [F].

    `bits` are below 16 and fall. Ranks are multiples of `multiple`.
    """
    full = len(energies[0]) // multiple
    steps = np.linspace(0, full, min(full, STEPS) + 1)
    ranks = np.unique(np.round(steps).astype(int)) * multiple
    middle, end = (ranks[i] for i in np.triu_indices(len(ranks), 1))
    one, two = middle == 0, middle > 0
    found = []
    for b1 in bits:
        found.append(_priced(energies, end[one], b1, end[one], 0))
        found += [_priced(energies, middle[two], b1, end[two], b2) for b2 in bits if b2 < b1]
    used, error, choice = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((error, used))
    best = np.minimum.accumulate(error[order])
    order = order[np.concatenate([[True], error[order][1:] < best[:-1]])]
    return Options(used[order], error[order], choice[order])


def _priced(energies, middle, b1, end, b2):
    """(bytes, errors, choices) of a class up to `middle` and, with b2 bits, another up to `end`."""
    used = block_bytes(middle, b1) + META
    if b2:
        used = used + block_bytes(end - middle, b2) + META
    error = np.zeros(len(end))
    for energy in energies:
        error += TRUNCATION * truncation(np.asarray(energy, np.float64))[end]
        error += rounding(energy, np.zeros_like(middle), middle, b1)
        if b2:
            error += SECOND * rounding(energy, middle, end, b2)
    choice = np.stack(np.broadcast_arrays(middle, b1, end - middle, b2), 1)
    return used * len(energies), error, choice


def best_within(items: Sequence[Options], budget: float) -> tuple[float, list[GroupClasses]] | None:
    """(the least total error within `budget` bytes, the classes of each item); None where not even
    the smallest options fit."""
    at = np.zeros(len(items), int)
    left = budget - sum(int(item.bytes_n[0]) for item in items)
    if left < 0:
        return None
    steps = []
    for i, item in enumerate(items):
        for a, b in itertools.pairwise(item.hull()):
            more = item.bytes_n[b] - item.bytes_n[a]
            steps.append(((item.error_n[b] - item.error_n[a]) / more, i, b, more))
    stopped = set()
    for _, i, b, more in sorted(steps):
        if more > left or i in stopped:
            stopped.add(i)
        else:
            at[i], left = b, left - more
    while (step := _beside(items, at, left)) is not None:
        i, b = step
        left -= int(items[i].bytes_n[b] - items[i].bytes_n[at[i]])
        at[i] = b
    error = sum(float(item.error_n[n]) for item, n in zip(items, at, strict=True))
    return error, [item.classes(int(n)) for item, n in zip(items, at, strict=True)]


def _beside(items, at, left) -> tuple[int, int] | None:
    """(item, option) that saves most for what is left of the budget; None where none does."""
    found = []
    for i, (item, n) in enumerate(zip(items, at, strict=True)):
        last = int(np.searchsorted(item.bytes_n, item.bytes_n[n] + left, "right")) - 1
        if last > n:
            found.append((float(item.error_n[last] - item.error_n[n]), i, last))
    return min(found)[1:] if found else None
