"""Group size, bits and ranks for a number of cache bytes a token, chosen by predicted error.

A plan weighs the loss by truncation against the loss by quantization for every item: the keys or
the values of one group of heads in one layer. `palu_jax.forecast` has the formula, `palu_jax.mixed`
the choice of two classes of bits for each item.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from llm_jax.config import Config
from pallas_kernels.lowrank_attention.cost import decode_seconds
from pallas_kernels.lowrank_attention.latents import LATENT_BITS
from palu_jax.forecast import predicted_error
from palu_jax.format import Classes, LatentFormat, MixedFormat
from palu_jax.mixed import best_within, options
from palu_jax.rank import (
    META,
    RankError,
    Ranks,
    by_layer,
    bytes_per_token,
    group_sizes,
    water_fill,
)


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """One way to spend a budget of cache bytes."""

    groups: tuple[int, ...]
    """The number of kv heads in each group."""
    ranks: Ranks
    key_bits: int
    """Of all keys; where there are classes, the most of any."""
    value_bits: int
    error: float
    """Predicted change of the loss, in nats a token."""
    bytes_per_token: int
    """In the caches of all layers."""
    seconds: float | None
    """Predicted time of one decode step's attention in all layers; None where no kernel runs."""
    classes: Classes | None = None
    """The classes of every group's latents, where they are not of one number of bits."""

    def format(self, base: LatentFormat | None = None) -> LatentFormat:
        """How a `palu_jax.Recipe` stores latents by this plan; all but the bits is from `base`."""
        base = base or LatentFormat()
        if self.classes is None:
            return dataclasses.replace(base, key_bits=self.key_bits, value_bits=self.value_bits)
        return MixedFormat(**(vars(base) | dict(classes=self.classes)))

    def mean_bits(self) -> tuple[float, float]:
        """Bits of a latent of keys and of values, on average."""
        if self.classes is None:
            return self.key_bits, self.value_bits
        sides = zip(*self.classes, strict=True)
        each = [[c for groups in side for group in groups for c in group] for side in sides]
        mean = lambda found: sum(r * b for r, b in found) / sum(r for r, _ in found)
        return mean(each[0]), mean(each[1])


def plan_cache(
    energies: Mapping[int, Sequence],
    cfg: Config,
    budget: float,
    multiple: int = 4,
    bits: Sequence[int] = LATENT_BITS,
    tokens: int = 65536,
    slowest: float | None = None,
    classes: int = 1,
) -> list[CachePlan]:
    """Every combination of group size and bits that fits `budget` bytes a token, the best first.

    With two `classes` there is one more plan for each group size, in which every item has bits of
    its own, of two sizes where that pays. The kernels do not run it, so `slowest` leaves it out.

    `energies` has for each group size (in kv heads) a list over layers of (eigenvalues of the key
    groups, eigenvalues of the value groups), each largest first. `slowest` limits the seconds that
    a decode step's attention over `tokens` slots takes by the cost model of the kernels;
    combinations that no kernel runs are then left out. Raises RankError if nothing fits.
    `palu_jax.Compressor.energies` makes the energies, and its `plans` calls this.
    """
    if not 0 < budget < math.inf:
        raise RankError(f"budget is {budget}; expected bytes a token above 0")
    if slowest is not None and not 0 < slowest < math.inf:
        raise RankError(f"slowest is {slowest}; expected seconds above 0")
    found, least = [], math.inf
    for group, layers in energies.items():
        groups = group_sizes(cfg.kv_heads, group)
        parts = [part for layer in layers for side in layer for part in side]
        full = [len(part) for part in parts]
        if any(size % multiple for size in full):
            raise RankError(
                f"ranks in steps of {multiple} do not reach the full rank {min(full)} of a group"
            )
        curves = {b: [predicted_error(part, b) for part in parts] for b in set(bits)}
        items = _tied(groups, cfg.layers)
        if classes == 2 and slowest is None:
            found += _mixed(groups, parts, items, budget, multiple, bits)
        for pair in itertools.product(bits, bits):
            of = [pair[side] for side in np.tile(np.repeat([0, 1], len(groups)), cfg.layers)]
            chosen = [sum(curves[of[i]][i] for i in item) for item in items]
            costs = np.array([sum(of[i] / 8 for i in item) for item in items])
            fixed = sum(META * (b < 16) for b in of)
            form = LatentFormat(*pair)
            smallest = fixed + multiple * costs.sum()
            least = min(least, smallest)
            if smallest > budget:
                continue
            at = _fill(chosen, costs, items, len(groups), budget, fixed, multiple, form)
            if at is None:
                continue
            ranks = _spread(at, items, len(groups))
            seconds = step_seconds(cfg, groups, ranks, form, tokens)
            if slowest is not None and (seconds is None or seconds > slowest):
                continue
            error = sum(c[r] for c, r in zip(chosen, at, strict=True))
            size = bytes_per_token(ranks, form)
            found.append(CachePlan(groups, ranks, *pair, float(error), size, seconds))
    if not found:
        limit = "" if slowest is None else f" and {slowest:g} s a step over {tokens} tokens"
        raise RankError(
            f"no ranks fit {budget:g} bytes a token{limit}; the least possible is {least:g} bytes"
        )
    return sorted(found, key=lambda p: (p.error, p.bytes_per_token))


