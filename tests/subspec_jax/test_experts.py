"""Experts that are brought one by one: always the model's own tokens, whatever was foreseen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import LLMError
from llm_jax.attention import caches_for, causal_step
from llm_jax.config import Experts
from llm_jax.generation import generate
from llm_jax.model import hidden
from llm_jax.mxfp4 import dense, encode, mxfp4_bytes
from llm_jax.params import SeparateExperts, init
from llm_jax.sample import Sampler
from llm_jax.testing import tiny_config, tiny_params
from pallas_kernels.residual_decode import residual_decode
from subspec_jax.check import NotFiniteError
from subspec_jax.decoder import Decoder
from subspec_jax.draft_model import Draft, make_draft
from subspec_jax.experts import AT_ONCE, ExpertCache, apart, without_experts
from subspec_jax.methods import make_method
from subspec_jax.offload import moving, offload, separate_experts, streamed_bytes
from subspec_jax.plan import make_plan
from subspec_jax.random_weights import random_target, split_layer
from subspec_jax.residual.split import gaussian_room, split_shapes
from subspec_jax.tree import TreeSpec
from subspec_jax.verify import Target, run_pass

EXPERTS = dict(
    plain=Experts(count=8, chosen=2, d_ff=32),
    shared=Experts(count=8, chosen=3, d_ff=32, shared_d_ff=48, shared_gate=True, normalize=False),
    clamped=Experts(count=6, chosen=2, d_ff=32, biases=True, clamp=1.0),
    one=Experts(count=4, chosen=1, d_ff=32, dense_layers=(0,)),
)
PROMPT = [5, 17, 200, 31, 8, 8, 90]


def model(name="plain", layers=3, **changes):
    cfg = tiny_config("qwen3", layers=layers, experts=EXPERTS[name], **changes)
    return tiny_params(cfg), cfg


def offloaded(params, cfg, capacity, ring=6):
    layers = tuple(map(offload, params.layers))
    cache = ExpertCache(layers, capacity, ring)
    return Target(dataclasses.replace(params, layers=layers), cfg, experts=cache)


def decoder(params, cfg, name, capacity=4, ring=6, sampler=Sampler(), **draft):
    target = offloaded(params, cfg, capacity, ring)
    spec = TreeSpec(depth=4, width=2)
    method = make_method(name, spec, Draft(bits=4, group=32, **draft))
    low = make_draft(target.params, method.draft) if method.draft.bits else None
    return Decoder(target, method.proposer(cfg, low), sampler, max_length=96, chunk=16)


METHODS = ("vanilla", "subspec", "chain", "best-first", "ngram", "subspec-post", "subspec-lookup",
           "subspec-own-cache")  # fmt: skip


@pytest.mark.quick_cases(
    "greedy-plain-vanilla", "greedy-shared-subspec", "sampled-clamped-subspec", "greedy-one-chain"
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("sampler", (Sampler(), Sampler(0.8)), ids=("greedy", "sampled"))
def test_every_method_gives_the_models_own_tokens(method, name, sampler):
    params, cfg = model(name)
    want = generate(params, PROMPT, cfg, 24, sampler, seed=3)
    got = decoder(params, cfg, method, sampler=sampler).generate(PROMPT, 24, seed=3)
    assert got == want


@pytest.mark.parametrize("capacity,ring", ((0, 1), (0, 8), (24, 4), (5, 5)))
def test_any_room_is_enough(capacity, ring):
    params, cfg = model()
    d = decoder(params, cfg, "subspec", capacity, ring)
    assert d.generate(PROMPT, 16) == generate(params, PROMPT, cfg, 16)
    most = max(capacity + ring, 2 * AT_ONCE)
    assert len(d.target.experts._arrays) <= most


@pytest.mark.parametrize("guess", ("none", "all", "wrong"))
def test_exact_with_any_guess(guess, monkeypatch):
    """The draft's guess decides what is copied early, never what is computed."""
    params, cfg = model()
    forced = dict(
        none=np.zeros((3, 8), bool), all=np.ones((3, 8), bool), wrong=np.eye(3, 8, 5, dtype=bool)
    )[guess]
    monkeypatch.setattr(Decoder, "_foreseen", lambda self, tree: forced)
    assert decoder(params, cfg, "subspec").generate(PROMPT, 16) == generate(params, PROMPT, cfg, 16)


