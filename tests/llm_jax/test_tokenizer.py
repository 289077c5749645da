"""Tokenizers: llama.cpp's vectors for Qwen2, brute force for SentencePiece, whole characters."""

import gzip
import itertools
import json

import pytest

from llm_jax import CheckpointError
from llm_jax.formats import open_checkpoint
from llm_jax.gguf_tokenizer import from_metadata
from llm_jax.testing import (
    CHAT_TEMPLATE,
    SPECIAL,
    tiny_config,
    tiny_params,
    tiny_vocabulary,
    write_gguf,
    write_safetensors,
)
from llm_jax.tokenizer import (
    ByteTokenizer,
    StreamDecoder,
    from_folder,
    wrap,
)

TEXTS = (
    "",
    "The thing in the hand.",
    " two  spaces\tand\n\nlines ",
    "naïve café, 東京, Привет",
    "🙂👩‍👩‍👧 e\u0301",
    "don't 12345",
)
MESSAGES = [dict(role="system", content="Be brief."), dict(role="user", content="Hi!")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    cfg = tiny_config("llama", layers=1)
    return write_safetensors(tmp_path_factory.mktemp("tok"), tiny_params(cfg), cfg)


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory):
    pytest.importorskip("gguf", reason="the gguf package writes the file under test")
    cfg = tiny_config("llama", layers=1)
    return write_gguf(tmp_path_factory.mktemp("tok") / "x.gguf", tiny_params(cfg), cfg)


@pytest.fixture(params=("folder", "gguf", "bytes"))
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "folder":
        return from_folder(request.getfixturevalue("folder"))
    return open_checkpoint(request.getfixturevalue("gguf_path")).tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_undoes_encoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(type(i) is int and 0 <= i < tokenizer.vocab for i in ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_gives_the_text_in_whole_characters(tokenizer, text):
    pieces = list(tokenizer.stream(iter(tokenizer.encode(text))))
    assert "".join(pieces) == text
    assert all(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_merges_are_used(folder):
    tokenizer = from_folder(folder)
    tokens = tiny_vocabulary(288)[0]
    assert [tokens[i] for i in tokenizer.encode(" the ring")] == ["Ġthe", "Ġ", "r", "ing"]


def test_both_files_hold_the_same_tokenizer(folder, gguf_path):
    one, two = from_folder(folder), open_checkpoint(gguf_path).tokenizer()
    assert one.vocab == two.vocab == len(tiny_vocabulary(288)[0])
    for text in TEXTS:
        assert one.encode(text) == two.encode(text)
    assert one.chat(MESSAGES) == two.chat(MESSAGES)


def test_chat_uses_the_template_and_its_special_tokens(folder):
    tokenizer = from_folder(folder)
    assert tokenizer.chat_fallback is None
    ids = tokenizer.chat(MESSAGES)
    start, end = (tiny_vocabulary(288)[0].index(f"<|im_{name}|>") for name in ("start", "end"))
    assert [i for i in ids if i in (start, end)] == [start, end, start, end, start]
    assert tokenizer.decode(ids) == "system\nBe brief.\nuser\nHi!\nassistant\n"


@pytest.mark.parametrize("bare", (False, True))
def test_chat_without_a_template_is_plain_text_and_says_so(folder, bare):
    tokenizer = ByteTokenizer() if bare else from_folder(folder)
    if not bare:
        tokenizer.hf.chat_template = None
    assert tokenizer.chat_fallback == "the tokenizer has no chat template"
    expected = "system: Be brief.\nuser: Hi!\nassistant:"
    assert tokenizer.decode(tokenizer.chat(MESSAGES)) == expected


def test_eos_is_every_id_that_ends_a_turn(folder, gguf_path):
    tokens = tiny_vocabulary(288)[0]
    end, text_end = tokens.index("<|im_end|>"), tokens.index("<|endoftext|>")
    assert open_checkpoint(gguf_path).tokenizer().eos == (end, text_end)
    assert from_folder(folder).eos == (end, text_end)
    assert ByteTokenizer().eos == (256,)


def test_gemma_ends_turns_with_a_token_of_its_own_and_strikes_text_out_with_another():
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    def eos(*tags):
        backend = Backend(BPE({"a": 0}, []))
        backend.add_special_tokens(["<eos>", "<end_of_turn>"])
        backend.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
        return wrap(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")).eos

    assert eos("</s>", "</b>") == (1, 2)
    assert eos("</s>") == (1, 2, 3)
    # gpt-oss writes several messages in a turn; Phi's turn is one
    assert eos("<|end|>", "<|channel|>", "<|return|>", "<|call|>") == (1, 2, 5, 6)
    assert eos("<|end|>") == (1, 3, 2)


@pytest.mark.parametrize(("stated", "expected"), (([7, 9], (258, 7, 9, 256)), (7, (258, 7, 256))))
def test_generation_config_adds_to_eos(tmp_path, folder, stated, expected):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=stated)))
    assert from_folder(tmp_path).eos == expected


