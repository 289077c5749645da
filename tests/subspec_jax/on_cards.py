"""Models that several devices share; `test_cards` runs this file where there are some."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspec_jax
from llm_jax.attention import caches_for, causal_step
from llm_jax.cards import (
    ALIKE,
    CACHES,
    PARTS,
    CardsError,
    cut,
    cut_head,
    empty,
    on_each,
    per_card,
    place_of,
    together,
)
from llm_jax.config import Config
from llm_jax.formats import open_checkpoint
from llm_jax.generation import generate
from llm_jax.model import forward, hidden
from llm_jax.params import Params
from llm_jax.sample import Sampler
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from subspec_jax import memory
from subspec_jax.load import spread
from subspec_jax.logprobs import tell
from subspec_jax.prefix_cache import Text

CARDS = len(jax.devices())
TREE = subspec_jax.TreeSpec("beam", depth=3, width=2)
SUBSTITUTES = ("subspec", "chain", "subspec-own-cache", "subspec-lookup", "subspec-post")
PROMPT, NEW = [5, 9, 17, 33, 65, 2, 7, 9, 17], 14
SAMPLED = Sampler(0.8, top_k=40)
MODELS = {
    "qwen2": tiny_config("qwen2", layers=3),  # biases of q, k and v; an own head
    "six kv heads": tiny_config("llama", heads=12, kv_heads=6, d_ff=128, vocab=290),
    "one kv head, tied": tiny_config("mistral", tied=True, vocab=290),
    "biases and sinks": tiny_config("qwen3", o_bias=True, mlp_bias=True, sinks=True, kv_heads=4),
    "windows and caps": tiny_config(
        "llama", layer_kinds=("sliding", "full"), window=5, norms="around", attn_softcap=20.0,
        logit_softcap=5.0, activation="gelu_tanh", embed_scale=2.0, wide_gains=True, tied=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "card_bytes", lambda: None)
        yield


@functools.cache
def written(tmp, name):
    cfg = MODELS[name]
    return write_safetensors(tmp / name.replace(" ", "-"), tiny_params(cfg), cfg)


@pytest.fixture(scope="session")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def opened(folder, memory="16MB", **changes):
    how = dict(tree=TREE, draft=subspec_jax.Draft(4, 16), max_length=96, chunk=32, resident=1)
    return subspec_jax.open(folder, memory, **how | dict(dtype="float32", devices=CARDS) | changes)


def divided(name) -> tuple[Params, Config]:
    """(the model with each device's part on it, its config)."""
    whole = MODELS[name]
    cfg, host = per_card(whole, CARDS), jax.tree.map(np.asarray, tiny_params(whole))
    parts = lambda i: [cut(host.layers[i], i, cfg, c) for c in range(CARDS)]
    layers = tuple(spread(parts(i), True) for i in range(cfg.layers))
    head = host.head_DV
    if head is not None:
        head = together([cut_head(head, cfg, c) for c in range(CARDS)])
    return Params(host.embed_VD, layers, host.norm, head), cfg


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_one_device(name):
    whole = MODELS[name]
    tokens, step = jnp.array([PROMPT]), causal_step(0, len(PROMPT), 16)
    want, _ = forward(tiny_params(whole), tokens, caches_for_one(whole), step, whole)
    params, cfg = divided(name)
    caches = empty(lambda: caches_for(params, cfg, 1, 16), CARDS)
    run = jax.jit(on_each(lambda *args: forward(*args, cfg), CARDS, (ALIKE, CACHES)))
    found, caches = run(params, tokens, caches, step)
    np.testing.assert_allclose(found, want, atol=2e-5, rtol=2e-5)
    each = np.stack([shard.data for shard in found.addressable_shards])
    np.testing.assert_array_equal(each, np.broadcast_to(each[:1], each.shape))
    heads = caches[0].k_BSKH.addressable_shards[0].data.shape[2]
    assert heads == -(-whole.kv_heads // CARDS)


def caches_for_one(cfg):
    return caches_for(tiny_params(cfg), cfg, 1, 16)


def test_each_device_holds_its_part_alone():
    params, cfg = divided("six kv heads")
    for layer in params.layers:
        for name, columns in (("q", cfg.heads * 16), ("k", cfg.kv_heads * 16)):
            matrix = getattr(layer.attn, name)
            assert matrix.sharding.spec == PARTS
            assert {s.data.shape for s in matrix.addressable_shards} == {(64, columns)}
        assert {s.data.shape[0] for s in layer.mlp.down.addressable_shards} == {cfg.d_ff}
    assert CARDS * cfg.d_ff < 128 + 64 and CARDS * cfg.kv_heads < 6 + CARDS


@pytest.mark.parametrize("name", list(MODELS)[:3])
def test_every_method_is_exact(name, tmp):
    whole = MODELS[name]
    want = generate(tiny_params(whole), PROMPT, whole, NEW)
    others = SUBSTITUTES[1:] if name == "qwen2" else ()
    with opened(written(tmp, name), also=("vanilla", "ngram", *others)) as model:
        assert model.cfg.cards == CARDS
        for method in model.methods:
            model.use(method)
            rounds = list(model.rounds(PROMPT, NEW, eos=()))
            assert [t for r in rounds for t in r.tokens] == want, method
            if method == "subspec":
                assert len(rounds) < NEW - 3
            streamed = model.target.params.layers[1:]
            kinds = {layer.mlp.down.sharding.memory_kind for layer in streamed}
            assert kinds == {"pinned_host"}


@pytest.mark.parametrize("draft", [subspec_jax.Draft(8, 0), subspec_jax.Draft(4, 16, head_bits=4)])
def test_other_substitutes_are_exact(draft, tmp):
    whole = MODELS["one kv head, tied"]
    want = generate(tiny_params(whole), PROMPT, whole, NEW)
    with opened(written(tmp, "one kv head, tied"), draft=draft) as model:
        rounds = list(model.rounds(PROMPT, NEW, eos=()))
        assert [t for r in rounds for t in r.tokens] == want and len(rounds) < NEW - 3


@pytest.mark.parametrize("head_bits", [None, 4])
def test_residuals_are_exact(head_bits, tmp):
    """Converted for so many devices: a folder for each."""
    folder, whole = written(tmp, "qwen2"), dataclasses.replace(MODELS["qwen2"], dtype="bfloat16")
    params = open_checkpoint(folder).load(whole)
    want = generate(params, PROMPT, whole, NEW)
    converted = tmp / f"converted-{head_bits}"
    how = dict(stream="residual", dtype="bfloat16", converted=converted, verify_weights=True)
    how |= dict(draft=subspec_jax.Draft(4, 16, head_bits=head_bits), max_length=64)
    for _ in range(2):  # the second one finds the folders
        with opened(folder, also=("vanilla",), **how) as model:
            plain = model.use("vanilla").generate(PROMPT, NEW)
            rounds = list(model.use("subspec").rounds(PROMPT, NEW))
            assert [t for r in rounds for t in r.tokens] == plain == want
            assert model.plan.streams_residuals and len(rounds) < NEW - 3
    assert sorted(p.name for p in converted.iterdir()) == [
        f"card-{i + 1}-of-{CARDS}" for i in range(CARDS)
    ]


def test_samples_do_not_depend_on_the_devices(tmp):
    whole = MODELS["qwen2"]
    want = generate(tiny_params(whole), PROMPT, whole, NEW, SAMPLED, seed=3)
    with opened(written(tmp, "qwen2"), sampler=SAMPLED) as model:
        assert model.generate(PROMPT, NEW, seed=3, eos=()) == want


def test_a_draft_model_is_on_every_device(tmp):
    whole = MODELS["qwen2"]
    want = generate(tiny_params(whole), PROMPT, whole, NEW)
    small = tiny_config("llama", layers=1)
    folder = write_safetensors(tmp / "small", tiny_params(small, 1), small)
    with opened(written(tmp, "qwen2"), method="classic", draft_model=folder) as model:
        assert model.generate(PROMPT, NEW, eos=()) == want


@pytest.mark.parametrize("method", ["subspec", "vanilla", "subspec-lookup", "subspec-own-cache"])
def test_texts_together_are_exact(method, tmp):
    whole, prompts = MODELS["qwen2"], (PROMPT, PROMPT[:4], PROMPT[2:])
    want = [generate(tiny_params(whole), p, whole, NEW) for p in prompts]
    with opened(written(tmp, "qwen2"), "24MB", method=method, texts=4) as model:
        decoder, texts = model.batch(), [Text(p, NEW, eos=()) for p in prompts]
        for text in texts:
            assert decoder.join(text)
        while not all(text.done for text in texts):
            decoder.step()
        assert [list(text.new) for text in texts] == want


def test_log_probabilities_are_the_models(tmp):
    whole = MODELS["qwen2"]
    caches = caches_for_one(whole)
    logits, _ = forward(
        tiny_params(whole), jnp.array([PROMPT]), caches, causal_step(0, len(PROMPT), 16), whole
    )
    want = jax.nn.log_softmax(logits[0], axis=-1)
    params, cfg = divided("qwen2")
    top = dataclasses.replace(params, embed_VD=None, layers=())
    x = hidden_states(params, cfg)
    found = tell(top, x, [(0, i) for i in range(len(PROMPT))], PROMPT, cfg)
    for i, told in enumerate(found):
        assert told.logprob == pytest.approx(float(want[i, PROMPT[i]]), abs=1e-4)


def hidden_states(params, cfg):
    run = on_each(lambda *args: hidden(*args, cfg)[0], CARDS)
    caches = empty(lambda: caches_for(params, cfg, 1, 16), CARDS)
    given = jnp.array([PROMPT]), caches, causal_step(0, len(PROMPT), 16)
    return jax.jit(run)(params, *given)


def test_the_plan_is_of_one_device_and_smaller(tmp):
    folder = written(tmp, "six kv heads")
    one, several = (opened(folder, devices=n).plan for n in (1, CARDS))
    assert several.streamed_bytes < one.streamed_bytes * (0.5 if CARDS > 2 else 0.6)
    assert several.total < one.total
    assert f"each of {CARDS} devices" in str(several)


def test_rounds_are_predicted(tmp):
    with opened(written(tmp, "qwen2")) as model:
        costs = model.predict()
        assert costs["round"] > costs["verify"] > 0
        assert model.generate(PROMPT, 4)


def test_more_devices_than_there_are_is_an_error(tmp):
    message = f"{CARDS + 1} devices were asked for, and JAX has {CARDS}"
    with pytest.raises(CardsError, match=message):
        opened(written(tmp, "qwen2"), devices=CARDS + 1).generate(PROMPT, 4)


def test_arrays_stay_in_parts_when_they_move():
    part = together([np.full((3, 2), c, np.float32) for c in range(CARDS)], "pinned_host")
    there = jax.device_put(part, place_of(part, 1))
    assert there.sharding.spec == PARTS and there.sharding.memory_kind == "device"
    for c, shard in enumerate(there.addressable_shards):
        np.testing.assert_array_equal(shard.data, np.full((3, 2), c))
