"""The target's pass over a tree, its judgement of every node, and the rows that are kept."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspec_jax.verify as verify
from llm_jax.cache import empty_caches
from llm_jax.generation import prefill
from llm_jax.model import unembed
from llm_jax.packed import packed
from llm_jax.quantize import quantize
from llm_jax.sample import Sampler, noise
from llm_jax.testing import tiny_config, tiny_params
from pallas_kernels import device
from pallas_kernels.residual_decode import api as residual_api
from pallas_kernels.residual_decode import residual_decode
from subspec_jax.accept import Gate
from subspec_jax.residual import split as residual_split
from subspec_jax.residual.encode import encode
from subspec_jax.residual.split import Split
from subspec_jax.tree import TreeSpec, seedling
from subspec_jax.verify import (
    Target,
    Verified,
    finish_round,
    judge,
    lay_out,
    run_pass,
    streamed_prefill,
)

PROMPT = [4, 8, 15, 16, 23, 42]
AT, SLOTS = len(PROMPT), 40
SPEC = TreeSpec("beam", 3, 2)
TOKEN = [77, 5, 60, 5, 9, 31, 0]
PARENT = [-1, 0, 0, 1, 2, 4, -1]  # the last place is empty
KEY = jax.random.key(2)


def tree_of(token, parent, spec):
    """A grown tree with these nodes in its first places."""
    n, tree = len(token), seedling(jnp.int32(token[0]), spec)
    ancestor, depth = np.eye(spec.places, dtype=bool), np.zeros(spec.places, int)
    for i in range(1, n):
        if parent[i] >= 0:
            ancestor[i] |= ancestor[parent[i]]
            depth[i] = depth[parent[i]] + 1
    put = lambda a, values: a.at[:n].set(jnp.asarray(values, a.dtype))
    return dataclasses.replace(
        tree,
        token_E=put(tree.token_E, token),
        parent_E=put(tree.parent_E, parent),
        depth_E=jnp.asarray(depth, jnp.int32),
        score_E=put(tree.score_E, -depth[:n]),
        ancestor_EE=jnp.asarray(ancestor),
        size=jnp.int32(n),
        forwarded=jnp.int32(n),
    )


def path_to(i):
    path = []
    while i >= 0:
        path.insert(0, i)
        i = PARENT[i]
    return path


@pytest.fixture(scope="module")
def passed(target, tiny):
    """(x of the pass over the tree, the tree as laid out, caches behind it)."""
    caches = list(empty_caches(tiny.cfg, 1, SLOTS))
    streamed_prefill(target, PROMPT, caches, 16)
    grown = tree_of(TOKEN, PARENT, SPEC)
    tree, tokens, step = lay_out(grown, jnp.int32(AT), SPEC, SLOTS)
    x = run_pass(target, target.stream(), tokens, caches, step)
    return x, tree, tuple(caches)


@pytest.fixture(scope="module")
def node_logits(tiny, logits_behind):
    """[E, V] behind every node, each path forwarded on its own."""
    return np.stack(
        [
            logits_behind(tiny.params, [*PROMPT, *(TOKEN[j] for j in path_to(i))], tiny.cfg)
            for i in range(6)
        ]
    )


@pytest.mark.slow
def test_prefill_streams_what_prefill_computes(target, tiny):
    caches, heard = list(empty_caches(tiny.cfg, 1, SLOTS)), []
    logits, streamed = streamed_prefill(target, PROMPT, caches, 4, heard.append)
    want, plain = prefill(tiny.params, PROMPT, empty_caches(tiny.cfg, 1, SLOTS), tiny.cfg)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5)
    assert heard == [4, 6]
    layer = 4 * tiny.cfg.layer_matrix_elements
    assert streamed == 2 * tiny.cfg.layers * layer  # two chunks, all layers
    head = lambda caches: jax.tree.map(lambda a: a[:, :AT], tuple(caches))
    chex.assert_trees_all_close(head(caches), head(plain), rtol=1e-4, atol=1e-5)


def test_a_pass_over_a_tree_is_a_pass_over_every_path(passed, target, node_logits, tiny):
    x, _, _ = passed
    logits = unembed(target.top, x, tiny.cfg)[0]
    np.testing.assert_allclose(logits[:6], node_logits, rtol=1e-3, atol=1e-4)
    # node 3 and node 1 carry the same token at different depths
    assert np.abs(node_logits[3] - node_logits[1]).max() > 0.1


def test_layout_cuts_the_places_that_are_not_verified(target):
    spec = TreeSpec("beam", 3, 2, extra=2)
    grown = tree_of(TOKEN + [1, 2, 3, 4], PARENT + [3, 3, 5, 5], spec)
    tree, tokens, step = lay_out(grown, jnp.int32(AT), spec, SLOTS)
    assert tokens.tolist() == [TOKEN] and tree.parent_E.tolist() == PARENT
    assert int(step.at) == AT
    assert step.position_BT.tolist() == [[AT + d for d in (0, 1, 1, 2, 2, 3, 0)]]
    for i in range(6):
        seen = set(range(AT)) | {AT + j for j in path_to(i)}
        assert set(np.flatnonzero(step.mask_BTS[0, i]).tolist()) == seen


@pytest.mark.quick_cases("sampling-3", "greedy-4")
@pytest.mark.parametrize("rows", [1, 3, 4, 64])
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.8, top_k=30)], ids=["greedy", "sampling"])
def test_judgement_in_blocks_of_any_size(
    passed, target, node_logits, tiny, monkeypatch, sampler, rows
):
    monkeypatch.setattr(verify, "LOGIT_ROWS", rows)
    x, tree, _ = passed
    at, depth = jnp.int32(AT), [len(path_to(i)) for i in range(6)]
    judged = judge(target.top, x, tree, at, KEY, tiny.cfg, sampler, Gate())
    scores = np.asarray(sampler.scores(jnp.asarray(node_logits)), np.float64)
    noisy = scores
    if not sampler.greedy:
        noisy = scores + np.asarray(noise(KEY, AT + jnp.array(depth), tiny.cfg.vocab))
    assert judged.draw_E[:6].tolist() == noisy.argmax(1).tolist()
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    plogp = np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0)
    entropy = -plogp.sum(1) / np.log(tiny.cfg.vocab)
    np.testing.assert_allclose(judged.entropy_E[:6], entropy, rtol=1e-3, atol=1e-5)
    want = [p[PARENT[i], TOKEN[i]] for i in range(1, 6)]
    np.testing.assert_allclose(judged.probability_E[1:6], want, rtol=2e-3, atol=1e-6)
    ungated = judge(target.top, x, tree, at, KEY, tiny.cfg, sampler, None)
    assert ungated.draw_E.tolist() == judged.draw_E.tolist()
    assert ungated.entropy_E is None and ungated.probability_E is None


@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
def test_accepted_rows_are_moved_bit_for_bit_and_nothing_else(passed, target, tiny, accepted):
    x, tree, caches = passed
    before = jax.tree.map(np.asarray, caches)
    emitted, length, last, finite, source, planted, at, after = finish_round(
        Verified(
            top=target.top,
            x_1ED=x,
            tree=tree,
            extended=tree_of(TOKEN, PARENT, SPEC),
            caches=jax.tree.map(jnp.copy, caches),
            at=jnp.int32(AT),
            key=KEY,
            accepted=jnp.int32(accepted),
            cfg=tiny.cfg,
            spec=SPEC,
            sampler=Sampler(),
            replay=True,
        )
    )
    assert finite
    assert int(at) == AT + accepted + 1
    path = path_to({0: 0, 1: 1, 2: 3, 3: 5}[accepted])
    assert int(length) == len(path) == accepted + 1 and int(last) == path[-1]
    assert emitted[:accepted].tolist() == [TOKEN[i] for i in path[1:]]
    assert int(planted.pool_token_C[0]) == int(emitted[accepted])
    rows = np.arange(SLOTS)
    rows[AT : AT + len(path)] = AT + np.array(path)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(new), old[:, rows])
    assert source[: len(path)].tolist() == [AT + i for i in path]


def test_rows_drafted_ahead_move_behind_the_path(passed, target, tiny):
    """The next tree's nodes take the slots right behind the accepted ones, in their order."""
    spec = TreeSpec("chain", 2, extra=2)
    caches = jax.tree.map(jnp.copy, passed[2])
    before = jax.tree.map(np.asarray, caches)
    # root and two nodes verified, two more drafted below; the draws are made to follow the chain
    draw = np.asarray(unembed(target.top, passed[0], tiny.cfg)[0].argmax(-1)).tolist()
    x = passed[0][:, [0, 1, 2]]
    # behind node 1 the target draws token[3], a child of node 1 that was drafted ahead
    token = [77, draw[0], (draw[1] + 1) % tiny.cfg.vocab, draw[1], 52]
    extended = tree_of(token, [-1, 0, 1, 1, 3], spec)
    tree, _, _ = lay_out(extended, jnp.int32(AT), spec, SLOTS)
    emitted, length, last, _, _, planted, _, after = finish_round(
        Verified(
            top=target.top,
            x_1ED=x,
            tree=tree,
            extended=extended,
            caches=caches,
            at=jnp.int32(AT),
            key=KEY,
            accepted=jnp.int32(-1),
            cfg=tiny.cfg,
            spec=spec,
            sampler=Sampler(),
        )
    )
    assert int(length) == 2 and int(last) == 1 and emitted[:2].tolist() == [token[1], token[3]]
    assert int(planted.size) == 2 and planted.token_E[:2].tolist() == [token[3], token[4]]
    rows = np.arange(SLOTS)
    rows[AT : AT + 4] = AT + np.array([0, 1, 3, 4])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(new), old[:, rows])


