"""Looked-up tokens in a tree, by brute force: what is kept, its scores, the pool, and growing."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.attention import causal_step
from llm_jax.cache import empty_caches
from llm_jax.generation import generate, prefill
from llm_jax.model import forward
from llm_jax.sample import Sampler, noise
from subspec_jax import chain
from subspec_jax.draft import Drafting, grow, grow_along
from subspec_jax.lookup import padded
from subspec_jax.tree import TreeSpec, commit, node_mask, node_positions, seedling

ROOT = 2
BEAM = TreeSpec("beam", 6, 3, lookup=4)
BEST = TreeSpec("best-first", 7, 2, budget=12, lookup=4)
LINE = TreeSpec("chain", 5, lookup=4)
SPECS = [BEAM, BEST, LINE, dataclasses.replace(BEAM, sharpen=1.0), TreeSpec("beam", 2, 2, lookup=4)]
name = lambda v: f"{v.kind} {v.depth} {v.sharpen}" if isinstance(v, TreeSpec) else None


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def followed(text, path, most, longest=3):
    """What followed the path's last tokens in the text, whose last token is the path's root."""
    whole = [*text[:-1], *path]
    for n in range(min(longest, len(whole)), 0, -1):
        pieces = [
            text[p : p + most] for p in range(n, len(text) - 1) if text[p - n : p] == whole[-n:]
        ]
        if pieces:
            return max(reversed(pieces), key=len)
    return []


class Grown:
    """A tree grown by hand from `logits(path)`: `nodes` and `pool` of (path, score)."""

    def __init__(self, spec, logits, follow, root=ROOT):
        self.spec, self.logits, self.follow = spec, logits, follow
        self.nodes, self.pool, self.spared, self.kept, self.steps = [], [((root,), 0.0)], 0, 0, 0

    def logp(self, path):
        return log_softmax(self.logits(path) / self.spec.sharpen)

    def commit(self):
        count = self.spec.width if self.nodes else 1
        newest, self.pool = self.pool[:count], self.pool[count:]
        self.nodes += newest
        return newest

    def step(self):
        newest, spec = self.commit(), self.spec
        below, level = newest[0], sum(np.exp(score) for _, score in newest)
        for token in self.follow(below[0]):
            path, above = below
            logp = self.logp(path)[token]
            if logp <= np.log(0.5) or len(path) > spec.deepest or len(self.nodes) == spec.nodes:
                break
            below = ((*path, token), above + logp)
            newest, self.nodes = [*newest, below], [*self.nodes, below]
            self.kept, self.spared = self.kept + 1, self.spared + np.exp(below[1]) / level
        known = {path for path, _ in self.nodes}
        self.pool = self.pool if spec.kind == "best-first" else []
        for path, above in newest:
            logp = self.logp(path)
            fresh = [t for t in np.argsort(-logp, kind="stable") if (*path, int(t)) not in known]
            if len(path) <= spec.deepest:
                self.pool += [((*path, int(t)), above + logp[t]) for t in fresh[: spec.offers]]
        self.pool = [child for child in self.pool if np.isfinite(child[1])]
        self.pool.sort(key=lambda child: -child[1])
        self.steps += 1

    def grow(self):
        spec = self.spec
        self.step()
        while self.pool:
            steps = spec.steps - int(self.spared + 1e-3)
            if len(self.nodes) + 2 * spec.width > min(
                1 + self.kept + steps * spec.width, spec.nodes
            ):
                break
            self.step()
        if len(self.nodes) + spec.width <= spec.nodes:
            self.commit()
        return self


def path_of(tree, i):
    path = []
    while i >= 0:
        path.insert(0, int(tree.token_E[i]))
        i = int(tree.parent_E[i])
    return tuple(path)


def same_tree(tree, want, rtol, atol=0.0):
    size = int(tree.size)
    assert [path_of(tree, i) for i in range(size)] == [path for path, _ in want.nodes]
    np.testing.assert_allclose(
        tree.score_E[:size], [s for _, s in want.nodes], rtol=rtol, atol=atol
    )
    depth = [len(path) - 1 for path, _ in want.nodes]
    assert tree.depth_E[:size].tolist() == depth
    assert (tree.parent_E[size : want.spec.nodes] == -1).all()


# ------------------------------------------------------------------------------ a draft from tables


@functools.partial(jax.jit, static_argnames=("spec", "steps"))
def chained(table_DVV, token_SM, spec, steps):
    """A tree after some steps, each with its chain; the draft's logits are table[depth, token]."""
    tree, spared = seedling(jnp.int32(ROOT), spec), jnp.float32(0)
    for i in range(steps):
        first = tree.size
        tree = commit(tree, spec)
        trial = chain.hang(tree, first, token_SM[i])
        rows = first + jnp.arange(spec.width + spec.lookup)
        logits = table_DVV[trial.depth_E[rows], trial.token_E[rows]]
        tree, more = chain.keep(tree, first, token_SM[i], logits, spec)
        spared += more
    return tree, spared


