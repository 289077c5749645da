"""Converted models: the same function at full rank, the same tokens however they are fed."""

import dataclasses
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from feeding import one_by_one, text, whole

import palu_jax
from llm_jax.attention import caches_for, causal_step, rope_frequencies
from llm_jax.generation import GenerationError, decode_loop, generate, prefill
from llm_jax.model import forward
from llm_jax.testing import TINY_FAMILIES, tiny_config, tiny_params
from palu_jax import convert as module
from palu_jax.attention import PaluAttention
from palu_jax.convert import DISTANCES, ConvertError, Recipe, layer_spectra, to_palu
from palu_jax.decompose import key_metric
from palu_jax.format import FormatError, LatentFormat
from palu_jax.rank import group_sizes, uniform_ranks


def recipe(cfg, group, keep, objective="plain", **changes):
    groups = group_sizes(cfg.kv_heads, group)
    ranks = uniform_ranks(cfg.layers, groups, cfg.head_dim, keep)
    return Recipe(groups, ranks, objective, **changes)


@pytest.mark.quick_cases("llama3", "qwen2")
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_full_rank_equals_dense(family):
    cfg = tiny_config(family)
    params = tiny_params(cfg)
    full = to_palu(params, cfg, recipe(cfg, cfg.kv_heads, 1.0))
    tokens = text(cfg)
    chex.assert_trees_all_close(
        whole(full, cfg, tokens)[0], whole(params, cfg, tokens)[0], atol=3e-5
    )


@pytest.mark.parametrize(
    "group, changes",
    [
        (1, dict(objective="whitened")),
        (2, dict(objective="aware", mean_split=True)),
        (2, dict(objective="gradient", rotate=False)),
        (3, dict(objective="gradient", mean_split=True)),
        (3, dict(objective="whitened", fuse_values=True)),
    ],
    ids=str,
)
def test_full_rank_equals_dense_in_all_groups(tiny, group, changes):
    """Groups of two leave one of a single head. Directions of the inputs that never occur in the
    statistics would be lost; here all do."""
    full = to_palu(tiny.params, tiny.cfg, recipe(tiny.cfg, group, 1.0, **changes), tiny.statistics)
    tokens = text(tiny.cfg)
    want = whole(tiny.params, tiny.cfg, tokens)[0]
    chex.assert_trees_all_close(whole(full, tiny.cfg, tokens)[0], want, atol=2e-4)


def test_rotation_changes_nothing_at_16_bits(tiny):
    tokens = text(tiny.cfg)
    one = recipe(tiny.cfg, 2, 0.5)
    params = to_palu(tiny.params, tiny.cfg, one)
    want = whole(params, tiny.cfg, tokens)[0]
    turned = dataclasses.replace(one, format=LatentFormat(4, 4), rotate=True)
    found = to_palu(tiny.params, tiny.cfg, turned)
    assert not np.allclose(found.layers[0].attn.k.down_DR, params.layers[0].attn.k.down_DR)
    layers = tuple(
        dataclasses.replace(l, attn=dataclasses.replace(l.attn, format=LatentFormat()))
        for l in found.layers
    )
    found = dataclasses.replace(found, layers=layers)
    chex.assert_trees_all_close(whole(found, tiny.cfg, tokens)[0], want, atol=3e-5)


FORMATS = {
    "16": LatentFormat(),
    "4 and 3": LatentFormat(4, 3),
    "2, blocks of 4": LatentFormat(2, 2, block=4),
    "sinks and window": LatentFormat(2, 4, sinks=2, window=5),
    "window": LatentFormat(4, 16, window=3),
}


SLOW = ("2, blocks of 4", "window")  # the others reach the same code


@pytest.mark.quick_cases("4 and 3-True", "window-False")
@pytest.mark.parametrize(
    "name, mean",
    [
        pytest.param(name, name == "4 and 3", marks=[pytest.mark.slow] * (name in SLOW))
        for name in FORMATS
    ],
)
def test_the_cache_gives_what_one_pass_gives(tiny, name, mean):
    """Token by token and at once; codes are the same ones."""
    one = recipe(tiny.cfg, 2, 0.5, "whitened", format=FORMATS[name], mean_split=mean)
    palu = to_palu(tiny.params, tiny.cfg, one, tiny.statistics)
    tokens = text(tiny.cfg)
    want, caches = whole(palu, tiny.cfg, tokens)
    got, filled = one_by_one(palu, tiny.cfg, tokens)
    chex.assert_trees_all_close(got, want, atol=1e-3)
    if name != "16":
        same = np.asarray(filled[0].k.codes_BSP) == np.asarray(caches[0].k.codes_BSP)
        assert same.mean() > 0.99  # the first layer's inputs are exact


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("4 and 3", marks=pytest.mark.slow), "sinks and window"]
)
def test_a_padded_prompt_leaves_the_newest_tokens_exact(tiny, name):
    """`generate` pads 5 tokens to 16: what fills up must not displace the window."""
    one = recipe(tiny.cfg, 2, 0.5, "whitened", format=FORMATS[name])
    palu = to_palu(tiny.params, tiny.cfg, one, tiny.statistics)
    prompt = [1, 2, 3, 5, 7]
    got = generate(palu, prompt, tiny.cfg, 12)
    logits, _ = one_by_one(palu, tiny.cfg, jnp.array([prompt + got]))
    assert got == jnp.argmax(logits[0, len(prompt) - 1 : -1], -1).tolist()


