"""What a step's gain means is learned; stopping by it is as good as the best rule there is."""

import numpy as np
import pytest

from subspec_jax.stop import PRIOR, Calibration, StopRule, features

GAINS = -np.geomspace(1e-6, 20, 60)
STEPS = np.arange(1, 13)


def truths():
    """Chances of acceptance by gain and step: two of the curve's own family and two of none."""
    curve = lambda weights: lambda g, s: 1 / (1 + np.exp(-(features(g, s) @ np.array(weights))))
    return {
        "sure": curve((3.0, 1.5, 0.5)),
        "hardly": curve((-1.0, 2.0, 2.0)),
        "as it says": lambda g, s: np.exp(g),
        "a cliff": lambda g, s: np.where(g > -0.2, 0.9, 0.1),
    }


def simulated(truth, rng, rounds, levels=12):
    """(gains, hits) of each round: gains fall with the step, and one draw decides all outcomes."""
    for _ in range(rounds):
        gains = -np.cumsum(rng.exponential(0.15, levels) * rng.integers(0, 2, levels)) - 1e-5
        chance = np.minimum.accumulate(truth(gains, np.arange(1, levels + 1)))
        yield gains, rng.random() < chance


@pytest.mark.parametrize("name", truths())
def test_calibration_finds_the_truth(name):
    """Where the data are: within 0.05, or 0.2 where the truth is no such curve."""
    truth, rng = truths()[name], np.random.default_rng(7)
    found, rounds = Calibration(), list(simulated(truth, rng, 600))
    assert found.weights.tolist() == list(PRIOR)
    gains, hits = map(np.concatenate, zip(*rounds))
    found.learn(gains, np.tile(STEPS, 600), hits)
    found.learn(rounds[0][0], STEPS, rounds[0][1])  # some steps of Newton's more
    error = np.abs(found.chance(gains, np.tile(STEPS, 600)) - truth(gains, np.tile(STEPS, 600)))
    assert error.mean() < (0.05 if name in ("sure", "hardly") else 0.2)


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_never_rises_with_less_gain_or_a_deeper_step(seed):
    """Whatever it is told, also nonsense."""
    rng, found = np.random.default_rng(seed), Calibration()
    for _ in range(40):
        levels = rng.integers(1, 12)
        gains = -rng.exponential(2.0, levels)
        nonsense = rng.random(levels) < (gains < -1) if seed % 2 else rng.random(levels) < 0.5
        found.learn(gains, np.arange(levels) + 1, nonsense)
        chance = found.chance(*np.meshgrid(GAINS, STEPS, indexing="ij"))
        assert np.isfinite(chance).all() and (chance >= 0).all() and (chance <= 1).all()
        assert (np.diff(chance, axis=0) <= 0).all() and (np.diff(chance, axis=1) <= 0).all()


def test_one_lucky_or_unlucky_round_changes_little():
    for hit in (True, False):
        found = Calibration()
        found.learn(np.full(6, -0.05), np.arange(6) + 1, np.full(6, hit))
        assert abs(found.chance(-0.05, 3) - Calibration().chance(-0.05, 3)) < 0.2


def test_old_rounds_are_forgotten():
    found, step = Calibration(decay=0.9), np.arange(8) + 1
    gains = -np.geomspace(1e-3, 1, 8)
    for hit in (True, False):
        for _ in range(60):
            found.learn(gains, step, np.full(8, hit))
        assert (found.chance(gains, step) > 0.5).all() == hit
    assert found.chance(gains, step).max() < 0.5


@pytest.mark.parametrize("chance", [0.02, 0.3, 0.5, 0.9, 0.99])
def test_the_least_gain_is_where_the_curve_has_that_chance(chance):
    found = Calibration()
    least_L = found.least_gain(chance, STEPS)
    assert (least_L[1:] >= least_L[:-1]).all()  # deeper steps must be surer
    some = np.isfinite(least_L)
    np.testing.assert_allclose(found.chance(least_L[some], STEPS[some]), chance, rtol=1e-6)
    assert (found.chance(0.0, STEPS[~some]) <= chance).all()


def test_the_least_gain_at_the_ends():
    found = Calibration()
    assert (found.least_gain(0.0, STEPS) == -np.inf).all()
    for chance in (1.0, 2.5):
        assert (found.least_gain(chance, STEPS) == np.inf).all()
    assert np.isfinite(found.least_gain(1e-12, STEPS)).all()


