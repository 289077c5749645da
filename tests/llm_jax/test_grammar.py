"""Grammars: the tokens that may follow, for every kind of tokenizer, and grammars that are none."""

import json
import random
import re
import threading
import time

import numpy as np
import pytest
from test_raw_tokenizers import sentencepiece, tekken

from llm_jax import grammar
from llm_jax.extras import MissingPackage
from llm_jax.formats import open_checkpoint
from llm_jax.grammar import GrammarError, Guide, only
from llm_jax.testing import tiny_config, tiny_params, tiny_tokenizer, write_gguf, write_safetensors
from llm_jax.tokenizer import ByteTokenizer, from_folder, wrap
from llm_jax.tokenizer_files import tokenizer_of

pytest.importorskip("llguidance", reason="it follows the grammars")


def added_to(tokenizer):
    """The same with added tokens: like a tag, with a space, with letters that stand for bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    plain = [tokenizers.AddedToken(t, normalized=False) for t in ("<b>", "a b", "naïve", "日本")]
    tokenizer.hf.backend_tokenizer.add_tokens(plain)
    tokenizer.hf.backend_tokenizer.add_special_tokens(["<|tool|>"])
    return tokenizer


def from_a_folder(path):
    cfg = tiny_config("llama", layers=1)
    return from_folder(write_safetensors(path, tiny_params(cfg), cfg))


def from_gguf(path):
    pytest.importorskip("gguf", reason="the gguf package writes the file under test")
    cfg = tiny_config("llama", layers=1)
    return open_checkpoint(write_gguf(path / "x.gguf", tiny_params(cfg), cfg)).tokenizer()


KINDS = {
    "folder": lambda path: added_to(from_a_folder(path)),
    "gguf": from_gguf,
    "tekken": lambda path: added_to(tokenizer_of(tekken(path))),
    "sentencepiece": lambda path: added_to(sentencepiece(path)),
}


def is_special(tokenizer):
    added = tokenizer.hf.backend_tokenizer.get_added_tokens_decoder()
    return lambda i: i in added and added[i].special


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_every_token_are_those_of_decoding(tmp_path, kind):
    tokenizer = KINDS[kind](tmp_path)
    tokens, special = Guide(tokenizer, tokenizer.vocab)._tokens, is_special(tokenizer)
    first = tokenizer.encode("a")[-1:]  # some decoders drop a space at the beginning
    front = len(tokenizer.decode(first))
    seen = 0
    for i in range(tokenizer.vocab):
        if tokenizer.hf.convert_ids_to_tokens(i) in ("<0xFF>", "ÿ"):
            continue  # llguidance marks special tokens by this byte, which is in no text
        assert tokens.is_special_token(i) == special(i), i
        try:
            text = tokens.decode_bytes([i]).decode() if not special(i) else ""
        except UnicodeDecodeError:
            continue  # a part of a character
        assert text == tokenizer.decode([*first, i])[front:], i
        seen += 1
    assert seen > 128
    rng = random.Random(0)
    letters = [chr(c) for c in (*range(32, 127), 10, 0xE9, 0x65E5, 0x1F916)]
    for _ in range(50):
        text = "".join(rng.choices([*letters, "<b>", "a b", "naïve"], k=40))
        ids = [i for i in tokenizer.encode(text) if not special(i)]
        found = tokens.decode_bytes(ids).decode(errors="replace")
        assert found == tokenizer.decode([*first, *ids])[front:]


def test_bytes_are_tokens():
    tokens = Guide(ByteTokenizer(), 257)._tokens
    assert [tokens.decode_bytes([i]) for i in range(255)] == [bytes([i]) for i in range(255)]


@pytest.mark.parametrize(
    "kind, vocab", [("bytes", 250), ("bytes", 288), ("bpe", 290), ("bpe", 330)]
)
def test_the_mask_is_every_token_that_keeps_the_text_possible(kind, vocab):
    """Against brute force over the beginnings of three words, for models with fewer rows than
    there are tokens, and with more."""
    tokenizer = wrap(tiny_tokenizer(290)) if kind == "bpe" else ByteTokenizer()
    guide, words = Guide(tokenizer, vocab), ("the thing", "the hand", "theatre")
    walk, text = guide.grammar("regex", "|".join(words)).start(), ""
    count = min(vocab, tokenizer.vocab)
    spelled = [guide._tokens.decode_bytes([i]).decode("latin-1") for i in range(count)]
    rng = random.Random(0)
    while text not in words:
        mask = walk.mask()
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        assert mask.shape == (-(-vocab // 32),) and mask.dtype == np.uint32
        going = [
            i
            for i, t in enumerate(spelled)
            if t and any(w.startswith(text + t) for w in words) and i not in tokenizer.eos
        ]
        several = {w[len(text) : len(text) + 1] for w in words if w.startswith(text)}
        if len(several) > 1:  # what is forced is asked for in the usual tokens
            assert allowed == going
        assert set(allowed) <= set(going) and allowed
        refused = walk.fork()
        assert not refused.take(next(i for i in range(vocab) if i not in allowed))
        token = rng.choice(allowed)
        text += spelled[token]
        assert walk.take(token) and not walk.error
    assert walk.over and text in words


def test_forks_go_their_own_ways():
    guide = Guide(ByteTokenizer(), 257)
    first = guide.grammar("regex", "ab|cd").start()
    other = first.fork()
    assert first.take(ord("a")) and other.take(ord("c"))
    assert not other.take(ord("b")) and not first.take(ord("d"))
    assert first.take(ord("b")) and other.take(ord("d")) and first.over and other.over


@pytest.mark.parametrize("vocab, words", ((64, 2), (70, 3), (70, 2), (33, 3)))
def test_logits_keep_what_the_mask_allows(vocab, words):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, vocab)).astype(np.float32)
    mask = rng.integers(0, 2**32, (5, words), np.uint32)
    found = np.asarray(only(logits, mask))
    for x in range(5):
        for v in range(vocab):
            is_allowed = v < 32 * words and mask[x, v // 32] >> (v % 32) & 1
            assert found[x, v] == (logits[x, v] if is_allowed else -np.inf)


@pytest.fixture(scope="module")
def guide():
    return Guide(ByteTokenizer(), 257)


def schema(**fields):
    return json.dumps(fields)


BOMB = dict(allOf=[dict(type="string", pattern=f"a{{{i},}}b") for i in range(200)])


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    (
        ("json", schema(type="nothing"), "Invalid type: nothing"),
        ("json", "[", "EOF"),
        ("json", schema(type="array", uniqueItems=True), 'Unimplemented keys: ["uniqueItems"]'),
        ("json", schema(**{"$ref": "file:///etc/passwd"}), "Default retriever does not fetch"),
        ("json", schema(**{"$ref": "http://127.0.0.1/x"}), "Default retriever does not fetch"),
        ("json", schema(**{"$ref": "#"}), "no text follows this grammar"),
        ("json", '{"items":' * 50_000 + "{}" + "}" * 50_000, "recursion limit exceeded"),
        ("json", schema(**BOMB), "it takes longer than 0.5 s"),
        ("regex", "(a", 'invalid regex "(a"'),
        ("regex", "(?=a)b", "invalid regex"),
        ("regex", "\ud800", "surrogates not allowed"),
        ("lark", "start: (", "Expected token ')'"),
        ("lark", "start: b\n", "b"),
        ("lark", "a: b\nb: a\nstart: a\n", "no text follows this grammar"),
        ("lark", "", "Empty grammar"),
    ),
)
def test_what_is_no_grammar(guide, monkeypatch, kind, text, expected):
    monkeypatch.setattr(grammar, "SECONDS", 0.5)
    with pytest.raises(GrammarError, match=re.escape(expected)) as caught:
        guide.grammar(kind, text)
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)
    assert guide.grammar("regex", "a").start().take(97)  # the next one is made


def test_what_a_grammar_cannot_say_may_be_left_out(guide):
    text = schema(type="array", items=dict(type="integer"), uniqueItems=True)
    walk = guide.grammar("json", text, lenient=True).start()
    assert all(walk.take(byte) for byte in b"[1,1]") and walk.over


def test_threads_get_their_own_grammars(guide):
    found = {}

    def work(i):
        walk = guide.grammar("regex", chr(97 + i)).start()
        found[i] = [byte for byte in range(97, 123) if walk.fork().take(byte)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [97 + i] for i in range(8)}


def test_the_process_ends_with_its_guide():
    guide = Guide(ByteTokenizer(), 257)
    guide.grammar("regex", "a")
    process = guide._worker.process
    assert process.poll() is None
    del guide
    end = time.monotonic() + 30
    while process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_tokens_that_are_not_made_of_bytes():
    t = pytest.importorskip("tokenizers")
    library = pytest.importorskip("transformers")
    words = t.Tokenizer(t.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.decoder = t.decoders.WordPiece()
    tokenizer = wrap(library.PreTrainedTokenizerFast(tokenizer_object=words), [1], "x/vocab.txt")
    with pytest.raises(GrammarError, match=r"x/vocab\.txt cannot follow a grammar"):
        Guide(tokenizer, 3)


def test_without_llguidance(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(MissingPackage, match=r"thimble-jax\[serve\]"):
        Guide(ByteTokenizer(), 257)
