"""Palu's moments through an NNX model's own forward: against `llm_jax`'s own calibration."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bonsai_qwen3 import CFG, tiny
from flax import nnx

import palu_jax
from llm_jax.attention import caches_for, causal_step
from llm_jax.model import forward
from llm_jax.rules import RuleError
from palu_jax import CalibrationError, calibrate, calibrate_nnx
from palu_jax.own_attention import shaped

SITES = dict(inputs=r"layers/\d+/attn/k_proj", queries=r"layers/\d+/attn/q_norm")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def shared():
    """(the module, `llm_jax`'s parameters of the same numbers)."""
    return tiny()


def batches():
    draw = np.random.default_rng(0)
    return [draw.integers(0, CFG.vocab, (n, 9)).astype(np.int32) for n in (2, 2, 1)]


def test_moments_are_those_of_llm_jax(shared):
    qwen3, params = shared
    before = nnx.to_pure_dict(nnx.state(qwen3))
    found = calibrate_nnx(qwen3, batches(), CFG, **SITES)
    expected = calibrate(params, batches(), CFG, gradients=False)
    assert (found.tokens, found.sequences, found.gradients) == (45, 5, False)
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        for name in ("gram_DD", "mean_D", "query_KHH"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(qwen3)), before)
    assert type(qwen3.layers[0].attn.k_proj).__call__ is type(qwen3.lm_head).__call__


ARRAYS = {name: f"layers/.*/{name}_proj/w" for name in "qkvo"}
ARRAYS |= {name: f"layers/.*/{name}/w" for name in ("q_norm", "k_norm")}


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["whitened", "aware"])
def test_palu_of_a_model_that_llm_jax_does_not_know(shared, objective):
    """The latent attention is that which `compress` makes of the shared checkpoint."""
    qwen3, params = shared
    how = dict(keep=0.5, bits=4, objective=objective)
    latents = palu_jax.compress_nnx(qwen3, CFG, batches(), arrays=ARRAYS, **SITES, **how)
    expected = palu_jax.compress(params, CFG, batches(), **how)
    x = np.random.default_rng(1).integers(0, CFG.vocab, (1, 32))
    layers = [
        dataclasses.replace(layer, attn=latent)
        for layer, latent in zip(params.layers, latents, strict=True)
    ]
    ours = dataclasses.replace(params, layers=tuple(layers))
    for name in ("q", "o", "q_norm", "k_norm"):
        for latent, layer in zip(latents, params.layers, strict=True):
            np.testing.assert_array_equal(getattr(latent, name), getattr(layer.attn, name))
    np.testing.assert_allclose(perplexity(ours, x), perplexity(expected, x), rtol=1e-3)
    assert perplexity(ours, x) != pytest.approx(perplexity(params, x), rel=1e-3)


@pytest.mark.parametrize("change, said", [
    (dict(objective="gradient"), "gradients are not taken through a foreign forward"),
    (dict(search="fisher"), "gradients are not taken through a foreign forward"),
    (dict(arrays={"q": "a", "k": "b"}), "no pattern for the matrices v, o"),
    (dict(arrays=ARRAYS | {"qkv": "a"}), "'qkv' is no part of attention"),
])  # fmt: skip
def test_what_cannot_be_compressed_is_named(change, said):
    with pytest.raises(palu_jax.ConvertError, match=said):
        palu_jax.compress_nnx(Few(), CFG, batches(), **(dict(arrays=ARRAYS) | SITES | change))


@pytest.mark.parametrize("name, shape, kept", [
    ("q", (64, 4, 16), (64, 64)), ("k", (64, 32), (64, 32)), ("v", (64, 2, 16), (64, 32)),
    ("o", (4, 16, 64), (64, 64)), ("o", (64, 64), (64, 64)), ("k_bias", (2, 16), (32,)),
    ("q_bias", (64,), (64,)), ("o_bias", (64,), (64,)), ("k_norm", (16,), (16,)),
    ("q", (4, 16, 64), None), ("k", (32, 64), None), ("o", (64, 4, 16), None), ("v", (), None),
    ("o_bias", (4, 16), None), ("q_norm", (4, 16), None),
])  # fmt: skip
def test_heads_may_be_apart_or_together(name, shape, kept):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    if kept is None:
        with pytest.raises(palu_jax.ConvertError, match=r"a/b has shape .*; expected"):
            shaped(name, "a/b", array, CFG)
    else:
        np.testing.assert_array_equal(shaped(name, "a/b", array, CFG), array.reshape(kept))