@pytest.mark.parametrize("name", EXPERTS)
def test_the_order_in_which_experts_come_changes_no_bit(name):
    """A pass with a cold cache, with any that is warm, and with little room: the same numbers."""
    params, cfg = model(name)
    tokens = jnp.asarray([PROMPT], jnp.int32)
    step = causal_step(0, len(PROMPT), 16)
    found, rng = [], np.random.default_rng(0)
    for room, warm in ((24, 0), (24, 3), (24, 12), (3, 1), (0, 0)):
        target = offloaded(params, cfg, room)
        shape = cfg.layers, cfg.experts.count
        there = np.array([[cfg.has_experts(i)] for i in range(cfg.layers)]).repeat(shape[1], 1)
        before = rng.permuted(np.arange(there.size) < warm).reshape(shape) & there
        target.experts.begin(before)
        caches = list(caches_for(params, cfg, 1, 16))
        found.append(np.asarray(run_pass(target, target.stream(), tokens, caches, step)))
        np.testing.assert_array_equal(found[0], found[-1])
    want = hidden(params, tokens, caches_for(params, cfg, 1, 16), step, cfg)[0]
    np.testing.assert_allclose(found[0], want, atol=1e-4, rtol=1e-5)


def test_all_tokens_to_one_expert_and_ties():
    params, cfg = model()
    zero = lambda layer, bias: dataclasses.replace(
        layer, mlp=dataclasses.replace(
            layer.mlp, router=jnp.zeros_like(layer.mlp.router), router_bias=bias
        )
    )  # fmt: skip
    for bias, used in ((None, [0, 1]), (jnp.arange(8.0), [6, 7])):  # ties go to the lower number
        same = dataclasses.replace(params, layers=tuple(zero(l, bias) for l in params.layers))
        d = decoder(same, cfg, "subspec")
        rounds = list(d.rounds(PROMPT, 12))
        assert [t for r in rounds for t in r.tokens] == generate(same, PROMPT, cfg, 12)
        assert set(np.flatnonzero(d.target.experts.score_LE.any(0))) == set(used)
        # two experts a layer are needed, and after the prefill they are all there
        assert all((r.experts.needed == 2).all() for r in rounds[1:])


def test_the_draft_foresees_what_the_pass_needs():
    """A draft that is the model itself routes the same tokens to the same experts."""
    params, cfg = model()
    target = offloaded(params, cfg, capacity=0, ring=24)
    method = make_method("chain", TreeSpec(depth=3, width=1), Draft())
    d = Decoder(target, method.proposer(cfg, params), max_length=96, chunk=16)
    rounds = list(d.rounds(PROMPT, 20))[1:]
    for r in rounds:
        e = r.experts
        assert (e.needed >= 2).all()
        known = e.held + e.foreseen
        assert (known >= 2).all()  # all but the last level was forwarded by the draft
        assert (known <= e.needed).all()
    missed = sum(
        r.experts.needed.sum() - (r.experts.held + r.experts.foreseen).sum() for r in rounds
    )
    assert missed < sum(r.experts.needed.sum() for r in rounds) / 2
    plain = list(decoder(params, cfg, "vanilla", capacity=0).rounds(PROMPT, 8))[1:]
    assert all(r.experts.foreseen.sum() == 0 for r in plain)
    assert all((r.experts.needed == 2).all() for r in plain)  # one token, two experts


def test_bytes_are_those_of_the_experts_that_were_copied():
    params, cfg = model()
    size = sum(a.nbytes for a in jax.tree.leaves(
        (params.layers[0].mlp.expert_gate_up[0], params.layers[0].mlp.expert_down[0])))  # fmt: skip
    for r in list(decoder(params, cfg, "subspec").rounds(PROMPT, 16))[1:]:
        assert r.streamed_bytes == size * r.experts.fetched.sum()


def test_hot_experts_stay():
    """Experts with the most tokens are kept, so a repeated token brings nothing."""
    params, cfg = model()
    cache = offloaded(params, cfg, capacity=6, ring=4).experts
    for _ in range(3):
        cache.begin()
        for layer in range(3):
            for tokens in ([0, 3], [5]):
                seen = np.bincount(tokens, minlength=8) * (4 if tokens == [0, 3] else 1)
                for some in cache.take(layer, seen):
                    assert {e for e, _ in some} <= set(tokens)
        hits = cache.counts.held.sum()
    assert hits >= 3  # of 3 layers x 3 experts, room for 6 and a ring of 4
    for layer in range(3):
        for some in cache.take(layer, np.eye(8, dtype=int)[0]):
            experts = params.layers[layer].mlp
            want = [
                np.asarray(w[0]).reshape(-1) for w in (experts.expert_gate_up, experts.expert_down)
            ]
            np.testing.assert_array_equal(some[0][1], np.concatenate(want))


