"""Acceptance on random trees, against walks written as recursion over lists of children."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec_jax.accept import Gate, Judged, exact, gated, replayed

E, PLACES, TOKENS = 14, 9, 4
seeds = given(seed=st.integers(0, 2**32 - 1))
often = settings(max_examples=150, deadline=None)


def random_tree(rng):
    """token, parent, depth, ancestor: parents first, siblings differ, some places are empty."""
    size = int(rng.integers(1, E + 1))
    parent, token, depth = np.full(E, -1), rng.integers(0, TOKENS, E), np.zeros(E, int)
    ancestor = np.eye(E, dtype=bool)
    for i in range(1, size):
        up = [j for j in range(i) if (j == 0 or parent[j] >= 0) and depth[j] < PLACES - 1]
        up = up[-3:] if rng.random() < 0.7 else up  # deep ones and bushy ones
        up = [j for j in up if (parent[:i] == j).sum() < TOKENS]
        if up and rng.random() < 0.93:
            parent[i] = rng.choice(up)
            taken = token[:i][parent[:i] == parent[i]]
            token[i] = rng.choice(np.setdiff1d(np.arange(TOKENS), taken))
            depth[i] = depth[parent[i]] + 1
            ancestor[i] |= ancestor[parent[i]]
    return token, parent, depth, ancestor


def random_draws(rng, token, parent):
    """Draws that agree with some child most of the time, so that walks are long."""
    draw = rng.integers(0, TOKENS, E)
    for i in range(E):
        children = np.flatnonzero(parent == i)
        if len(children) and rng.random() < 0.75:
            draw[i] = token[rng.choice(children)]
    return draw


def judged_of(draw, entropy=None, probability=None):
    f32 = lambda a: None if a is None else jnp.asarray(a, jnp.float32)
    return Judged(jnp.asarray(draw, jnp.int32), f32(entropy), f32(probability))


def check_path(path, nodes, token, draw):
    """The path holds these nodes, and the tokens emitted are theirs and the draw at its end."""
    n = len(nodes)
    assert int(path.length) == n and int(path.last) == nodes[-1]
    assert path.node_P.tolist() == nodes + [nodes[-1]] * (PLACES - n)
    emitted = [token[i] for i in nodes[1:]] + [draw[nodes[-1]]]
    assert path.emitted_P.tolist() == emitted + [-1] * (PLACES - n)
    assert int(path.bonus) == emitted[-1]


i32 = lambda a: jnp.asarray(a, jnp.int32)
jit_exact = jax.jit(exact, static_argnums=3)
jit_gated = jax.jit(gated, static_argnums=(3, 4))
jit_replayed = jax.jit(replayed, static_argnums=5)


@often
@seeds
def test_exact_follows_the_target(seed):
    rng = np.random.default_rng(seed)
    token, parent, _, _ = random_tree(rng)
    draw = random_draws(rng, token, parent)

    def walk(node):
        for child in range(E):
            if parent[child] == node and token[child] == draw[node]:
                return [node, *walk(child)]
        return [node]

    path = jit_exact(i32(token), i32(parent), judged_of(draw), PLACES)
    check_path(path, walk(0), token, draw)


def test_exact_by_example():
    #      0:7 - 1:3 - 3:5     draws: behind 7 comes 3, behind 3 comes 6 (no child), behind 6: 1
    #          \ 2:4 - 4:6
    token, parent = i32([7, 3, 4, 5, 6, 0]), i32([-1, 0, 0, 1, 2, -1])
    path = exact(token, parent, judged_of([3, 6, 6, 9, 1, 8]), 3)
    assert path.node_P.tolist() == [0, 1, 1] and path.emitted_P.tolist() == [3, 6, -1]
    path = exact(token, parent, judged_of([4, 6, 6, 9, 1, 8]), 3)
    assert path.node_P.tolist() == [0, 2, 4] and path.emitted_P.tolist() == [4, 6, 1]
    path = exact(
        token, parent, judged_of([0, 6, 6, 9, 1, 8]), 3
    )  # 0 is the token of an empty place
    assert path.node_P.tolist() == [0, 0, 0] and path.emitted_P.tolist() == [0, -1, -1]


def gated_by_recursion(token, parent, draw, entropy, probability, gate):
    """The longest admissible path; between equals the match, the likelier child, the first."""
    children = lambda u: [c for c in range(E) if parent[c] == u]

    def run(u):
        """Longest chain of exact matches below u."""
        return max((1 + run(c) for c in children(u) if token[c] == draw[u]), default=0)

    def admitted(c):
        u = parent[c]
        if token[c] == draw[u]:
            return True
        is_open = (
            entropy[u] < gate.threshold
            if gate.kind == "entropy"
            else probability[c] >= gate.threshold
        )
        return is_open and run(c) >= gate.window

    def longest(u):
        below = [(longest(c), c) for c in children(u) if admitted(c)]
        if not below:
            return [u]
        key = lambda pair: (len(pair[0]), token[pair[1]] == draw[u], probability[pair[1]])
        return [u, *max(below, key=key)[0]]

    return longest(0)


GATES = [Gate(kind, 0.5, window) for kind in ("entropy", "probability") for window in (1, 2, 3)]


@pytest.mark.quick_cases(repr(GATES[2]), repr(GATES[4]))
@pytest.mark.parametrize("gate", GATES, ids=repr)
@settings(max_examples=80, deadline=None)
@seeds
def test_gated_is_the_longest_admissible_path(gate, seed):
    rng = np.random.default_rng(seed)
    token, parent, _, _ = random_tree(rng)
    draw = random_draws(rng, token, parent)
    # multiples of 1/8, so that 0.5 is hit exactly; 1/1024ths keep siblings apart
    entropy = rng.integers(0, 9, E) / 8
    probability = rng.integers(0, 8, E) / 8 + (np.arange(E) % 2 == 0) * rng.permutation(E) / 1024
    probability = np.where(probability == 0.5, 0.5, probability + np.arange(E) / 65536)
    nodes = gated_by_recursion(token, parent, draw, entropy, probability, gate)
    judged = judged_of(draw, entropy, probability)
    path = jit_gated(i32(token), i32(parent), judged, PLACES, gate)
    check_path(path, nodes, token, draw)


def a_chain(mismatch_at, length):
    """A chain of `length` nodes whose draws agree everywhere but before node `mismatch_at`."""
    token = np.arange(length) % TOKENS
    parent = np.arange(length) - 1
    draw = (token + 1) % TOKENS
    draw[mismatch_at - 1] = (draw[mismatch_at - 1] + 1) % TOKENS
    return i32(token), i32(parent), draw


@pytest.mark.quick_cases(
    *("gate0-0.29-0.0-3-True", "gate1-0.29-0.0-2-False", "gate3-0.0-1.0-5-False"),
    *("gate4-1.0-0.25-3-True", "gate5-0.0-0.24-5-False"),
)
@pytest.mark.parametrize(
    "gate, entropy, probability, following, passes",
    [
        (Gate("entropy", 0.3, 3), 0.29, 0.0, 3, True),
        (Gate("entropy", 0.3, 3), 0.29, 0.0, 2, False),  # one match too few behind it
        (Gate("entropy", 0.25, 3), 0.25, 0.0, 5, False),  # strictly below
        (Gate("entropy", 0.0, 1), 0.0, 1.0, 5, False),  # threshold 0: exact
        (Gate("probability", 0.25, 3), 1.0, 0.25, 3, True),  # at least
        (Gate("probability", 0.25, 3), 0.0, 0.24, 5, False),
        (Gate("probability", 0.25, 4), 0.0, 0.9, 3, False),
        (Gate("probability", 0.0, 1), 1.0, 0.0, 1, True),
        (Gate("probability", 0.0, 1), 1.0, 0.0, 0, False),  # a leaf has nothing behind it
    ],
)
def test_window_and_threshold(gate, entropy, probability, following, passes):
    at = 2
    length = at + 1 + following
    token, parent, draw = a_chain(at, length)
    judged = judged_of(draw, np.full(length, entropy), np.full(length, probability))
    path = gated(token, parent, judged, length, gate)
    assert int(path.length) == (length if passes else at)


@often
@seeds
def test_a_closed_gate_is_exact(seed):
    rng = np.random.default_rng(seed)
    token, parent, _, _ = random_tree(rng)
    judged = judged_of(random_draws(rng, token, parent), np.zeros(E), rng.random(E))
    shut = jit_gated(i32(token), i32(parent), judged, PLACES, Gate("entropy", 0.0, 1))
    path = jit_exact(i32(token), i32(parent), judged, PLACES)
    assert all(map(np.array_equal, jax.tree.leaves(shut), jax.tree.leaves(path)))


@often
@seeds
def test_replayed_accepts_the_number_asked_for(seed):
    rng = np.random.default_rng(seed)
    token, parent, depth, ancestor = random_tree(rng)
    draw = rng.integers(0, TOKENS, E)
    accepted = int(rng.integers(0, PLACES + 3))
    deepest = max(depth[i] for i in range(E) if i == 0 or parent[i] >= 0)
    real = [i for i in range(E) if i == 0 or parent[i] >= 0]
    end = next(i for i in real if depth[i] == min(accepted, deepest))
    nodes = [end]
    while nodes[0]:
        nodes.insert(0, int(parent[nodes[0]]))
    path = jit_replayed(
        i32(token),
        i32(parent),
        i32(depth),
        jnp.asarray(ancestor),
        judged_of(draw),
        PLACES,
        jnp.int32(accepted),
    )
    check_path(path, nodes, token, draw)
    assert int(path.length) - 1 == min(accepted, deepest)


def test_paths_of_every_length_fit():
    """A chain that fills all places is accepted to its end."""
    token, parent, draw = a_chain(1, PLACES)
    draw = (np.asarray(token) + 1) % TOKENS
    walk = functools.partial(exact, token, parent, judged_of(draw))
    assert int(walk(PLACES).length) == PLACES
    assert -1 not in walk(PLACES).emitted_P.tolist()


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(kind="typical"), "gate 'typical' is not one of entropy, probability"),
        (dict(threshold=1.5), "threshold is 1.5; expected 0 to 1"),
        (dict(threshold=-0.1), "threshold is -0.1"),
        (dict(window=0), "window is 0; expected 1 to 1000"),
    ],
)
def test_gates_that_mean_nothing_raise(options, words):
    with pytest.raises(ValueError) as caught:
        Gate(**options)
    assert words in str(caught.value)