@pytest.mark.slow
def test_matrices_of_another_shape_are_named(shared):
    arrays = ARRAYS | {"k": r"layers/\d/attn/q_proj/w"}
    with pytest.raises(
        palu_jax.ConvertError, match=r"layers/0/attn/q_proj/w has shape \(64, 4, 16\)"
    ):
        palu_jax.compress_nnx(shared[0], CFG, batches()[:1], arrays=arrays, **SITES)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["whitened", "aware"])
def test_the_same_palu_model(shared, objective):
    qwen3, params = shared
    found = calibrate_nnx(qwen3, batches(), CFG, **SITES)
    how = dict(keep=0.5, bits=4, objective=objective, search="error")
    ours = palu_jax.compress(params, CFG, statistics=found, **how)
    theirs = palu_jax.compress(params, CFG, batches(), **how)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert jax.tree.structure(a.attn) == jax.tree.structure(b.attn)
    x = np.random.default_rng(1).integers(0, CFG.vocab, (1, 32))
    np.testing.assert_allclose(perplexity(ours, x), perplexity(theirs, x), rtol=1e-3)


def perplexity(params, tokens_1T):
    T = tokens_1T.shape[1]
    step, caches = causal_step(0, T, T), caches_for(params, CFG, 1, T)
    logits = jax.jit(forward, static_argnums=4)(params, tokens_1T, caches, step, CFG)[0]
    logp = np.asarray(jax.nn.log_softmax(logits[0, :-1]), np.float64)
    return np.exp(-logp[np.arange(T - 1), tokens_1T[0, 1:]].mean())


@pytest.mark.slow
def test_a_forward_with_its_own_jit(shared):
    qwen3, _ = shared
    inner = nnx.jit(lambda model, tokens: model(tokens))
    given = batches()[:1]
    found = calibrate_nnx(qwen3, given, CFG, **SITES, forward=lambda m, t: inner(m, t))
    plain = calibrate_nnx(qwen3, given, CFG, **SITES)
    jax.tree.map(np.testing.assert_allclose, *(s.layers[1].gram_DD for s in (found, plain)))


class Few(nnx.Module):
    """The model's embedding and its attention's first projection, called `times`."""

    def __init__(self, times=1, D=CFG.d_model):
        self.embed = nnx.Embed(CFG.vocab, CFG.d_model, rngs=nnx.Rngs(0))
        self.layers = nnx.List([nnx.Linear(CFG.d_model, D, rngs=nnx.Rngs(0)) for _ in range(3)])
        self.times = times

    def __call__(self, tokens):
        for layer in self.layers:
            for _ in range(self.times):
                y = layer(self.embed(tokens)[..., : layer.in_features])
        return y


def refused(error, said, model=None, given=None, inputs=r"layers/\d", queries=r"layers/\d", **more):
    with pytest.raises(error, match=said):
        given = batches()[:1] if given is None else given
        calibrate_nnx(model or Few(), given, CFG, inputs=inputs, queries=queries, **more)


def test_what_cannot_be_measured_is_named(shared):
    refused(CalibrationError, "called with 36 tokens for a batch of 18", Few(times=2))
    refused(CalibrationError, "called with 0 tokens", forward=lambda model, tokens: tokens)
    refused(CalibrationError, r"gives \(2, 9, 24\); expected queries", Few(D=24))
    refused(RuleError, "nearest paths are layers/", inputs="layer/./k")
    refused(CalibrationError, "chooses 1 parts of a model of 3 layers", inputs="layers/0")
    refused(CalibrationError, "no text", given=[])
    refused(CalibrationError, "batch 1: ", given=[np.full((1, 4), CFG.vocab)])
    refused(CalibrationError, "no Flax NNX module", model={"a": jnp.ones(2)})


def test_gradients_are_asked_for_by_name(shared):
    qwen3, params = shared
    found = calibrate_nnx(qwen3, batches()[:1], CFG, **SITES)
    with pytest.raises(palu_jax.ConvertError, match=r"no gradients; .*whitened or aware"):
        palu_jax.compress(params, CFG, statistics=found)
