"""Palu as an attention swap: latents in the cache of a Qwen3 in NNX, whose other parts are its own.

The factors are made from the module's own numbers under their Hugging Face names.
"""

import jax
import numpy as np
import pytest
from bonsai_qwen3 import CFG, tiny
from flax import nnx

import llm_jax
import palu_jax
from llm_jax import layouts
from llm_jax.attention import attention, caches_for, causal_step, empty_cache
from llm_jax.generation import generate
from llm_jax.model import forward
from llm_jax.stream import to_device
from subspec_jax import Decoder, ForeignModel, Rule, TreeSpec

PROMPT = [5, 17, 3, 60, 2]
STEPS = 20


def block(layer, x, cache, step):
    own, latent = layer["own"], layer["latent"]
    y, cache = attention(latent, own.input_layernorm(x), cache, step, CFG)
    x = x + y
    return x + own.mlp(own.post_attention_layernorm(x)), cache


SWAPPED = ForeignModel(
    embed=lambda top, tokens: top["embedder"].encode(tokens),
    block=block,
    unembed=lambda top, x: top["lm_head"](top["final_norm"](x)),
    cache=lambda layer, batch, slots: empty_cache(layer["latent"], CFG, batch, slots),
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=[pytest.param(16, marks=pytest.mark.slow), 4])
def swapped(request):
    """(the module swapped, as a target; `llm_jax`'s own Palu model of the same numbers)."""
    qwen3, params = tiny()
    arrays = layouts.BONSAI_QWEN3.to_hf(nnx.to_pure_dict(nnx.state(qwen3)), CFG)
    ours = llm_jax.params_from_hf(arrays, CFG)
    jax.tree.map(np.testing.assert_array_equal, ours, params)
    bits = request.param
    palu = palu_jax.compress(ours, CFG, keep=0.7, bits=bits, objective="plain", search="uniform")
    top = {name: getattr(qwen3, name) for name in ("embedder", "final_norm", "lm_head")}
    pairs = zip(qwen3.layers, palu.layers, strict=True)
    layers = [{"own": own, "latent": layer.attn} for own, layer in pairs]
    return SWAPPED.target(top, layers), palu


def test_perplexity_is_that_of_llm_jax(swapped):
    target, palu = swapped
    tokens_1T, T = np.random.default_rng(0).integers(0, CFG.vocab, (1, 48)), 48
    step = causal_step(0, T, 64)

    def perplexity(params, cfg):
        caches = caches_for(params, cfg, 1, 64)
        logits = jax.jit(forward, static_argnums=4)(params, tokens_1T, caches, step, cfg)[0]
        logp = np.asarray(jax.nn.log_softmax(logits[0, :-1]), np.float64)
        return np.exp(-logp[np.arange(T - 1), tokens_1T[0, 1:]].mean())

    params = to_device(target.params)
    assert perplexity(params, target.cfg) == pytest.approx(perplexity(palu, CFG), rel=1e-3)


def test_speculation_over_latents_writes_their_plain_text(swapped):
    target, palu = swapped
    expected = generate(palu, PROMPT, CFG, STEPS)
    rules = [Rule("layers/.*/own/mlp/.*", 8, 0), Rule("layers/.*/latent/[qo]", 8, 0)]
    draft = SWAPPED.draft(target, rules, TreeSpec("beam", 4, 2))
    for proposer in ({}, dict(proposer=draft)):
        rounds = list(Decoder(target, max_length=64, chunk=16, **proposer).rounds(PROMPT, STEPS))
        assert [t for r in rounds for t in r.tokens] == expected
    assert len(rounds) < STEPS
