"""Group size, bits and ranks for a number of cache bytes a token, by predicted error.

A plan weighs what truncation loses against what quantization loses, for every item (the keys or the
values of one group of heads in one layer). With eigenvalues a_1 >= a_2 >= ... of an item, latents
scaled to their fourth roots and rotated, rank r at b bits is predicted to cost

    TRUNCATION sum_{j > r} a_j  +  NOISE D(b, r) (sum_{j <= r} a_j^(1/2))^2 / r,

D being the mean squared error of a Gaussian block of r latents over its variance. Items compare
under the gradient objective, where this is a change of the loss in nats a token.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from llm_jax.config import Config
from pallas_kernels.lowrank_attention.cost import decode_seconds
from pallas_kernels.lowrank_attention.latents import BITS, dense
from palu_jax.latent import LatentFormat, encode
from palu_jax.rank import (
    META,
    RankError,
    Ranks,
    by_layer,
    bytes_per_token,
    group_sizes,
    truncation,
    water_fill,
)

TRUNCATION, NOISE = 3.1, 0.27
"""Change of the loss over what the metric says, fitted to seven conversions of SmolLM2 (truncation
2.5 to 3.7, noise 0.24 to 0.29; docs/decisions.md). What truncation drops is the same subspace in
every token and adds up, rounding errors of different tokens average out."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to spend a budget."""

    groups: tuple[int, ...]
    ranks: Ranks
    key_bits: int
    value_bits: int
    error: float
    """Predicted change of the loss, in nats a token."""
    bytes_per_token: int
    seconds: float | None
    """Predicted time of one decode step's attention over all layers; None where no kernel runs."""


def plan(
    energies: Mapping[int, Sequence],
    cfg: Config,
    budget: float,
    multiple: int = 4,
    bits: Sequence[int] = BITS,
    tokens: int = 65536,
    slowest: float | None = None,
) -> list[Plan]:
    """Every combination of group size and bits that fits `budget` bytes a token, the best first.

    `energies` has, for each group size (kv heads), a list over layers of (energies of the key
    groups, energies of the value groups), each largest first. `slowest`: seconds that a step's
    attention over `tokens` slots may take by the cost model of the kernels; combinations that no
    kernel covers are then left out. RankError if nothing fits.
    """
    found, least = [], math.inf
    for group, layers in energies.items():
        groups = group_sizes(cfg.kv_heads, group)
        parts = [part for layer in layers for side in layer for part in side]
        full = [len(part) for part in parts]
        if any(size % multiple for size in full):
            raise RankError(
                f"ranks in steps of {multiple} do not reach the full rank {min(full)} of a group"
            )
        curves = {b: [predicted(part, b) for part in parts] for b in set(bits)}
        items = _tied(groups, cfg.layers)
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
            found.append(Plan(groups, ranks, *pair, float(error), size, seconds))
    if not found:
        limit = "" if slowest is None else f" and {slowest:g} s a step over {tokens} tokens"
        raise RankError(
            f"no ranks fit {budget:g} bytes a token{limit}; the least possible is {least:g} bytes"
        )
    return sorted(found, key=lambda p: (p.error, p.bytes_per_token))


def _tied(groups, layers: int) -> list[list[int]]:
    """Which items share a rank: the groups of a projection, as the kernels want it, if of one size.

    Items count layer by layer, keys before values, group by group.
    """
    n = len(groups)
    together = n if len(set(groups)) == 1 else 1
    return [list(range(i, i + together)) for i in range(0, 2 * n * layers, together)]


def _spread(at, items, groups: int) -> Ranks:
    return by_layer(np.repeat(at, [len(item) for item in items]), groups)


def _fill(curves, costs, items, groups, budget, fixed, multiple, form):
    """Ranks of the items with least error within the budget; None where rounding leaves no room.

    Packed blocks are whole bytes, so what rounding up added is taken off and tried again.
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


def step_seconds(cfg: Config, groups, ranks: Ranks, form: LatentFormat, tokens: int):
    """Predicted seconds of a decode step's attention over all layers, by the kernels' cost model.

    None where the kernels do not run: 2 and 3 bits, groups of different sizes or ranks, and ranks
    that they do not take.
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


def predicted(energy_F, bits: int) -> np.ndarray:
    """The change of the loss if 0 … F latents of an item are kept, at so many bits, [F + 1]."""
    energy = np.asarray(energy_F, np.float64)
    cost = TRUNCATION * truncation(energy)
    if bits == 16:
        return cost
    count = np.arange(1, len(energy) + 1)
    kept = np.cumsum(np.sqrt(np.maximum(energy, 0))) ** 2 / count
    return cost + np.concatenate([[0.0], NOISE * distortion(bits, count) * kept])


def distortion(bits: int, size) -> np.ndarray:
    """D(b, r): mean squared error over variance of `encode` on Gaussian blocks of r latents.

    Measured on a fixed sample at powers of two and interpolated in log r.
    """
    if bits == 16:
        return np.zeros(np.shape(size))
    size = np.asarray(size, np.float64)
    powers = np.arange(2, max(3, math.ceil(math.log2(size.max()))) + 1)
    sampled = [_sampled(bits, int(p)) for p in powers]
    return np.exp(np.interp(np.log2(size), powers, np.log(sampled)))


@functools.cache
def _sampled(bits: int, power: int) -> float:
    size = 2**power
    z = np.random.default_rng(power).standard_normal((max(16, 2**14 // size), size))
    z = z.astype(np.float32)
    packed = jax.jit(encode, static_argnums=(1, 2, 3))(
        z, bits, (size,), LatentFormat(bits).shares(bits)
    )
    back = np.asarray(jax.jit(dense, static_argnums=1)(packed, "float32"))
    return float(np.mean((back - z) ** 2) / np.mean(z**2))
