"""Plans against brute force, noise against the encoder, budgets against live arrays."""

import itertools
import types

import jax
import numpy as np
import pytest

from llm_jax.attention import caches_for
from llm_jax.testing import tiny_config, tiny_params
from palu_jax import forecast, planner, rank
from palu_jax.convert import Recipe, to_palu
from palu_jax.format import LatentFormat
from palu_jax.rank import RankError


def model(layers=1, kv_heads=1, head_dim=8, heads=None):
    return types.SimpleNamespace(
        layers=layers, kv_heads=kv_heads, head_dim=head_dim, heads=heads or kv_heads
    )


def energies(rng, layers, groups, size):
    side = lambda: [np.sort(rng.exponential(size=size) ** 3)[::-1] for _ in range(groups)]
    return [(side(), side()) for _ in range(layers)]


def cost_of(energy, r, bits):
    """The formula of the module's docstring, written out."""
    left = float(sum(energy[r:]))
    if bits == 16:
        return forecast.TRUNCATION * left
    kept = sum(np.sqrt(e) for e in energy[:r])
    noise = float(forecast.distortion(bits, [r])[0]) * kept**2 / r
    return forecast.TRUNCATION * left + forecast.NOISE * noise


@pytest.mark.parametrize("seed", range(3))
def test_the_best_plan_is_that_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    cfg, size = model(), 8
    found = {1: energies(rng, 1, 1, size)}
    budget = 18.0
    best = planner.plan_cache(found, cfg, budget, multiple=1, bits=(16, 4))[0]
    (k,), (v,) = found[1][0]
    every = []
    for kb, vb in itertools.product((16, 4), (16, 4)):
        for rk, rv in itertools.product(range(1, size + 1), repeat=2):
            used = rank.bytes_per_token((((rk,), (rv,)),), LatentFormat(kb, vb))
            if used <= budget:
                every.append(cost_of(k, rk, kb) + cost_of(v, rv, vb))
    # Greedy buying leaves at most the last steps unspent, so one rank of slack.
    looser = planner.plan_cache(found, cfg, budget + 4, multiple=1, bits=(16, 4))[0]
    assert looser.error <= min(every) + 1e-12 <= best.error + 2e-12
    assert best.error <= min(every) * 1.25 + 1e-12


@pytest.mark.slow
def test_plans_are_sorted_fit_and_have_predicted_what_they_say():
    rng = np.random.default_rng(7)
    cfg = model(layers=2, kv_heads=2, head_dim=16)
    found = {g: energies(rng, 2, 2 // g, 16 * g) for g in (1, 2)}
    plans = planner.plan_cache(found, cfg, 60, classes=1)
    assert [p.error for p in plans] == sorted(p.error for p in plans)
    assert {p.groups for p in plans} == {(1, 1), (2,)}
    for p in plans:
        form = LatentFormat(p.key_bits, p.value_bits)
        assert p.bytes_per_token == rank.bytes_per_token(p.ranks, form) <= 60
        assert all(len(set(part)) == 1 for layer in p.ranks for part in layer)
        want = 0.0
        for layer, sides in zip(p.ranks, found[p.groups[0]], strict=True):
            for part, side, bits in zip(layer, sides, (p.key_bits, p.value_bits), strict=True):
                want += sum(cost_of(e, r, bits) for e, r in zip(side, part, strict=True))
        np.testing.assert_allclose(p.error, want, rtol=1e-9)


def test_more_budget_is_never_worse_and_small_ones_take_fewer_bits():
    rng = np.random.default_rng(3)
    found = {4: energies(rng, 1, 1, 64)}
    cfg = model(kv_heads=4, head_dim=16)
    best = [planner.plan_cache(found, cfg, b)[0] for b in (16, 24, 48, 96, 256)]
    assert all(a.error >= b.error for a, b in itertools.pairwise(best))
    assert best[0].key_bits + best[0].value_bits < best[-1].key_bits + best[-1].value_bits


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_distortion(bits):
    """Between the sampled sizes; and by theory: a uniform step over the range of a Gaussian."""
    size = 96
    rng = np.random.default_rng(1)
    z = rng.standard_normal((4000, size))
    low, high = z.min(1, keepdims=True), z.max(1, keepdims=True)
    errors = []
    for share in LatentFormat(bits).shares(bits):
        middle, half = (low + high) / 2, (high - low) / 2 * share
        step = 2 * half / (2**bits - 1)
        code = np.clip(np.round((z - middle + half) / step), 0, 2**bits - 1)
        errors.append(((code * step + middle - half - z) ** 2).sum(1))
    want = np.min(errors, axis=0).sum() / (z**2).sum()
    np.testing.assert_allclose(forecast.distortion(bits, [size])[0], want, rtol=0.06)


def test_the_budget_is_that_of_the_live_arrays():
    cfg = tiny_config("qwen2", kv_heads=2)
    rng = np.random.default_rng(0)
    found = {2: energies(rng, cfg.layers, 1, 2 * cfg.head_dim)}
    best = planner.plan_cache(found, cfg, 40, bits=(4, 2))[0]
    recipe = Recipe(best.groups, best.ranks, "plain", best.format())
    palu = to_palu(tiny_params(cfg), cfg, recipe)
    caches = caches_for(palu, cfg, 1, 10)
    held = sum(a.nbytes for a in jax.tree.leaves(caches))
    assert held == 10 * best.bytes_per_token <= 400


@pytest.mark.slow
def test_time_limits_choose_among_what_the_kernels_run():
    rng = np.random.default_rng(5)
    cfg = model(layers=1, kv_heads=4, head_dim=64)
    found = {1: energies(rng, 1, 4, 64), 4: energies(rng, 1, 1, 256)}
    free = planner.plan_cache(found, cfg, 400, multiple=32)
    timed = [p for p in free if p.seconds is not None]
    assert any(p.seconds is None for p in free) and len(timed) > 3
    middle = sorted(p.seconds for p in timed)[len(timed) // 2]
    limited = planner.plan_cache(found, cfg, 400, multiple=32, slowest=middle)
    assert limited and all(p.seconds <= middle for p in limited)
    assert limited == [p for p in timed if p.seconds <= middle]
    for p in timed:
        assert min(p.key_bits, p.value_bits) >= 4
        assert all(r % 32 == 0 for layer in p.ranks for part in layer for r in part)


def test_groups_of_different_sizes_have_ranks_of_their_own():
    rng = np.random.default_rng(2)
    cfg = model(kv_heads=3, head_dim=8)
    sides = lambda: [np.sort(rng.random(n))[::-1] for n in (16, 8)]
    best = planner.plan_cache({2: [(sides(), sides())]}, cfg, 24, multiple=2)[0]
    assert best.groups == (2, 1) and best.seconds is None
    assert all(part[1] <= 8 for part in best.ranks[0])


def test_what_cannot_be_is_said():
    found = {1: energies(np.random.default_rng(0), 1, 1, 8)}
    with pytest.raises(RankError, match="no ranks fit 2 bytes a token; the least possible is 10"):
        planner.plan_cache(found, model(), 2, bits=(4, 2))
    with pytest.raises(RankError, match="1e-09 s a step over 65536"):
        planner.plan_cache(found, model(), 64, slowest=1e-9)
    with pytest.raises(RankError, match="steps of 3"):
        planner.plan_cache(found, model(), 64, multiple=3)