@pytest.mark.quick_cases("(4, 4)-beam 6 0.2", "(0, 3)-beam 2 0.2", "(0, 3)-chain 5 0.2")
@pytest.mark.parametrize("spec", SPECS, ids=name)
@pytest.mark.parametrize("agreed", [(4, 4), (2, 0), (0, 3)], ids=str)
def test_kept_tokens_scores_and_pool_are_those_of_brute_force(spec, agreed):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        table = rng.normal(size=(spec.deepest + 6, 23, 23)) * 2
        logits = lambda path, table=table: table[len(path) - 1, path[-1]]
        chains = []

        def follow(path, logits=logits, chains=chains):
            """Tokens that the draft finds best so many times, and then others."""
            tokens = []
            for i in range(4):
                order = np.argsort(-logits((*path, *tokens)))
                tokens.append(int(order[0 if i < agreed[len(chains)] else 3]))
            chains.append(tokens)
            return tokens

        want = Grown(spec, logits, follow)
        want.step(), want.step()
        tokens = jnp.array(chains, jnp.int32)
        tree, spared = chained(jnp.asarray(table, jnp.float32), tokens, spec, 2)
        assert int(tree.forwarded) == int(tree.size)
        same_tree(tree, want, 1e-4, 1e-4)
        assert float(spared) == pytest.approx(want.spared, abs=1e-4)
        assert want.kept <= sum(agreed)
        found = [
            ((*path_of(tree, int(p)), int(t)), float(s))
            for s, p, t in zip(tree.pool_score_C, tree.pool_parent_C, tree.pool_token_C)
            if np.isfinite(s)
        ]
        assert not {path for path, _ in want.nodes} & {path for path, _ in found}
        best = want.pool[: spec.pool]
        assert [path for path, _ in found] == [path for path, _ in best]
        np.testing.assert_allclose(
            [s for _, s in found], [s for _, s in best], rtol=1e-4, atol=1e-4
        )


def kept(likely, tokens=(5, 7, 1), spec=BEAM):
    """The tree of a draft that finds so many of the tokens likely, and nothing else."""
    table = np.zeros((9, 9, 9))
    path = (ROOT, *tokens)
    for depth in range(likely):
        table[depth, path[depth], path[depth + 1]] = 4.0
    return chained(jnp.asarray(table, jnp.float32), jnp.array([padded(tokens, 4)]), spec, 1)


@pytest.mark.parametrize("likely", [0, 1, 2, 3])
def test_the_beginning_that_the_draft_agrees_with_is_kept(likely):
    tree, spared = kept(likely)
    assert int(tree.size) == 1 + likely
    assert path_of(tree, likely) == (ROOT, 5, 7, 1)[: 1 + likely]
    assert (tree.parent_E[1 + likely :] == -1).all()
    assert float(spared) == pytest.approx(likely, abs=0.01)
    pool = {(int(p), int(t)) for p, t in zip(tree.pool_parent_C, tree.pool_token_C)}
    assert not pool & set(list(enumerate([5, 7, 1]))[:likely])  # offered once, as a node


