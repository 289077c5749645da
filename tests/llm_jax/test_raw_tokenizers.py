"""tokenizer.model and tekken.json, read as their own libraries read them."""

import base64
import importlib.util
import itertools
import json
import random
import struct
from pathlib import Path

import pytest

from llm_jax import CheckpointError
from llm_jax.formats import open_checkpoint
from llm_jax.sentencepiece import metadata
from llm_jax.testing import CHAT_TEMPLATE, tiny_config, tiny_params, write_safetensors
from llm_jax.tokenizer_files import tokenizer_of

TEXTS = (
    "the cat sat on the mat",
    " two  spaces, at both ends ",
    "Größe 42 日本 🤖\n\n\ttabs",
    "a",
    "hehehe thethe  the\n",
)


# ---------------------------------------------------------------------- SentencePiece


def varint(value):
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


WORDS = ("▁t", "he", "▁the", "at", "▁c", "▁cat", "in")
LETTERS = "▁abcdehinost,"


def pieces():
    yield from (("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3))
    yield from ((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))
    yield from ((word, -float(n), 1) for n, word in enumerate(WORDS))
    yield from ((letter, -100.0 - n, 1) for n, letter in enumerate(LETTERS))


def model(trainer=None, normalizer=None, some=None):
    trainer = {3: 2, 35: 1, 43: -1} | (trainer or {})
    normalizer = {1: b"identity", 4: 0} | (normalizer or {})
    data = b""
    for text, score, kind in pieces() if some is None else some:
        data += field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
    data += field(2, b"".join(field(n, v) for n, v in trainer.items()))
    return data + field(3, b"".join(field(n, v) for n, v in normalizer.items()))


def sentencepiece(folder, data=None, **config):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model() if data is None else data)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer_of(folder)


def ids_of(*names):
    known = [text for text, _, _ in pieces()]
    return [known.index(name) for name in names]


def test_pieces_are_joined_by_their_scores(tmp_path):
    found = sentencepiece(tmp_path)
    assert found.encode("the cat") == ids_of("<s>", "▁the", "▁cat")
    assert found.encode("that") == ids_of("<s>", "▁t", "h", "at")
    assert found.encode("a\n") == ids_of("<s>", "▁", "a", "<0x0A>")
    assert found.encode("é") == ids_of("<s>", "▁", "<0xC3>", "<0xA9>")
    assert found.eos == (2,) and found.vocab == len([*pieces()])
    for text in TEXTS:
        assert found.decode(found.encode(text)) == text


def test_the_library_of_sentencepiece_agrees(tmp_path):
    library = pytest.importorskip("sentencepiece", reason="it reads the file under test")
    found = sentencepiece(tmp_path)
    reference = library.SentencePieceProcessor(model_proto=model())
    for text in TEXTS:
        assert found.encode(text) == [1, *reference.encode(text)]


def test_what_tokenizer_config_changes(tmp_path):
    count = len([*pieces()])
    added = {
        "2": dict(content="</s>", special=True),
        str(count + 1): dict(content="<|im_end|>", special=True),
        str(count + 2): dict(content="wörd", special=False),
    }
    config = dict(added_tokens_decoder=added, eos_token="<|im_end|>", bos_token={"content": "<s>"})
    config |= dict(add_bos_token=False, chat_template=CHAT_TEMPLATE)
    found = sentencepiece(tmp_path, **config)
    assert found.encode("the<|im_end|>wörd") == [*ids_of("▁the"), count + 1, count + 2]
    assert found.eos == (count + 1, 2)  # every turn end that is known
    assert found.chat_fallback is None
    assert found.chat([dict(role="user", content="the")])[-1:] != found.encode("the")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": count}))
    assert tokenizer_of(tmp_path).encode("<new>") == [count]


def test_a_template_of_its_own(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}the cat")
    config = dict(chat_template=[dict(name="default", template="the")])
    found = sentencepiece(tmp_path, **config)
    message = [dict(role="user", content="x")]
    assert found.chat(message) == ids_of("<s>", "▁the", "▁cat")
    (tmp_path / "chat_template.jinja").unlink()
    assert tokenizer_of(tmp_path).chat(message) == ids_of("▁the")


def test_a_model_without_the_mark_in_front(tmp_path):
    found = sentencepiece(tmp_path, model(normalizer={3: 0}))
    assert found.encode("the cat") == ids_of("<s>", "t", "he", "▁cat")
    assert found.decode(found.encode(" the")) == " the"


@pytest.mark.parametrize(
    ("data", "expected"),
    (
        (b"", "it has no pieces"),
        (b"\x0a", "a number ends nowhere"),
        (b"\x0a\x05ab", "a field of 5 bytes, at byte 2"),
        (b"\x0b\x01", "a field of type 3"),
        (b"\xff" * 12, "a number ends nowhere"),
        (field(1, 5), "is no SentencePiece model"),
        (field(1, field(1, b"\xff")), "is no SentencePiece model"),
        (model()[:1000], "is truncated or is no SentencePiece model"),
        (model({3: 1}), "the model is of type unigram; supported is bpe"),
        (model({3: 9}), "the model is of type None; supported is bpe"),
        (model(normalizer={1: b"nmt_nfkc", 2: b"xx"}), "it normalizes text (nmt_nfkc); supported"),
        (model(normalizer={4: 1}), "it removes spaces, or marks them otherwise"),
        (model(normalizer={5: 0}), "it removes spaces, or marks them otherwise"),
        (model({24: 1}), "it removes spaces, or marks them otherwise"),
        (model(some=[("a", 0.0, 1)] * 2), "tokens has 'a'; expected every token once"),
        (model(some=[("a", float("nan"), 1)]), "scores has nan; expected finite numbers"),
    ),
)
def test_files_that_are_no_such_model(tmp_path, data, expected):
    with pytest.raises(CheckpointError) as caught:
        sentencepiece(tmp_path, data)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.model"))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    (
        (dict(add_bos_token=1), "add_bos_token is 1; expected true or false"),
        (dict(added_tokens_decoder={"x": {}}), "added_tokens_decoder.x is {}; expected an added"),
        (dict(added_tokens_decoder={"7": {}}), "added_tokens_decoder.7 is {}; expected an added"),
        (dict(added_tokens_decoder={"7": dict(content=1)}), "content is 1; expected a string"),
        (dict(added_tokens_decoder={"99999": dict(content="a")}), "has the id 99999, far behind"),
    ),
)
def test_configurations_that_are_no_such_thing(tmp_path, config, expected):
    with pytest.raises(CheckpointError) as caught:
        sentencepiece(tmp_path, **config)
    assert expected in str(caught.value)