def test_the_head_takes_nothing_that_is_on_the_host(tiny):
    top = Target(tiny.placed, tiny.cfg).top
    assert top.layers == () and top.embed_VD is tiny.placed.embed_VD
    table = np.asarray(tiny.params.embed_VD)
    top = Target(dataclasses.replace(tiny.placed, embed_VD=table), tiny.cfg).top
    assert top.embed_VD is None and top.head_DV is tiny.placed.head_DV


def test_a_table_on_the_host_gives_the_same_pass(passed, target, tiny):
    x, _, caches = passed
    table = np.asarray(tiny.params.embed_VD)
    on_host = dataclasses.replace(target, params=dataclasses.replace(tiny.placed, embed_VD=table))
    _, tokens, step = lay_out(tree_of(TOKEN, PARENT, SPEC), jnp.int32(AT), SPEC, SLOTS)
    again = run_pass(on_host, on_host.stream(), tokens, list(jax.tree.map(jnp.copy, caches)), step)
    chex.assert_trees_all_equal(again, x)


def test_between_is_called_behind_every_layer(target, tiny):
    seen, caches = [], list(empty_caches(tiny.cfg, 1, SLOTS))
    _, tokens, step = lay_out(tree_of(TOKEN, PARENT, SPEC), jnp.int32(AT), SPEC, SLOTS)
    run_pass(target, target.stream(), tokens, caches, step, seen.append)
    assert seen == list(range(tiny.cfg.layers))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_the_likeliest_token_by_parts_of_a_head_is_that_of_whole_rows(monkeypatch, parts):
    """Equal columns, in one part and in two: the first counts. Padding, whose logits are 0, never
    does, and NaN wins as in argmax."""
    rng = np.random.default_rng(parts)
    cfg = tiny_config("llama", layers=1, d_model=64, vocab=1000, dtype="bfloat16")
    w = rng.standard_normal((64, 1024), np.float32).astype(jnp.bfloat16)
    w[:, 1000:] = 0
    w[:, [700, 130, 131]] = w[:, [3, 128, 128]]
    low = quantize(jnp.asarray(w), 4, 64)
    residual = encode(w, jax.tree.map(np.asarray, low), "levels")
    head = Split(packed(low), jax.tree.map(jnp.asarray, residual))
    top = dataclasses.replace(tiny_params(cfg), head_DV=head)
    x = rng.standard_normal((40, 64)).astype(jnp.bfloat16)
    x[:20] = w[:, rng.permutation([3, 128, *range(200, 218)])].T  # their own column is largest
    x[20], x[21] = -np.abs(x[20]), np.nan
    monkeypatch.setattr(device, "on_gpu", lambda: parts > 1)
    monkeypatch.setattr(residual_api, "PART_WEIGHTS", w.size // parts)
    slow = lambda r, q, way, *part: residual_decode(r, q, "xla", *part)
    monkeypatch.setattr(residual_split, "residual_decode", slow)
    found = jax.jit(verify.likeliest, static_argnames="cfg")(top, jnp.asarray(x), cfg)
    logits = unembed(dataclasses.replace(top, head_DV=jnp.asarray(w)), jnp.asarray(x[None]), cfg)
    assert found.dtype == jnp.int32 and found.tolist() == logits[0].argmax(-1).tolist()
    assert {3, 128} <= set(found.tolist()) and not {700, 130, 131} & set(found.tolist())
