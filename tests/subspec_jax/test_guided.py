"""Texts with grammars: each is what plain decoding of its masked logits gives."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_batch import alone, batch, texts

from llm_jax.attention import causal_step
from llm_jax.cache import empty_caches
from llm_jax.grammar import Guide
from llm_jax.model import forward
from llm_jax.testing import tiny_config, tiny_params, tiny_tokenizer
from llm_jax.tokenizer import wrap

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


@pytest.mark.quick_cases("subspec-4", "ngram-2")
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
    some, which = some_texts(cfg, 14, seed=rows)
    found = batch(params, cfg, name, rows=rows, max_length=LONGEST - 8).generate(some)
    assert found == [wanted(params, cfg, *given) for given in zip(some, which, strict=True)]
    assert sum(t.complete for t in some) > 1
