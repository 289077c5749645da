"""`compress` against its pieces done by hand, and what a `Compressor` keeps."""

import contextlib
import dataclasses
import inspect

import chex
import jax
import numpy as np
import pytest
from feeding import text

import palu_jax
from llm_jax.attention import caches_for
from llm_jax.generation import generate
from llm_jax.progress import Reporter
from llm_jax.testing import tiny_config, tiny_params
from palu_jax import compression, planner
from palu_jax.compression import Compression, Compressor, compress
from palu_jax.convert import ConvertError, Recipe, layer_spectra, to_palu
from palu_jax.format import FormatError, LatentFormat
from palu_jax.rank import RankError, error_ranks, fisher_ranks, share_kept, uniform_ranks


def test_it_equals_the_pieces():
    """Calibration, the ranks of least error, conversion; and the result decodes."""
    cfg = tiny_config("qwen2")
    params, batches = tiny_params(cfg), [np.asarray(text(cfg, length=24, seed=s)) for s in (1, 2)]
    heard = []

    class Heard(Reporter):
        @contextlib.contextmanager
        def bar(self, title, total):
            yield lambda done: heard.append((title, done, total))

    found = palu_jax.compress(params, cfg, iter(batches), keep=0.5, bits=4, reporter=Heard())
    statistics = palu_jax.calibrate(params, batches, cfg)
    groups = (cfg.kv_heads,)
    spectra = [
        layer_spectra(layer.attn, cfg, groups, "gradient", own)
        for layer, own in zip(params.layers, statistics.layers, strict=True)
    ]
    ranks = error_ranks(spectra, groups, cfg.head_dim, 0.5)
    recipe = Recipe(groups, ranks, "gradient", LatentFormat(4, 4))
    chex.assert_trees_all_equal(found, to_palu(params, cfg, recipe, statistics))
    assert share_kept(ranks, groups, cfg.head_dim) == 0.5
    title = f"Decomposing (groups of {cfg.kv_heads}, gradient)"
    want = [("Calibrating", 2, 4), ("Calibrating", 4, 4)]
    assert heard == want + [(title, i + 1, cfg.layers) for i in range(cfg.layers)]
    assert len(generate(found, [1, 2, 3], cfg, steps=3)) == 3


SEARCHES = {
    "uniform": lambda tiny, groups: uniform_ranks(2, groups, 16, 0.5, split=(1, 2)),
    "fisher": lambda tiny, groups: fisher_ranks(tiny.statistics, groups, 16, 0.5),
    "fisher-group": lambda tiny, groups: fisher_ranks(
        tiny.statistics, groups, 16, 0.5, per="group"
    ),
}


@pytest.mark.parametrize("search", SEARCHES)
def test_searches_and_options_are_respected(tiny, search):
    form = LatentFormat(3, 2, sinks=1)
    how = Compression(0.5, form, 2, "whitened", search, split=(1, 2), rotate=False, mean_split=True)
    params, recipe = Compressor(tiny.params, tiny.cfg, tiny.statistics).compress(how)
    ranks = SEARCHES[search](tiny, (2, 1))
    assert recipe == Recipe((2, 1), ranks, "whitened", form, rotate=False, mean_split=True)
    chex.assert_trees_all_equal(params, to_palu(tiny.params, tiny.cfg, recipe, tiny.statistics))


@pytest.mark.slow
def test_a_budget_is_kept(tiny):
    """By the live arrays; with the best plan and the rest of the format."""
    how = Compression(format=LatentFormat(16, 16, window=2), budget=60.0, multiple=2, keep=1.0)
    compressor = Compressor(tiny.params, tiny.cfg, tiny.statistics)
    best, recipe = compressor.plans(how)[0], compressor.recipe(how)
    bits = recipe.format.key_bits, recipe.format.value_bits
    assert (recipe.groups, recipe.ranks, bits) == (
        best.groups, best.ranks, (best.key_bits, best.value_bits),
    )  # fmt: skip
    assert recipe.format.window == 2 and best.error == min(p.error for p in compressor.plans(how))
    params = compress(
        tiny.params, tiny.cfg, budget=60.0, multiple=2, bits=16, statistics=tiny.statistics
    )
    held = sum(a.nbytes for a in jax.tree.leaves(caches_for(params, tiny.cfg, 1, 10)))
    assert 300 < held == 10 * best.bytes_per_token <= 600
    with pytest.raises(RankError, match="no ranks fit 3 bytes"):
        compress(tiny.params, tiny.cfg, budget=3.0, statistics=tiny.statistics)


@pytest.mark.slow
def test_decompositions_are_kept(tiny, monkeypatch):
    """Formats and ranks share them; energies of all group sizes serve every budget."""
    made, real = [], compression.layer_spectra
    counted = lambda attn, cfg, groups, *rest: made.append(groups) or real(attn, cfg, groups, *rest)
    monkeypatch.setattr(compression, "layer_spectra", counted)
    compressor = Compressor(tiny.params, tiny.cfg, tiny.statistics)
    for keep, bits in ((0.5, 4), (0.5, 2), (0.7, 4)):
        how = Compression(keep, LatentFormat(bits, bits))
        (params, recipe), layers = compressor.compress(how), tiny.cfg.layers
        assert params.layers[0].attn.format == recipe.format == how.format
    assert made == [(3,)] * layers
    compressor.plans(Compression(budget=60.0))
    assert made == [(3,)] * layers + [(1, 1, 1)] * layers + [(3,)] * layers
    compressor.plans(Compression(budget=90.0))
    assert len(made) == 3 * layers


