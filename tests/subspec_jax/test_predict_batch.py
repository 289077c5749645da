"""How deep trees of several texts should be: by hand, by brute force, and through the engine."""

import dataclasses

import jax
import pytest

import subspec_jax
from llm_jax.generation import generate
from llm_jax.params import init_layer
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from subspec_jax import SubspecError, memory, predict_batch
from subspec_jax.draft_model import Draft
from subspec_jax.plan import make_plan, published_tau
from subspec_jax.predict import RoundCosts, round_seconds
from subspec_jax.predict_batch import best_levels, costs_between, measure_together, timed_shapes
from subspec_jax.prefix_cache import Text
from subspec_jax.tree import TreeSpec

CFG = tiny_config("qwen2", layers=4, dtype="bfloat16")
SPEC = TreeSpec("beam", 48, 6)
LINK = 1e9


def plan_for(texts=8, spec=SPEC, **options):
    options = dict(max_length=128, chunk=16, resident=1) | options
    return make_plan(CFG, 2**30, spec, Draft(4, 32), texts=texts, **options)


def linear(step, node, rest):
    """Costs as they are where a step takes `step` seconds a text, a block `node` a node."""

    def of(texts, levels):
        nodes = texts * (1 + 6 * levels)
        return RoundCosts(0.01 + texts * step * levels, 0.001 + node * nodes, rest * nodes, 0.0)

    return of


@pytest.mark.parametrize("step, node, rest", [(1e-3, 1e-6, 1e-7), (0.0, 1e-3, 0.0), (0.01, 0, 0)])
def test_linear_costs_are_found_again_wherever_they_were_not_timed(step, node, rest):
    plan, real = plan_for(), linear(step, node, rest)
    shapes = timed_shapes(plan)
    assert shapes == [(1, 12), (1, 48), (8, 6), (8, 24)]
    costs = costs_between({shape: real(*shape) for shape in shapes}, 6)
    for texts in (1, 2, 4, 8):
        for levels in (2, 6, 13, 24):
            found, expected = costs(texts, levels), real(texts, levels)
            assert found.draft == pytest.approx(expected.draft)
            inside = texts * (1 + 6 * levels) >= 8 * 37 or (texts, levels) == (1, 13)
            if inside:
                assert found.block == pytest.approx(expected.block)
                assert found.rest == pytest.approx(expected.rest, abs=1e-12)


@pytest.mark.parametrize("step, node", [(1e-4, 1e-8), (1e-3, 1e-6), (1e-4, 1e-4), (1e-2, 1e-3)])
def test_the_chosen_depth_is_the_fastest_of_all(step, node):
    plan, real = plan_for(), linear(step, node, 1e-8)
    timed = {(n, d): real(n, d) for n in (1, 8) for d in range(1, plan.spec_of(n).depth + 1)}
    found = best_levels(plan, timed, LINK)
    assert list(found) == list(plan.ladder) == [1, 2, 4, 8]
    for texts in (1, 8):
        rates = {
            d: texts * published_tau(d) / round_seconds(plan, real(texts, d), LINK)
            for d in range(1, plan.spec_of(texts).depth + 1)
        }
        assert found[texts] == (max(rates, key=rates.get), pytest.approx(max(rates.values())))


def test_trees_shrink_where_nodes_cost_and_stay_where_they_do_not():
    plan = plan_for()
    chosen = lambda step, node: [
        d
        for d, _ in best_levels(
            plan, {s: linear(step, node, 0)(*s) for s in timed_shapes(plan)}, LINK
        ).values()
    ]
    assert chosen(0.0, 0.0) == [48, 48, 48, 24]  # what `shared_spec` allows
    dear = chosen(1e-4, 1e-3)
    assert dear == sorted(dear, reverse=True) and dear[-1] < dear[0] < 48


def test_a_plan_with_levels_gives_smaller_trees():
    plan = dataclasses.replace(plan_for(), levels=(40, 30, 30, 30))
    assert [plan.spec_of(n).depth for n in plan.ladder] == [40, 30, 30, 24]
    assert plan.spec == SPEC  # caches stay as large as for the largest


@pytest.mark.slow
def test_parts_of_a_shared_round_are_timed():
    plan = plan_for(texts=2, spec=TreeSpec("beam", 3, 2))
    costs = measure_together(plan, init_layer(jax.random.key(0), CFG), 2, plan.spec)
    assert min(costs.draft, costs.block, costs.rest, costs.send) > 0


@pytest.mark.parametrize(
    "spec, reason", [(TreeSpec("best-first", 6, 2, budget=8), "beams"), (SPEC, None)]
)
def test_what_is_not_predicted_says_why(spec, reason):
    found = predict_batch.why_not_together(plan_for(spec=spec))
    assert found is None if reason is None else reason in found


def test_an_engine_chooses_and_its_texts_stay_those_of_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "card_bytes", lambda: None)
    cfg = tiny_config("qwen2", layers=3)
    folder, options = (
        write_safetensors(tmp_path, tiny_params(cfg), cfg),
        dict(
            tree=TreeSpec("beam", 4, 2),
            draft=Draft(4, 16),
            max_length=96,
            chunk=32,
            dtype="float32",
        ),
    )
    with subspec_jax.open(folder, "full", texts=2, resident=1, **options) as engine:
        # A step costs a hundred times a pass: no tree is worth more than its first level.
        dear = lambda plan, layer, texts, spec: RoundCosts(spec.depth, 0.01, 0.0)
        monkeypatch.setattr(predict_batch, "measure_together", dear)
        assert [d for d, _ in engine.choose_levels().values()] == [1, 1]
        prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
        texts = [Text(p, 10) for p in prompts]
        decoder = engine.batch()
        for text in texts:
            decoder.join(text)
        rounds = []
        while decoder.running:
            rounds += [r for _, r in decoder.step() if r.drafted]
        params = engine.source.checkpoint.load(cfg)
        assert [t.new for t in texts] == [generate(params, p, cfg, 10) for p in prompts]
        assert rounds and {r.depth for r in rounds} == {1}
        with pytest.raises(SubspecError, match="before the model is loaded"):
            engine.choose_levels()


def test_an_engine_predicts_rounds_of_several_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "card_bytes", lambda: None)
    cfg = tiny_config("qwen2", layers=3)
    folder = write_safetensors(tmp_path, tiny_params(cfg), cfg)
    options = dict(tree=TreeSpec("beam", 3, 2), draft=Draft(4, 16), max_length=96, chunk=32)
    with subspec_jax.open(folder, "full", texts=2, resident=1, **options) as engine:
        parts = engine.predict(texts=2)
        assert parts["round"] >= parts["draft"] + parts["verify"] > 0
        with pytest.raises(SubspecError, match="3 texts"):
            engine.predict(texts=3)
