"""Malformed tokenizers: each is a named error or rightly accepted, never anything else."""

import json
import random

import pytest

from llm_jax import CheckpointError, LLMError
from llm_jax.gguf_tokenizer import from_metadata
from llm_jax.testing import tiny_config, tiny_params, tiny_vocabulary, write_safetensors
from llm_jax.tokenizer import ByteTokenizer, from_folder, growth
from llm_jax.tokenizer_files import tokenizer_of

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    cfg = tiny_config("llama", layers=1)
    folder = write_safetensors(tmp_path_factory.mktemp("tok"), tiny_params(cfg), cfg)
    return {name: (folder / name).read_text() for name in (*FILES, "chat_template.jinja")}


@pytest.fixture
def folder(original, tmp_path):
    for name, text in original.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def change(folder, name, **changes):
    held = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(held))


@pytest.mark.parametrize(
    "text", ("", "{", "[]", "7", "null", "\x00", '{"a": 1, "a": 2}', "[" * 10**5)
)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_json_object(folder, name, text):
    if name == "tokenizer.json" and text.startswith('{"a"'):
        text = '{"version": "1.0", "version": "2.0"}'
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"{folder}.*(valid JSON|an object|cannot be read)"):
        from_folder(folder)


@pytest.mark.parametrize("stated", ("258", True, 1.0, -1, [258, None], [[258]], {"a": 1}, 1e400))
def test_eos_ids_that_are_none(folder, stated):
    change(folder, "generation_config.json", eos_token_id=stated)
    with pytest.raises(
        CheckpointError, match=r"eos_token_id has .*; expected a token id or a list"
    ):
        from_folder(folder)


@pytest.mark.parametrize("stated", (None, []))
def test_eos_ids_may_be_left_out(folder, stated):
    change(folder, "generation_config.json", eos_token_id=stated)
    assert from_folder(folder).eos == (258, 256)


@pytest.mark.parametrize("name", ("../tokenizer.1.0.json", "/etc/tokenizer.1.0.json"))
def test_a_tokenizer_of_another_version_outside_the_folder(folder, name):
    change(folder, "tokenizer_config.json", fast_tokenizer_files=["tokenizer.json", name])
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json names .* is not inside"):
        from_folder(folder)