def test_metadata_is_named_as_in_gguf():
    found = metadata(model())
    assert found["tokens"][:3] == ["<unk>", "<s>", "</s>"] and found["model"] == "llama"
    assert (found["bos_token_id"], found["eos_token_id"], found["unknown_token_id"]) == (1, 2, 0)
    assert found["token_type"][:4] == [2, 3, 3, 6] and found["add_space_prefix"] is True


# ---------------------------------------------------------------------- tekken

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MERGED = (b"th", b"he", b"the", b" the", b"at", b" c", b" cat", b"hehe", b"\xc3\xb6", b"  ", b"<s>")
COUNT = 20
"""Special tokens of the tiny files."""


def tekken(folder, **changes):
    tokens = [bytes([i]) for i in range(256)] + list(MERGED) + [b"never used"]
    vocab = [
        dict(rank=rank, token_bytes=base64.b64encode(token).decode(), token_str=None)
        for rank, token in enumerate(tokens)
    ]
    config = dict(pattern=PATTERN, num_vocab_tokens=len(vocab), version="v3")
    config |= dict(default_vocab_size=COUNT + len(vocab) - 1, default_num_special_tokens=COUNT)
    described = dict(config=config | changes.pop("config", {}), vocab=vocab) | changes
    folder.mkdir(exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(described))
    return folder


