"""Both methods at once: speculative decoding over a Palu model gives that model's own tokens."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experts
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from llm_jax.attention import caches_for
from llm_jax.config import Config
from llm_jax.formats import open_checkpoint
from llm_jax.generation import generate
from llm_jax.params import abstract
from llm_jax.sample import Sampler
from llm_jax.stream import to_device
from llm_jax.testing import tiny_params
from pallas_kernels.quantized_matmul.packing import scales
from palu_jax import store
from palu_jax.convert import Recipe, to_palu
from palu_jax.format import LatentFormat, MixedFormat
from palu_jax.rank import group_sizes, uniform_ranks
from subspec_jax.batch import BatchDecoder
from subspec_jax.decoder import Decoder
from subspec_jax.draft_model import Draft, make_draft, substitute
from subspec_jax.load import load_target
from subspec_jax.methods import make_method
from subspec_jax.offload import place
from subspec_jax.plan import make_plan
from subspec_jax.precompile import Ahead, compile_ahead, use_cache
from subspec_jax.prefix_cache import Text
from subspec_jax.propose import ModelDraft, Vanilla
from subspec_jax.sources import Source
from subspec_jax.tree import TreeSpec, cache_slots
from subspec_jax.verify import Target, streamed_prefill

PROMPT, STEPS = [1, 2, 3, 5, 7, 1, 2, 3], 20
CFG = Config(2, 32, 4, 2, 8, 64, 97, dtype="float32", qkv_bias=True)
RANKS = (((8,), (12,)), ((6,), (16,)))
FORMATS = {
    "16 bits": LatentFormat(),
    "4 bits": LatentFormat(4, 4),
    "2 bits, sinks and window": LatentFormat(2, 2, (1.0,), sinks=2, window=4),
    "two classes": MixedFormat(
        classes=(((((4, 4), (4, 2)),), (((12, 3),),)), ((((6, 8),),), (((4, 8), (12, 2)),)))
    ),
}
TREES = {
    "beam": TreeSpec("beam", 3, 3),
    "best-first": TreeSpec("best-first", 4, 2, budget=8),
    "post": TreeSpec("beam", 2, 3, extra=2),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def palu(form, ranks=RANKS):
    return to_palu(tiny_params(CFG), CFG, Recipe((2,), ranks, "plain", form))


def split(form):
    """Heads apart, ranks uneven, and the mean direction of the inputs stored by itself."""
    x = np.random.default_rng(0).normal(size=(100, CFG.d_model)) + 1
    layer = SimpleNamespace(
        gram_DD=x.T @ x / 100, mean_D=x.mean(0), query_KHH=np.ones((2, 8, 8)), grad_k_FF=None
    )
    ranks = (((4, 7), (8, 5)), ((6, 6), (3, 8)))
    recipe = Recipe((1, 1), ranks, "whitened", form, mean_split=True)
    return to_palu(tiny_params(CFG), CFG, recipe, SimpleNamespace(layers=(layer,) * 2, model=None))


def speculated(params, tree, sampler=Sampler(), **options):
    """(tokens, rounds, decoder) of speculative decoding with all layers offloaded."""
    target = Target(dataclasses.replace(params, layers=place(params.layers, 0)), CFG)
    draft = ModelDraft(substitute(target.params, 4, 16), CFG, tree, **options)
    decoder = Decoder(target, draft, sampler, max_length=64, chunk=16)
    rounds = list(decoder.rounds(PROMPT, STEPS, seed=3))
    return [t for r in rounds for t in r.tokens], rounds, decoder


@pytest.mark.quick_cases("beam")
@pytest.mark.parametrize("tree", TREES)
def test_a_tree_behind_windows_and_two_bases(tree):
    """The branches of a tree are as far from the text as their depth says, not their slot."""
    kinds = dict(layer_kinds=("sliding", "full"), window=5, sliding_theta=50.0)
    cfg = dataclasses.replace(CFG, query_scale=0.3, **kinds)
    recipe = Recipe((2,), RANKS, "plain", LatentFormat(4, 4))
    params = to_palu(tiny_params(cfg), cfg, recipe)
    target = Target(dataclasses.replace(params, layers=place(params.layers, 0)), cfg)
    draft = ModelDraft(substitute(target.params, 4, 16), cfg, TREES[tree])
    rounds = list(Decoder(target, draft, max_length=64, chunk=16).rounds(PROMPT, STEPS))
    assert [t for r in rounds for t in r.tokens] == generate(params, PROMPT, cfg, STEPS)
    assert sum(r.accepted for r in rounds) > 3


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_texts_together_over_low_rank_caches(form):
    """Rows of such caches, too: what a text has is right whoever had its row before."""
    params = palu(FORMATS[form])
    target = Target(dataclasses.replace(params, layers=place(params.layers, 0)), CFG)
    method = make_method("subspec", TREES["beam"], Draft(4, 16))
    draft = substitute(target.params, 4, 16)
    decoder = BatchDecoder(target, method, draft, rows=3, max_length=64, chunk=16)
    prompts = [PROMPT, PROMPT[:3], [9, 8, 7, *PROMPT], [*PROMPT, 4, 4], PROMPT[:1]]
    some = [Text(p, STEPS, i, Sampler(0.8 * (i % 2))) for i, p in enumerate(prompts)]
    want = [generate(params, t.prompt, CFG, STEPS, t.sampler, t.seed) for t in some]
    assert decoder.generate(some) == want
    kept = next(t for t in some if decoder.rows.held[t.row] == t.tokens[: t.at])
    again = Text([*kept.tokens, 5], 4)  # goes on from its row
    assert decoder.generate([again]) == [generate(params, again.prompt, CFG, 4)]
    assert again.cached == len(kept.tokens) - 1


CASES = {
    # name -> how the model is made, format, tree, what else differs
    "mean split": (split, LatentFormat(), TREES["best-first"], {}),
    "mean split, sinks and window, drafting on": (
        split,
        LatentFormat(2, 3, (1.0,), sinks=1, window=5),
        TREES["post"],
        {},
    ),
    "window, sampled": (
        palu,
        LatentFormat(2, 2, (1.0,), window=3),
        TREES["best-first"],
        dict(sampler=Sampler(0.8, top_k=40)),
    ),
    "window, own cache": (
        palu,
        LatentFormat(2, 2, (1.0, 0.8), sinks=1, window=3),
        TREES["beam"],
        dict(own_cache=True),
    ),
    "two classes": (palu, FORMATS["two classes"], TREES["beam"], {}),
}


QUICK = "window, sampled"


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, form, tree, options",
    [
        pytest.param(*case, id=name, marks=() if name == QUICK else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_more_formats_trees_and_ways_of_drawing(make, form, tree, options):
    params = make(form)
    got, rounds, decoder = speculated(params, tree, **options)
    assert got == generate(params, PROMPT, CFG, STEPS, options.get("sampler", Sampler()), 3)
    assert sum(r.accepted for r in rounds) > 0
    # Caches hold what a fresh prefill of the text gives: nothing of the draft is left.
    text = PROMPT + got[:-1]
    count = len(text) - len(rounds[-1].tokens) + 1
    scratch = tree.places + 1
    want = list(to_device(caches_for(params, CFG, 1, decoder.slots, scratch)))
    streamed_prefill(decoder.target, text[:count], want, 16)
    for cache, fresh in zip(decoder.caches, want, strict=True):
        low, again = (
            np.concatenate([np.asarray(a) for a in c.stored(jnp.float32)], -1)[:, :count]
            for c in (cache, fresh)
        )
        near = np.isclose(low, again, rtol=1e-4, atol=1e-4)
        assert near.mean() > 0.99  # a code may be another one where the last bit of a latent is
        if cache.exact is not None:
            exact = jnp.array([*range(form.sinks), *range(count - form.window, count)])
            kept = (c.exact.rows_BXR[:, c.exact.place(exact)] for c in (cache, fresh))
            np.testing.assert_allclose(*kept, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_nothing_large_is_compiled_again(tmp_path):
    """What `compile_ahead` makes from shapes alone serves a model with two kinds of layers."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    cfg, form = dataclasses.replace(CFG, vocab=98), LatentFormat(2, 2, (1.0,), sinks=2, window=4)
    recipe = Recipe((2,), RANKS, "plain", form)
    params = to_device(to_palu(tiny_params(cfg), cfg, recipe))
    model = store.abstract_layers(store.StoredModel(None, "", cfg, recipe, []), abstract(cfg), cfg)
    options = dict(max_length=64, chunk=16, resident=0, model=model)
    plan = make_plan(cfg, 2**30, TREES["beam"], Draft(4, 16), **options)
    large = lambda: sorted(
        f.name
        for f in tmp_path.glob("*-cache")
        if any(n in f.name for n in ("jit_block", "last_logits", "finish_round", "grow"))
    )
    reset_cache()
    use_cache(tmp_path)
    try:
        compile_ahead(dict(m=Ahead(plan, Sampler())))
        ahead = large()
        assert len(ahead) == 2 * 2 + 3  # two kinds of layers, a tree and a chunk
        placed = dataclasses.replace(params, layers=place(params.layers, 0))
        draft = ModelDraft(substitute(placed, 4, 16, 0), cfg, plan.spec)
        decoder = Decoder(Target(placed, cfg), draft, max_length=64, chunk=16)
        assert len(decoder.generate(PROMPT, 6)) == 6
        assert large() == ahead
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


