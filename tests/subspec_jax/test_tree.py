"""Token trees against brute force: growth from tables of logits, masks, and new roots."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec_jax.tree import (
    Tree,
    TreeSpec,
    add_candidates,
    commit,
    gain,
    largest,
    node_mask,
    node_positions,
    replant,
    seedling,
)

ROOT = 2


@pytest.mark.parametrize("vocab, count", [(100, 3), (4096, 6), (9001, 40), (152_064, 6)])
def test_the_largest_of_long_rows(vocab, count):
    """As lax.top_k: of equal ones the first, and of -inf too."""
    z = np.random.default_rng(vocab).integers(-5, 5, (3, vocab)).astype(np.float32)
    z[1, : vocab - 2] = -np.inf
    z[2] = -np.inf
    got, want = jax.jit(largest, static_argnums=1)(z, count), jax.lax.top_k(z, count)
    chex.assert_trees_all_equal(list(got), list(want))


@functools.partial(jax.jit, static_argnames=("spec", "steps"))
def grown(table_DVV, spec, steps):
    """The tree after `steps` steps of a draft whose logits are table[depth, token]."""
    tree = seedling(jnp.int32(ROOT), spec)
    for _ in range(steps):
        first = tree.size
        tree = commit(tree, spec)
        rows = first + jnp.arange(spec.width)
        tree = add_candidates(tree, first, table_DVV[tree.depth_E[rows], tree.token_E[rows]], spec)
    return tree


def table(spec, vocab, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(size=(spec.deepest + 1, vocab, vocab)) * scale


def log_softmax(z):
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def nodes_of(tree):
    """(path of tokens from the root, score) of every node in use, in order."""
    token, parent, score = (np.asarray(a) for a in (tree.token_E, tree.parent_E, tree.score_E))
    paths = []
    for i in range(int(tree.size)):
        if i == 0 or parent[i] >= 0:
            above = paths[parent[i]][0] if i else ()
            paths.append(((*above, int(token[i])), float(score[i])))
        else:
            paths.append(((), -np.inf))
    return paths


def beam_by_hand(spec, logits, levels):
    """Every level is the best `width` of all width x V children, ties to the lower index."""
    nodes = [((ROOT,), 0.0)]
    level = nodes
    for depth in range(levels):
        children = [
            ((*path, token), score + logp)
            for path, score in level
            for token, logp in enumerate(log_softmax(logits[depth, path[-1]] / spec.sharpen))
        ]
        level = sorted(children, key=lambda child: -child[1])[: spec.width]  # stable
        nodes = nodes + level
    return nodes


def same_nodes(got, want, rtol=1e-5):
    assert [path for path, _ in got] == [path for path, _ in want]
    np.testing.assert_allclose([s for _, s in got], [s for _, s in want], rtol=rtol, atol=1e-4)


@pytest.mark.quick_cases("4-3-11-0.2", "2-5-5-1.0")
@pytest.mark.parametrize("sharpen", [1.0, 0.2])
@pytest.mark.parametrize("depth, width, vocab", [(4, 3, 11), (5, 1, 7), (2, 5, 5)])
def test_beam_is_the_best_of_all_children(sharpen, depth, width, vocab):
    spec = TreeSpec("beam", depth, width, sharpen=sharpen)
    for seed in range(3):
        logits = table(spec, vocab, seed)
        tree = grown(jnp.asarray(logits, jnp.float32), spec, 1 + depth)
        same_nodes(nodes_of(tree), beam_by_hand(spec, logits, depth))
        assert int(tree.size) == spec.nodes == 1 + depth * width


def test_beam_gives_ties_to_the_lower_index():
    spec = TreeSpec("beam", 3, 3, sharpen=1.0)
    flat = np.zeros((4, 6, 6))
    same_nodes(
        nodes_of(grown(jnp.asarray(flat, jnp.float32), spec, 4)), beam_by_hand(spec, flat, 3)
    )
    # Whole logits: many ties among the children of a node. Not -0.0, which sorts before 0.0.
    steps = np.round(table(spec, 6, 1)) + 0.0
    one = jnp.asarray(steps, jnp.float32)
    same_nodes(nodes_of(grown(one, spec, 2))[:4], beam_by_hand(spec, steps, 1))


def test_sums_of_logs_are_products_of_probabilities():
    spec = TreeSpec("beam", 4, 4, sharpen=0.5)
    logits = table(spec, 9, 4)
    level, product = [((ROOT,), 1.0)], []
    for depth in range(4):
        p = np.exp(logits[depth] / 0.5)
        p /= p.sum(-1, keepdims=True)
        children = [((*path, t), s * p[path[-1], t]) for path, s in level for t in range(9)]
        level = sorted(children, key=lambda child: -child[1])[:4]
        product += level
    got = nodes_of(grown(jnp.asarray(logits, jnp.float32), spec, 5))[1:]
    assert [path for path, _ in got] == [path for path, _ in product]
    np.testing.assert_allclose(np.exp([s for _, s in got]), [s for _, s in product], rtol=1e-5)


@pytest.mark.slow
def test_unlikely_beams_do_not_underflow():
    """40 levels of an unsure draft: products would be 0 in float32, and the order lost."""
    spec = TreeSpec("beam", 40, 3, sharpen=1.0)
    logits = table(spec, 50, 5, scale=0.3)
    tree = grown(jnp.asarray(logits, jnp.float32), spec, 41)
    worst = float(tree.score_E[-1])
    assert worst < np.log(np.finfo(np.float32).smallest_subnormal) - 5
    want = beam_by_hand(spec, logits, 40)
    same_nodes(nodes_of(tree), want)


def best_first_by_hand(spec, logits, steps):
    """All children ever offered compete; a node offers its `offers` best."""
    nodes, pool = [((ROOT,), 0.0)], []
    newest = nodes
    for _ in range(steps):
        for path, score in newest:
            if len(path) - 1 < spec.deepest:
                logp = log_softmax(logits[len(path) - 1, path[-1]] / spec.sharpen)
                for token in np.argsort(-logp)[: spec.offers]:
                    pool.append(((*path, int(token)), score + logp[token]))
        pool.sort(key=lambda child: -child[1])
        newest, pool = pool[: spec.width], pool[spec.width :]
        nodes = nodes + newest
    return nodes


@pytest.mark.quick_cases("6-2-12-0.2-0.3", "3-3-14-1.0-1.0", "9-4-20-1.0-0.1")
@pytest.mark.parametrize("sharpen, scale", [(1.0, 1.0), (0.2, 0.3), (1.0, 0.1)])
@pytest.mark.parametrize("depth, width, budget", [(6, 2, 12), (3, 3, 14), (9, 4, 20), (7, 1, 9)])
def test_best_first_takes_the_most_probable_candidates(sharpen, scale, depth, width, budget):
    spec = TreeSpec("best-first", depth, width, budget=budget, sharpen=sharpen)
    steps = budget // width
    for seed in range(3):
        logits = table(spec, 6, seed, scale)
        tree = grown(jnp.asarray(logits, jnp.float32), spec, 1 + steps)
        got, want = nodes_of(tree), best_first_by_hand(spec, logits, steps)
        same_nodes(got[: len(want)], want)
        assert int(tree.size) == 1 + steps * width == spec.nodes
        assert max(len(path) for path, _ in got) - 1 <= depth
        paths = {path for path, _ in got}
        assert all(path[:-1] in paths for path, _ in got if len(path) > 1)


def test_best_first_goes_deep_where_it_is_sure_and_wide_where_not():
    spec = TreeSpec("best-first", 8, 2, budget=8, sharpen=1.0)
    sure = np.zeros((9, 5, 5))
    sure[..., 1] = 20.0
    depth = lambda logits: max(
        len(path) - 1 for path, _ in nodes_of(grown(jnp.asarray(logits, jnp.float32), spec, 5))
    )
    assert depth(sure) == 4 and depth(np.zeros((9, 5, 5))) == 2  # 5 on level 1, 3 on level 2


@pytest.mark.slow
def test_a_tree_that_runs_out_of_candidates_stops():
    """Best-first trees have a depth; behind it, places are filled with nodes that match nothing."""
    spec = TreeSpec("best-first", 1, 2, budget=8, sharpen=1.0)
    tree = grown(jnp.asarray(table(spec, 5), jnp.float32), spec, 5)
    assert tree.parent_E.tolist() == [-1, 0, 0, 0, 0, 0, -1, -1, -1]  # a vocabulary of 5
    assert float(gain(tree, spec)) == -np.inf


@pytest.mark.slow
def test_gain_is_the_sum_of_path_probabilities():
    spec = TreeSpec("beam", 3, 3, sharpen=1.0)
    logits = table(spec, 8, 9)
    for steps in (1, 2, 3):
        following = beam_by_hand(spec, logits, steps)[-3:]
        tree = grown(jnp.asarray(logits, jnp.float32), spec, steps)
        want = sum(np.exp(score) for _, score in following)
        assert abs(np.exp(float(gain(tree, spec))) - want) < 1e-5
    assert float(gain(seedling(jnp.int32(1), spec), spec)) == 0.0


def test_sharpening_is_a_temperature():
    """And it reorders nodes only through sums: one level is the same set at any temperature."""
    logits = table(TreeSpec("beam", 1, 4), 9)
    levels = [
        [p for p, _ in nodes_of(grown(jnp.asarray(logits, jnp.float32), spec, 2))]
        for spec in (TreeSpec("beam", 1, 4, sharpen=1.0), TreeSpec("beam", 1, 4, sharpen=0.1))
    ]
    assert levels[0] == levels[1]


# ---------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    "spec",
    [TreeSpec("beam", 4, 3, sharpen=1.0), TreeSpec("best-first", 6, 2, budget=12, sharpen=1.0)],
    ids=lambda s: s.kind,
)
def test_masks_follow_the_parents(spec):
    tree = grown(
        jnp.asarray(table(spec, 6, 2), jnp.float32), spec, (spec.nodes - 1) // spec.width + 1
    )
    parent = np.asarray(tree.parent_E)
    want = np.zeros((spec.places, spec.places), bool)
    for i in range(spec.places):
        j = i
        while j >= 0:
            want[i, j] = True
            j = parent[j]
    np.testing.assert_array_equal(tree.ancestor_EE, want)
    assert (parent[1:] < np.arange(1, spec.places)).all() and (parent[1:] >= 0).all()
    depth = want.sum(1) - 1
    np.testing.assert_array_equal(tree.depth_E, depth)

    at, slots, rows = 5, 5 + spec.places + 4, [0, 3, spec.places - 1]
    mask = node_mask(tree, jnp.array(rows), jnp.int32(at), slots)
    chex.assert_shape(mask, (1, 3, slots))
    for r, i in enumerate(rows):
        seen = set(range(at)) | {at + int(j) for j in np.flatnonzero(want[i])}
        assert set(np.flatnonzero(mask[0, r]).tolist()) == seen
    position = node_positions(tree, jnp.int32(at), slots)
    want = [*range(at), *(at + depth), *range(at + spec.places, slots)]
    assert position.dtype == jnp.int32 and position.tolist() == [want]


# ------------------------------------------------------------------------------------- replanting

REPLANTED = [TreeSpec("beam", 3, 2, extra=3), TreeSpec("best-first", 5, 3, budget=6, extra=2)]
jit_replant = jax.jit(replant, static_argnames="spec")
jit_commit = jax.jit(commit, static_argnames="spec")


def random_tree(rng, spec, verified):
    """A tree whose first `verified` nodes were verified, and `extra` steps drafted behind them."""
    E, X, C = spec.places, spec.extra * spec.width, spec.pool
    size = verified + int(rng.integers(0, spec.extra + 1)) * spec.width
    parent, token = np.full(E, -1), rng.integers(0, 50, E)
    for i in range(1, size):
        if rng.random() < 0.9:  # a tenth of the places hold no node
            real = [j for j in range(i) if j == 0 or parent[j] >= 0]
            parent[i] = rng.choice(real[-4:])
            taken = token[:i][parent[:i] == parent[i]]
            token[i] = rng.choice(np.setdiff1d(np.arange(6), taken))
    ancestor, depth = np.eye(E, dtype=bool), np.zeros(E, int)
    score = np.full(E, -np.inf)
    score[0] = 0.0
    for i in range(1, size):
        if parent[i] >= 0:
            ancestor[i] |= ancestor[parent[i]]
            depth[i] = depth[parent[i]] + 1
            score[i] = score[parent[i]] - rng.random()
    real = np.flatnonzero(np.isfinite(score))
    up = rng.choice(np.r_[real, -1], C)
    pool_score = np.where(up >= 0, score[up] - rng.random(C), -np.inf)
    f32, i32 = (lambda a: jnp.asarray(a, jnp.float32)), (lambda a: jnp.asarray(a, jnp.int32))
    tree = Tree(
        *map(i32, (token, parent, depth)),
        f32(score),
        jnp.asarray(ancestor),
        i32(size),
        i32(size),
        f32(pool_score),
        i32(up),
        i32(rng.integers(0, 50, C)),
    )
    assert E - spec.nodes == X
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("spec", REPLANTED, ids=lambda s: s.kind)
@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_replanting_moves_the_subtree_that_was_drafted(spec, seed):
    rng = np.random.default_rng(seed)
    verified = int(rng.integers(1, spec.nodes + 1))
    tree = random_tree(rng, spec, verified)
    parent, token = np.asarray(tree.parent_E), np.asarray(tree.token_E)
    size, score = int(tree.size), np.asarray(tree.score_E)
    # the walk ends at a verified node, with a token that none of its verified children carries
    last = int(rng.choice([i for i in range(verified) if i == 0 or parent[i] >= 0]))
    ahead = [i for i in range(verified, size) if parent[i] == last]
    known = [token[i] for i in range(verified) if parent[i] == last]
    bonus = int(token[rng.choice(ahead)]) if ahead and rng.random() < 0.7 else 49
    if bonus in known:
        return
    new, places = jit_replant(tree, jnp.int32(verified), jnp.int32(last), jnp.int32(bonus), spec)
    chex.assert_shape(places, (spec.extra * spec.width,))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, tree)

    roots = [i for i in ahead if token[i] == bonus]
    if not roots:
        chex.assert_trees_all_equal(new, seedling(jnp.int32(bonus), spec))
        assert (places == -1).all()
        return
    members = []
    for i in range(size):
        if i == roots[0] or parent[i] in members:
            members.append(i)
    n, where = len(members), {old: i for i, old in enumerate(members)}
    assert int(new.size) == int(new.forwarded) == n
    assert places[:n].tolist() == members
    assert new.token_E[:n].tolist() == [token[i] for i in members]
    assert new.parent_E[:n].tolist() == [-1] + [where[parent[i]] for i in members[1:]]
    assert (new.parent_E[n:] == -1).all() and (new.score_E[n:] == -jnp.inf).all()
    np.testing.assert_allclose(new.score_E[:n], score[members] - score[members[0]], atol=1e-6)
    depth = np.asarray(tree.depth_E)
    assert new.depth_E[:n].tolist() == [depth[i] - depth[members[0]] for i in members]
    ancestor = np.eye(spec.places, dtype=bool)
    for i in range(1, n):
        ancestor[i] |= ancestor[where[parent[members[i]]]]
    np.testing.assert_array_equal(new.ancestor_EE, ancestor)
    rows = lambda t: [
        (float(s), int(u), int(k))
        for s, u, k in zip(t.pool_score_C, t.pool_parent_C, t.pool_token_C)
        if np.isfinite(s)
    ]
    want = [(s - score[members[0]], where[u], k) for s, u, k in rows(tree) if u in members]
    got = rows(new)
    assert [g[1:] for g in got] == [w[1:] for w in want]
    np.testing.assert_allclose([g[0] for g in got], [w[0] for w in want], atol=1e-6)


@pytest.mark.quick_cases("best-first")
@pytest.mark.parametrize("kind", ["best-first", "chain"])
def test_a_replanted_tree_grows_like_one_planted_there(kind):
    """Growing on below the new root gives what growing from it gives, as far as both are known."""
    spec = TreeSpec(kind, 3, 1, extra=3, sharpen=1.0)
    # The same at every depth, and so sure that best-first goes straight down.
    logits = np.tile(table(spec, 7, 3, 30.0)[:1], (spec.deepest + 1, 1, 1))
    one = jnp.asarray(logits, jnp.float32)
    tree = grown(one, spec, 6)
    new, places = jit_replant(tree, 3, jnp.int32(2), tree.token_E[3], spec)
    assert places.tolist() == [3, 4, 5] and int(new.size) == 3
    after, whole = jit_commit(new, spec), nodes_of(grown(one, spec, 7))
    assert [p[-1] for p, _ in nodes_of(after)] == [p[-1] for p, _ in whole[3:7]]


def test_without_post_speculation_the_next_tree_is_a_seedling():
    spec = TreeSpec("beam", 2, 2, sharpen=1.0)
    tree = grown(jnp.asarray(table(spec, 5), jnp.float32), spec, 3)
    new, places = jit_replant(tree, spec.nodes, jnp.int32(0), tree.token_E[1], spec)
    chex.assert_trees_all_equal(new, seedling(tree.token_E[1], spec))
    assert places.shape == (0,)


def test_nodes_that_were_not_forwarded_are_not_kept():
    """Their keys and values are in no cache."""
    spec = TreeSpec("chain", 2, extra=2, sharpen=1.0)
    tree = grown(jnp.asarray(table(spec, 5), jnp.float32), spec, 4)
    for forwarded, hit in ((4, True), (3, False)):
        late = dataclasses.replace(tree, forwarded=jnp.int32(forwarded))
        new, _ = jit_replant(late, 3, jnp.int32(2), tree.token_E[3], spec)
        assert (int(new.size) == 1) == hit and int(new.token_E[0]) == (
            tree.token_E[3] if hit else 0
        )


# ------------------------------------------------------------------------------------------ specs


@pytest.mark.parametrize(
    "spec, nodes, places, deepest, pool",
    [
        (TreeSpec(), 289, 289, 48, 36),  # SubSpec: 48 levels of 6, and the root
        (TreeSpec("beam", 32, 6), 193, 193, 32, 36),
        (TreeSpec("beam", 3, 4, extra=2), 13, 21, 5, 16),
        (TreeSpec("chain", 5), 6, 6, 5, 1),
        (TreeSpec("chain", 5, extra=3), 6, 9, 8, 1),
        (TreeSpec("chain", 0), 1, 1, 0, 1),
        (TreeSpec("best-first", 6, 3), 19, 19, 6, 19),
        (TreeSpec("best-first", 6, 3, budget=13), 13, 13, 6, 13),  # whole steps: 4 of 3
        (TreeSpec("best-first", 6, 4, budget=4, extra=1), 5, 9, 7, 16),
        (TreeSpec(lookup=16), 289, 305, 48, 36),
        (TreeSpec("chain", 5, lookup=9), 6, 15, 5, 1),
        (TreeSpec("best-first", 6, 3, budget=13, lookup=2), 13, 15, 6, 15),
    ],
)
def test_arithmetic_of_places(spec, nodes, places, deepest, pool):
    assert (spec.nodes, spec.places, spec.deepest, spec.pool) == (nodes, places, deepest, pool)
    tree = seedling(jnp.int32(7), spec)
    chex.assert_shape(tree.token_E, (places,))
    chex.assert_shape(tree.pool_score_C, (pool,))
    assert int(tree.size) == 0 and (tree.parent_E == -1).all()


def test_a_chain_has_width_one_whatever_is_asked():
    assert TreeSpec("chain", 4, width=6) == TreeSpec("chain", 4, width=1)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(kind="star"), "tree kind 'star' is not one of beam, best-first, chain"),
        (dict(depth=-1), "tree depth is -1; it must be at least 0"),
        (dict(width=0), "tree width is 0; it must be at least 1"),
        (dict(extra=-2), "tree extra is -2"),
        (dict(lookup=-1), "tree lookup is -1; it must be at least 0"),
        (dict(extra=1, lookup=4), "set lookup or extra to 0"),
        (dict(sharpen=0.0), "sharpen is 0.0; it must be above 0"),
        (dict(sharpen=float("nan")), "sharpen is nan"),
        (dict(budget=12), "a node budget is for best-first trees; a beam has depth x width"),
        (dict(kind="best-first", budget=5), "budget 5 is less than one step of 6 nodes"),
    ],
)
def test_specs_that_mean_nothing_raise(options, words):
    with pytest.raises(ValueError) as caught:
        TreeSpec(**options)
    assert words in str(caught.value)