def test_code_of_a_repository_is_not_asked_for(folder):
    """`transformers` would ask on the terminal whether to run it."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"x")
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", "a.B"]})
    with pytest.raises(CheckpointError, match="is truncated or is no SentencePiece model"):
        tokenizer_of(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        tokenizer_of(folder)


REPLACE = dict(type="Replace", pattern={"String": "a"}, content="aa")


@pytest.mark.parametrize(
    ("part", "expected"),
    (
        (REPLACE, 2),
        (REPLACE | dict(content=""), 1),
        (REPLACE | dict(pattern={"String": "aaaa"}, content="aa"), 1),
        (REPLACE | dict(pattern={"String": ""}, content="aa"), 3),
        (REPLACE | dict(pattern={"Regex": "a*"}, content="aa"), 3),
        (dict(type="Sequence", normalizers=[REPLACE] * 3), 8),
        (dict(type="Sequence", decoders=[REPLACE, dict(type="Fuse"), REPLACE]), 4),
        (dict(type="NFC"), 1),
    ),
)
def test_growth_is_the_factor(part, expected):
    assert growth(part) == expected


@pytest.mark.parametrize("field", ("normalizer", "decoder"))
def test_a_tokenizer_that_builds_gigabytes(folder, field):
    """40 doublings make a terabyte of one letter; the libraries then end the process."""
    change(
        folder, "tokenizer.json", **{field: dict(type="Sequence", **{f"{field}s": [REPLACE] * 40})}
    )
    with pytest.raises(CheckpointError, match="makes texts over 1000 times longer"):
        from_folder(folder)


def test_a_tokenizer_that_puts_too_much_around_a_text(folder):
    single = [dict(Sequence=dict(id="A", type_id=0))] * 2000
    post = dict(type="TemplateProcessing", single=single, pair=single, special_tokens={})
    change(folder, "tokenizer.json", post_processor=post)
    with pytest.raises(CheckpointError, match="three characters become more than 1000 tokens"):
        from_folder(folder)


def test_a_panic_of_the_library_is_named(folder):
    """The regular expression takes for ever; the library gives up with an error that is no
    `Exception`, and would end every command with a traceback."""
    tokenizer = from_folder(folder)

    class Panic(BaseException):
        pass

    def encode(*args, **options):
        raise Panic("retry-limit-in-match over")

    tokenizer.hf.encode = encode
    with pytest.raises(CheckpointError, match=f"{folder} cannot encode this text: retry-limit"):
        tokenizer.encode("a")
    with pytest.raises(CheckpointError, match=f"{folder} cannot encode this text: retry-limit"):
        tokenizer.chat([dict(role="user", content="a")])


@pytest.mark.parametrize("plain", (False, True))
def test_text_that_is_no_unicode(folder, plain):
    """Such as an argument of the command line in another encoding."""
    tokenizer = ByteTokenizer() if plain else from_folder(folder)
    with pytest.raises(LLMError, match="character 2 of the text is half a surrogate pair"):
        tokenizer.encode("ab\udcff")


def test_escapes_in_a_tokenizers_error(folder):
    change(folder, "tokenizer.json", decoder=dict(type="\x1b[2J"))
    with pytest.raises(CheckpointError) as caught:
        from_folder(folder)
    assert str(caught.value).isprintable()


def metadata(**changes):
    tokens, merges = tiny_vocabulary(288)
    held = dict(model="gpt2", pre="gpt-2", tokens=tokens, merges=merges, eos_token_id=258)
    held["token_type"] = [3 if token.startswith("<|") else 1 for token in tokens]
    return {f"tokenizer.ggml.{name}": value for name, value in (held | changes).items()}


WRONG = (
    # what is changed -> what is said
    (dict(tokens="abc"), "tokens has 'abc'; expected a list of str"),
    (dict(tokens=["a", 1]), "tokens has 1; expected str alone"),
    (dict(tokens=["a", "b", "a"]), "tokens has 'a'; expected every token once"),
    (dict(tokens=["a", "\x1b" * 2000]), r"tokens has .*\\x1b.*; expected at most 1,024"),
    (dict(token_type=[1, 1]), "token_type has 2; expected as many entries as there are tokens"),
    (dict(token_type=[True] * 288), "token_type has True; expected int alone"),
    (dict(scores=[0.5]), "scores has 1; expected as many entries"),
    (dict(scores=[float("nan")] * 282), "scores has nan; expected finite numbers"),
    (dict(bos_token_id=282), "bos_token_id has 282; expected an id below 282, the number"),
    (dict(eos_token_id=-1), "eos_token_id has -1; expected an id"),
    (dict(eos_token_id="258"), "eos_token_id has '258'; expected an id"),
    (dict(eot_token_id=2**32 - 1), "eot_token_id has 4294967295; expected an id"),
    (dict(unknown_token_id=True), "unknown_token_id has True; expected an id"),
    (dict(add_bos_token=1), "add_bos_token has 1; expected true or false"),
    (dict(model=["gpt2"]), r"tokenizer model is \['gpt2'\]; supported are"),
)
WRONG_IN_BYTE_LEVEL = (
    (dict(merges=[1]), "merges has 1; expected str alone"),
    (dict(merges=["nospace"]), "cannot be read"),
    (dict(merges=["a missing"]), "cannot be read"),
    (dict(pre=["gpt-2"]), r"pre-tokenizer \['gpt-2'\] is not supported"),
)
CASES = [(kind, *row) for kind in ("gpt2", "llama") for row in WRONG]
CASES += [("gpt2", *row) for row in WRONG_IN_BYTE_LEVEL]


@pytest.mark.parametrize(("model", "changes", "said"), CASES)
def test_metadata_of_a_wrong_kind(model, changes, said):
    changes = dict(model=model) | changes
    if "tokens" in changes:  # what belongs to the vocabulary follows it
        changes |= dict(merges=[], token_type=[], eos_token_id=None)
    with pytest.raises(CheckpointError, match=said) as caught:
        from_metadata(metadata(**changes), "x.gguf")
    assert "x.gguf" in str(caught.value) and str(caught.value).isprintable()


def test_metadata_that_is_right_is_accepted():
    """A padding token that does not exist is common, and nothing uses it."""
    tokenizer = from_metadata(metadata(padding_token_id=2**32 - 1, add_bos_token=False), "x.gguf")
    assert tokenizer.eos == (258, 256)


ODD = (None, True, 0, -1, 1.5, 10**30, "", "\x1b[2Jx", "\ud800", [], {}, ["a"], {"a": 1}, [[1]])
KEYS = (
    *("added_tokens_decoder", "additional_special_tokens", "bos_token", "chat_template"),
    *("eos_token", "eos_token_id", "extra_special_tokens", "fast_tokenizer_files", "init_inputs"),
    *("model_max_length", "normalizer", "padding", "post_processor", "pre_tokenizer"),
    *("padding_side", "tokenizer_file", "tokenizer_object", "truncation", "vocab_file"),
)


def mutated(value, rng):
    """The JSON value with one part of it, or one more key, replaced by something odd."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        copy = value.copy()
        some = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        if isinstance(copy, dict) and rng.random() < 0.3:
            some = rng.choice(KEYS)
        if some in copy or isinstance(copy, list):
            copy[some] = mutated(copy[some], rng)
        else:
            copy[some] = rng.choice(ODD)
        return copy
    return rng.choice(ODD)


@pytest.mark.parametrize("count", (20, 600))
@pytest.mark.quick_cases("20")
@pytest.mark.filterwarnings("ignore")
def test_any_change_is_named_or_accepted(original, folder, count):
    rng = random.Random(count)
    messages = [dict(role="user", content="Hi! the ring")]
    for _ in range(count):
        name = rng.choice(FILES)
        (folder / name).write_text(json.dumps(mutated(json.loads(original[name]), rng)))
        try:
            tokenizer = from_folder(folder)
            ids = tokenizer.chat(messages) + tokenizer.encode("in")
            assert isinstance("".join(tokenizer.stream(ids)), str)
        except LLMError as error:
            assert str(folder) in str(error) and str(error).isprintable()
        (folder / name).write_text(original[name])


@pytest.mark.parametrize("count", (20, 600))
@pytest.mark.quick_cases("20")
def test_any_change_of_the_metadata_is_named_or_accepted(count):
    rng = random.Random(count)
    right = metadata(bos_token_id=0, scores=[0.0] * 282, add_bos_token=True)
    right |= {"tokenizer.chat_template": "{{ messages[0].content }}"}
    for _ in range(count):
        wrong = right | {"tokenizer.ggml.model": rng.choice(("gpt2", "llama"))}
        key = rng.choice(list(wrong))
        wrong[key] = mutated(wrong[key], rng)
        try:
            tokenizer = from_metadata(wrong, "x.gguf")
            ids = tokenizer.encode("Hi! the ring") + tokenizer.chat(
                [dict(role="user", content="a")]
            )
            assert isinstance("".join(tokenizer.stream(ids)), str)
        except LLMError as error:
            assert "x.gguf" in str(error) and str(error).isprintable()
