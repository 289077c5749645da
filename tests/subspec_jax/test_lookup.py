"""Finding text that repeats itself, on the device, and noticing when that does not pay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from subspec_jax.lookup import Payoff, continuation, padded, recent
from subspec_jax.tree import TreeSpec, seedling

SLOTS = 32
TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=24)


@functools.partial(jax.jit, static_argnames="most")
def found(text_S, at, recent_n, most):
    return continuation(text_S, at, recent_n, most)


def continued(tokens, path, most, longest):
    """What `continuation` finds behind a path, of which the text's last token is the root."""
    whole = [*tokens, *path]
    newest = np.array([*whole[::-1], *[-7] * longest][:longest], np.int32)
    text = jnp.array(padded(tokens, SLOTS))
    got = found(text, jnp.int32(len(tokens) - 1), jnp.array(newest), most).tolist()
    kept = [t for t in got if t >= 0]
    assert got == kept + [-1] * (most - len(kept))
    return kept


def by_hand(tokens, path, most, longest):
    """The piece behind the longest match: the newest that is long enough, else the longest."""
    whole = [*tokens, *path]
    for n in range(min(longest, len(whole)), 0, -1):
        places = range(n, len(tokens) - 1)  # two tokens follow
        pieces = [tokens[p : p + most] for p in places if tokens[p - n : p] == whole[-n:]]
        if pieces:
            return max(reversed(pieces), key=len)
    return []


@settings(max_examples=400, deadline=None)
@given(
    tokens=TEXTS,
    path=st.lists(st.integers(0, 3), max_size=4),
    most=st.sampled_from([2, 5]),
    longest=st.sampled_from([1, 3]),
)
@example(tokens=[7], path=[], most=2, longest=3)
@example(tokens=[7, 7, 7], path=[], most=5, longest=3)
@example(tokens=[0, 0, 0, 0, 0, 0, 0, 0], path=[0], most=5, longest=3)
def test_the_longest_match_is_continued(tokens, path, most, longest):
    assert continued(tokens, path, most, longest) == by_hand(tokens, path, most, longest)


@pytest.mark.parametrize(
    "tokens, path, most, longest, want",
    [
        ([1, 2, 3, 4, 0, 1, 2], [], 2, 3, [3, 4]),
        ([1, 2, 3, 4, 0, 1, 2], [], 5, 3, [3, 4, 0, 1, 2]),
        ([1, 2, 3, 4, 0, 1, 2, 5, 6, 0, 1, 2], [], 2, 3, [5, 6]),  # the newest
        ([9, 1, 2, 3, 4, 0, 1, 2, 5, 6, 9, 1, 2], [], 2, 3, [3, 4]),  # the longer match
        ([1, 2, 3, 4, 0, 9], [1, 2], 2, 3, [3, 4]),  # of a path
        ([1, 2, 3, 4, 5, 0, 2], [3], 2, 3, [4, 5]),  # over the root
        ([1, 2, 3, 4, 0, 6], [], 2, 3, []),
        ([5, 5, 5], [], 5, 3, [5, 5]),
        ([4, 5, 5], [], 5, 3, []),  # one token follows
        ([3, 4, 6, 3], [4], 2, 1, [6, 3]),
    ],
)
def test_continuations_by_example(tokens, path, most, longest, want):
    assert continued(tokens, path, most, longest) == want


def test_the_last_tokens_of_a_path_go_on_above_the_root():
    spec = TreeSpec("chain", 4)
    tree = seedling(jnp.int32(5), spec)
    tree = dataclasses.replace(
        tree,
        token_E=jnp.array([5, 11, 12, 13, 0], jnp.int32),
        parent_E=jnp.array([-1, 0, 1, 0, -1], jnp.int32),
        depth_E=jnp.array([0, 1, 2, 1, 0], jnp.int32),
    )
    text = jnp.array(padded([2, 3, 4, 5], 8))
    last = lambda node: recent(tree, jnp.int32(node), text, jnp.int32(3), 4).tolist()
    assert last(0) == [5, 4, 3, 2]
    assert last(2) == [12, 11, 5, 4]
    assert last(3) == [13, 5, 4, 3]


def test_a_text_is_filled_up():
    assert padded([7, 8], 4).tolist() == [7, 8, -1, -1] and padded([7], 1).dtype == np.int32


def asked(payoff, brought, rounds):
    """The rounds in which a lookup was due; each spares so many levels a step."""
    seen = []
    for i in range(rounds):
        if payoff.due():
            seen.append(i)
            payoff.learn(brought)
    return seen


def test_lookups_that_bring_nothing_become_rare():
    # 1 0.7 0.49 0.34 0.24: four tries, then every 8th round
    assert asked(Payoff(), 0, 30) == [0, 1, 2, 3, 11, 19, 27]


def test_lookups_that_pay_go_on_and_come_back():
    payoff = Payoff()
    assert asked(payoff, 1, 20) == list(range(20))
    assert asked(payoff, 0, 12) == [0, 1, 2, 3, 11]
    assert payoff.mean == pytest.approx(0.7**5)
    assert asked(payoff, 1, 10) == [7, 8, 9]  # one success is enough


def test_rounds_without_a_lookup_count_as_waiting():
    payoff = Payoff(mean=0.1)
    assert [payoff.due() for _ in range(10)] == [False] * 7 + [True] * 3
    payoff.learn(0)
    assert not payoff.due()
