"""Both methods at once: speculative decoding over a Palu model gives that model's own tokens."""

import dataclasses

import jax
import numpy as np
import pytest

from llm_jax.attention import caches_for
from llm_jax.config import Config
from llm_jax.generate import generate
from llm_jax.params import abstract
from llm_jax.testing import tiny_params
from palu_jax import store
from palu_jax.convert import Recipe, to_palu
from palu_jax.latent import LatentFormat
from subspec_jax.decode import Decoder
from subspec_jax.offload import place
from subspec_jax.plan import Draft, make_plan
from subspec_jax.propose import ModelDraft, Vanilla
from subspec_jax.substitute import substitute
from subspec_jax.tree import TreeSpec, cache_slots
from subspec_jax.verify import Target

PROMPT, STEPS = [1, 2, 3, 5, 7, 1, 2, 3], 20
CFG = Config(2, 32, 4, 2, 8, 64, 97, dtype="float32", qkv_bias=True)
RANKS = (((8,), (12,)), ((6,), (16,)))
FORMATS = {
    "16 bits": LatentFormat(),
    "4 bits": LatentFormat(4, 4),
    "2 bits, sinks and window": LatentFormat(2, 2, sinks=2, window=4),
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


def palu(form):
    return to_palu(tiny_params(CFG), CFG, Recipe((2,), RANKS, "plain", form))


@pytest.mark.parametrize("name", FORMATS)
def test_speculative_tokens_are_the_models_own(name):
    params = palu(FORMATS[name])
    target = Target(dataclasses.replace(params, layers=place(params.layers, 0)), CFG)
    want = generate(params, PROMPT, CFG, STEPS)
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
    stored = store.Stored(None, "tiny", CFG, recipe, [])
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
    assert np.isfinite(np.asarray(draft.layers[0].attn.q.step_QF, np.float32)).all()
