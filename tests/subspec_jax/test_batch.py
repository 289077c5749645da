"""Texts decoded together: each is what it is alone, whoever comes and goes beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.attention import caches_for
from llm_jax.config import Experts
from llm_jax.generation import decode_loop, generate, prefill
from llm_jax.sample import Sampler, Samplers
from llm_jax.testing import tiny_config, tiny_params
from subspec_jax.accept import Gate
from subspec_jax.batch import BatchDecoder
from subspec_jax.check import NotFiniteError
from subspec_jax.decoder import Decoder
from subspec_jax.draft_model import Draft, make_draft
from subspec_jax.experts import ExpertCache
from subspec_jax.methods import make_method
from subspec_jax.offload import offload
from subspec_jax.prefix_cache import Rows, Text
from subspec_jax.tree import TreeSpec, ladder, pass_nodes, shared_spec
from subspec_jax.verify import Target

METHODS = ("vanilla", "subspec", "chain", "best-first", "ngram", "subspec-uncoupled")
METHODS += ("subspec-own-cache", "classic", "subspec-lookup")
SMALL = tiny_config("qwen3", layers=2)
"""The model that drafts in the method classic: the target itself, so that much is accepted."""
SAMPLERS = (Sampler(), Sampler(0.8), Sampler(1.0, top_k=5), Sampler(0.9, top_p=0.8, min_p=0.05))


def model(layers=2, **changes):
    cfg = tiny_config("qwen3", layers=layers, **changes)
    return tiny_params(cfg), cfg


def batch(
    params, cfg, name="subspec", rows=4, max_length=96, chunk=16, stop_gain=0.0, gate=Gate(), **tree
):
    layers = tuple(map(offload, params.layers))
    experts = None
    if cfg.experts is not None:
        experts = ExpertCache(layers, 4, 6)
    target = Target(dataclasses.replace(params, layers=layers), cfg, experts=experts)
    spec = TreeSpec(**dict(depth=4, width=2) | tree)
    method = make_method(name, spec, Draft(bits=4, group=32), gate, stop_gain, SMALL)
    draft = make_draft(target.params, method.draft) if method.draft.bits else None
    draft = tiny_params(SMALL) if name == "classic" else draft
    return BatchDecoder(target, method, draft, rows, max_length, chunk)


def texts(cfg, count, seed=0, most=40, samplers=SAMPLERS):
    rng = np.random.default_rng(seed)
    return [
        Text(
            prompt=rng.integers(0, cfg.vocab, rng.integers(1, most)).tolist(),
            new_tokens=int(rng.integers(1, 30)),
            seed=int(rng.integers(0, 1000)),
            sampler=samplers[rng.integers(len(samplers))],
            eos=rng.integers(0, cfg.vocab, 3).tolist(),
        )
        for _ in range(count)
    ]


def alone(params, cfg, t):
    """The plain model's own tokens, with no cache shared and nothing drafted; one token at a time.

    As `generate`, but with caches of one size, so that one program does for all texts."""
    key, caches = jax.random.key(t.seed), caches_for(params, cfg, 1, 128)
    logits, caches = prefill(params, t.prompt, caches, cfg, chunk=16)
    first = t.sampler.draw(logits, key, jnp.array([len(t.prompt)]))
    given = params, first, caches, jnp.int32(len(t.prompt)), key, cfg, 30, t.sampler
    tokens = [int(first[0]), *decode_loop(*given)[0].tolist()][: t.new_tokens]
    ends = [i + 1 for i, token in enumerate(tokens) if token in t.eos]
    return tokens[: min(ends, default=len(tokens))]


@pytest.mark.quick_cases("vanilla", "subspec", "ngram")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_each_text_its_own_tokens(name):
    params, cfg = model()
    some = texts(cfg, 9)
    found = batch(params, cfg, name).generate(some)
    assert found == [alone(params, cfg, t) for t in some]


@pytest.mark.parametrize(
    "count, name",
    [(20, "subspec"), *(pytest.param(300, name, marks=pytest.mark.slow) for name in METHODS)],
)
def test_texts_come_and_go_at_random(count, name):
    """Joins, leaves before the end and prompts that share beginnings, in random order."""
    params, cfg = model()
    decoder, rng = batch(params, cfg, name, rows=5), np.random.default_rng(3)
    waiting, done, left = texts(cfg, count, seed=1), [], 0
    for i, t in enumerate(waiting):
        if i % 3:  # goes on from an earlier text
            t.prompt = (waiting[rng.integers(i)].prompt + t.prompt)[:50]
    started = []
    while waiting or decoder.running:
        while waiting and rng.random() < 0.5 and decoder.join(waiting[0]):
            started.append(waiting.pop(0))
        before = list(decoder.running)
        decoder.step()
        done += [t for t in before if t not in decoder.running]
        if decoder.running and rng.random() < 0.05:
            decoder.leave(decoder.running[rng.integers(len(decoder.running))])
            left += 1
    assert left > 0 and any(t.cached for t in started)
    for t in started:
        want = alone(params, cfg, t)
        assert t.new == (want if t.done else want[: len(t.new)])
    assert sum(t.done for t in started) == count - left
    assert sum(len(t.new) for t in started) > 10 * count


@pytest.mark.parametrize(
    "name", [pytest.param("subspec-own-cache", marks=pytest.mark.slow), "classic"]
)
def test_a_draft_with_caches_of_its_own_accepts_as_alone(name):
    """It has read the prompts, follows what is accepted, and goes on from the rows of others."""
    params, cfg = model()
    decoder, some = batch(params, cfg, name, rows=3), texts(cfg, 6, 5, 40, [Sampler()])
    for i, t in enumerate(some[1:], 1):
        t.prompt, t.new_tokens, t.eos = (some[i - 1].prompt + t.prompt)[:50], 25, ()
    single = Decoder(
        decoder.target, decoder.method.proposer(cfg, decoder.draft), Sampler(), None, 96
    )
    accepted = lambda rounds: [r.accepted for r in rounds if r.drafted]
    want = [accepted(single.rounds(t.prompt, t.new_tokens, t.seed, t.eos)) for t in some]
    found = {id(t): [] for t in some}
    waiting = list(some)
    while waiting or decoder.running:
        while waiting and decoder.join(waiting[0]):
            waiting.pop(0)
        for t, r in decoder.step():
            found[id(t)] += accepted([r])
    assert [found[id(t)] for t in some] == want
    assert any(t.cached for t in some) and any(map(any, want))


def test_one_text_is_looked_up_in_as_alone(looping):
    """Text that repeats: the trees copy the same tokens in the same rounds, in fewer steps."""
    target, cfg, draft = Target(looping.placed, looping.cfg), looping.cfg, looping.draft(2)
    method = make_method("subspec-lookup", TreeSpec("beam", 6, 3, lookup=4), Draft(2, 16))
    prompt = generate(looping.params, [1, 2, 3, 5, 7, 1, 2, 3], cfg, 30)
    single = Decoder(target, method.proposer(cfg, draft), Sampler(), None, 96, 16)
    told = lambda rounds: [
        (r.tokens, r.accepted, r.drafted, r.steps, r.copied) for r in rounds if r.drafted
    ]
    want = told(single.rounds(prompt, 30))
    decoder, text, found = BatchDecoder(target, method, draft, 1, 96, 16), Text(prompt, 30), []
    decoder.join(text)
    while decoder.running:
        found += told(r for _, r in decoder.step())
    # What is behind the end of a text is cut from its last round here.
    assert found[:-1] == want[:-1] and any(copied for *_, copied in want)


@pytest.mark.parametrize("gate", [Gate("entropy", 0.9, 1), Gate("probability", 0.001, 2)])
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.8, top_k=20)])
def test_with_a_gate_each_text_is_what_it_is_alone_with_that_gate(gate, sampler):
    """Where trees are as large as alone; the gate lets through what the model would not write."""
    params, cfg = model()
    decoder, some = batch(params, cfg, "subspec-lossy", gate=gate), texts(cfg, 5, 2, 40, [sampler])
    single = Decoder(
        decoder.target, decoder.method.proposer(cfg, decoder.draft), sampler, gate, 96, 16
    )
    want = [
        [token for r in single.rounds(t.prompt, t.new_tokens, t.seed, t.eos) for token in r.tokens]
        for t in some
    ]
    assert decoder.generate(some) == want
    assert want != [alone(params, cfg, t) for t in some]


def test_texts_fill_the_largest_pass_and_no_more():
    """Four whole trees of 48 x 6 are 1,156 nodes; more texts get trees of fewer levels."""
    spec = TreeSpec(depth=48, width=6)
    assert [shared_spec(spec, n).nodes for n in (1, 2, 4, 8, 16)] == [289, 289, 289, 145, 73]
    assert pass_nodes(spec, 4) == 1156 and pass_nodes(spec, 16) == 1168
    assert shared_spec(TreeSpec("best-first", 48, 6, budget=288), 8).nodes == 145
    assert shared_spec(TreeSpec("chain", depth=0), 4000).nodes == 1
    assert ladder(1) == (1,) and ladder(6) == (1, 2, 4, 6) and ladder(8) == (1, 2, 4, 8)


@pytest.mark.slow
def test_more_texts_than_whole_trees_fit(monkeypatch):
    """Trees of fewer levels where a pass would have too many nodes."""
    monkeypatch.setattr(shared_spec, "__defaults__", (20,))
    params, cfg = model()
    some = texts(cfg, 7, seed=5)
    decoder = batch(params, cfg)
    found = decoder.generate(some)
    assert found == [alone(params, cfg, t) for t in some]


@pytest.mark.slow
def test_experts_are_shared_by_the_texts():
    params, cfg = model(experts=Experts(count=8, chosen=2, d_ff=32))
    some = texts(cfg, 6, seed=2)
    for name in ("subspec", "vanilla"):
        decoder = batch(params, cfg, name)
        rounds = []
        for t in some:
            t.tokens, t.done = [], False
        waiting = list(some)
        while waiting or decoder.running:
            while waiting and decoder.join(waiting[0]):
                waiting.pop(0)
            rounds += decoder.step()
        assert [t.new for t in some] == [alone(params, cfg, t) for t in some]
        assert all(r.experts is None or (r.experts.needed >= 2).all() for _, r in rounds)


def test_a_second_turn_reads_only_its_new_tokens():
    params, cfg = model()
    decoder = batch(params, cfg, rows=2)
    first = Text(list(range(40)), 12)
    decoder.generate([first])
    again = Text([*first.tokens, 7, 8, 9], 10)
    other = Text(list(range(20)) + [3, 3], 10, sampler=Sampler(1.0))
    [got, shared] = decoder.generate([again, other])
    # The last emitted token is in no cache yet: nothing needed its keys.
    assert again.cached == len(first.tokens) - 1 and other.cached == 20
    assert got == alone(params, cfg, again) and shared == alone(params, cfg, other)


def test_rows_share_the_longest_beginning_and_forget_the_oldest():
    rows = Rows(3)
    seat = lambda tokens: Text(tokens, 1)
    chat, other = seat(list(range(50))), seat([9] * 40)
    for text in (chat, other):
        text.row, source, held = rows.take(text)
        text.tokens, text.at = [*text.prompt, 1], len(text.prompt)
        assert (source, held) == (text.row, 0)
    # while it runs, its beginning is copied to a free row
    assert rows.take(seat(list(range(30)) + [99] * 5)) == (2, chat.row, 30)
    assert rows.take(seat([1, 2])) is None
    rows.leave(chat), rows.leave(other)
    # what follows a free row goes on there; its last token is computed again
    assert rows.take(seat(list(range(50)))) == (chat.row, chat.row, 49)
    # a few equal tokens are no reason to give up a longer text
    assert rows.take(seat([9] * 5 + [4] * 30))[0] == other.row  # the only free one
    rows = Rows(2, rewinds=False)
    text = seat([1, 2, 3, 4])
    text.row, *_ = rows.take(text)
    text.tokens, text.at = [1, 2, 3, 4, 5], 4
    rows.leave(text)
    assert rows.take(seat([1, 2, 3, 9, 9]))[2] == 0  # the newest tokens are kept apart
    assert Rows(1).take(seat([5]))[2] == 0


def test_a_text_that_fails_fails_alone():
    """A token whose embedding is NaN, in a prompt and drawn later: the row is clean afterwards."""
    params, cfg = model()
    bad = dataclasses.replace(params, embed_VD=params.embed_VD.at[7].set(jnp.nan))
    some = [Text([1, 2, 3], 12), Text([4, 7, 5], 12), Text(list(range(10, 30)), 12)]
    decoder = batch(bad, cfg, "vanilla", rows=3)
    with pytest.raises(NotFiniteError, match="NaN"):
        decoder.generate(some)
    assert [bool(t.failed) for t in some] == [False, True, False]
    for t in (some[0], some[2]):
        assert t.new == alone(params, cfg, t) and 7 not in t.new
    for rest in range(3):  # also the one in the row of the text that failed
        t = Text([30 + rest, 2, 3, 4], 12)
        assert decoder.generate([t]) == [alone(params, cfg, t)]


def test_seeds_of_32_bits_are_those_of_one_text():
    for seed in (0, 5, 2**31 - 1, 2**31, 2**32 - 1):
        of = Samplers.of([Sampler(1.0)], [seed])
        want = Sampler(1.0).draw(jnp.zeros((4, 50)), jax.random.key(seed), jnp.arange(4))
        got = of.draw(jnp.zeros((4, 50)), jnp.zeros(4, jnp.int32), jnp.arange(4))
        np.testing.assert_array_equal(got, want)
