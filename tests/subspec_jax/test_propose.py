"""Proposers: text that repeats itself, when to stop drafting, and who is called when."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import subspec_jax.propose as propose
from llm_jax.sample import Sampler
from subspec_jax.decoder import Decoder
from subspec_jax.propose import ModelDraft, PromptLookup, Proposer, Round, State, Vanilla
from subspec_jax.tree import TreeSpec, seedling
from subspec_jax.verify import Target


def state_of(tokens, proposer):
    return State(
        tokens=tokens,
        caches=[],
        tree=seedling(jnp.int32(tokens[-1]), proposer.spec),
        at=jnp.int32(len(tokens) - 1),
        key=jax.random.key(0),
        sampler=Sampler(),
    )


def continuations_by_hand(tokens, longest, width, depth):
    """Paths of the trie: what followed the longest suffix that occurs earlier, the newest first."""
    for n in range(longest, 0, -1):
        suffix = tuple(tokens[-n:])
        if len(suffix) < n or n >= len(tokens):
            continue
        ends = [i + n for i in range(len(tokens) - n) if tuple(tokens[i : i + n]) == suffix]
        if ends:
            paths = set()
            for end in sorted(ends, reverse=True)[:width]:
                text = tokens[end : end + depth]
                paths |= {tuple(text[: k + 1]) for k in range(len(text))}
            return paths
    return set()


@settings(max_examples=300)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=24),
    longest=st.integers(1, 4),
    width=st.integers(1, 3),
    depth=st.integers(1, 5),
)
@example(tokens=[7], longest=3, width=2, depth=3)
@example(tokens=[7, 7], longest=3, width=2, depth=3)
@example(tokens=[1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], longest=3, width=2, depth=2)
def test_lookup_continues_the_longest_suffix(tokens, longest, width, depth):
    lookup = PromptLookup(TreeSpec("beam", depth, width), longest)
    token, parent, level = lookup.continuations(tokens)
    assert (token[0], parent[0], level[0]) == (tokens[-1], -1, 0)
    assert len(token) <= lookup.spec.nodes
    paths = {0: ()}
    for i in range(1, len(token)):
        assert 0 <= parent[i] < i and level[i] == level[parent[i]] + 1
        paths[i] = (*paths[parent[i]], token[i])
    found = [paths[i] for i in range(1, len(token))]
    assert len(found) == len(set(found))  # siblings differ
    assert set(found) == continuations_by_hand(tokens, longest, width, depth)


def test_lookup_by_example():
    lookup = PromptLookup(TreeSpec("beam", 2, 2), 2)
    # 1 2 was followed by 3 4 and later by 3 5: one node for 3, two below it, the newer first
    assert lookup.continuations([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2]) == (
        [2, 3, 5, 4],
        [-1, 0, 1, 1],
        [0, 1, 2, 2],
    )


def test_lookup_fills_a_tree():
    lookup = PromptLookup(TreeSpec("best-first", 2, 2, budget=4, extra=3), 2)
    assert lookup.spec == TreeSpec("beam", 2, 2)
    tokens = [1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2]
    state = state_of(tokens, lookup)
    lookup.propose(state)
    tree = state.tree
    assert tree.token_E.tolist() == [2, 3, 5, 4, 0] and tree.parent_E.tolist() == [-1, 0, 1, 1, -1]
    assert tree.depth_E.tolist() == [0, 1, 2, 2, 0] and int(tree.size) == 4
    want = np.eye(5, dtype=bool)
    want[1:4, 0] = want[2:4, 1] = True
    np.testing.assert_array_equal(tree.ancestor_EE, want)


@pytest.mark.slow
def test_lookup_accepts_a_text_that_repeats(tiny):
    """A model whose text goes in circles: whole spans are copied, and the text is the same."""
    target = Target(tiny.placed, tiny.cfg)
    plain = Decoder(target, Vanilla(), max_length=64).generate([3], 40)
    prompt = [3, *plain[:20], 3, *plain[:3]]  # the beginning again
    rounds = list(
        Decoder(target, PromptLookup(TreeSpec("chain", 4)), max_length=64).rounds(prompt, 16)
    )
    want = Decoder(target, Vanilla(), max_length=64).generate(prompt, 16)
    assert [t for r in rounds for t in r.tokens] == want
    assert rounds[1].drafted > 0


def test_vanilla_proposes_the_root_alone():
    assert Vanilla is Proposer and Vanilla.spec.nodes == 1
    state = state_of([5, 6], Vanilla)
    Vanilla().propose(state)
    assert state.tree.token_E.tolist() == [6] and int(state.tree.size) == 1


@pytest.mark.slow
def test_a_draft_learns_from_rounds_where_to_stop(tiny):
    """Steps of low gain that are never accepted are not worth it; only "auto" needs the times."""
    spec = TreeSpec("beam", 4, 2)
    gains = (-0.001, -0.1, -1.0, -2.0)
    one = Round([1] * 2, drafted=8, path=(2,), gains=gains, draft_s=0.4, verify_s=1.5, other_s=0.1)
    for gain in ("auto", 0.2):
        proposer = ModelDraft(tiny.draft(4), tiny.cfg, spec, stop_gain=gain)
        before_L = np.asarray(proposer._least_L)
        assert (before_L == -np.inf).all() == (gain == "auto")  # nothing is measured yet
        for _ in range(30):
            proposer.learn(one)
        assert proposer.stop.least_chance() == pytest.approx(0.1 if gain == "auto" else 0.2)
        least_L = np.asarray(proposer._least_L)
        assert least_L.shape == (4,) and (least_L > before_L).all()


def test_what_was_accepted_is_found_behind_an_earlier_rounds_nodes(tiny):
    """17 places: the root, 4 nodes drafted below the last tree, 4 steps of 3."""
    spec = TreeSpec("beam", 5, 3, extra=2)
    proposer = ModelDraft(tiny.draft(4), tiny.cfg, spec, stop_gain=0.2)
    heard = []
    proposer.stop.learn = lambda gains, hits, *_: heard.append(hits.tolist())
    # steps: places 2-4 (of the earlier round), 5-7, 8-10, 11-13, 14-16
    proposer.learn(Round([1] * 4, drafted=16, path=(1, 5, 12), gains=(-0.1,) * 5))
    assert heard == [[False, True, False, True, False]]


@pytest.mark.parametrize("gain", [0, 0.0])
def test_a_draft_that_never_stops_learns_nothing(tiny, gain):
    proposer = ModelDraft(tiny.draft(4), tiny.cfg, TreeSpec("beam", 2, 2), stop_gain=gain)
    proposer.learn(Round([1], drafted=4, gains=(-0.1, -3.0), draft_s=1.0))
    assert np.asarray(proposer._least_L).tolist() == [-np.inf, -np.inf]


@pytest.mark.parametrize("layers, extra", [(4, 2), (2, 5), (3, 3), (28, 8), (5, 0)])
def test_extra_steps_are_spread_over_the_layers(tiny, monkeypatch, layers, extra):
    """All are dispatched behind the last layer at the latest, and never in one heap."""
    steps = []
    monkeypatch.setattr(
        propose, "extend_once", lambda given: (steps.append(0), (given.tree, given.caches))[1]
    )
    cfg = tiny.cfg.__class__(**{**tiny.cfg.__dict__, "layers": layers})
    proposer = ModelDraft(tiny.params, cfg, TreeSpec("beam", 2, 2, extra=extra))
    state = state_of([1, 2], proposer)
    seen = []
    for layer in range(layers):
        proposer.between(state, layer)
        seen.append(len(steps))
    assert seen[-1] == extra
    assert max(np.diff([0, *seen])) <= math.ceil(extra / layers)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda t: ModelDraft(t.params, t.cfg, TreeSpec("beam", 2, 2, extra=1), own_cache=True),
            "drafting during verification needs the shared cache",
        ),
        (
            lambda t: ModelDraft(t.params, t.cfg, TreeSpec(), stop_gain=-0.5),
            "stop_gain is -0.5; expected 'auto' or a number from 0 on",
        ),
        (
            lambda t: ModelDraft(t.params, t.cfg, TreeSpec(), stop_gain=float("nan")),
            "stop_gain is nan",
        ),
        (
            lambda t: ModelDraft(t.params, t.cfg, TreeSpec(lookup=4), longest=0),
            "the longest n-gram is 0; it must be at least 1",
        ),
        (
            lambda t: PromptLookup(TreeSpec(), longest=0),
            "the longest n-gram is 0; it must be at least 1",
        ),
    ],
)
def test_proposers_that_cannot_work_raise(tiny, make, words):
    with pytest.raises(ValueError) as caught:
        make(tiny)
    assert words in str(caught.value)
