"""A Qwen3 in NNX, shaped as bonsai's, decoded speculatively: its own plain tokens, exactly."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bonsai_qwen3 import CFG, Layer, in_float64, plain, tiny
from flax import nnx

from llm_jax.attention import causal_step
from llm_jax.cache import empty_caches
from llm_jax.lowbit_array import LowBitArray
from llm_jax.model import forward
from llm_jax.rules import RuleError
from llm_jax.stream import on_host
from subspec_jax import Decoder, ForeignModel, PromptLookup, Rule, Sampler, SubspecError, TreeSpec
from subspec_jax.propose import Proposer

RULES = [
    Rule(r"layers/\d/attn/o_proj/w", 4, 16, summed=(0, 1)),
    Rule(r"layers/\d/attn/._proj/w", 4, 16),
    Rule(r"layers/\d/mlp/.*/kernel", 8, 0),
]
PROMPTS = ([5, 17, 3, 60, 2], list(range(20)))
STEPS = 24


def block(layer, x, cache, step):
    def write(k, v):
        put = lambda a, b: jax.lax.dynamic_update_slice(a, b, (0, step.at, 0, 0))
        new.update(k=put(cache["k"], k), v=put(cache["v"], v))
        return new["k"], new["v"]

    new = {}
    return layer(x, step.position_BT, step.mask_BTS, write), new


def cache(layer, batch, slots):
    shape = (batch, slots, *layer.attn.k_proj.shape[1:])
    return {"k": jnp.zeros(shape), "v": jnp.zeros(shape)}


BONSAI = ForeignModel(
    embed=lambda top, tokens: top["embedder"].encode(tokens),
    block=block,
    unembed=lambda top, x: top["lm_head"](top["final_norm"](x)),
    cache=cache,
)


@pytest.fixture(scope="module")
def model():
    return tiny()[0]


@pytest.fixture(scope="module")
def own(model):
    """f(prompt): the text that the model's own plain decoding writes."""
    return functools.cache(lambda prompt: plain(model, prompt, STEPS))


def target_of(model, resident=0):
    top = {name: getattr(model, name) for name in ("embedder", "final_norm", "lm_head")}
    return BONSAI.target(top, list(model.layers), resident)


@pytest.fixture(scope="module")
def target(model):
    return target_of(model, resident=1)


def drafts(target):
    tree = TreeSpec("beam", depth=4, width=2)
    substitutes = lambda spec, **more: lambda: BONSAI.draft(target, RULES, spec, **more)
    return {
        "plain": Proposer,
        "substitutes": substitutes(tree),
        "own cache": substitutes(tree, own_cache=True),
        "extra steps": substitutes(dataclasses.replace(tree, extra=2)),
        "best first": substitutes(TreeSpec("best-first", 4, 2, budget=7)),
        "look-up": substitutes(dataclasses.replace(tree, lookup=3)),
        "n-grams": lambda: PromptLookup(tree),
    }


NAMES = ("plain", "substitutes", "own cache", "extra steps", "best first", "look-up", "n-grams")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.quick_cases("plain", "substitutes", "n-grams")
def test_every_draft_writes_the_models_own_text(own, target, name):
    decoder = Decoder(target, drafts(target)[name](), max_length=128, chunk=16)
    for prompt in PROMPTS:
        assert decoder.generate(prompt, STEPS) == own(tuple(prompt))


def test_a_draft_is_accepted(target):
    decoder = Decoder(target, drafts(target)["substitutes"](), max_length=128)
    rounds = list(decoder.rounds(PROMPTS[0], STEPS))
    assert len(rounds) < STEPS / 2
    assert sum(r.streamed_bytes for r in rounds) > 0


@pytest.mark.slow
def test_sampled_tokens_are_those_of_plain_sampling(target):
    sampler = Sampler(temperature=0.8)
    alone = Decoder(target, sampler=sampler, max_length=128)
    drafted = Decoder(target, drafts(target)["substitutes"](), sampler, max_length=128)
    for seed in range(3):
        expected = alone.generate(PROMPTS[0], STEPS, seed=seed)
        assert drafted.generate(PROMPTS[0], STEPS, seed=seed) == expected


def test_layers_are_offloaded_and_the_model_is_untouched(model, target):
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    first, *others = target.params.layers
    assert not any(map(on_host, first.leaves))
    for layer in others:
        assert all(on_host(a) == (a.ndim > 1) for a in layer.leaves)
        assert isinstance(layer.own, Layer)
    draft = BONSAI.draft(target, RULES, TreeSpec("chain", 2)).params
    low = [a for a in jax.tree.leaves(draft.layers[1].own, is_leaf=is_low) if is_low(a)]
    assert len(low) == 7
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)


def is_low(a):
    return isinstance(a, LowBitArray)


def test_its_logits_are_those_of_llm_jax_and_of_float64():
    model, params = tiny()
    tokens = np.arange(3, 23)
    expected = in_float64(params, tokens)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        nnx.jit(lambda m, t: m(t))(model, tokens[None])[0], expected, atol=5e-6 * scale
    )
    caches, step = empty_caches(CFG, 1, 64), causal_step(0, 20, 64)
    run = jax.jit(forward, static_argnums=4)
    ours = run(params, jnp.asarray(tokens[None], jnp.int32), caches, step, CFG)[0]
    np.testing.assert_allclose(ours[0], expected, atol=5e-6 * scale)


WRONG = {
    "embed": (dict(embed=lambda top, t: top["embedder"].encode(t)[0]), "embed gives"),
    "unembed": (dict(unembed=lambda top, x: x[0]), "unembed"),
    "cache": (dict(cache=lambda layer, B, S: {"k": jnp.zeros((S, B))}), "cache of layer 0"),
    "no cache": (dict(cache=lambda layer, B, S: {}), "cache of layer 0"),
    "block": (dict(block=lambda l, x, c, s: (x[:, :1], c)), "block of layer 0 gives"),
    "whole numbers": (dict(embed=lambda top, t: jnp.zeros((1, 2, 64), jnp.int32)), "int32"),
}


@pytest.mark.parametrize("change, words", WRONG.values(), ids=WRONG)
def test_functions_that_do_not_fit_are_named(model, change, words):
    top = {name: getattr(model, name) for name in ("embedder", "final_norm", "lm_head")}
    wrong = dataclasses.replace(BONSAI, **change)
    with pytest.raises(SubspecError, match=words):
        wrong.target(top, list(model.layers))


def test_no_layers(model):
    with pytest.raises(SubspecError, match="without layers"):
        BONSAI.target({}, [])


def test_a_rule_for_nothing(target):
    with pytest.raises(RuleError, match="nearest paths are layers/"):
        BONSAI.draft(target, [Rule("layers/0/attn/query/w")], TreeSpec("chain", 2))
