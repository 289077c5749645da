"""The bytes of tokens, joined, are the text; special tokens have names, and can be shown."""

import os
from pathlib import Path

import pytest

from llm_jax.formats import open_checkpoint
from llm_jax.gguf_tokenizer import from_metadata
from llm_jax.testing import SPECIAL, tiny_tokenizer
from llm_jax.token_stream import StreamDecoder
from llm_jax.tokenizer import ByteTokenizer, wrap

MODELS = sorted((Path.home() / "models").glob("*.gguf"))
TEXTS = ("a the ring", "Hällo  wörld\n\t→ 東京 😀 é", "don't 12345 <x> Ġ", " lead", "نمस्ते")


def sentencepiece():
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters += ["▁", "a", "e", "h", "t", "▁t", "he", "▁the", "r", "i", "n", "g"]
    meta = {
        "model": "llama",
        "tokens": letters,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(letters) - 259)],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * (len(letters) - 259)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
        "add_space_prefix": False,
    }
    return from_metadata({f"tokenizer.ggml.{k}": v for k, v in meta.items()}, Path("x"))


TOKENIZERS = {
    "bytes": ByteTokenizer,
    "byte-level": lambda: wrap(tiny_tokenizer(288)),
    "sentencepiece": sentencepiece,
    **{path.stem: lambda path=path: open_checkpoint(path).tokenizer() for path in MODELS},
}


LARGE = [pytest.mark.slow]


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=LARGE if "gemma" in n else ()) for n in TOKENIZERS],
)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def test_the_bytes_of_a_texts_tokens_are_its_own(tokenizer):
    for text in TEXTS:
        ids = [i for i in tokenizer.encode(text) if tokenizer.token(i)[1] is not None]
        assert b"".join(tokenizer.token(i)[1] for i in ids).decode() == text
        for i in ids:
            shown, found = tokenizer.token(i)
            assert shown == tokenizer.decode([i]) or "\ufffd" in tokenizer.decode([i])
            try:
                assert shown == found.decode()
            except UnicodeDecodeError:
                assert shown == "".join(f"\\x{byte:02x}" for byte in found)


def test_special_tokens_and_rows_without_a_token_have_names_alone(tokenizer):
    for token in (*tokenizer.eos, tokenizer.vocab, tokenizer.vocab + 10**6):
        shown, found = tokenizer.token(token)
        assert shown.startswith("<") and found is None


def test_special_tokens_are_shown_where_asked():
    plain = wrap(tiny_tokenizer(288))
    start, end = SPECIAL[1:]
    text = f"{start}a → b{end}c{SPECIAL[0]}"
    ids = plain.encode(text)
    assert plain.decode(ids) == "a → bc"
    assert plain.showing([end, "no such token"]).decode(ids) == f"a → b{end}c"
    assert plain.showing([start, end]).decode(ids) == f"{start}a → b{end}c"
    assert plain.showing([]).decode(ids) == "a → bc" and ByteTokenizer().showing([end]).eos == (
        256,
    )
    decoder = StreamDecoder(plain.showing([end]))
    pieces = [decoder.push(i) for i in ids]
    assert end in pieces and "".join(pieces) == f"a → b{end}c"


@pytest.mark.skipif(not MODELS, reason=f"no models in {os.fspath(Path.home() / 'models')}")
def test_the_markers_of_qwens_calls_are_text():
    (path,) = [path for path in MODELS if "qwen2.5-coder" in path.name]
    tokenizer = open_checkpoint(path).tokenizer()
    text = '<tool_call>\n{"name": "f"}\n</tool_call>'
    ids = tokenizer.encode(text)
    assert tokenizer.token(ids[0]) == ("<tool_call>", b"<tool_call>")
    assert tokenizer.decode(ids) == text
