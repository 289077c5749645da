"""Predictions for smaller trees, against simulating those trees."""

import dataclasses

import numpy as np
import pytest

import subspec_jax
from llm_jax import registry
from llm_jax.config import Experts
from llm_jax.testing import tiny_config
from subspec_jax import shape
from subspec_jax.draft_model import Draft
from subspec_jax.predict_experts import Routing
from subspec_jax.propose import Round
from subspec_jax.shape import TreeCosts, best_shape, measured_costs, predicted, reached
from subspec_jax.tree import TreeSpec

DEPTH, WIDE = 14, 5
COSTS = {
    "streaming": TreeCosts({5: 3e-3}, {71: 0.05}, 5e-3),
    "slow draft": TreeCosts({1: 4e-3, 5: 12e-3}, {1: 0.02, 71: 0.03}),
    "slow verification": TreeCosts({1: 1e-3}, {1: 0.01, 71: 0.2}),
}


def draws(rng, rounds):
    """Per round and level: the rank at which the target's token is, WIDE if it is in no beam."""
    ranks = rng.choice(WIDE + 1, (rounds, DEPTH), p=[0.72, 0.12, 0.06, 0.03, 0.02, 0.05])
    return ranks


def accepted(ranks, depth, width):
    """Levels that a beam of that shape gets accepted in a round."""
    found = 0
    for rank in ranks[:depth]:
        if rank >= width:
            break
        found += 1
    return found


def paths_of(ranks_RL, depth=DEPTH, width=WIDE):
    """Places of accepted nodes: level l's are 1 + l * width … (l + 1) * width."""
    return [
        tuple(1 + l * width + int(ranks[l]) for l in range(accepted(ranks, depth, width)))
        for ranks in ranks_RL
    ]


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_levels_reached_by_narrower_trees(width):
    ranks = draws(np.random.default_rng(1), 300)
    got = reached(paths_of(ranks), [DEPTH] * 300, DEPTH, width, WIDE)
    count = np.array([accepted(r, DEPTH, width) for r in ranks])
    want = [(count >= l).mean() for l in range(1, DEPTH + 1)]
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_trees_that_stopped_early_say_nothing_of_deeper_levels():
    """Stopping at random, the chances are still those of whole trees."""
    rng = np.random.default_rng(2)
    ranks = draws(rng, 40_000)
    depths = rng.integers(1, DEPTH + 1, len(ranks))
    paths = [paths_of([r], d)[0] for r, d in zip(ranks, depths)]
    got = reached(paths, depths, DEPTH, WIDE, WIDE)
    np.testing.assert_allclose(got, 0.95 ** np.arange(1, DEPTH + 1), atol=0.02)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("fixed", [{}, {"depth": 4}, {"width": 2}])
def test_the_best_shape_is_that_of_brute_force(name, fixed):
    """Every shape's rounds are simulated on the same draws; then on new ones, where it holds up."""
    rng, costs = np.random.default_rng(3), COSTS[name]
    ranks, fresh = draws(rng, 1500), draws(rng, 1500)

    def rate(sample, depth, width):
        tokens = np.mean([1 + accepted(r, depth, width) for r in sample])
        step = np.interp(width, *zip(*costs.draft_s.items()))
        whole = np.interp(1 + depth * width, *zip(*costs.verify_s.items()))
        return tokens / (depth * step + whole + costs.other_s)

    shapes = [(d, w) for d in range(1, DEPTH + 1) for w in range(1, WIDE + 1)]
    allowed = [
        (d, w) for d, w in shapes if d == fixed.get("depth", d) and w == fixed.get("width", w)
    ]
    best = max(allowed, key=lambda shape: rate(ranks, *shape))
    paths, depths = paths_of(ranks), [DEPTH] * len(ranks)
    depth, width, predicted_rate = best_shape(paths, depths, WIDE, costs, **fixed)
    assert (depth, width) == best
    assert predicted_rate == pytest.approx(rate(ranks, *best))
    assert rate(fresh, depth, width) > 0.97 * max(rate(fresh, *shape) for shape in allowed)


def test_costs_decide():
    """Slow drafts want short trees, slow verification narrow ones, a slow stream large ones."""
    paths = paths_of(draws(np.random.default_rng(4), 800))
    best = {name: best_shape(paths, [DEPTH] * 800, WIDE, costs) for name, costs in COSTS.items()}
    assert best["streaming"][0] > best["slow draft"][0]
    assert best["slow verification"][1] < best["streaming"][1] == WIDE


def test_costs_are_lines_between_measurements():
    costs = TreeCosts({2: 1.0, 6: 3.0}, {1: 10.0, 101: 20.0}, 0.5)
    assert [costs.step_s(w) for w in (1, 2, 4, 6, 9)] == [1, 1, 2, 3, 3]
    assert costs.round_s(10, 5) == 10 * 2.5 + 15.0 + 0.5