def _mixed(groups, parts, items, budget, multiple, bits) -> list[CachePlan]:
    """The plan with classes of bits; none where it does not fit."""
    low = sorted({b for b in bits if b < 16}, reverse=True)
    if not low:
        return []
    every = [options([parts[i] for i in item], multiple, low) for item in items]
    chosen = best_within(every, budget)
    if chosen is None:
        return []
    error, found = chosen
    each = iter(c for c, item in zip(found, items, strict=True) for _ in item)
    per_side = lambda: tuple(next(each) for _ in groups)
    classes = tuple((per_side(), per_side()) for _ in range(len(parts) // (2 * len(groups))))
    used = lambda side: {b for layer in classes for group in layer[side] for _, b in group}
    if len(used(0)) == len(used(1)) == 1:
        return []  # a plan of one class
    ranks = by_layer([sum(r for r, _ in c) for l in classes for s in l for c in s], len(groups))
    form = MixedFormat(classes=classes)
    size = bytes_per_token(ranks, form)
    return [CachePlan(groups, ranks, form.key_bits, form.value_bits, error, size, None, classes)]


def _tied(groups, layers: int) -> list[list[int]]:
    """Which items share a rank: the groups of one projection if they are of one size, because the
    kernels want equal ranks there.

    Items are counted layer by layer, keys before values, group by group.
    """
    n = len(groups)
    together = n if len(set(groups)) == 1 else 1
    return [list(range(i, i + together)) for i in range(0, 2 * n * layers, together)]


def _spread(at, items, groups: int) -> Ranks:
    return by_layer(np.repeat(at, [len(item) for item in items]), groups)


def _fill(curves, costs, items, groups, budget, fixed, multiple, form):
    """The ranks of the items with the least error within the budget; None where rounding leaves no
    room.

    Packed blocks are whole bytes: what rounding up adds is taken off the budget, and ranks are
    chosen again.
    """
    over = 0
    while True:
        try:
            at = water_fill(curves, costs, budget - fixed - over, multiple)
        except RankError:
            return None
        excess = bytes_per_token(_spread(at, items, groups), form) - budget
        if excess <= 0:
            return at
        over += excess


def step_seconds(
    cfg: Config, groups: Sequence[int], ranks: Ranks, form: LatentFormat, tokens: int
) -> float | None:
    """Predicted seconds of a decode step's attention in all layers, by the kernels' cost model.

    None where the kernels do not run: for 2 and 3 bits, for groups of different sizes or ranks, and
    for ranks that they do not take.
    """
    if min(form.key_bits, form.value_bits) < 4 or len(set(groups)) > 1:
        return None
    total = 0.0
    for k, v in ranks:
        for part, bits in ((k, form.key_bits), (v, form.value_bits)):
            if len(set(part)) > 1 or part[0] % (32 if bits == 4 else 16):
                return None
        pair = form.key_bits, form.value_bits
        total += decode_seconds(
            cfg.heads, cfg.kv_heads, cfg.head_dim, len(groups), k[0], v[0], pair, tokens
        )
    return total