def test_a_chain_ends_where_the_tree_is_deepest_or_full():
    tree, _ = kept(3, spec=TreeSpec("beam", 2, 2, lookup=4))
    assert int(tree.size) == 3 and int(tree.depth_E.max()) == 2
    tree, _ = kept(3, spec=TreeSpec("best-first", 8, 1, budget=1, lookup=4))
    assert int(tree.size) == 2


@pytest.mark.slow
def test_masks_and_positions_of_a_chain():
    """Below node 1, of which 3 is the sibling's: what is forwarded sees its own path alone."""
    tree = commit(seedling(jnp.int32(ROOT), BEAM), BEAM)
    tree = chain.hang(tree, 0, jnp.array([5, 6, -1, -1]), jnp.array([-1.0, -2.0, 0.0, 0.0]))
    assert tree.score_E[:4].tolist() == [0.0, -1.0, -2.0, -np.inf] and int(tree.size) == 3
    trial = chain.hang(tree, 1, jnp.array([7, 8, 9, -1]))
    assert int(trial.size) == 3 and (trial.score_E[3:] == -jnp.inf).all()
    assert trial.parent_E[:7].tolist() == [-1, 0, 1, 1, 3, 4, -1]
    assert trial.depth_E[:7].tolist() == [0, 1, 2, 2, 3, 4, 0]
    mask = node_mask(trial, jnp.arange(7), jnp.int32(2), 9)[0].astype(int).tolist()
    assert mask == [
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 1, 1, 1, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 1],
    ]
    assert node_positions(trial, jnp.int32(2), 9).tolist() == [[0, 1, 2, 3, 4, 4, 5, 6, 2]]


@pytest.mark.parametrize(
    "size, kept, spared, deep",
    [
        (13, 0, 0.0, False),  # of 19 places two levels of 3 are left
        (14, 0, 0.0, True),
        (10, 0, 0.9, False),  # less than a level is spared
        (12, 2, 2.0, True),  # 1 + 2 + 4 x 3 places, and a last level
        (9, 2, 2.0, False),
    ],
)
def test_a_tree_is_as_deep_as_without_looking_up(size, kept, spared, deep):
    tree = dataclasses.replace(seedling(jnp.int32(ROOT), BEAM), size=jnp.int32(size))
    assert bool(chain.tree_is_deep(tree, kept, jnp.float32(spared), BEAM)) == deep


# ------------------------------------------------------------------------ growing with a real draft

START, SLOTS, KEY, NEVER = [1, 2, 3, 5, 7], 64, jax.random.key(11), jnp.full(16, -jnp.inf)


@pytest.fixture(scope="module")
def text(looping):
    """What the looping model says, which goes in circles; the last token is the root."""
    return [*START, *generate(looping.params, START, looping.cfg, 24)]


@pytest.fixture(scope="module")
def filled(looping):
    """f(text) -> caches that hold all of it but the root (they are donated)."""
    empty = lambda: empty_caches(looping.cfg, 1, SLOTS)
    return lambda text: prefill(looping.params, text[:-1], empty(), looping.cfg)[1]


def along(model, caches, text, spec, sampler=Sampler(), gain=NEVER):
    return grow_along(
        Drafting(
            params=model.params,
            tree=seedling(jnp.int32(text[-1]), spec),
            caches=caches,
            at=jnp.int32(len(text) - 1),
            key=KEY,
            cfg=model.cfg,
            spec=spec,
            sampler=sampler,
            least_L=gain,
            text_S=jnp.array(padded(text, SLOTS)),
            longest=3,
        )
    )


GROWN = [
    (dataclasses.replace(BEAM, sharpen=0.02), Sampler()),
    (dataclasses.replace(BEAM, sharpen=0.02), Sampler(0.1)),
    (dataclasses.replace(BEAM, sharpen=0.1, coupled=False), Sampler(0.8, top_k=20)),
    (dataclasses.replace(BEST, sharpen=0.05), Sampler()),
    (dataclasses.replace(LINE, sharpen=0.02), Sampler(0.05)),
    (TreeSpec("beam", 2, 2, sharpen=0.02, lookup=4), Sampler()),
]