def test_costs_are_medians_of_rounds():
    slow = Round([1], depth=2, draft_s=9.0, verify_s=9.0, other_s=9.0)
    wide = [Round([1], depth=d, draft_s=0.2 * d, verify_s=0.7, other_s=0.1) for d in (4, 2, 4)]
    small = [Round([1], depth=2, draft_s=0.1, verify_s=0.3, other_s=0.3)] * 3
    costs = measured_costs({(4, 3): [slow, *wide], (2, 1): small})
    assert costs.draft_s == pytest.approx({1: 0.05, 3: 0.2})
    assert costs.verify_s == pytest.approx({3: 0.3, 13: 0.7})
    assert costs.other_s == pytest.approx(0.2)
    with pytest.raises(ValueError, match="no rounds were recorded with depth 4 and width 3"):
        measured_costs({(4, 3): []})


def test_a_wider_tree_needs_more_experts_but_ever_fewer_new_ones():
    """Tokens choose 2 of 16 experts, whose weights differ, in 3 layers; each expert takes 1 ms."""
    rng, weights = np.random.default_rng(6), 1.0 / np.arange(1, 17)

    def token():
        return np.argsort(rng.gumbel(size=(3, 16)) + np.log(weights), axis=1)[:, -2:]

    def needed(nodes):
        tokens = np.stack([token() for _ in range(nodes)])
        return sum(len(np.unique(tokens[:, layer])) for layer in range(3))

    def rounds(depth, width, count):
        passes = [needed(1 + depth * width) for _ in range(count)]
        return [Round([1], depth=depth, verify_s=0.01 + 1e-3 * n) for n in passes]

    popular_LE = np.zeros((3, 16))
    for _ in range(4000):
        np.add.at(popular_LE, (np.arange(3)[:, None], token()), 1)
    shapes = {(2, 1): rounds(2, 1, 200), (16, 6): rounds(16, 6, 200)}
    costs = measured_costs(shapes, Routing.counted(popular_LE, 2))
    straight = measured_costs(shapes)
    for depth, width in ((5, 2), (4, 4), (16, 3)):
        true = 0.01 + 1e-3 * np.mean([needed(1 + depth * width) for _ in range(200)])
        assert costs.round_s(depth, width) == pytest.approx(true, rel=0.03)
        assert straight.round_s(depth, width) < 0.93 * true
    assert costs.pass_s(97) == straight.pass_s(97) and costs.pass_s(3) == straight.pass_s(3)


@pytest.mark.slow
def test_a_tree_is_chosen_by_the_experts_that_were_counted(monkeypatch):
    cfg = tiny_config("qwen3", layers=3, d_model=128, d_ff=128, experts=Experts(16, 4, 64))
    tiny = registry.RegisteredModel("tiny", "a/tiny", cfg)
    monkeypatch.setitem(registry.MODELS, "tiny", tiny)
    given, real = [], shape.measured_costs
    monkeypatch.setattr(shape, "measured_costs", lambda *a: given.append(a) or real(*a))
    how = dict(weights="random", quantizer="nearest", max_length=192, chunk=16)
    how |= dict(tree=TreeSpec("beam", depth=4, width=3), draft=Draft(4, 64))
    with subspec_jax.open("tiny", "2GB", method="subspec", **how) as engine:
        plan = engine.plan
        engine.plans["subspec"] = dataclasses.replace(plan, hot=10)
        prompt = np.random.default_rng(0).integers(0, cfg.vocab, 16).tolist()
        method, rate = shape.choose_tree(engine, engine.method, prompt)
    ((rounds, routing),) = given
    assert rate > 0 and 1 <= method.spec.depth <= 4 and 1 <= method.spec.width <= 3
    np.testing.assert_allclose(routing.chance_LE.sum(1), 4)
    for (depth, width), found in rounds.items():
        count = np.mean([r.experts.needed.sum() for r in found])
        # Tokens of a tree are routed more alike than alone.
        assert 12 <= count <= 1.15 * routing.experts(1 + depth * width)
        assert all(r.pass_bytes == r.experts.fetched.sum() * 3 * 128 * 64 * 4 for r in found)


def test_no_trees_no_shape():
    assert predicted([], [], 3, COSTS["streaming"]).size == 0
    with pytest.raises(ValueError, match="no recorded round has a tree"):
        best_shape([()], [0], 3, COSTS["streaming"])


def test_ties_go_to_the_smaller_tree():
    flat = TreeCosts({1: 0.0}, {1: 1.0})
    assert best_shape([(1, 4)], [3], 3, flat)[:2] == (2, 1)