@pytest.mark.parametrize("objective", ["plain", "whitened", "aware", "gradient"])
@pytest.mark.parametrize("group", [1, 2])
def test_converted_factors_have_the_predicted_error(tiny, objective, group):
    """Group by group, from the float32 factors that a model gets; and no other objective's are
    better in this one's measure."""
    cfg, H = tiny.cfg, tiny.cfg.head_dim
    attn, moments = tiny.params.layers[0].attn, tiny.statistics.layers[0]
    gram = np.eye(cfg.d_model) if objective == "plain" else np.asarray(moments.gram_DD, np.float64)
    metrics = [np.eye(cfg.kv_heads * H)] * 2
    if objective == "gradient":
        metrics = [np.asarray(g, np.float64) for g in (moments.grad_k_FF, moments.grad_v_FF)]
    elif objective == "aware":
        o = np.asarray(attn.o, np.float64).reshape(cfg.kv_heads, -1, H, cfg.d_model)
        of_values = [sum(w @ w.T for w in heads) for heads in o]
        of_keys = key_metric(moments.query_KHH, rope_frequencies(cfg), DISTANCES)
        metrics = [scipy.linalg.block_diag(*m) for m in (of_keys, of_values)]
    groups = group_sizes(cfg.kv_heads, group)

    def errors(made):
        """Of every group of keys, then of values, weighed by this objective."""
        palu = to_palu(tiny.params, cfg, recipe(cfg, group, 0.5, made), tiny.statistics)
        for f, w, metric in zip(
            (palu.layers[0].attn.k, palu.layers[0].attn.v), (attn.k, attn.v), metrics
        ):
            first, at = 0, 0
            for i, (rank, heads) in enumerate(zip(f.ranks, f.heads, strict=True)):
                own = slice(at, at + heads * H)
                up = np.asarray(f.up_gRKH[i, :rank, :heads], np.float64).reshape(rank, -1)
                assert not f.up_gRKH[i, rank:].any() and not f.up_gRKH[i, :, heads:].any()
                down = np.asarray(f.down_DR[:, first : first + rank], np.float64)
                rest = np.asarray(w, np.float64)[:, own] - down @ up
                yield np.trace(rest.T @ gram @ rest @ metric[own, own])
                first, at = first + rank, at + heads * H

    found = layer_spectra(attn, cfg, groups, objective, moments)
    ranks = recipe(cfg, group, 0.5).ranks[0]
    predicted = [
        s.error(r) for part, rs in zip((found.k, found.v), ranks) for s, r in zip(part, rs)
    ]
    np.testing.assert_allclose(list(errors(objective)), predicted, rtol=1e-4)
    for other in {"plain", "whitened", "aware", "gradient"} - {objective}:
        assert (np.array(list(errors(other))) >= np.array(predicted) * (1 - 1e-4)).all()


def test_three_lines_in_other_code(tiny):
    palu = to_palu(tiny.params, tiny.cfg, recipe(tiny.cfg, 3, 0.5))
    tokens = generate(palu, [1, 2, 3], tiny.cfg, 6)
    assert len(tokens) == 6 and isinstance(palu.layers[0].attn, PaluAttention)
    assert palu.layers[0].mlp is tiny.params.layers[0].mlp  # what is not converted is shared
    text = jnp.array([[4, 5, 6]])
    step, caches = causal_step(0, 3, 8), caches_for(palu, tiny.cfg, 1, 8)
    logits = jax.jit(lambda p: forward(p, text, caches, step, tiny.cfg)[0])(palu)
    chex.assert_trees_all_close(forward(palu, text, caches, step, tiny.cfg)[0], logits, atol=1e-5)


def test_decoding_ends_where_the_latent_cache_ends(tiny):
    cfg, token = tiny.cfg, jnp.array([1])
    for form in (LatentFormat(), LatentFormat(4, 4, sinks=1, window=2)):
        palu = to_palu(tiny.params, cfg, recipe(cfg, 3, 0.5, format=form))
        caches = caches_for(palu, cfg, 1, 8)
        with pytest.raises(GenerationError, match=r"4 steps from position 5 .* 8 slots"):
            decode_loop(palu, token, caches, jnp.int32(5), jax.random.key(0), cfg, 4)
        with pytest.raises(GenerationError, match="9 tokens and the cache 8 slots"):
            prefill(palu, [1] * 9, caches, cfg)
        with pytest.raises(GenerationError, match="token id 96 is outside"):
            generate(palu, [96], cfg, 2)


