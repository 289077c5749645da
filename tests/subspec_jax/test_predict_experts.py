"""Routing that is drawn against routers and sums; a pass against the cache itself, on a clock."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspec_jax
from llm_jax import registry
from llm_jax.attention import caches_for, causal_step
from llm_jax.config import Experts
from llm_jax.params import Params, init_layer
from llm_jax.stream import to_device
from llm_jax.testing import tiny_config
from subspec_jax import experts, predict_experts
from subspec_jax.draft_model import NO_DRAFT, Draft
from subspec_jax.experts import ExpertCache, routed_block
from subspec_jax.layout import expert_bytes
from subspec_jax.offload import offload
from subspec_jax.plan import make_plan
from subspec_jax.predict import RoundCosts, round_seconds, why_not
from subspec_jax.predict_experts import (
    Routing,
    expected_experts,
    routed_block_seconds,
    routed_pass_seconds,
)
from subspec_jax.sources import Source
from subspec_jax.tree import TreeSpec

CFG = tiny_config("qwen3", layers=3, d_model=128, d_ff=128, experts=Experts(16, 4, 64))
SPEC = TreeSpec("chain", depth=3, width=1)


def uneven(layers=3, count=16, chosen=4):
    """Chances that add up to `chosen` in every layer, none above 1."""
    chance_LE = np.random.default_rng(5).random((layers, count)) ** 2
    while abs(chance_LE.sum(1) - chosen).max() > 1e-12:
        chance_LE = np.minimum(chance_LE * chosen / chance_LE.sum(1, keepdims=True), 1)
    return Routing(chance_LE)


def test_a_token_has_its_number_of_experts_and_each_its_chance():
    routing = uneven()
    drawn = routing.draw(tokens=1, forwarded=0, capacity=0, passes=500)
    assert (drawn.sum(1) == 4).all() and (drawn[:, :2] == 0).all()
    kept = routing.draw(1, 0, 20, passes=3000).mean(0)
    best = np.sort(routing.chance_LE, axis=None)[-20:]
    assert kept[0].sum() == pytest.approx(best.sum(), rel=0.02)
    assert kept[2].sum() == pytest.approx(12 - best.sum(), rel=0.03)


@pytest.mark.parametrize("zipf", (0.0, 1.0))
def test_random_routers_are_as_if_run(zipf):
    """Real scores of random states, token by token, and the union of what they choose."""
    rng, layers, count, chosen, tokens = np.random.default_rng(1), 2, 32, 4, 7
    routing = Routing.random(layers, count, chosen, zipf)
    needed = []
    for _ in range(1500):
        router = rng.standard_normal((64, count)) / 8
        states = rng.standard_normal((tokens, 64))
        states /= np.sqrt((states**2).mean(1, keepdims=True))
        scores = states @ router - zipf * np.log(1 + rng.permutation(count))
        needed.append(len({e for row in scores for e in np.argsort(row)[-chosen:]}))
    assert routing.experts(tokens) == pytest.approx(layers * np.mean(needed), rel=0.02)
    assert routing.chance_LE.sum(1) == pytest.approx(chosen)


def test_drawn_passes_need_what_is_expected():
    routing, tokens, capacity = uneven(), 5, 14
    drawn = routing.draw(tokens, 0, capacity, passes=2000)
    expected, away = 0.0, []
    for chances in routing.chance_LE:
        for chance in chances:
            needed = 1 - np.prod([1 - chance for _ in range(tokens)])
            expected += needed
            away.append((chance, needed))
    assert drawn.sum((1, 2)).mean() == pytest.approx(expected, rel=0.01)
    assert routing.experts(tokens) == pytest.approx(expected)
    late = sum(needed for _, needed in sorted(away)[:-capacity])
    assert drawn[:, 2].sum(1).mean() == pytest.approx(late, rel=0.03)


def test_a_draft_foresees_the_experts_of_what_it_forwards():
    routing = uneven()
    at = lambda forwarded, **how: routing.draw(6, forwarded, 0, passes=1500, **how).sum(2).mean(0)
    all_but_one, every, none = at(5), at(6), at(0)
    assert every[2] == none[1] == 0
    assert all_but_one[1] == pytest.approx(routing.experts(5), rel=0.02)
    assert all_but_one.sum() == pytest.approx(routing.experts(6), rel=0.02)
    # A draft of half of the experts: each token's expert is known with chance 1/2.
    half = (1 - (1 - routing.chance_LE / 2) ** 6).sum()
    assert at(6, share=0.5)[1] == pytest.approx(half, rel=0.03)
    counted = dataclasses.replace(routing, foreseen=0.25)
    drawn = counted.draw(6, 5, 0, passes=1500).sum(2).mean(0)
    assert drawn[1] / drawn.sum() == pytest.approx(0.25, rel=0.03)


def test_counts_are_chances_per_token():
    routing = Routing.counted(np.array([[6.0, 3.0, 3.0], [1.0, 0.0, 1.0]]), 2)
    np.testing.assert_allclose(routing.chance_LE, [[1, 0.5, 0.5], [1, 0, 1]])
    assert routing.kept(2).tolist() == [[True, False, False], [True, False, False]]
    assert routing.draw(3, 0, 6)[:, 0].sum(1).max() <= 5  # nobody asks for the middle one


@pytest.mark.parametrize(
    "held, foreseen, missed, ring, seconds",
    [
        # layer 10 s; a program of 2 takes 3, of 4 takes 5; a copy 7, starting it 1
        ([4, 2], [0, 0], [0, 0], 8, 10 + 5 + 10 + 3),
        ([6, 0], [0, 0], [0, 0], 8, 10 + 5 + 3 + 10),  # two programs
        ([2], [0], [1], 8, 10 + 1 + 7 + 3),  # the copy runs during a program, and longer
        ([0], [0], [5], 8, 10 + 1 + 5 * 7 + 3),  # four run while the fifth comes
        ([0, 0], [0, 2], [0, 0], 8, 2 + 10 + 10 + 3),  # there long before
        ([0], [2], [0], 1, 1 + 10 + 1 + 7 + 3),  # no room for the second before the layer
    ],
)
def test_a_pass_by_hand(held, foreseen, missed, ring, seconds):
    got = routed_pass_seconds(np.array([held, foreseen, missed]), 10, {2: 3, 4: 5}, 7, 1, ring)
    assert got == seconds


@pytest.mark.parametrize("seed", range(30))
def test_a_pass_as_the_cache_runs_it(seed, monkeypatch):
    """`ExpertCache` itself brings the experts; only the clock is made up."""
    rng = np.random.default_rng(seed)
    layers, count, at_once = 4, 64, 4
    foreseen_L = rng.integers(0, 4, layers)
    held_L, missed_L = rng.integers(0, 5 - foreseen_L), rng.integers(0, 10, layers)
    ring = int(rng.integers(1, 7))
    layer, copy, send = (float(n) for n in rng.integers((1, 1, 0), (9, 9, 3)))
    groups = {2: 2.0, 4: 3.0}
    clock = types.SimpleNamespace(host=0.0, device=0.0, link=0.0)
    arrived = {}

    def copied(array):
        clock.host += send
        clock.link = arrived[array.key] = max(clock.link, clock.host) + copy
        return array

    made = lambda l, e: types.SimpleNamespace(key=(l, e), nbytes=1, delete=lambda: None)
    each = [tuple(made(l, e) for e in range(count)) for l in range(layers)]
    monkeypatch.setattr(experts, "apart", lambda own: types.SimpleNamespace(each=own))
    monkeypatch.setattr(experts, "to_device", copied)
    cache = ExpertCache(each, 0, ring, at_once)
    tokens_LE, known_LE = np.zeros((layers, count), int), np.zeros((layers, count), bool)
    for l in range(layers):
        n = held_L[l], held_L[l] + foreseen_L[l], held_L[l] + foreseen_L[l] + missed_L[l]
        tokens_LE[l, : n[2]], known_LE[l, : n[1]] = 1, True
        for e in [*range(n[0]), *range(n[2], count)]:  # those behind are in nobody's way
            cache._arrays[l, e], cache._held_LE[l, e] = each[l][e], True
    cache.capacity = len(cache._arrays) - ring  # all room is taken, as in a long text
    cache.begin(known_LE)
    for l in range(layers):
        clock.host = clock.device = max(clock.host, clock.device) + layer
        for some in cache.take(l, tokens_LE[l]):
            ready = max(arrived.get((l, e), 0.0) for e, _ in some)
            least = max(clock.device, clock.host, ready)
            clock.device = least + groups[2 if len(some) <= 2 else 4]
    assert cache.counts.needed.sum() == (held_L + foreseen_L + missed_L).sum()
    assert cache.counts.held.tolist() == held_L.tolist()
    counts = np.array([held_L, foreseen_L, missed_L])
    got = routed_pass_seconds(counts, layer, groups, copy, send, ring)
    assert got == pytest.approx(max(clock.host, clock.device))


def test_a_layer_and_its_programs_are_told_apart(monkeypatch):
    """With a clock that counts programs: 5 s for a layer, 2 and 3 s for few and more experts."""
    plan = plan_for()
    exact = offload(init_layer(jax.random.key(0), CFG))
    step = causal_step(0, 4, 16)
    cache = to_device(caches_for(Params(None, (exact,), None, None), CFG, 1, 16, 0))[0]
    state, asked = [jnp.ones((1, 4, 128)), cache], []

    def seconds(block):
        asked.clear()
        assert np.isfinite(block())
        return 5 + sum({2: 2, 4: 3}[n] for n in asked)

    def run(*given):
        asked.extend(len(some) for some in given[6].take(0, np.ones(16)))
        return routed_block(*given)

    monkeypatch.setattr(predict_experts, "routed_block", run)
    layer, groups = routed_block_seconds(exact, state, step, plan.spec.nodes, 4, CFG, seconds)
    assert (layer, groups) == (5, {2: 2, 4: 3})


def plan_for(spec=SPEC, draft=None, limit=2**30, cfg=CFG, **options):
    return make_plan(cfg, limit, spec, draft or Draft(4, 64), 128, 16, **options)


def test_a_round_is_draft_pass_and_end():
    """All experts are there: a layer, and programs for as many experts as 4 tokens need."""
    plan = plan_for()
    assert plan.hot == 48
    costs = RoundCosts(0.5, 0.01, 0.1, 9.0, {2: 0.002, 4: 0.004})
    one = np.zeros((3, 16))
    one[:, :4] = 1  # every token has the same four
    got = round_seconds(plan, costs, 1.0, Routing(one))
    assert got == pytest.approx(0.5 + 3 * (0.01 + 0.004) + 0.1)
    bare = dataclasses.replace(plan, hot=0)
    copies, size = {}, 3 * 128 * 64 * 4
    for link in (1e6, 1e8):
        copies[link] = round_seconds(bare, dataclasses.replace(costs, send=0.0), link, Routing(one))
    # The draft knows them all: on a slow link, 12 copies and the last program.
    assert copies[1e6] == pytest.approx(0.5 + 12 * size / 1e6 + 0.004 + 0.1)
    assert copies[1e8] == pytest.approx(got)  # hidden behind the layers


def test_what_is_not_predicted_says_why():
    assert why_not(plan_for()) is None and why_not(plan_for(draft=NO_DRAFT)) is None
    assert "whole layers" in why_not(plan_for(by_expert=False))
    mixed = dataclasses.replace(CFG, experts=Experts(16, 4, 64, dense_layers=(0,)))
    assert "beside others" in why_not(plan_for(cfg=mixed))
    assert "another model" in why_not(plan_for(draft=Draft(None, own_cache=True, model=CFG)))


def test_fewer_bits_keep_more_experts_and_hardly_save_bytes():
    """The table of docs/design/046, by hand: what the substitutes of a bit less leave, as experts
    with their larger residuals. Qwen3-30B-A3B in 24 GB, 17 tokens."""
    cfg = dataclasses.replace(registry.find_model("qwen3-30b-a3b").config, dtype="bfloat16")
    spec, weights, kept, size, away = TreeSpec("chain", 16, 1), 3 * 2048 * 768, {}, {}, {}
    for bits in (4, 3, 2):
        source = Source("qwen3-30b-a3b", cfg, residual=True)
        model = source.shapes(Draft(bits, 64))
        plan = make_plan(cfg, 24 * 2**30, spec, Draft(bits, 64), 512, 64, model=model)
        kept[bits], size[bits] = plan.hot, expert_bytes(plan)
        low = 48 * 128 * weights * (bits + 0.5) / 8
        assert plan.device["substitutes"] == pytest.approx(low, rel=1e-3)
        popular = [Routing.random(48, 128, 8, zipf) for zipf in (0.0, 1.0)]
        away[bits] = [expected_experts(r.chance_LE, 17, 8, plan.hot) for r in popular]
        alike = (6144 - plan.hot) * (1 - (15 / 16) ** 17)
        assert away[bits][0] == pytest.approx(alike)
    ring = lambda bits: (8 + 2**28 // size[bits]) * size[bits]
    for bits in (3, 2):
        room = (kept[4] * size[4] + ring(4) - ring(bits)) + (4 - bits) * 6144 * weights / 8
        assert kept[bits] == pytest.approx(room / size[bits], rel=0.01)
    assert [kept[bits] for bits in (4, 3, 2)] == pytest.approx([1235, 1801, 2178], abs=2)
    gigabytes = np.array([[n * size[bits] / 1e9 for n in away[bits]] for bits in (4, 3, 2)])
    np.testing.assert_allclose(gigabytes[:, 0], [14.6, 14.7, 15.6], atol=0.06)
    np.testing.assert_allclose(gigabytes[:, 1], [2.75, 1.82, 1.50], atol=0.02)


CASES = {
    "plain": ("vanilla", "raw", None),
    "raw": ("chain", "raw", None),
    "fewer": ("chain", "raw", 2),
    "residual": ("chain", "residual", None),
    "mxfp4": ("chain", "raw", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_engine_predicts_all_parts(name, monkeypatch):
    method, stream, fewer = CASES[name]
    cfg = dataclasses.replace(CFG, family="gpt_oss") if name == "mxfp4" else CFG
    tiny = registry.RegisteredModel("tiny", "a/tiny", cfg)
    monkeypatch.setitem(registry.MODELS, "tiny", tiny)
    how = dict(weights="random", quantizer="nearest", zipf=1.0, max_length=128, chunk=16)
    how |= dict(stream=stream, dtype="bfloat16", tree=SPEC, draft=Draft(4, 64, experts=fewer))
    with subspec_jax.open("tiny", "2GB", method=method, **how) as engine:
        plan = engine.plan
        assert engine.source.mxfp4 == (name == "mxfp4")
        engine.plans[engine.method.name] = dataclasses.replace(plan, hot=10)
        parts = engine.predict()
        assert set(parts["groups"]) == {2, 4} and min(parts["groups"].values()) >= 0
        assert parts["block"] > 0 and parts["rest"] > 0 and parts["send"] > 0
        assert (parts["draft"] > 0) == (name != "plain")
        whole = parts["draft"] + parts["verify"] + parts["rest"]
        assert parts["round"] == pytest.approx(whole)
        assert engine.predict() == parts  # measured once, drawn with the same numbers
        slower = engine.predict(routing=Routing.uniform(3, 16, 4))
        assert slower["draft"] == parts["draft"] and slower["verify"] > 0
        engine.plans[engine.method.name] = plan
        assert len(engine.generate([1, 2, 3], 4, eos=())) == 4