@pytest.mark.quick_cases("4 bits")
@pytest.mark.parametrize(
    "name", [pytest.param("16 bits", marks=pytest.mark.slow), *list(FORMATS)[1:]]
)
def test_speculative_tokens_are_the_models_own(name):
    # Layers of one kind in the quick case: the other ones have as many programs again.
    params = palu(FORMATS[name], RANKS[:1] * 2 if name == "4 bits" else RANKS)
    target = Target(dataclasses.replace(params, layers=place(params.layers, 0)), CFG)
    want = generate(params, PROMPT, CFG, STEPS)
    if name == "16 bits":
        assert Decoder(target, Vanilla(), max_length=64).generate(PROMPT, STEPS) == want
    for tree in TREES.values() if name == "16 bits" else [TREES["beam"]]:
        draft = ModelDraft(substitute(target.params, 4, 16), CFG, tree)
        decoder = Decoder(target, draft, max_length=64)
        rounds = list(decoder.rounds(PROMPT, STEPS))
        assert [t for r in rounds for t in r.tokens] == want
        assert max(r.accepted for r in rounds) > 0  # so rows of latents were moved
        assert rounds[1].streamed_bytes == sum(
            a.nbytes for l in params.layers for a in jax.tree.leaves(l) if a.ndim > 1
        )