@pytest.mark.slow
@pytest.mark.parametrize("spec, sampler", GROWN, ids=name)
def test_a_tree_is_what_forwarding_every_path_gives(
    looping, filled, text, logits_behind, spec, sampler
):
    """At several places of a text, behind which the draft copies more or less of it."""
    cfg, copied = looping.cfg, []
    for length in range(len(text) - 12, len(text) + 1, 3):
        shown, at = text[:length], length - 1

        @functools.cache
        def scores(path, shown=shown, at=at):
            found = logits_behind(looping.params, [*shown[:-1], *path], cfg)
            if sampler.greedy:
                return found
            found = np.asarray(sampler.scores(jnp.asarray(found)[None])[0])
            if spec.coupled:
                found = found + np.asarray(noise(KEY, jnp.array([at + len(path)]), cfg.vocab)[0])
            return found

        follow = lambda path, shown=shown: followed(shown, path, 4)
        want = Grown(spec, scores, follow, shown[-1]).grow()
        tree, caches, counts = along(looping, filled(shown), shown, spec, sampler)
        same_tree(tree, want, 1e-3, 2e-2)
        assert counts.tolist()[:2] == [want.steps, want.kept]
        assert abs(int(counts[2]) - want.spared) <= 1
        copied.append(want.kept)

        # the last forwarded node's row holds the keys and values of its own path
        last = int(tree.forwarded) - 1
        whole = [*shown[:-1], *path_of(tree, last)]
        step, fresh = causal_step(0, len(whole), SLOTS), empty_caches(cfg, 1, SLOTS)
        _, fresh = forward(looping.params, jnp.array([whole]), fresh, step, cfg)
        row = lambda caches, slot: jax.tree.map(lambda a: a[:, slot], caches)
        chex.assert_trees_all_close(
            row(caches, at + last), row(fresh, len(whole) - 1), rtol=1e-4, atol=1e-4
        )
        head = lambda caches, at=at: jax.tree.map(lambda a: a[:, :at], caches)
        chex.assert_trees_all_equal(head(caches), head(filled(shown)))
    assert max(copied) > 0


@pytest.mark.slow
@pytest.mark.parametrize("spec", [BEAM, BEST, LINE], ids=name)
def test_without_a_match_the_tree_is_the_ordinary_one(looping, filled, spec):
    text = [*range(90, 97), 3]  # nothing occurs twice
    tree, _, counts = along(looping, filled(text), text, spec)
    assert counts.tolist() == [spec.steps, 0, 0]
    alone = dataclasses.replace(spec, lookup=0)
    plant, at = seedling(jnp.int32(3), alone), jnp.int32(len(text) - 1)
    fixed = dict(cfg=looping.cfg, spec=alone, sampler=Sampler(), least_L=NEVER)
    want, _ = grow(Drafting(looping.params, plant, filled(text), at, KEY, **fixed))
    assert int(tree.size) == int(want.size) == spec.nodes
    for field in ("token_E", "parent_E", "depth_E"):
        chex.assert_trees_all_equal(getattr(tree, field)[: spec.nodes], getattr(want, field))
    np.testing.assert_allclose(tree.score_E[: spec.nodes], want.score_E, rtol=1e-3)


@pytest.mark.slow
def test_growing_stops_where_it_does_not_pay(looping, filled, text):
    spec, sizes = dataclasses.replace(BEAM, sharpen=1.0), []
    for gain in (-jnp.inf, -9.0, -6.0, -3.0, jnp.inf):
        tree, _, _ = along(looping, filled(text), text, spec, gain=jnp.full(16, gain))
        sizes.append(int(tree.size))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 2
    assert sizes[0] == spec.nodes and sizes[-1] == 1 + spec.width  # unforwarded, so free
