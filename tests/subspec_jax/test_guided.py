"""Texts with grammars: each is what plain decoding of its masked logits gives."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_batch import alone, batch, texts

from llm_jax.attention import causal_step
from llm_jax.cache import empty_caches
from llm_jax.config import Experts
from llm_jax.grammar import GrammarError, Guide
from llm_jax.model import forward, unembed
from llm_jax.packed import packed
from llm_jax.quantize import quantize
from llm_jax.sample import Sampler, Samplers
from llm_jax.testing import tiny_config, tiny_params, tiny_tokenizer
from llm_jax.tokenizer import wrap
from subspec_jax import batch_programs as programs
from subspec_jax import guided
from subspec_jax.check import NotFiniteError
from subspec_jax.prefix_cache import Text
from subspec_jax.residual.encode import encode
from subspec_jax.residual.split import Split
from subspec_jax.tree import TreeSpec

library = pytest.importorskip("llguidance", reason="it follows the grammars")
VOCAB, LONGEST = 400, 128
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS = (
    ("json", json.dumps(PERSON)),
    ("json", '{"type": "array", "items": {"enum": ["the", "thing", "in"]}, "minItems": 3}'),
    ("json", '{"type": "object"}'),
    ("json", '{"const": {"a": [1, 2, 3], "b": "é日"}}'),
    ("regex", "(the|thing)( in| hand){2,5}[.]"),
    ("regex", "[a-c]{1,9}"),
    ("regex", "[0-9]{3}-[^\\x00-\\x7F]{2}"),
    ("lark", 'start: sum\nsum: NUMBER (("+" | "*") NUMBER)*\nNUMBER: /[0-9]+/\n'),
    ("lark", 'start: "(" start ")" | "x"\n'),
)


@pytest.fixture(scope="module")
def small():
    cfg = tiny_config("qwen3", layers=2, vocab=VOCAB)
    return tiny_params(cfg), cfg


@functools.cache
def guide():
    return Guide(wrap(tiny_tokenizer(VOCAB - 7)), VOCAB)  # a few rows belong to no token


@functools.cache
def grammar(i):
    return guide().grammar(*GRAMMARS[i])


@functools.partial(jax.jit, static_argnames="cfg")
def logits_behind(params, tokens_1T, last, cfg):
    caches, step = empty_caches(cfg, 1, LONGEST), causal_step(0, LONGEST, LONGEST)
    return forward(params, tokens_1T, caches, step, cfg)[0][0, last]


@functools.cache
def tokens_of_llguidance():
    hf = tiny_tokenizer(VOCAB - 7)
    return library.LLTokenizer(hf.backend_tokenizer.to_str(), eos_token=[*wrap(hf).eos])


def matcher(kind, text):
    make = {"json": "grammar_from_json_schema", "regex": "grammar_from_regex"}
    described = getattr(library.LLMatcher, make.get(kind, "grammar_from_lark"))(text)
    return library.LLMatcher(tokens_of_llguidance(), described)


def masked_plainly(params, cfg, t, kind, text):
    """The tokens of plain decoding, one whole pass a token, whose logits llguidance masks."""
    tokens, follows = list(t.prompt), matcher(kind, text)
    while len(tokens) < len(t.prompt) + t.new_tokens and not follows.is_stopped():
        padded = np.pad(tokens, (0, LONGEST - len(tokens)))[None].astype(np.int32)
        logits_V = np.array(logits_behind(params, padded, len(tokens) - 1, cfg))
        bits = np.unpackbits(
            np.frombuffer(follows.compute_bitmask(), np.uint8), bitorder="little", count=VOCAB - 7
        )
        logits_V[: VOCAB - 7][bits == 0] = -np.inf
        logits_V[VOCAB - 7 :] = -np.inf
        at = jnp.array([len(tokens)])
        token = int(t.sampler.draw(logits_V[None], jax.random.key(t.seed), at)[0])
        tokens.append(token)
        if token in t.eos:
            break
        assert follows.consume_token(token)
    return tokens[len(t.prompt) :]


def some_texts(cfg, count, seed, guided_share=0.7):
    """(texts, the grammar's number or None of each)."""
    rng, found = np.random.default_rng(seed), texts(cfg, count, seed)
    which = [
        int(rng.integers(len(GRAMMARS))) if rng.random() < guided_share else None for _ in found
    ]
    for t, i in zip(found, which, strict=True):
        if i is not None:
            t.grammar, t.eos = grammar(i), wrap(tiny_tokenizer(VOCAB)).eos
            t.new_tokens = int(rng.integers(1, 45))
    return found, which


def wanted(params, cfg, t, i):
    return alone(params, cfg, t) if i is None else masked_plainly(params, cfg, t, *GRAMMARS[i])


@pytest.mark.quick_cases("subspec-2", "ngram-4")
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param(name, rows, id=f"{name}-{rows}")
        for name in ("subspec", "vanilla", "chain", "best-first", "ngram", "subspec-uncoupled")
        for rows in (1, 2, 4)
    ],
)
def test_a_text_is_what_plain_decoding_of_masked_logits_gives(small, name, rows):
    params, cfg = small
    some, which = some_texts(cfg, 12, seed=rows)
    found = batch(params, cfg, name, rows=rows, max_length=LONGEST - 8).generate(some)
    assert found == [wanted(params, cfg, *given) for given in zip(some, which, strict=True)]
    assert sum(t.complete for t in some) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ("subspec", "ngram"))
