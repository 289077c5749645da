"""How many ranks each projection keeps: the same share everywhere, shares by Fisher information, or
the ranks that reduce the error most.
"""

import heapq
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from pallas_kernels.lowrank_attention.latents import block_bytes, each_block
from palu_jax import PaluError
from palu_jax.calibration import Statistics
from palu_jax.format import LatentFormat

Ranks = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""For each layer the ranks of its key groups and the ranks of its value groups."""
META = 4
"""Bytes of a block's step and offset."""


class RankError(PaluError):
    """Impossible ranks; the message says what is possible."""


def group_sizes(kv_heads: int, group: int) -> tuple[int, ...]:
    """The number of kv heads in each group, for groups of `group` heads.

    In Palu's words, 1 head is M-LRD, all heads are J-LRD, and numbers between are G-LRD. The last
    group is smaller where `group` does not divide the heads. Raises RankError.
    """
    if not 1 <= group <= kv_heads:
        raise RankError(
            f"groups of {group} kv heads are impossible; this model has {kv_heads}, so 1 to "
            f"{kv_heads}"
        )
    whole, rest = divmod(kv_heads, group)
    return (group,) * whole + ((rest,) if rest else ())


def _check(keep: float, multiple: int, full: Sequence[int]) -> None:
    if not 0 < keep <= 1:
        raise RankError(f"the share of ranks kept is {keep}; expected above 0 and at most 1")
    if multiple < 1 or any(size % multiple for size in full):
        raise RankError(
            f"ranks in steps of {multiple} do not reach the full rank {min(full)} of a group"
        )