def test_only_experts_move():
    params, _ = model("shared")
    layer = params.layers[0]
    moves = moving(layer)
    assert moves.mlp.expert_gate_up and moves.mlp.expert_down
    assert not any(jax.tree.leaves((moves.attn, moves.mlp.router, moves.mlp.shared)))
    stacks = layer.mlp.expert_gate_up, layer.mlp.expert_down
    assert streamed_bytes(layer) == sum(a.nbytes for a in stacks)
    moved = offload(layer)
    assert isinstance(moved.mlp.expert_gate_up, SeparateExperts)
    assert streamed_bytes(moved) == streamed_bytes(layer)
    assert apart(layer) is None and apart(moved) is not None
    assert jax.tree.leaves(without_experts(moved).mlp.expert_gate_up) == []
    for flat, *want in zip(moved.mlp.expert_gate_up.each, *stacks, strict=True):
        for got, w in zip(moved.mlp.expert_gate_up.matrices(flat), want, strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(w))


def test_whole_layers_can_be_streamed_too():
    params, cfg = model()
    layers = tuple(map(offload, params.layers))
    target = Target(dataclasses.replace(params, layers=layers), cfg)
    d = Decoder(target, max_length=96, chunk=16)
    rounds = list(d.rounds(PROMPT, 8))
    assert [t for r in rounds for t in r.tokens] == generate(params, PROMPT, cfg, 8)
    whole = sum(map(streamed_bytes, params.layers))
    assert all(r.streamed_bytes == whole for r in rounds[1:])


def test_a_draft_of_fewer_experts():
    params, cfg = model("shared")
    d = decoder(params, cfg, "subspec", experts=1)
    assert d.proposer.cfg.experts.chosen == 1
    assert d.generate(PROMPT, 12) == generate(params, PROMPT, cfg, 12)


def test_init_has_experts():
    cfg = tiny_config("qwen3", experts=EXPERTS["one"])
    params = init(jax.random.key(0), cfg)
    assert params.layers[1].mlp.expert_gate_up.shape == (4, 64, 64)
    assert cfg.parameter_count == sum(a.size for a in jax.tree.leaves(params))


def test_residuals_of_experts_give_the_same_tokens():
    """Experts in two parts are decoded to the very weights, so nothing but the bytes changes."""
    params, cfg = model(dtype="bfloat16")
    shapes = split_shapes(cfg, 4, 32, gaussian_room(cfg, 4, 32))
    layers = [split_layer(layer, shapes, 20) for layer in params.layers]
    for layer, split in zip(params.layers, layers, strict=True):
        w = split.mlp.expert_gate_up
        for e, words in enumerate(w.each):
            both = w.matrices(jnp.asarray(words), jnp.int32(e))
            exact = layer.mlp.expert_gate_up[e], layer.mlp.expert_down[e]
            for got, want in zip(both, exact, strict=True):
                got = residual_decode(got.residual, got.substitute)
                np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    both = dataclasses.replace(params, layers=tuple(layers))
    method = make_method("subspec", TreeSpec(depth=4, width=2), Draft(bits=4, group=32))
    raw = decoder(params, cfg, "subspec")
    target = offloaded(both, cfg, capacity=4)
    low = make_draft(target.params, method.draft)
    assert low.layers[0].mlp.expert_down is target.params.layers[0].mlp.expert_gate_up.down
    split = Decoder(target, method.proposer(cfg, low), max_length=96, chunk=16)
    got, want = (list(d.rounds(PROMPT, 16)) for d in (split, raw))
    assert [r.tokens for r in got] == [r.tokens for r in want]
    assert all(r.experts.fetched.sum() for r in got[1:])


@pytest.mark.slow
def test_whole_layers_of_residuals_can_be_streamed_too():
    params, cfg = model("shared", dtype="bfloat16")
    shapes = split_shapes(cfg, 4, 32, gaussian_room(cfg, 4, 32))
    both, raw = (
        dataclasses.replace(params, layers=tuple(map(offload, layers)))
        for layers in ([split_layer(layer, shapes, 20) for layer in params.layers], params.layers)
    )
    method = make_method("subspec", TreeSpec(depth=4, width=2), Draft(bits=4, group=32))
    found = []
    for given in (both, raw):
        proposer = method.proposer(cfg, make_draft(given, method.draft))
        decoder = Decoder(Target(given, cfg), proposer, max_length=96, chunk=16)
        found.append(list(decoder.rounds(PROMPT, 12)))
    assert [r.tokens for r in found[0]] == [r.tokens for r in found[1]]
    for given, rounds in zip((both, raw), found, strict=True):
        whole = sum(map(streamed_bytes, given.layers))
        assert all(r.streamed_bytes == whole for r in rounds[1:])