def test_plan_counts_what_is_there():
    form, spec, draft = LatentFormat(4, 2, window=8), TREES["beam"], Draft(4, 16)
    params, recipe = palu(form), Recipe((2,), RANKS, "plain", form)
    stored = store.StoredModel(None, "tiny", CFG, recipe, [])
    model = store.abstract_layers(stored, abstract(CFG), CFG)
    plan = make_plan(CFG, 2**30, spec, draft, max_length=64, resident=1, model=model)
    plain = make_plan(CFG, 2**30, spec, draft, max_length=64, resident=1)
    nbytes = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree))
    slots = cache_slots(64, spec)
    live = nbytes(caches_for(params, CFG, 1, slots, spec.places + 1))
    assert plan.device["KV cache"] == live < plain.device["KV cache"] / 2
    matrices = [sum(a.nbytes for a in jax.tree.leaves(l) if a.ndim > 1) for l in params.layers]
    assert plan.device["resident layers"] == matrices[0]
    assert plan.streamed_bytes == matrices[1] == plan.host["streamed layers"]
    low = substitute(params, 4, 16, 0, [1]).layers[1]
    vectors = sum(a.nbytes for a in jax.tree.leaves(params.layers[1]) if a.ndim == 1)
    assert plan.device["substitutes"] == nbytes(low) - vectors


def test_small_factors_are_shared_with_the_draft():
    params = palu(LatentFormat(4, 4))
    draft = substitute(params, 4, 16)
    ours, theirs = (p.layers[0].attn.k.up_gRKH for p in (draft, params))
    assert ours.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer()
    assert not isinstance(draft.layers[0].attn.k.down_DR, jax.Array)
    step, _ = scales(draft.layers[0].attn.q)
    assert np.isfinite(np.asarray(step, np.float32)).all()


@pytest.mark.slow
def test_a_stored_model_with_experts(tmp_path):
    """Its attention is Palu's, and its experts are brought one by one."""
    base = open_checkpoint(tiny_experts.write(tmp_path / "model")[0])
    cfg = base.config("float32")
    sizes = group_sizes(cfg.kv_heads, 2)
    recipe = Recipe(sizes, uniform_ranks(cfg.layers, sizes, cfg.head_dim, 0.5), "plain")
    store.save(tmp_path / "palu", to_palu(base.load(cfg), cfg, recipe), cfg, recipe, "tiny")
    checkpoint = store.PaluCheckpoint(base, store.describe(tmp_path / "palu"))
    spec, draft = TREES["beam"], Draft(4, 16)
    shapes = Source("tiny", cfg, checkpoint).shapes(draft)
    plan = make_plan(cfg, 2**30, spec, draft, max_length=64, chunk=16, model=shapes)
    target = load_target(checkpoint, dataclasses.replace(plan, hot=3))
    low = make_draft(target.params, draft)
    decoder = Decoder(target, ModelDraft(low, cfg, spec), max_length=64, chunk=16)
    rounds = list(decoder.rounds(PROMPT, STEPS))
    want = generate(checkpoint.load(cfg), PROMPT, cfg, STEPS)
    assert [t for r in rounds for t in r.tokens][:STEPS] == want
    assert all(r.experts.needed[[0, 2]].all() for r in rounds[1:])