def joined(word: bytes) -> list[int]:
    """Ids of a word: the two neighbours that are the token of the lowest rank, again and again."""
    ranks = {bytes([i]): i for i in range(256)} | {t: 256 + n for n, t in enumerate(MERGED)}
    parts = [bytes([byte]) for byte in word]
    while pairs := [
        (ranks[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks
    ]:
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [COUNT + ranks[part] for part in parts]


def test_bytes_are_joined_by_rank(tmp_path):
    found = tokenizer_of(tekken(tmp_path))
    for words in (["the", " cat"], ["hehehe"], [" thethe"], ["w", "1", "2"], ["ö", "  "]):
        text = "".join(words)
        want = [i for word in words for i in joined(word.encode())]
        assert found.encode(text) == [1, *want], text
        assert found.decode(found.encode(text)) == text
    assert found.eos == (2,) and found.vocab == COUNT + 256 + len(MERGED) - 1
    assert found.encode("<s>") == [1, 1]  # as with every tokenizer here, wherever it stands


def test_a_conversation_of_version_three(tmp_path):
    found = tokenizer_of(tekken(tmp_path))
    messages = [dict(role="system", content="S"), dict(role="user", content="the")]
    messages += [dict(role="assistant", content="cat"), dict(role="user", content="he")]
    ids = lambda text: found.encode(text)[1:]
    want = [1, 3, *ids("the"), 4, *ids("cat"), 2, 3, *ids("S\n\nhe"), 4]
    assert found.chat(messages) == want
    later = tokenizer_of(tekken(tmp_path, config=dict(version="v7")))
    assert later.chat(messages[:2]) == [1, 17, *ids("S"), 18, 3, *ids("the"), 4]
    (tmp_path / "chat_template.jinja").write_text("cat")
    assert tokenizer_of(tmp_path).chat(messages) == ids("cat")


def test_special_tokens_of_a_later_version(tmp_path):
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[THINK]"]
    special = [dict(rank=i, token_str=name, is_control=True) for i, name in enumerate(names)]
    config = dict(version="v99")
    found = tokenizer_of(tekken(tmp_path, config=config, special_tokens=special))
    assert found.encode("[THINK]<SPECIAL_7>") == [1, 5, 7]
    assert found.chat_fallback == "the tokenizer has no chat template"


ENTRY = dict(rank=0, token_bytes="AA==")


@pytest.mark.parametrize(
    ("changes", "expected"),
    (
        (dict(config=dict(default_vocab_size="x")), "default_vocab_size is 'x'; expected a whole"),
        (dict(config=dict(default_vocab_size=999)), "vocab has 268 tokens; expected 979 or more"),
        (dict(config=dict(default_num_special_tokens=0)), "default_num_special_tokens is 0; expec"),
        (dict(config=dict(pattern=7)), "pattern is 7; expected a string"),
        (dict(config=dict(pattern="(" * 5000)), "expected at most 4096 characters"),
        (dict(config=dict(pattern="(")), "cannot be read"),
        (dict(config=dict(version="v15")), "special_tokens is missing; version 'v15' needs it"),
        (dict(vocab=[ENTRY] * 400), "rank is 0; expected a whole number from 1 to 1"),
        (dict(vocab=["x"]), "vocab is ['x']; expected a list, each entry of type dict"),
        (dict(vocab=[ENTRY | dict(token_bytes="*")] * 400), "token 0 of vocab is not base64"),
        (dict(vocab=[ENTRY | dict(token_bytes="")] * 400), "token 0 of vocab is there twice, emp"),
        (dict(special_tokens=[dict(rank=1, token_str="<s>")]), "special_tokens lacks </s>"),
        (dict(special_tokens=[dict(rank=99, token_str="a")]), "rank is 99; expected a whole"),
        (
            dict(special_tokens=[dict(rank=i, token_str="<s>") for i in (1, 2)]),
            "special_tokens has an empty one, or one twice",
        ),
    ),
)
def test_files_that_are_no_tekken(tmp_path, changes, expected):
    with pytest.raises(CheckpointError) as caught:
        tokenizer_of(tekken(tmp_path, **changes))
    assert str(tmp_path) in str(caught.value) and expected in str(caught.value)


def test_a_vocabulary_without_a_byte(tmp_path):
    path = tekken(tmp_path) / "tekken.json"
    known = json.loads(path.read_text())
    known["vocab"][65]["token_bytes"] = base64.b64encode(b"another").decode()
    path.write_text(json.dumps(known))
    with pytest.raises(CheckpointError, match="vocab lacks the byte 65"):
        tokenizer_of(tmp_path)


def test_a_checkpoint_folder_with_such_a_file(tmp_path):
    cfg = tiny_config("mistral", layers=1, vocab=320)
    folder = write_safetensors(tmp_path / "model", tiny_params(cfg), cfg, tokenizer=False)
    tekken(folder)
    found = open_checkpoint(folder).tokenizer()
    assert found.encode("the") == [1, *joined(b"the")]
    identity = open_checkpoint(folder).identity()
    tekken(folder, config=dict(version="v7"))
    assert open_checkpoint(folder).identity() != identity


# ---------------------------------------------------------------------- Mistral's own files

FILES = ("tekken_240718.json", "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3")


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.parametrize("name", FILES)
def test_mistrals_own_files(tmp_path, name):
    """The files of Mistral 7B and Nemo, on this project's texts and on random characters."""
    pytest.importorskip("mistral_common", reason="it brings the files and reads them")
    from mistral_common.protocol.instruct import messages, request
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    source = Path(importlib.util.find_spec("mistral_common").origin).parent / "data" / name
    own = "tekken.json" if name.endswith("json") else "tokenizer.model"
    (tmp_path / own).write_bytes(source.read_bytes())
    found, reference = tokenizer_of(tmp_path), MistralTokenizer.from_file(source)
    plain = reference.instruct_tokenizer.tokenizer
    rng, root = random.Random(0), Path(__file__).parents[2]
    kinds = ((32, 127), (160, 0x2000), (0x4E00, 0x4F00), (32, 33), (10, 11))
    texts = [*TEXTS, (root / "README.md").read_text(), (root / "docs" / "palu.md").read_text()]
    for _ in range(100):
        texts.append("".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(100)))
    for text in texts:
        assert found.encode(text) == plain.encode(text, bos=True, eos=False)
        assert found.decode(found.encode(text)) == text
    assert found.vocab == plain.n_words
    if own == "tekken.json":
        said = [messages.SystemMessage(content="Be  short."), messages.UserMessage(content="Hi!")]
        said += [messages.AssistantMessage(content="Yes?"), messages.UserMessage(content="Go on.")]
        asked = reference.encode_chat_completion(request.ChatCompletionRequest(messages=said))
        roles = ("system", "user", "assistant", "user")
        turns = [dict(role=role, content=m.content) for role, m in zip(roles, said, strict=True)]
        assert found.chat(turns) == asked.tokens