def test_a_plan_keeps_hot_experts(tmp_path):
    _, cfg = model(dtype="bfloat16", layers=4)
    spec, draft = TreeSpec(depth=2, width=2), Draft(bits=4, group=32)
    most = make_plan(cfg, 2**30, spec, draft, max_length=64, chunk=16)
    limit = most.total - 150_000
    plan = make_plan(cfg, limit, spec, draft, max_length=64, chunk=16)
    assert 0 < plan.hot < 32
    assert plan.total <= limit * 0.98
    size = 3 * 64 * 32 * 2
    assert plan.device["experts kept"] == plan.hot * size
    assert plan.total + size > limit * 0.98
    assert plan.host["streamed layers"] == 4 * 8 * size
    assert f"{plan.hot} of 32 experts kept" in str(plan)
    roomy = make_plan(cfg, 2**30, spec, draft, max_length=64, chunk=16)
    assert roomy.hot == 32 and roomy.streamed == 0 and roomy.streamed_bytes == 0
    whole = make_plan(cfg, limit, spec, draft, max_length=64, chunk=16, by_expert=False)
    assert whole.hot is None and whole.streamed_bytes == whole.streamed * 8 * size
    target = random_target(plan, zipf=1.0)
    bias = np.sort(np.asarray(target.params.layers[1].mlp.router_bias, np.float32))
    np.testing.assert_allclose(bias[::-1], -np.log(np.arange(1.0, 9)), atol=0.01)
    assert target.experts.capacity == plan.hot


@pytest.mark.slow
def test_experts_in_mxfp4_are_brought_in_their_own_form():
    """A model whose experts have MXFP4's numbers decodes as if they were dense; fewer bytes."""
    params, cfg = model("clamped", dtype="bfloat16")
    round_to = lambda w: jnp.stack([dense(encode(one), w.dtype) for one in w])
    layers = tuple(
        dataclasses.replace(
            layer,
            mlp=dataclasses.replace(
                layer.mlp,
                expert_gate_up=round_to(layer.mlp.expert_gate_up),
                expert_down=round_to(layer.mlp.expert_down),
            ),
        )
        for layer in params.layers
    )
    params = dataclasses.replace(params, layers=layers)
    small = tuple(offload(separate_experts(layer, mxfp4=True)) for layer in params.layers)
    target = Target(
        dataclasses.replace(params, layers=small), cfg, experts=ExpertCache(small, 4, 6, 2)
    )
    method = make_method("subspec", TreeSpec(depth=4, width=2), Draft(bits=4, group=32))
    low = make_draft(target.params, method.draft)
    got = list(
        Decoder(target, method.proposer(cfg, low), max_length=96, chunk=16).rounds(PROMPT, 16)
    )
    want = list(decoder(params, cfg, "subspec").rounds(PROMPT, 16))
    assert [r.tokens for r in got] == [r.tokens for r in want]
    assert streamed_bytes(small[0]) == 6 * (mxfp4_bytes((64, 64)) + mxfp4_bytes((32, 64)))
    with pytest.raises(LLMError, match="not MXFP4's"):
        separate_experts(model("clamped")[0].layers[0], mxfp4=True)


def test_nan_in_an_expert_is_named_with_its_layer():
    params, cfg = model()
    layer = params.layers[1]
    down = layer.mlp.expert_down.at[:, 3, 5].set(jnp.nan)
    broken = dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, expert_down=down))
    params = dataclasses.replace(params, layers=(params.layers[0], broken, params.layers[2]))
    with pytest.raises(NotFiniteError, match="in layer 1"):
        decoder(params, cfg, "vanilla").generate(PROMPT, 4)


def test_layers_without_experts_stream_whole_beside_the_others():
    """Layer 0 has an MLP: it passes through the ring of layers; the experts have their own."""
    _, cfg = model("one", dtype="bfloat16", layers=4)
    whole = make_plan(cfg, 2**30, TreeSpec(depth=2, width=2), max_length=64, chunk=16)
    first = cfg.layer_matrix_elements * 2
    ring = 3 * 64 * 32 * 2 * min(12, 2**28 // (3 * 64 * 32 * 2) + 1)
    assert whole.device["streaming ring"] == first + ring
    assert whole.hot == 12 and whole.streamed_bytes == first
    tight = make_plan(
        cfg, whole.total - 50_000, TreeSpec(depth=2, width=2), max_length=64, chunk=16
    )
    assert first < tight.streamed_bytes < first + 12 * 3 * 64 * 32 * 2
