"""Looked-up tokens in the whole loop: the tokens are plain decoding's, in fewer draft steps."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import pytest

from llm_jax.cache import empty_caches
from llm_jax.generation import generate, prefill
from llm_jax.sample import Sampler
from subspec_jax import propose
from subspec_jax.accept import Gate
from subspec_jax.decoder import Decoder
from subspec_jax.draft import grow, grow_along
from subspec_jax.lookup import Payoff
from subspec_jax.propose import ModelDraft, Round
from subspec_jax.tree import TreeSpec
from subspec_jax.verify import Target

BEAM = TreeSpec("beam", 6, 3, lookup=4)
BEST = TreeSpec("best-first", 7, 2, budget=12, lookup=4)
LINE = TreeSpec("chain", 5, lookup=4)
STEPS, LENGTH = 36, 96
START = [1, 2, 3, 5, 7, 1, 2, 3]
SAMPLERS = {"greedy": Sampler(), "sampling": Sampler(0.2, top_k=40, top_p=0.95)}


@pytest.fixture(scope="module")
def target(looping):
    return Target(looping.placed, looping.cfg)


@pytest.fixture(scope="module")
def plain(looping):
    """f(prompt, sampler): what plain decoding of the looping model emits."""
    cached = functools.cache(
        lambda prompt, sampler: generate(looping.params, prompt, looping.cfg, STEPS, sampler, 3)
    )
    return lambda prompt, sampler=Sampler(): cached(tuple(prompt), sampler)


LOOP = {
    "beam": lambda t: ModelDraft(t.draft(2), t.cfg, BEAM),
    "good draft": lambda t: ModelDraft(t.draft(8), t.cfg, BEAM),
    "best-first": lambda t: ModelDraft(t.draft(2), t.cfg, BEST),
    "chain": lambda t: ModelDraft(t.draft(2), t.cfg, LINE),
    "one token": lambda t: ModelDraft(t.draft(2), t.cfg, BEAM, longest=1),
    "long": lambda t: ModelDraft(t.draft(2), t.cfg, TreeSpec("beam", 2, 2, lookup=9)),
    "root alone": lambda t: ModelDraft(t.draft(2), t.cfg, TreeSpec("beam", 0, 2, lookup=3)),
    "own cache": lambda t: ModelDraft(t.draft(2), t.cfg, BEAM, own_cache=True),
    "auto": lambda t: ModelDraft(t.draft(2), t.cfg, BEAM, stop_gain="auto"),
    "stop": lambda t: ModelDraft(t.draft(2), t.cfg, BEAM, stop_gain=0.7),
    "uncoupled": lambda t: ModelDraft(
        t.draft(2), t.cfg, dataclasses.replace(BEAM, coupled=False, sharpen=1.0)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "which, how",
    [(which, "greedy") for which in LOOP if which != "uncoupled"]
    + [(which, "sampling") for which in ("beam", "best-first", "own cache", "long", "uncoupled")],
)
def test_tokens_are_those_of_plain_decoding(looping, target, plain, which, how):
    sampler = SAMPLERS[how]
    prompt = [*START, *plain(START, sampler)]
    proposer = LOOP[which](looping)
    decoder = Decoder(target, proposer, sampler, max_length=LENGTH)
    rounds = list(decoder.rounds(prompt, STEPS, seed=3))
    assert [t for r in rounds for t in r.tokens] == plain(prompt, sampler)
    check(rounds, proposer.spec)
    if proposer.spec.depth:
        assert sum(r.copied for r in rounds) > 2  # it did copy


def check(rounds, spec):
    for r in rounds[1:]:
        assert r.copied <= r.drafted <= spec.nodes - 1 and r.accepted <= r.depth <= spec.deepest
        assert 1 <= r.steps <= max(spec.steps, 1)


@pytest.mark.slow
def test_a_shut_gate_is_exact(looping, target, plain):
    proposer, gate = LOOP["beam"](looping), Gate("entropy", 0.0, 1)
    decoder = Decoder(target, proposer, Sampler(), gate, LENGTH)
    assert decoder.generate(START, STEPS) == plain(START)


@pytest.mark.slow
def test_a_text_that_repeats_takes_fewer_steps(looping, target, plain):
    """The draft is the target itself, so trees are as deep, and accepted as far, either way."""
    spec = TreeSpec("beam", 8, 2, sharpen=0.01, lookup=6)
    prompt = [*START, *plain(START)]
    draft = lambda spec: ModelDraft(looping.params, looping.cfg, spec)
    run = lambda spec: list(Decoder(target, draft(spec), max_length=128).rounds(prompt, STEPS))
    without, looked = run(dataclasses.replace(spec, lookup=0)), run(spec)
    for rounds in (without, looked):
        assert [t for r in rounds for t in r.tokens] == plain(prompt)
        assert {(r.accepted, r.depth) for r in rounds[1:-1]} == {(8, 8)}
    assert {(r.steps, r.copied) for r in without[1:]} == {(8, 0)}
    assert all(r.copied >= 3 for r in looked[1:])
    assert sum(r.steps for r in looked[1:]) <= 8 * len(looked[1:]) / 2


@pytest.mark.slow
def test_the_same_run_gives_the_same_rounds(looping, target):
    decoder = Decoder(target, LOOP["beam"](looping), max_length=LENGTH)
    fresh = Decoder(target, LOOP["beam"](looping), max_length=LENGTH)
    seen = lambda rounds: [(r.tokens, r.drafted, r.depth, r.steps, r.copied) for r in rounds]
    first = seen(decoder.rounds(START, STEPS))
    decoder.generate([5] * 20, STEPS)  # what another text taught is forgotten
    decoder.proposer._payoff.mean = 0.0
    assert seen(decoder.rounds(START, STEPS)) == seen(fresh.rounds(START, STEPS)) == first


@pytest.mark.slow
@pytest.mark.parametrize("which", ["beam", "own cache", "long", "best-first"])
def test_caches_hold_what_a_fresh_prefill_gives(looping, target, plain, which):
    proposer, prompt = LOOP[which](looping), [*START, *plain(START)]
    decoder = Decoder(target, proposer, max_length=LENGTH)
    rounds = list(itertools.islice(decoder.rounds(prompt, STEPS), 5))
    assert any(r.copied for r in rounds)
    kept = [*prompt, *(t for r in rounds for t in r.tokens)][:-1]
    cfg, head = looping.cfg, lambda caches: jax.tree.map(lambda a: a[:, : len(kept)], tuple(caches))
    _, want = prefill(looping.params, kept, empty_caches(cfg, 1, LENGTH), cfg)
    chex.assert_trees_all_close(head(decoder.caches), head(want), rtol=1e-4, atol=2e-5)
    if proposer.own_cache:
        _, want = prefill(proposer.params, kept, empty_caches(cfg, 1, LENGTH), cfg)
        chex.assert_trees_all_close(head(proposer._caches), head(want), rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["beam", "own cache"])
def test_both_ways_to_grow_are_compiled_before_the_first_round(looping, target, monkeypatch, which):
    """Whichever way is taken first, later ones must not compile within a round."""
    decoder = Decoder(target, LOOP[which](looping), max_length=LENGTH)
    jax.clear_caches()
    rounds = decoder.rounds(START, STEPS)
    next(rounds)
    assert grow._cache_size() == grow_along._cache_size() == 1
    ways = itertools.cycle([True, False])
    monkeypatch.setattr(Payoff, "due", lambda _: next(ways))
    rounds = [*rounds, *decoder.rounds([*START, *START], STEPS, seed=1)]
    assert {r.copied > 0 for r in rounds} == {False, True}
    assert grow._cache_size() == grow_along._cache_size() == 1


def test_what_is_looked_up_is_sent_before_the_layers(looping, target, monkeypatch):
    proposer, seen = LOOP["beam"](looping), []
    decoder = Decoder(target, proposer, max_length=LENGTH)
    prepare, propose, stream = proposer.prepare, proposer.propose, Target.stream
    monkeypatch.setattr(proposer, "prepare", lambda s: (seen.append("prepare"), prepare(s)))
    monkeypatch.setattr(proposer, "propose", lambda s: (seen.append("propose"), propose(s)))
    monkeypatch.setattr(Target, "stream", lambda t: (seen.append("stream"), stream(t))[1])
    rounds = list(decoder.rounds(START, STEPS))
    assert seen == ["stream"] + ["prepare", "stream", "propose"] * (len(rounds) - 1)


@pytest.mark.slow
def test_lookups_that_fail_are_made_less_often(tiny, monkeypatch):
    """A model whose text does not repeat itself, and a draft of which little is accepted."""
    proposer = ModelDraft(tiny.draft(2), tiny.cfg, TreeSpec("beam", 2, 1, sharpen=1.0, lookup=2))
    decoder = Decoder(Target(tiny.placed, tiny.cfg), proposer, max_length=LENGTH)
    sent, pad = [], propose.padded
    monkeypatch.setattr(propose, "padded", lambda *a: (sent.append(len(seen)), pad(*a))[1])
    seen = []
    for r in decoder.rounds([1, 2, 3], 60):
        seen.append(r)
    assert not any(r.copied for r in seen)
    # 0 is the compilation before the first round
    assert sent == [0, 1, 2, 3, 4, *range(12, len(seen), 8)] and len(sent) > 6


def test_what_a_step_costs_is_learned_from_its_count(tiny):
    proposer = ModelDraft(tiny.draft(2), tiny.cfg, TreeSpec("beam", 8, 4, lookup=5), stop_gain=1)
    proposer._counts = jnp.array([3, 7, 6])
    assert proposer.effort(20) == {"steps": 3, "copied": 7}
    assert proposer._payoff.mean == pytest.approx(0.7 + 0.3 * 6 / 3)
    proposer.learn(Round([1] * 6, drafted=20, steps=3, copied=6, draft_s=0.5))
    assert proposer.stop._average[3] == 3
    proposer._counts = None
    assert proposer.effort(17) == {"steps": 5}
    proposer.learn(Round([1] * 6, drafted=17, draft_s=0.5))
    assert proposer._payoff.mean == pytest.approx(1.3)
