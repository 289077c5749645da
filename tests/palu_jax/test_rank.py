"""Rank allocations against brute force, and their totals against budgets."""

import itertools

import numpy as np
import pytest

from palu_jax import rank
from palu_jax.convert import layer_spectra
from palu_jax.format import LatentFormat
from palu_jax.latent import PaluCache
from palu_jax.rank import RankError


def test_group_sizes():
    assert rank.group_sizes(8, 1) == (1,) * 8
    assert rank.group_sizes(8, 4) == (4, 4) and rank.group_sizes(3, 3) == (3,)
    assert rank.group_sizes(3, 2) == (2, 1)
    with pytest.raises(RankError, match="1 to 3"):
        rank.group_sizes(3, 4)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7, 1.0])
def test_uniform_ranks_have_one_sum_in_all_groups(keep):
    sums = set()
    for groups in ((3,), (1, 1, 1)):
        (layer,) = rank.uniform_ranks(1, groups, 64, keep, 16)
        sums.add((sum(layer[0]), sum(layer[1])))
        assert all(r % 16 == 0 and r <= 64 * g for part in layer for r, g in zip(part, groups))
    assert len({abs(a - round(keep * 192)) <= 48 for a, _ in sums}) == 1
    assert rank.uniform_ranks(2, (3,), 64, 0.5, 4, (1, 3)) == (((48,), (144,)),) * 2
    assert rank.uniform_ranks(1, (1,), 64, 0.9, 4, (1, 3)) == (
        ((48,), (64,)),
    )  # V takes what it can


@pytest.mark.parametrize("seed", range(20))
def test_distribute_meets_the_total_near_the_shares(seed):
    rng = np.random.default_rng(seed)
    n, multiple = 5, int(rng.choice([1, 4]))
    caps = rng.integers(4, 12, n) * multiple
    shares = rng.random(n) ** 3 + 1e-4
    total = int(rng.integers(n, caps.sum() // multiple + 1)) * multiple + int(multiple > 1)
    found = rank.distribute(shares, caps, total, multiple)
    assert found.sum() == total // multiple * multiple
    assert (found >= multiple).all() and (found <= caps).all() and (found % multiple == 0).all()
    free = (found > multiple) & (found < caps)
    if free.sum() > 1:  # in proportion, to within a multiple
        scale = found[free].sum() / shares[free].sum()
        assert (np.abs(found[free] - shares[free] * scale) <= 1.51 * multiple).all()


def test_fisher(tiny):
    cfg = tiny.cfg
    for per in ("projection", "group"):
        ranks = rank.fisher_ranks(tiny.statistics, (1, 1, 1), cfg.head_dim, 0.5, 2, per)
        assert rank.share_kept(ranks, (1, 1, 1), cfg.head_dim) == 0.5
    louder = tiny.statistics.layers[1]
    louder.fisher_v_DF[:] *= 9  # three times the score
    ranks = rank.fisher_ranks(tiny.statistics, (3,), cfg.head_dim, 0.4, 2)
    louder.fisher_v_DF[:] /= 9
    (a, b), (c, d) = ((k[0], v[0]) for k, v in ranks)
    assert d > 2 * max(a, b, c) and a + b + c + d == round(0.4 * 4 * 48) // 2 * 2


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("multiple", [1, 2])
def test_water_filling_is_optimal(seed, multiple):
    """Convex curves and equal prices: brute force finds nothing better."""
    rng = np.random.default_rng(seed)
    curves = [rank.truncation(np.sort(rng.random(6) ** 4)[::-1]) for _ in range(3)]
    budget = int(rng.integers(3, 19))
    budget = max(budget, 3 * multiple)
    found = rank.water_fill(curves, [1, 1, 1], budget, multiple)
    assert found.sum() <= budget
    steps = range(multiple, 7, multiple)
    best = min(
        sum(c[r] for c, r in zip(curves, some, strict=True))
        for some in itertools.product(steps, repeat=3)
        if sum(some) <= budget
    )
    got = sum(c[r] for c, r in zip(curves, found, strict=True))
    np.testing.assert_allclose(got, best, atol=1e-12)


def test_water_filling_minds_prices_and_bumps():
    flat = rank.truncation([1.0, 1, 1, 1])
    found = rank.water_fill([flat, flat], [1, 4], 8, 1)
    assert found.tolist() == [4, 1]  # the cheap one first
    bumpy = np.array([9.0, 9.0, 9.0, 0.0])  # nothing helps until the third
    assert rank.water_fill([bumpy, rank.truncation([4.0, 1, 1])], [1, 1], 4, 1).tolist() == [3, 1]
    with pytest.raises(RankError, match="below the 2"):
        rank.water_fill([flat, flat], [1, 1], 1, 1)


def test_by_error_takes_the_largest_eigenvalues(tiny):
    spectra = [
        layer_spectra(l.attn, tiny.cfg, (2, 1), "gradient", s)
        for l, s in zip(tiny.params.layers, tiny.statistics.layers, strict=True)
    ]
    ranks = rank.error_ranks(spectra, (2, 1), tiny.cfg.head_dim, 0.5, 1)
    assert abs(rank.share_kept(ranks, (2, 1), tiny.cfg.head_dim) - 0.5) < 0.01
    kept, lost = [], []
    for layer, found in zip(ranks, spectra, strict=True):
        for part, some in zip(layer, (found.k, found.v), strict=True):
            for r, s in zip(part, some, strict=True):
                kept += s.energy_F[1:r].tolist()
                lost += s.energy_F[r:].tolist()
    assert min(kept) >= max(lost) * (1 - 1e-9)


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
@pytest.mark.parametrize("lead", [False, True])
def test_bytes_per_token_are_the_live_ones(bits, lead):
    ranks = (((8, 5), (7, 6)), ((3, 3), (10, 2)))
    form = LatentFormat(bits, 4)
    caches = [PaluCache.empty(form, r, lead, 1, 16, 0, "bfloat16") for r in ranks]
    live = sum(a.nbytes for c in caches for a in (c.k.codes_BSP, c.v.codes_BSP))
    live += sum(a.nbytes for c in caches for l in (c.k, c.v) for a in (l.step_BSg, l.offset_BSg)
                if a is not None)  # fmt: skip
    live += sum(c.mean_coefficient_BS.nbytes for c in caches) if lead else 0
    assert rank.bytes_per_token(ranks, form, lead) == live / 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1, (3,), 64, 0.0), "share of ranks"),
        ((1, (3,), 64, 1.2), "share of ranks"),
        ((1, (3,), 64, 0.5, 7), "steps of 7"),
    ],
)
def test_impossible_ranks(arguments, words):
    with pytest.raises(RankError, match=words):
        rank.uniform_ranks(*arguments)
    with pytest.raises(RankError, match="too few"):
        rank.distribute([1, 1], [8, 8], 1, 1)