def distribute(shares: Any, caps: Any, total: int, multiple: int) -> np.ndarray:
    """Ranks [n] near total * share: multiples of `multiple`, at least one of them, at most the cap.

    What a cap takes away goes to the others in proportion. Rounding is by the largest remainder, so
    the sum is `total` rounded down to a multiple (or what floors and caps allow). Raises RankError
    where `total` is too small.
    """
    shares, caps = np.asarray(shares, np.float64), np.asarray(caps) // multiple
    units = min(int(total // multiple), int(caps.sum()))
    if units < len(caps):
        raise RankError(
            f"{total} ranks in steps of {multiple} are too few for {len(caps)} groups; keep more"
        )
    lowest, highest = 0.0, 1.0
    level = lambda x: np.clip(shares * x, 1, caps)
    while level(highest).sum() < units and highest < 1e300:
        highest *= 2
    for _ in range(200):
        middle = (lowest + highest) / 2
        lowest, highest = (middle, highest) if level(middle).sum() < units else (lowest, middle)
    wanted = level(highest)
    found = np.clip(np.floor(wanted + 1e-9), 1, caps).astype(int)
    order = np.argsort(found - wanted, kind="stable")  # largest remainder first
    while found.sum() != units:
        step = 1 if found.sum() < units else -1
        room = [i for i in order[::step] if (found[i] < caps[i] if step > 0 else found[i] > 1)]
        for i in room[: abs(units - found.sum())]:
            found[i] += step
    return found * multiple


def uniform_ranks(
    layers: int,
    groups: Sequence[int],
    head_dim: int,
    keep: float,
    multiple: int = 4,
    split: tuple[float, float] = (1, 1),
) -> Ranks:
    """`Ranks` that keep the share `keep` in every layer and group; `split` is R_k : R_v.

    Every group gets the largest multiple of `multiple` that its share allows, and at least one.
    Raises RankError.
    """
    full = [heads * head_dim for heads in groups]
    _check(keep, multiple, full)
    k, v = (2 * keep * part / sum(split) for part in split)
    if (excess := max(k, v) - 1) > 0:  # the other takes what does not fit
        k, v = (1.0, v + excess) if k > v else (k + excess, 1.0)
    below = lambda share, size: max(int(share * size / multiple + 1e-9), 1) * multiple
    one = tuple(tuple(below(share, size) for size in full) for share in (k, v))
    return (one,) * layers


def fisher_ranks(
    statistics: Statistics,
    groups: Sequence[int],
    head_dim: int,
    keep: float,
    multiple: int = 4,
    per: Literal["projection", "group"] = "projection",
) -> Ranks:
    """`Ranks` in proportion to Fisher information (Palu's search).

    The score of a projection is the mean, over its weights, of the square root of their Fisher
    information. With `per` projection (Palu's default) a projection's ranks are divided evenly
    among its groups; with `per` group each group has a score. Two differences to the official code:
    labels are shifted once, and ranks lost to rounding or caps go to other projections, so that
    `keep` is met. Raises RankError.
    """
    full = [heads * head_dim for heads in groups]
    _check(keep, multiple, full)
    if not statistics.gradients:
        raise RankError("Fisher information needs gradients; calibrate with gradients=True")
    scores = []
    for layer in statistics.layers:
        for information in (layer.fisher_k_DF, layer.fisher_v_DF):
            root = np.sqrt(np.asarray(information, np.float64))
            edges = np.cumsum([0, *full])
            parts = [root[:, a:b].mean() for a, b in itertools.pairwise(edges)]
            scores.append(np.full(len(full), root.mean()) if per == "projection" else parts)
    weights = np.asarray(full) / sum(full)  # a larger group gets more of its projection's share
    shares = (np.asarray(scores) * weights).reshape(-1)
    caps = np.tile(full, len(scores))
    found = distribute(shares, caps, round(keep * caps.sum()), multiple)
    return by_layer(found, len(groups))


def by_layer(flat: Any, groups: int) -> Ranks:
    """`Ranks` from a flat row: layer by layer, keys before values, group by group."""
    table = np.asarray(flat).reshape(-1, 2, groups)
    return tuple(tuple(tuple(int(r) for r in part) for part in layer) for layer in table)


def water_fill(
    curves: Sequence[np.ndarray], costs: np.ndarray, budget: float, multiple: int = 4
) -> np.ndarray:
    """Ranks [n] with the least total error whose cost stays within the budget.

    `curves[i][r]` is the error of item i at rank r = 0 … full; `costs[i]` is the price of one of
    its ranks. Each step buys `multiple` ranks of the item whose error falls most for the price. For
    convex curves, such as sums of discarded eigenvalues, this is optimal up to the last step; any
    other curve counts as its convex hull. Raises RankError where the budget is too small.
    """
    hulls = [_hull(np.asarray(c, np.float64)[::multiple]) for c in curves]
    at = np.ones(len(curves), int)
    left = budget - multiple * float(np.sum(costs))
    if left < -1e-9:
        raise RankError(
            f"a budget of {budget:g} is below the {budget - left:g} that {multiple} ranks of each "
            "item cost"
        )
    gain = lambda i: (hulls[i][at[i]] - hulls[i][at[i] + 1]) / costs[i]
    heap = [(-gain(i), i) for i in range(len(curves)) if len(hulls[i]) > 2]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        if costs[i] * multiple > left + 1e-9:
            continue
        at[i] += 1
        left -= costs[i] * multiple
        if at[i] + 1 < len(hulls[i]):
            heapq.heappush(heap, (-gain(i), i))
    return at * multiple


def _hull(curve) -> np.ndarray:
    """The largest convex curve that is nowhere above the given one."""
    kept = [0]
    for i in range(1, len(curve)):
        while len(kept) > 1 and (curve[kept[-1]] - curve[kept[-2]]) * (i - kept[-1]) >= (
            curve[i] - curve[kept[-1]]
        ) * (kept[-1] - kept[-2]):
            kept.pop()
        kept.append(i)
    return np.interp(np.arange(len(curve)), kept, curve[kept])


def truncation(energy: Any) -> np.ndarray:
    """The error at ranks 0 … full, [F + 1], from F eigenvalues in descending order."""
    return np.concatenate([np.cumsum(np.asarray(energy)[::-1])[::-1], [0.0]])


def error_ranks(
    spectra: Sequence[Any], groups: Sequence[int], head_dim: int, keep: float, multiple: int = 4
) -> Ranks:
    """`Ranks` with the least total error for a share of all ranks: water-filling over all spectra.

    `spectra` are the `palu_jax.convert.Spectra` of all layers. Errors of different layers, and
    errors of keys and of values, can be compared only under the gradient objective: there all are
    changes of the loss. Raises RankError.
    """
    full = [heads * head_dim for heads in groups]
    _check(keep, multiple, full)
    curves = [
        truncation(s.energy_F) for layer in spectra for part in (layer.k, layer.v) for s in part
    ]
    total = sum(len(c) - 1 for c in curves)
    return by_layer(water_fill(curves, np.ones(len(curves)), keep * total, multiple), len(groups))


def share_kept(ranks: Ranks, groups: Sequence[int], head_dim: int) -> float:
    """The share of all ranks that these keep."""
    full = 2 * len(ranks) * sum(groups) * head_dim
    return sum(sum(part) for layer in ranks for part in layer) / full


def bytes_per_token(
    ranks: Ranks, format: LatentFormat, mean_split: bool = False, size: int = 2
) -> int:
    """Bytes that a token takes in the caches of all layers, with steps and offsets.

    `size` is the number of bytes of an unquantized latent. The exact tokens of sinks and window are
    not counted.
    """
    total = 0
    for i, layer in enumerate(ranks):
        total += size * mean_split
        for side, part in enumerate(layer):
            for block, bits in each_block(*format.layer(i).layout(side, part)):
                total += size * block if bits == 16 else block_bytes(block, bits) + META
    return total