def test_plain_factors_need_no_text(tiny):
    """And statistics have gradients only where they are needed."""
    found = compress(tiny.params, tiny.cfg, objective="plain", search="uniform")
    recipe = Recipe((3,), uniform_ranks(2, (3,), 16, 0.7), "plain", LatentFormat(4, 4))
    chex.assert_trees_all_equal(found, to_palu(tiny.params, tiny.cfg, recipe))
    needs = lambda **k: (Compression(**k).needs_statistics, Compression(**k).needs_gradients)
    assert needs() == (True, True)
    assert needs(objective="whitened") == (True, False)
    assert needs(objective="plain", mean_split=True) == (True, False)
    assert needs(objective="plain", search="fisher") == (True, True)
    assert needs(objective="plain", search="fisher", mean_split=True, budget=9.0) == (False, False)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(), palu_jax.CalibrationError, "no text to calibrate on"),
        (dict(bits=4, format=LatentFormat()), ConvertError, "give one of them"),
        (dict(bits=5), FormatError, "key_bits is 5"),
        (dict(keep=1.5), RankError, "share of ranks"),
        (dict(group=4), RankError, "groups of 4 kv heads"),
        (dict(objective="best"), ConvertError, "is not one of plain"),
        (dict(mean_split=True, fuse_values=True), ConvertError, "choose one"),
    ],
    ids=str,
)
def test_impossible_requests(tiny, options, error, words):
    statistics = tiny.statistics if options else None
    with pytest.raises(error, match=words) as caught:
        compress(tiny.params, tiny.cfg, statistics=statistics, **options)
    assert isinstance(caught.value, palu_jax.PaluError)
    with pytest.raises(ConvertError, match="fisher needs statistics"):
        Compressor(tiny.params, tiny.cfg).recipe(Compression(search="fisher"))


def test_the_keywords_are_the_fields():
    """`compress` spells out the fields of `Compression`, with their defaults."""
    keywords = {n: p.default for n, p in inspect.signature(compress).parameters.items()}
    for name in ("params", "cfg", "batches", "bits", "statistics", "reporter"):
        del keywords[name]
    assert list(keywords) == [f.name for f in dataclasses.fields(Compression)]
    fields = dataclasses.asdict(Compression()) | dict(format=None)
    assert keywords == fields
    assert Compression().format == LatentFormat(4, 4)
    assert planner.CachePlan is palu_jax.CachePlan


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["keep", "budget", "slowest", "tokens", "multiple", "group", "split"]
)
def test_numbers_must_be_above_0(tiny, name, value):
    given = (1.0, value) if name == "split" else value
    with pytest.raises(ConvertError, match=f"^{name} is "):
        compress(tiny.params, tiny.cfg, statistics=tiny.statistics, **{name: given})


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_the_planner_refuses_no_budget_at_all(tiny, value):
    """NaN is below no cost, so it would buy every rank."""
    energies = {3: [(np.ones((1, 48)), np.ones((1, 48)))] * 2}
    with pytest.raises(RankError, match=r"^budget is "):
        planner.plan_cache(energies, tiny.cfg, value)
    with pytest.raises(RankError, match=r"^slowest is "):
        planner.plan_cache(energies, tiny.cfg, 60, slowest=value)
    with pytest.raises(ConvertError, match="no budget to plan for"):
        Compressor(tiny.params, tiny.cfg, tiny.statistics).plans(Compression())


def test_any_plan_can_be_chosen(tiny):
    """`energies` are the eigenvalues of the pieces; every plan converts, and its cache has the
    bytes that it says."""
    compressor = Compressor(tiny.params, tiny.cfg, tiny.statistics)
    energies = compressor.energies("whitened")
    assert list(energies) == [1, 3]
    for group, layers in energies.items():
        for i, sides in enumerate(layers):
            attn = tiny.params.layers[i].attn
            gram = np.asarray(tiny.statistics.layers[i].gram_DD, np.float64)
            for w, parts in zip((attn.k, attn.v), sides, strict=True):
                w = np.asarray(w, np.float64)
                for g, found in enumerate(parts):
                    own = w[:, g * group * 16 : (g + 1) * group * 16]
                    want = np.linalg.eigvalsh(own.T @ gram @ own)[::-1]
                    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-9 * want[0])
    form = LatentFormat(dtype="bfloat16")
    how = Compression(format=form, objective="whitened", budget=60.0, multiple=16)
    plans = compressor.plans(how)
    by_hand = planner.plan_cache(energies, tiny.cfg, 60.0, 16)
    assert plans == by_hand and len(plans) > 2
    assert compressor.recipe(how) == compressor.recipe(how, plans[0])
    for plan in (plans[1], plans[-1]):
        params, recipe = compressor.compress(how, plan)
        assert (recipe.groups, recipe.ranks) == (plan.groups, plan.ranks)
        assert recipe.format == plan.format(how.format) and recipe.objective == "whitened"
        shapes = jax.eval_shape(lambda p=params: caches_for(p, tiny.cfg, 1, 10))
        held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shapes))
        assert held == 10 * plan.bytes_per_token <= 600
