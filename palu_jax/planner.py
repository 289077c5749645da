"""Group size, bits and ranks for a number of cache bytes a token, chosen by predicted error.

A plan weighs the loss by truncation against the loss by quantization for every item: the keys or
the values of one group of heads in one layer. An item has eigenvalues a_1 >= a_2 >= ...; its
latents are scaled to their fourth roots and rotated. Rank r at b bits is predicted to cost

    TRUNCATION sum_{j > r} a_j  +  NOISE D(b, r) (sum_{j <= r} a_j^(1/2))^2 / r,

where D is the mean squared error of a Gaussian block of r latents over its variance. Under the
gradient objective this is a change of the loss in nats a token, so items can be compared.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.config import Config
from pallas_kernels.lowrank_attention.cost import decode_seconds
from pallas_kernels.lowrank_attention.latents import LATENT_BITS, dense
from palu_jax.latent import LatentFormat, quantize_latents
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
"""Change of the loss over the metric's error, fitted to seven conversions of SmolLM2 (truncation
2.5 to 3.7, noise 0.24 to 0.29). Truncation drops the same subspace in every token, so its errors
add up; rounding errors of different tokens average out."""


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """One way to spend a budget of cache bytes."""

    groups: tuple[int, ...]
    """The number of kv heads in each group."""
    ranks: Ranks
    key_bits: int
    value_bits: int
    error: float
    """Predicted change of the loss, in nats a token."""
    bytes_per_token: int
    """In the caches of all layers."""
    seconds: float | None
    """Predicted time of one decode step's attention in all layers; None where no kernel runs."""


def plan_cache(
    energies: Mapping[int, Sequence],
    cfg: Config,
    budget: float,
    multiple: int = 4,
    bits: Sequence[int] = LATENT_BITS,
    tokens: int = 65536,
    slowest: float | None = None,
) -> list[CachePlan]:
    """Every combination of group size and bits that fits `budget` bytes a token, the best first.

    `energies` has for each group size (in kv heads) a list over layers of (eigenvalues of the key
    groups, eigenvalues of the value groups), each largest first. `slowest` limits the seconds that
    a decode step's attention over `tokens` slots takes by the cost model of the kernels;
    combinations that no kernel runs are then left out. Raises RankError if nothing fits.
    `palu_jax.Compressor.plans` makes the energies and calls this.
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
        curves = {b: [predicted_error(part, b) for part in parts] for b in set(bits)}
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
            found.append(CachePlan(groups, ranks, *pair, float(error), size, seconds))
    if not found:
        limit = "" if slowest is None else f" and {slowest:g} s a step over {tokens} tokens"
        raise RankError(
            f"no ranks fit {budget:g} bytes a token{limit}; the least possible is {least:g} bytes"
        )
    return sorted(found, key=lambda p: (p.error, p.bytes_per_token))


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


def predicted_error(energy_F: Any, bits: int) -> np.ndarray:
    """[F + 1]: the change of the loss if 0 … F latents of an item are kept with `bits` bits."""
    energy = np.asarray(energy_F, np.float64)
    cost = TRUNCATION * truncation(energy)
    if bits == 16:
        return cost
    count = np.arange(1, len(energy) + 1)
    kept = np.cumsum(np.sqrt(np.maximum(energy, 0))) ** 2 / count
    return cost + np.concatenate([[0.0], NOISE * distortion(bits, count) * kept])


def distortion(bits: int, size: Any) -> np.ndarray:
    """D(b, r) for block sizes r: the mean squared error of `quantize_latents` over the variance of
    Gaussian blocks.

    It is measured on a fixed sample for powers of two, and interpolated in log r.
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
    packed = jax.jit(quantize_latents, static_argnums=(1, 2, 3))(
        z, bits, (size,), LatentFormat(bits).shares(bits)
    )
    back = np.asarray(jax.jit(dense, static_argnums=1)(packed, "float32"))
    return float(np.mean((back - z) ** 2) / np.mean(z**2))