def test_an_ordinary_word_that_looks_like_an_end_is_none(folder):
    """`</s>` typed as text in a vocabulary without that special token must not stop generation."""
    meta = metadata(tokens=["a", "</s>"], token_type=[1, 1], merges=[], eos_token_id=0)
    assert from_metadata(meta, "x").eos == (0,)
    for kind in (3, 4):  # control, and user-defined as some converters mark it
        meta["tokenizer.ggml.token_type"] = [1, kind]
        assert from_metadata(meta, "x").eos == (0, 1)


def test_a_checkpoint_hands_out_its_tokenizer(folder, gguf_path):
    for path in (folder, gguf_path):
        assert open_checkpoint(path).tokenizer().decode([]) == ""


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json; download it"):
        from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"the tokenizer in {tmp_path} cannot be read"):
        from_folder(tmp_path)


def test_bytes_that_are_no_character_come_out_at_the_end():
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(i) for i in "é!".encode()] == ["", "é", "!"]
    assert [decoder.push(i) for i in "🙂".encode()[:3]] == ["", "", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_junk_in_the_middle_does_not_swallow_what_follows():
    ids = [0x61, 0xFF, 0xE2, 0x82, 0xAC, 0x62]  # a, junk, the three bytes of a euro sign, b
    assert list(ByteTokenizer().stream(ids)) == ["a", "\ufffd€", "b"]
    assert len(list(ByteTokenizer().stream([0xFF] * 200))) > 1


def test_special_tokens_are_not_text(folder):
    tokenizer = from_folder(folder)
    ids = [tokenizer.encode("a")[0], tokenizer.eos[0], tokenizer.encode("b")[0]]
    assert list(tokenizer.stream(ids)) == ["a", "b"]


def metadata(model="gpt2", **ggml):
    return {f"tokenizer.ggml.{name}": value for name, value in dict(model=model, **ggml).items()}


def splitter(pre):
    """A function text -> the pieces that BPE may not merge across."""
    tokens, merges = tiny_vocabulary(288)
    meta = metadata(pre=pre, tokens=tokens, merges=merges, token_type=[1] * len(tokens))
    tok = from_metadata(meta, "x").hf.backend_tokenizer
    return lambda text: [text[a:b] for _, (a, b) in tok.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    (
        ("gpt-2", ["I", "'m", " 12345", " OK", "'", "S", ".", "\n\n", " x"]),
        ("default", ["I", "'m", " 12345", " OK", "'", "S", ".", "\n\n", " x"]),
        ("smollm", ["I", "'m", " ", *"12345", " OK", "'", "S", ".", "\n\n", " x"]),
        ("qwen2", ["I", "'m", " ", *"12345", " OK", "'S", ".\n\n", " x"]),
        ("llama-bpe", ["I", "'m", " ", "123", "45", " OK", "'S", ".\n\n", " x"]),
    ),
)
def test_text_is_cut_as_the_model_was_trained(pre, expected):
    assert splitter(pre)("I'm 12345 OK'S.\n\n x") == expected


def test_unknown_tokenizers_are_refused():
    with pytest.raises(CheckpointError, match=r"x.gguf: pre-tokenizer 'tekken' is not supported"):
        from_metadata(metadata(pre="tekken", tokens=["a"], merges=[]), "x.gguf")
    with pytest.raises(
        CheckpointError, match="tokenizer model is 'bert'; supported are gpt2, llama"
    ):
        from_metadata(metadata(model="bert", tokens=["a"]), "x.gguf")
    with pytest.raises(CheckpointError, match="tokenizer model is None"):
        from_metadata({}, "x.gguf")


@pytest.mark.parametrize(
    ("ggml", "expected"),
    (
        (dict(pre="gpt-2"), [0, 1]),
        (dict(pre="llama-bpe"), [2, 0, 1]),
        (dict(pre="gpt-2", add_bos_token=True), [2, 0, 1]),
        (dict(pre="llama-bpe", add_bos_token=False), [0, 1]),
        (dict(pre="gpt-2", add_bos_token=True, add_eos_token=True), [2, 0, 1, 3]),
    ),
)
def test_bos_and_eos_are_added_where_asked(ggml, expected):
    meta = metadata(
        tokens=["a", "b", "<s>", "</s>"], token_type=[1, 1, 3, 3], merges=[],
        bos_token_id=2, eos_token_id=3, **ggml,
    )  # fmt: skip
    tokenizer = from_metadata(meta, "x")
    assert tokenizer.encode("ab") == expected
    assert tokenizer.decode(expected) == "ab"
    meta["tokenizer.chat_template"] = "<s>{{ messages[0].content }}"
    assert from_metadata(meta, "x").chat([dict(role="user", content="b")]) == [2, 1]  # one bos


PIECES = {
    # piece -> score, as SentencePiece stores them: a better merge has a larger score
    **{"▁": -9.0, "t": -10.0, "h": -11.0, "e": -12.0, "c": -13.0, "a": -14.0},
    **{"▁t": -1.0, "he": -2.0, "▁the": -3.0, "at": -4.0, "cat": -5.0, "▁c": -6.0, "▁a": -7.0},
}


def sentencepiece_vocabulary():
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + list(PIECES)
    scores = [0.0] * 259 + list(PIECES.values())
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(PIECES)
    return tokens, scores, kinds


def brute_force(text):
    """SentencePiece's BPE: again and again merge the adjacent pair whose piece scores best."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(PIECES.get(a + b), -i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        best = max(((s, i) for s, i in pairs if s is not None), default=None)
        if best is None:
            break
        i = -best[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    spelled = [[p] if p in PIECES else [f"<0x{b:02X}>" for b in p.encode()] for p in parts]
    return [piece for group in spelled for piece in group]


@pytest.mark.parametrize("text", ("the cat", "thecat at", "a  hat", "tea é 🙂", "cheat that heath"))
def test_sentencepiece_is_brute_force(text):
    tokens, scores, kinds = sentencepiece_vocabulary()
    meta = metadata("llama", tokens=tokens, scores=scores, token_type=kinds,
                    bos_token_id=1, eos_token_id=2, unknown_token_id=0)  # fmt: skip
    tokenizer = from_metadata(meta, "x")
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert [tokens[i] for i in ids[1:]] == brute_force(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.stream(ids)) == text
    assert tokenizer.eos == (2,)


def qwen_vectors(folder):
    """Pairs (text, ids) of llama.cpp's tokenizer test."""
    base = folder / "tokenizers" / "qwen2.5" / "ggml-vocab-qwen2.gguf"
    texts = (base.parent / (base.name + ".inp")).read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = (base.parent / (base.name + ".out")).read_text().splitlines()
    return [(t, [int(i) for i in line.split()]) for t, line in zip(texts, lines, strict=False)]


def test_qwen_folder_gives_llama_cpps_ids(shared_data, tmp_path):
    source = shared_data / "tokenizers" / "qwen2.5"
    packed = gzip.decompress((source / "tokenizer.json.gz").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(packed)
    config = (source / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config)
    tokenizer = from_folder(tmp_path)
    vectors = qwen_vectors(shared_data)
    assert len(vectors) == 46
    for text, ids in vectors:
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos == (151645, 151643)
    assert tokenizer.decode(tokenizer.chat(MESSAGES)).startswith("system\nBe brief.")


def test_qwen_metadata_gives_llama_cpps_ids(shared_data):
    """The same vocabulary through the GGUF route: our own pre-tokenizer and merges."""
    source = shared_data / "tokenizers" / "qwen2.5"
    model = json.loads(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    meta = metadata(pre="qwen2", tokens=tokens, merges=merges, token_type=[1] * len(tokens))
    tokenizer = from_metadata(meta, "x")
    for text, ids in qwen_vectors(shared_data):
        assert tokenizer.encode(text) == ids
        assert "".join(tokenizer.stream(ids)) == text


def test_the_tiny_vocabulary_fits_any_model():
    for size in (97, 258, 259, 288):
        tokens, _ = tiny_vocabulary(size)
        assert len(tokens) == len(set(tokens)) <= size
        assert set(SPECIAL) <= set(tokens)
    assert "add_generation_prompt" in CHAT_TEMPLATE