def test_the_example_at_the_top_of_the_module_runs(tiny):
    lines = module.__doc__.splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
    tokens = np.random.default_rng(0).integers(0, tiny.cfg.vocab, (2, 12))
    names = vars(palu_jax.rank) | vars(module) | dict(calibrate=palu_jax.calibrate)
    names |= dict(params=tiny.params, cfg=tiny.cfg, batches=[tokens])
    exec(code, names)
    assert isinstance(names["palu"].layers[0].attn, PaluAttention)


def test_whitened_beats_plain_on_the_text_it_was_made_from(tiny):
    gram = np.asarray(tiny.statistics.layers[0].gram_DD, np.float64)
    w = np.asarray(tiny.params.layers[0].attn.k, np.float64)
    error = {}
    for objective in ("plain", "whitened"):
        found = layer_spectra(
            tiny.params.layers[0].attn, tiny.cfg, (3,), objective, tiny.statistics.layers[0]
        )
        rest = w - np.matmul(*found.k[0].factors(16))
        error[objective] = np.trace(rest.T @ gram @ rest)
    assert error["whitened"] < 0.99 * error["plain"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(groups=(2, 2)), "do not add up to the 3 kv heads"),
        (dict(groups=(1, 2)), "only the last one may be smaller"),
        (dict(ranks=()), "ranks for 0 layers"),
        (dict(ranks=(((49,), (8,)),) * 2), "key rank 49"),
        (dict(ranks=(((8,), (0,)),) * 2), "value rank 0"),
        (dict(ranks=(((8, 8), (8,)),) * 2), "2 key ranks for 1 groups"),
        (dict(objective="best"), "objective 'best'"),
        (dict(objective="whitened"), "need statistics"),
        (dict(mean_split=True), "need statistics"),
        (dict(mean_split=True, fuse_values=True), "no place for a mean split"),
    ],
)
def test_impossible_recipes(tiny, change, words):
    good = Recipe((3,), (((8,), (8,)),) * 2, "plain")
    with pytest.raises(ConvertError, match=words):
        to_palu(tiny.params, tiny.cfg, dataclasses.replace(good, **change))


def test_statistics_must_be_of_this_model(tiny):
    good = Recipe((3,), (((8,), (8,)),) * 2, "whitened")
    one = dataclasses.replace(tiny.statistics, layers=tiny.statistics.layers[:1])
    with pytest.raises(ConvertError, match="have 1 layers"):
        to_palu(tiny.params, tiny.cfg, good, one)
    other = dataclasses.replace(tiny.statistics.layers[0], gram_DD=np.eye(7))
    with pytest.raises(ConvertError, match="width 7"):
        wrong = dataclasses.replace(tiny.statistics, layers=(other,) * 2)
        to_palu(tiny.params, tiny.cfg, good, wrong)
    less = dataclasses.replace(tiny.statistics.layers[0], grad_k_FF=None)
    with pytest.raises(ConvertError, match="hold no gradients"):
        wrong = dataclasses.replace(tiny.statistics, layers=(less,) * 2)
        to_palu(tiny.params, tiny.cfg, dataclasses.replace(good, objective="gradient"), wrong)


def test_statistics_of_other_heads_and_converted_models_are_refused(tiny):
    good = Recipe((3,), (((8,), (8,)),) * 2, "whitened")
    other = dataclasses.replace(tiny.statistics.layers[0], query_KHH=np.ones((2, 16, 16)))
    with pytest.raises(ConvertError, match=r"kv heads and head size \(2, 16\)"):
        wrong = dataclasses.replace(tiny.statistics, layers=(other,) * 2)
        to_palu(tiny.params, tiny.cfg, good, wrong)
    palu = to_palu(tiny.params, tiny.cfg, good, tiny.statistics)
    with pytest.raises(ConvertError, match="not PaluAttention"):
        to_palu(palu, tiny.cfg, good, tiny.statistics)
    with pytest.raises(FormatError, match="blocks of 3 latents do not divide a rank of 8"):
        blocks = dataclasses.replace(good, format=LatentFormat(4, 4, block=3))
        to_palu(tiny.params, tiny.cfg, blocks, tiny.statistics)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_models(dtype):
    cfg = tiny_config("qwen2", dtype=dtype)
    params = tiny_params(cfg)
    full = to_palu(params, cfg, recipe(cfg, 2, 1.0))
    assert full.layers[0].attn.k.down_DR.dtype == jnp.dtype(dtype)
    tokens = text(cfg)
    got, want = (np.asarray(whole(p, cfg, tokens)[0]) for p in (full, params))
    assert np.abs(got - want).max() < 0.15 * np.abs(want).max()
    assert jax.tree.leaves(whole(full, cfg, tokens)[1])[0].dtype == jnp.dtype(dtype)
