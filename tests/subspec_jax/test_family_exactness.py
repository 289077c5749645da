"""Every family with every lossless method: the tokens of plain decoding, greedy and sampled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, METHODS, RESIDUAL, RESIDUAL_EXPERTS, T, saved

from llm_jax.formats import open_checkpoint
from llm_jax.generation import generate
from llm_jax.sample import Sampler
from subspec_jax.batch import BatchDecoder
from subspec_jax.decoder import Decoder
from subspec_jax.draft_model import Draft, make_draft
from subspec_jax.experts import ExpertCache
from subspec_jax.load import load_target
from subspec_jax.methods import make_method
from subspec_jax.offload import place
from subspec_jax.plan import make_plan
from subspec_jax.prefix_cache import Text
from subspec_jax.residual import split as residual_split
from subspec_jax.residual.convert import convert
from subspec_jax.residual.split import is_split
from subspec_jax.tree import TreeSpec
from subspec_jax.verify import Target

pytestmark = pytest.mark.reference

SAMPLERS = (Sampler(), Sampler(0.8))
STEPS, LENGTH, CHUNK = 20, 96, 16
SPEC = TreeSpec(depth=3, width=2)
DRAFT = Draft(bits=4, group=32)
PROMPT = np.random.default_rng(2).integers(3, 96, T).tolist()
"""Longer than every window, and than a chunk of the prefill."""


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    """(the config, the texts of plain decoding, parameters in their places, layers that stay).

    One layer of a dense model stays on the device; of others only experts move.
    """
    checkpoint = open_checkpoint(saved(request.param, tmp_path_factory.mktemp(request.param))[0])
    cfg = checkpoint.config("float32")
    params = checkpoint.load(cfg)
    want = [generate(params, PROMPT, cfg, STEPS, sampler, seed=3) for sampler in SAMPLERS]
    assert len(set(want[1])) > 1  # a text that repeats one token shows nothing
    resident = 1 if cfg.experts is None else 0
    placed = dataclasses.replace(params, layers=place(params.layers, resident))
    yield cfg, want, placed, resident
    jax.clear_caches()  # a family has some hundred programs; see tests/conftest.py


def texts(target, method, resident):
    """What the method emits, with each of SAMPLERS."""
    low = None
    if method.draft.bits is not None:
        low = make_draft(target.params, method.draft, resident)
    proposer = method.proposer(target.cfg, low)
    return [
        Decoder(target, proposer, sampler, max_length=LENGTH, chunk=CHUNK).generate(
            PROMPT, STEPS, seed=3
        )
        for sampler in SAMPLERS
    ]


@pytest.mark.quick_cases("gemma3-subspec", "qwen2-moe-best-first")
@pytest.mark.parametrize("name", METHODS)
def test_tokens_are_those_of_plain_decoding(family, name):
    cfg, want, params, resident = family
    experts = None
    if cfg.experts is not None:
        experts = ExpertCache(params.layers, capacity=6, ring=4)
    method = make_method(name, SPEC, DRAFT)
    assert method.lossless
    target = Target(params, cfg, experts=experts)
    assert texts(target, method, resident) == want


@pytest.mark.slow
def test_texts_together_are_those_of_plain_decoding(family):
    """Five texts in rows for three: sampled and greedy ones beside each other, a shared beginning,
    prompts longer than every window and of one token."""
    cfg, want, params, resident = family
    experts = None if cfg.experts is None else ExpertCache(params.layers, capacity=6, ring=4)
    target, method = Target(params, cfg, experts=experts), make_method("subspec", SPEC, DRAFT)
    low = make_draft(target.params, method.draft, resident)
    decoder = BatchDecoder(target, method, low, 3, LENGTH, CHUNK)
    short = Text(PROMPT[:1], STEPS, 5)
    some = [short, *(Text(PROMPT, STEPS, 3, sampler) for sampler in SAMPLERS * 2)]
    [first, *rest] = decoder.generate(some)
    assert rest == want * 2
    assert first == Decoder(target, max_length=LENGTH, chunk=CHUNK).generate(PROMPT[:1], STEPS)
    assert some[-1].cached == len(PROMPT) - 1


@pytest.fixture(scope="module", params=RESIDUAL)
def converted(request, tmp_path_factory):
    """A family's checkpoint in bfloat16, and as substitutes and residuals."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = open_checkpoint(saved(request.param, folder / "model")[0])
    cfg = checkpoint.config("bfloat16")
    yield checkpoint, cfg, convert(checkpoint, cfg, folder / "split", DRAFT.bits, DRAFT.group)
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("name", ("vanilla", "subspec", "subspec-post"))
def test_residuals_give_the_tokens_of_the_raw_weights(converted, name):
    """The same method on both: in bfloat16 passes of other widths may round otherwise."""
    checkpoint, cfg, split = converted
    found, method = [], make_method(name, SPEC, DRAFT)
    for source, model in ((checkpoint, None), (split, split.model)):
        plan = make_plan(cfg, 2**30, SPEC, DRAFT, LENGTH, CHUNK, resident=1, model=model)
        target = load_target(source, plan)
        found.append(texts(target, dataclasses.replace(method, draft=UNSHARED), plan.resident))
    assert found[0] == found[1]


UNSHARED = dataclasses.replace(DRAFT, share_resident=False)
"""A target of residuals has substitutes of all its layers."""


def widened(tree):
    """The tree with float32 arrays in place of 16-bit ones; what is in two parts stays."""
    wide = lambda a: a if is_split(a) or a.dtype.itemsize != 2 else a.astype(jnp.float32)
    return jax.tree.map(wide, tree, is_leaf=is_split)


@pytest.fixture(scope="module", params=RESIDUAL_EXPERTS)
def converted_experts(request, tmp_path_factory):
    """(the config in float32, the texts of plain decoding with the bfloat16 weights, the target
    whose residuals are streamed, some experts at a time)."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = open_checkpoint(saved(request.param, folder / "model")[0])
    cfg = checkpoint.config("bfloat16")
    split = convert(checkpoint, cfg, folder / "split", DRAFT.bits, DRAFT.group)
    plan = make_plan(cfg, 2**30, SPEC, DRAFT, LENGTH, CHUNK, model=split.model)
    target, params = load_target(split, plan), widened(checkpoint.load(cfg))
    cfg = dataclasses.replace(cfg, dtype="float32")
    want = [generate(params, PROMPT, cfg, STEPS, sampler, seed=3) for sampler in SAMPLERS]
    assert len(set(want[1])) > 1
    yield cfg, want, widened(target.params)
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_residuals_of_experts_give_the_tokens_of_plain_decoding(
    converted_experts, name, monkeypatch
):
    """Sums are in float32, so that passes of other widths round alike: the decoded weights, which
    are bfloat16, are widened."""
    cfg, want, params = converted_experts
    decode = residual_split.residual_decode
    wide = lambda *given: decode(*given).astype(jnp.float32)
    monkeypatch.setattr(residual_split, "residual_decode", wide)
    target = Target(params, cfg, experts=ExpertCache(params.layers, capacity=6, ring=4))
    method = make_method(name, SPEC, DRAFT)
    assert texts(target, dataclasses.replace(method, draft=UNSHARED), 0) == want