def test_texts_with_grammars_come_and_go_at_random(small, name):
    params, cfg = small
    decoder = batch(params, cfg, name, rows=3, max_length=LONGEST - 8)
    rng, (some, which) = np.random.default_rng(5), some_texts(cfg, 60, seed=11)
    for i, t in enumerate(some):
        if i % 3:  # goes on from an earlier text
            t.prompt = (some[rng.integers(i)].prompt + t.prompt)[:50]
    started, left = [], set()
    waiting = list(enumerate(some))
    while waiting or decoder.running:
        while waiting and rng.random() < 0.5 and decoder.join(waiting[0][1]):
            started.append(waiting.pop(0))
        decoder.step()
        if decoder.running and rng.random() < 0.05:
            gone = decoder.running[rng.integers(len(decoder.running))]
            decoder.leave(gone)
            left.add(id(gone))
    assert left and any(t.cached for _, t in started)
    for i, t in started:
        want = wanted(params, cfg, t, which[i])
        assert t.new == (want[: len(t.new)] if id(t) in left else want)


@pytest.mark.parametrize("kind", ("whole", "split"))
def test_draws_are_those_of_masked_logits(kind):
    """Of three texts, of which the second and third have masks; also for a head in two parts."""
    cfg = tiny_config("qwen3", layers=1, vocab=250, dtype="bfloat16")
    D, (B, E), rng = cfg.d_model, (3, 5), np.random.default_rng(0)
    w = (rng.standard_normal((D, 256)) * 0.1).astype(jnp.bfloat16)  # padded, as heads in parts are
    head = jnp.asarray(w[:, :250])
    if kind == "split":
        low = quantize(jnp.asarray(w), 4, 32)
        head = jax.tree.map(jnp.asarray, Split(packed(low), encode(w, low)))
    top = dataclasses.replace(tiny_params(cfg), layers=(), head_DV=head)
    x_XD = jnp.asarray(rng.standard_normal((B * E, D)), jnp.bfloat16)
    mask_GTW = rng.integers(0, 2**32, (4, E, 8), np.uint32)
    allowed = programs.Allowed(jnp.asarray(mask_GTW), jnp.array([-1, 1, 0]))
    samplers = Samplers.of([Sampler(), Sampler(0.9, top_k=3), Sampler()], [1, 2, 3])
    samplers = jax.tree.map(jnp.asarray, samplers)
    of_X, position_X = jnp.repeat(jnp.arange(B), E), jnp.tile(jnp.arange(E), B)
    nobody = jnp.zeros(B, jnp.int32)
    given = programs.Verifying(
        top=top,
        x_BED=x_XD.reshape(B, E, D),
        trees=SimpleNamespace(depth_E=position_X.reshape(B, E) - 1),  # all that a draw needs
        caches=(),
        seats=programs.Seats(nobody, nobody, nobody, samplers),
        accepted_B=nobody,
        cfg=cfg,
        spec=TreeSpec("beam", 2, 2),
    )
    found = programs.judge_each(dataclasses.replace(given, allowed=allowed)).draw_E
    logits_XV = np.array(
        unembed(dataclasses.replace(top, head_DV=jnp.asarray(w)), x_XD[None], cfg)[0]
    )
    for b, which in enumerate((None, 1, 0)):
        for e in range(E):
            for v in range(250 if which is not None else 0):
                if not mask_GTW[which, e, v // 32] >> (v % 32) & 1:
                    logits_XV[b * E + e, v] = -np.inf
    want = np.asarray(samplers.draw(logits_XV, of_X, position_X)).reshape(B, E)
    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(programs.judge_each(given).draw_E[0], want[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", (dict(experts=Experts(8, 2, 32)), dict(tied=True)), ids=("experts", "tied")
)
def test_other_models_follow_grammars(changes):
    """With experts whose routing the draft records, and with a tied head."""
    cfg = tiny_config("qwen3", layers=2, vocab=VOCAB, **changes)
    params = tiny_params(cfg)
    some, which = some_texts(cfg, 8, seed=21)
    found = batch(params, cfg, rows=2, max_length=LONGEST - 8).generate(some)
    assert found == [wanted(params, cfg, *given) for given in zip(some, which, strict=True)]


def test_rounds_without_a_grammar_run_their_own_programs(small, monkeypatch):
    params, cfg = small
    seen = []
    whole, step = programs.grow_each, guided.grow_step
    monkeypatch.setattr(programs, "grow_each", lambda g: (seen.append("whole"), whole(g))[1])
    monkeypatch.setattr(guided, "grow_step", lambda g: (seen.append("step"), step(g))[1])
    finish = programs.finish_each
    masked = lambda v: (seen.append("free" if v.allowed is None else "masked"), finish(v))[1]
    monkeypatch.setattr(programs, "finish_each", masked)
    decoder = batch(params, cfg, rows=2, max_length=LONGEST - 8)
    decoder.generate([Text([1, 2, 3], 6), Text([4, 5], 6)])
    assert set(seen) == {"whole", "free"}
    seen.clear()
    decoder.generate([Text([1, 2, 3], 6, grammar=grammar(6)), Text([4, 5], 3)])
    assert set(seen) == {"step", "masked"}


def test_what_the_draft_proposes_is_allowed(small):
    """So a grammar that leaves no choice is followed as fast as the tree is deep."""
    params, cfg = small
    decoder = batch(params, cfg, rows=2, max_length=LONGEST - 8)
    text = Text([5, 6, 7], 60, grammar=guide().grammar("regex", "[0-9]the thing in the hand[.]"))
    assert decoder.join(text)
    rounds = []
    while not text.done:
        rounds += [r for _, r in decoder.step()]
    want = masked_plainly(params, cfg, text, "regex", "[0-9]the thing in the hand[.]")
    assert text.new == want and text.complete
    assert [len(r.tokens) for r in rounds[1:-1]] == [5] * (len(rounds) - 2) and len(rounds) > 2


def test_the_end_of_a_grammar_ends_the_text(small):
    """Also one that nothing may follow but an end, and one that is full."""
    params, cfg = small
    eos = wrap(tiny_tokenizer(VOCAB)).eos
    texts = [
        Text([9, 8], 30, grammar=guide().grammar("regex", pattern), eos=eos)
        for pattern in ("the", "(the)?", "")
    ]
    found = batch(params, cfg, rows=2, max_length=LONGEST - 8).generate(texts)
    assert texts[0].complete and "".join(map(spelled, found[0])) == "the"
    assert found[1][-1] in eos or texts[1].complete
    assert len(found[2]) == 1 and found[2][0] in eos


def spelled(token):
    return wrap(tiny_tokenizer(VOCAB - 7)).decode([token])


@pytest.mark.parametrize("name", ("subspec", "vanilla"))
def test_a_grammar_that_fails_ends_its_own_text_alone(small, monkeypatch, name):
    """After so many masks of a tree none is made any more, as where a limit of llguidance is
    passed."""
    params, cfg = small
    wrong, good = Text([5, 6, 7], 40, grammar=grammar(3)), Text([5, 6, 9], 40, grammar=grammar(0))
    free = Text([1, 2, 3], 20)
    start, calls = wrong.grammar.start, []
    monkeypatch.setattr(wrong.grammar, "start", lambda: Failing(start(), calls))
    decoder = batch(params, cfg, name, rows=2, max_length=LONGEST - 8)
    with pytest.raises(NotFiniteError, match="the grammar fails: too hard"):
        decoder.generate([wrong, good, free])
    assert len(calls) >= 9 and not good.failed and not free.failed
    assert wrong.new == masked_plainly(params, cfg, wrong, *GRAMMARS[3])[: len(wrong.new)]
    assert good.new == masked_plainly(params, cfg, good, *GRAMMARS[0])
    assert free.new == alone(params, cfg, free)
    monkeypatch.undo()
    again = Text([5, 6, 7], 12, grammar=grammar(3))
    assert decoder.generate([again]) == [masked_plainly(params, cfg, again, *GRAMMARS[3])]


class Failing:
    """A walk whose masks end after eight tokens."""

    def __init__(self, walk, calls, taken=0):
        self._walk, self._calls, self._taken = walk, calls, taken

    def fork(self):
        return Failing(self._walk.fork(), self._calls, self._taken)

    def take(self, token):
        self._taken += 1
        return self._walk.take(token)

    @property
    def over(self):
        return self._walk.over

    @property
    def error(self):
        return "too hard" if self._taken > 8 else ""

    def mask(self):
        self._calls.append(self._taken)
        mask = self._walk.mask()
        return mask * 0 if self._taken > 8 else mask


def test_masks_that_take_too_long_end_the_text(small, monkeypatch):
    params, cfg = small
    monkeypatch.setattr(guided, "SECONDS", -1.0)
    text = Text([5, 6, 7], 40, grammar=grammar(2))
    with pytest.raises(NotFiniteError, match="its masks take longer than -1 s a round"):
        batch(params, cfg, rows=2, max_length=LONGEST - 8).generate([text])
    assert text.new == masked_plainly(params, cfg, text, *GRAMMARS[2])[: len(text.new)]


def test_grammars_that_do_not_fit(small):
    params, cfg = small
    decoder = batch(params, cfg, rows=1)
    with pytest.raises(GrammarError, match="of 300 tokens, and the model has 400"):
        of_another = Guide(wrap(tiny_tokenizer(VOCAB - 7)), 300).grammar("regex", "a")
        decoder.join(Text([1], 4, grammar=of_another))
    with pytest.raises(GrammarError, match="replayed"):
        decoder.join(Text([1], 4, grammar=grammar(0), replay=[1]))
    assert not decoder.running