def test_the_break_even_point_is_a_ratio_of_decaying_means():
    stop = StopRule("auto", 8)
    assert stop.least_chance() == 0 and (stop.least_gain_L() == -np.inf).all()
    stop.learn((-0.1,) * 5, np.ones(5), seconds=2.0, tokens=6, draft_s=0.5)
    assert stop.least_chance() == pytest.approx(0.5 / 5 * 6 / 2.0)
    stop.learn((-0.1,) * 2, np.zeros(2), seconds=0.5, tokens=1, draft_s=0.1)
    mean = lambda old, new: 0.95 * old + 0.05 * new
    want = mean(0.5, 0.1) / mean(5, 2) * mean(6, 1) / mean(2.0, 0.5)
    assert stop.least_chance() == pytest.approx(want)
    assert stop.least_gain_L().dtype == np.float32 and stop.least_gain_L().shape == (8,)


def test_a_given_chance_needs_no_times():
    stop = StopRule(0.25, 3)
    assert stop.least_chance() == 0.25
    np.testing.assert_allclose(stop.calibration.chance(stop.least_gain_L(), [1, 2, 3]), 0.25, 1e-4)


def test_which_outcome_belongs_to_a_gain():
    """A forward pass buys the next step; where all nodes are forwarded, the step's own nodes."""
    for forwarded, want in ((False, [1, 0]), (True, [1, 1, 0])):
        stop, heard = StopRule(0.5, 3, forwarded), []
        stop.calibration.learn = lambda *pairs, heard=heard: heard.append(pairs)
        stop.learn((-0.1, -0.2, -0.3), np.array([1, 1, 0]), 1.0, 3, 0.1)
        (gains, steps, hits), known = heard[0], len(want)
        assert list(hits) == want and list(steps) == [1, 2, 3][:known]
        assert gains == (-0.1, -0.2, -0.3)[:known]


@pytest.mark.slow
def test_stopping_is_within_a_few_percent_of_the_best_rule():
    """A renewal process of known chances: against brute force over all monotone rules of a grid.

    A round pays 30 ms and 3 ms a step. Its draft is sure, or unsure from a random step on; the
    chance of a step depends on how many unsure steps there were.
    """
    rng, levels, step_s, rest_s = np.random.default_rng(3), 24, 3e-3, 30e-3

    def trees(count):
        for _ in range(count):
            unsure = np.cumsum(rng.random(levels) < rng.choice([0.03, 0.4]))
            keep = np.where(np.diff(unsure, prepend=0) > 0, 0.55, 0.985)
            survival = np.cumprod(keep)
            gains = np.log(np.exp(-0.02 * unsure**2 - 1e-5))
            yield gains, unsure, int((rng.random() < survival).sum())

    def rate(rule, sample):
        tokens = seconds = 0.0
        for gains, unsure, accepted in sample:
            drafted = rule(gains, unsure)
            tokens += min(accepted, drafted) + 1
            seconds += rest_s + drafted * step_s
        return tokens / seconds

    first = lambda bad: int(np.argmax(bad)) + 1 if bad.any() else levels
    sample = list(trees(3000))
    # brute force: stop at the n-th unsure step, or at a depth, whichever comes first
    rules = [(n, d) for n in range(1, 12) for d in range(1, levels + 1)]
    at = lambda n, d: lambda gains, unsure: min(first(unsure >= n), d)
    best = max(rate(at(n, d), sample) for n, d in rules)

    stop = StopRule("auto", levels)

    def learned(gains, unsure):
        return min(first(gains[:-1] <= stop.least_gain_L()[:-1]), levels)

    for gains, unsure, accepted in trees(300):
        drafted = learned(gains, unsure)
        tokens, draft_s = min(accepted, drafted) + 1, drafted * step_s
        hits = np.arange(drafted) < accepted
        stop.learn(gains[:drafted], hits, rest_s + draft_s, tokens, draft_s)
    whole = rate(lambda *_: levels, sample)
    assert rate(learned, sample) > 0.96 * best > 1.1 * whole


@pytest.mark.parametrize("chance", [-0.5, float("nan")])
def test_a_chance_that_cannot_be_raises(chance):
    with pytest.raises(ValueError, match="expected 'auto' or a number from 0 on"):
        StopRule(chance, 4)
