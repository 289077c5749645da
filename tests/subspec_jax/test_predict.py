"""A pass by hand and step by step, and what is timed against what it is used for."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from llm_jax.params import abstract, init_layer
from llm_jax.testing import tiny_config
from subspec_jax import predict
from subspec_jax.draft_model import NO_DRAFT, Draft
from subspec_jax.plan import make_plan
from subspec_jax.predict import FEW, MORE, RoundCosts, measure, pass_seconds, round_seconds
from subspec_jax.random_weights import split_layer
from subspec_jax.residual.split import gaussian_room, split_head_shapes, split_shapes
from subspec_jax.tree import PassShape, TreeSpec

CFG = tiny_config("qwen2", layers=6, dtype="bfloat16")
SPEC = TreeSpec("beam", 3, 2)


def plan_for(spec=SPEC, draft=None, model=None, **options):
    options = dict(max_length=64, chunk=16) | options
    return make_plan(CFG, 2**30, spec, draft or Draft(4, 32), model=model, **options)


@pytest.mark.parametrize(
    "sizes, block, ahead, early, seconds",
    [
        ([0, 0, 0], 2.0, 1, 0.0, 6.0),  # nothing streams
        ([10, 10, 10], 1.0, 1, 0.0, 31.0),  # the link is the limit, and the last block
        ([10, 10, 10], 1.0, 1, 100.0, 12.0),  # two are there, the third starts behind a block
        ([10, 10, 10], 20.0, 1, 100.0, 60.0),  # the blocks are the limit
        ([0, 0, 10, 10], 4.0, 1, 0.0, 24.0),  # residents run while the first copy does
        ([10, 10, 10, 10], 1.0, 2, 100.0, 12.0),  # three are there
        ([10, 0, 10], 5.0, 1, 0.0, 25.0),
    ],
)
def test_a_pass_by_hand(sizes, block, ahead, early, seconds):
    assert pass_seconds(sizes, block, 1.0, ahead, early) == pytest.approx(seconds)


def test_starting_a_copy_takes_the_host_a_while():
    """In which no block runs; the last ones have no copy behind them."""
    assert pass_seconds([10, 10, 10, 0], 20.0, 1.0, 1, 100.0, 3.0) == pytest.approx(83.0)
    assert pass_seconds([10, 10, 10], 1.0, 1.0, 1, 100.0, 3.0) == pytest.approx(15.0)


def by_ticks(sizes, block, ahead, early, send):
    """The rules of `llm_jax.stream.Stream`, with whole numbers, one unit of time after another."""
    streamed = [i for i, size in enumerate(sizes) if size]
    left = dict(zip(streamed, (sizes[i] for i in streamed), strict=True))
    allowed, there, now = ahead + 1, set(), -early  # copies that may have started
    i, busy, pause, running, sends = 0, 0, 0, False, False
    while True:
        if now >= 0:
            if running and not busy:
                running, sends = False, sizes[i] > 0 and allowed < len(streamed)
                pause, i = send if sends else 0, i + 1
            if not running and not pause:
                allowed, sends = allowed + sends, False
                if i == len(sizes):
                    return now
                if not sizes[i] or i in there:
                    running, busy = True, block
        coming = next((k for k in streamed[:allowed] if k not in there), None)
        now += 1
        if coming is not None:
            left[coming] -= 1
            if not left[coming]:
                there.add(coming)
        busy, pause = max(0, busy - 1), max(0, pause - 1)


@pytest.mark.parametrize("seed", range(40))
def test_a_pass_step_by_step(seed):
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.integers(1, 9, rng.integers(1, 9)) * rng.integers(0, 2)]
    sizes = [int(n) * int(rng.integers(0, 2)) for n in sizes] or [3]
    block, ahead, early, send = (int(n) for n in rng.integers((1, 1, 0, 0), (9, 4, 30, 4)))
    expected = by_ticks(sizes, block, ahead, early, send)
    assert pass_seconds(sizes, block, 1.0, ahead, early, send) == pytest.approx(expected)


def test_a_round_is_draft_pass_and_end():
    plan = plan_for(resident=2)
    costs = RoundCosts(draft=0.5, block=0.01, rest=0.1, send=0.001)
    layer, link = plan.streamed_bytes // 4, 1e6
    expected = 0.5 + pass_seconds([0, 0] + [layer] * 4, 0.01, link, 1, 0.5, 0.001) + 0.1
    assert round_seconds(plan, costs, link) == pytest.approx(expected)


def test_residuals_that_stay_are_spread_over_the_pass():
    """So that the link is busy while they are put together."""
    plan = plan_for(resident=2, model=residual_shapes())
    size, costs = plan.streamed_bytes // 4, RoundCosts(draft=0.0, block=0.01, rest=0.0)
    assert plan.stays == {1, 4}
    sizes = [size, 0, size, size, 0, size]
    assert round_seconds(plan, costs, 1e6) == pytest.approx(pass_seconds(sizes, 0.01, 1e6, 1))


def residual_shapes(split_head=False):
    room = gaussian_room(CFG, 4, 32)
    layers = (split_shapes(CFG, 4, 32, room),) * CFG.layers
    shapes = dataclasses.replace(abstract(CFG), layers=layers)
    if not split_head:
        return shapes
    return dataclasses.replace(shapes, head_DV=split_head_shapes(CFG, 4, 32, room["head"]))


CASES = {
    # name -> plan, layers of the draft that are shared and that are low-bit
    "raw": (plan_for(resident=2), 2, 4),
    "all resident": (plan_for(resident=6), 6, 0),
    "not shared": (plan_for(resident=2, draft=Draft(4, 32, share_resident=False)), 0, 6),
    "own head, table on host": (
        plan_for(resident=0, draft=Draft(4, 32, 8), table_on_host=True), 0, 6,
    ),
    "residual": (plan_for(model=residual_shapes(), resident=2), 0, 6),
    "residual head": (
        plan_for(model=residual_shapes(True), resident=2, draft=Draft(4, 32, 4)), 0, 6,
    ),
    "plain": (plan_for(TreeSpec("chain", 0), NO_DRAFT, resident=2), 0, 0),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_draft_has_as_many_layers_of_each_kind_as_the_plan(name, monkeypatch):
    """With a clock that knows what a layer takes; everything is run for real."""
    plan, shared, low = CASES[name]
    exact = init_layer(jax.random.key(0), CFG)
    if plan.streams_residuals:
        exact = split_layer(exact, plan.model.layers[0])
    ran = []

    def clock(f, calls):
        jax.block_until_ready([f() for _ in range(2)])
        ran.append(calls)
        return 0.25

    real = predict._tree_seconds

    def tree(given):
        real(given)
        params = given.params
        own = jax.tree.structure(params.layers[0]) == jax.tree.structure(exact)
        return 7 + len(params.layers) * (30 if own and not plan.streams_residuals else 2)

    monkeypatch.setattr(predict, "_seconds", clock)
    monkeypatch.setattr(predict, "_tree_seconds", tree)
    costs = measure(plan, exact)
    assert costs.block == costs.rest == 0.25
    drafted = shared + low
    assert costs.draft == pytest.approx((7 + 30 * shared + 2 * low) if drafted else 0)
    assert len(ran) == 2 + 2 * ((shared > 0) + (low > 0)) and (FEW, MORE) == (2, 4)


def test_times_are_medians_behind_the_first(monkeypatch):
    ticks = iter([0, 100, 100, 101, 101, 104, 104, 106, 106, 108, 108, 117])
    monkeypatch.setattr(predict, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert predict._seconds(lambda: 0, 1) == 2


@pytest.mark.slow
def test_a_pass_of_a_shape_is_timed_with_its_rows(monkeypatch):
    plan = plan_for(draft=NO_DRAFT, shape=PassShape(rows=16, places=32, levels=8))
    block, rows = predict.jit_block, []
    timed = lambda layer, x, *rest: (rows.append(x.shape[1]), block(layer, x, *rest))[1]
    monkeypatch.setattr(predict, "jit_block", timed)
    costs = measure(plan, init_layer(jax.random.key(0), CFG))
    assert set(rows) == {16} and costs.block > 0 and costs.rest > 0


@pytest.mark.slow
def test_another_model_is_not_predicted():
    plan = plan_for(draft=Draft(None, own_cache=True, model=CFG))
    with pytest.raises(ValueError, match="another model is not predicted"):
        measure(plan, init_layer(jax.random.key(0), CFG))
