"""Growing a tree with a real draft, against forwarding every node's path on its own."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.attention import causal_step
from llm_jax.cache import empty_caches
from llm_jax.generation import prefill
from llm_jax.model import forward
from llm_jax.sample import Sampler, noise
from subspec_jax.draft import Drafting, extend_once, grow
from subspec_jax.tree import TreeSpec, seedling

PROMPT = [4, 8, 15, 16, 23, 42]
ROOT = 77
AT = len(PROMPT)
SLOTS = 48
NEVER = jnp.full(8, -jnp.inf)
KEY = jax.random.key(11)


@pytest.fixture(scope="module")
def filled(tiny):
    """Fresh caches that hold the prompt, as the draft sees them (they are donated)."""
    _, caches = prefill(tiny.params, PROMPT, empty_caches(tiny.cfg, 1, SLOTS), tiny.cfg)
    return lambda: jax.tree.map(jnp.copy, caches)


def log_softmax(z):
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def path_of(tree, i):
    path = []
    while i >= 0:
        path.insert(0, int(tree.token_E[i]))
        i = int(tree.parent_E[i])
    return path


def by_hand(spec, steps, score):
    """[(path, score)]; `score(path)` gives the draft's scores [V] behind it."""
    nodes, pool, newest = [((ROOT,), 0.0)], [], [((ROOT,), 0.0)]
    for _ in range(steps):
        if spec.kind != "best-first":
            pool = []
        for path, above in newest:
            logp = log_softmax(score(path).astype(np.float64) / spec.sharpen)
            for token in np.argsort(-logp, kind="stable")[: spec.width]:
                pool.append(((*path, int(token)), above + logp[token]))
        pool.sort(key=lambda child: -child[1])
        newest, pool = pool[: spec.width], pool[spec.width :]
        nodes = nodes + newest
    return nodes


def drafting(tiny, spec, caches, sampler=Sampler(), least_L=NEVER) -> Drafting:
    """The draft's inputs where the tree is a root alone."""
    return Drafting(
        params=tiny.params,
        tree=seedling(jnp.int32(ROOT), spec),
        caches=caches,
        at=jnp.int32(AT),
        key=KEY,
        cfg=tiny.cfg,
        spec=spec,
        sampler=sampler,
        least_L=least_L,
    )


@pytest.mark.quick_cases("beam-T0.0", "beam-T0.8_0", "beam-T0.8_1")
@pytest.mark.parametrize(
    "spec, sampler",
    [
        (TreeSpec("beam", 3, 3, sharpen=1.0), Sampler()),
        (TreeSpec("beam", 3, 3), Sampler(0.8)),
        (TreeSpec("beam", 3, 3, coupled=False), Sampler(0.8)),
        (TreeSpec("best-first", 5, 2, budget=8), Sampler()),
        (TreeSpec("chain", 4), Sampler(1.0, top_k=20)),
    ],
    ids=lambda v: v.kind if isinstance(v, TreeSpec) else f"T{v.temperature}",
)
def test_a_tree_is_what_forwarding_every_path_gives(tiny, filled, logits_behind, spec, sampler):
    """Masks, positions, slots and the sampler's noise, all at once."""
    draft = tiny.params

    def score(path):
        logits = logits_behind(draft, [*PROMPT, *path], tiny.cfg)
        if sampler.greedy:
            return logits
        scores = np.asarray(sampler.scores(jnp.asarray(logits)[None])[0])
        if spec.coupled:
            scores = scores + np.asarray(noise(KEY, jnp.array([AT + len(path)]), tiny.cfg.vocab)[0])
        return scores

    tree, caches = grow(drafting(tiny, spec, filled(), sampler))
    want = by_hand(spec, (spec.nodes - 1) // spec.width, score)
    assert [tuple(path_of(tree, i)) for i in range(spec.nodes)] == [path for path, _ in want]
    np.testing.assert_allclose(tree.score_E, [s for _, s in want], rtol=1e-3, atol=2e-3)
    assert int(tree.size) == spec.nodes and int(tree.forwarded) == spec.nodes - spec.width

    # every forwarded node's row holds the keys and values of its own path
    deepest = int(tree.forwarded) - 1
    path = [*PROMPT, *path_of(tree, deepest)]
    step = causal_step(0, len(path), SLOTS)
    _, fresh = forward(draft, jnp.array([path]), empty_caches(tiny.cfg, 1, SLOTS), step, tiny.cfg)
    row = lambda caches, slot: jax.tree.map(lambda a: a[:, slot], caches)
    chex.assert_trees_all_close(
        row(caches, AT + deepest), row(fresh, len(path) - 1), rtol=1e-4, atol=1e-4
    )
    before = filled()
    head = lambda caches: jax.tree.map(lambda a: a[:, :AT], caches)
    chex.assert_trees_all_equal(head(caches), head(before))


@pytest.mark.slow
def test_growing_stops_where_it_does_not_pay(tiny, filled):
    """The step that does not pay is proposed, its nodes being known, and not forwarded."""
    spec = TreeSpec("beam", 5, 2, sharpen=1.0)
    sizes = []
    whole, _ = grow(drafting(tiny, spec, filled()))
    levels = np.exp(np.asarray(whole.score_E[1:], np.float64)).reshape(5, 2).sum(1)
    assert (np.diff(levels) < 0).all()  # so that one threshold stops at one level
    bounds = np.r_[2.0, levels, levels[-1] / 4]
    limits = [np.full(5, np.log(bounds[i : i + 2]).mean()) for i in range(6)]
    limits.append(np.where(np.arange(5) == 2, 0.1, -np.inf))  # only the third step does not pay
    for least_L in limits:
        tree, _ = grow(drafting(tiny, spec, filled(), least_L=jnp.float32(least_L)))
        sizes.append(int(tree.size))
        chex.assert_trees_all_equal(tree.token_E[: sizes[-1]], whole.token_E[: sizes[-1]])
        assert (tree.parent_E[sizes[-1] :] == -1).all()
        assert int(tree.forwarded) == sizes[-1] - 2
    assert sizes == [3, 5, 7, 9, 11, 11, 7]
    assert int(whole.forwarded) == 9


@pytest.mark.slow
def test_drafting_goes_on_below_the_tree(tiny, filled):
    """Growing and then extending is growing a taller tree, and everything is forwarded."""
    spec, tall = TreeSpec("beam", 2, 3, extra=2), TreeSpec("beam", 4, 3)
    given = drafting(tiny, spec, filled())
    tree, caches = grow(given)
    assert int(tree.size) == int(tree.forwarded) == 7
    for size in (10, 13):
        tree, caches = extend_once(dataclasses.replace(given, tree=tree, caches=caches))
        assert int(tree.size) == int(tree.forwarded) == size
    want, _ = grow(drafting(tiny, tall, filled()))
    for name in ("token_E", "parent_E", "depth_E", "ancestor_EE"):
        chex.assert_trees_all_equal(getattr(tree, name), getattr(want, name))


def test_caches_and_tree_are_donated(tiny, filled):
    spec, caches = TreeSpec("beam", 3, 3, sharpen=1.0), filled()
    given = drafting(tiny, spec, caches)
    grow(given)
    assert all(a.is_deleted() for a in jax.tree.leaves((caches, given.tree)))
