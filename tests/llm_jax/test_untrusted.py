"""Files of others: only ordinary ones are opened, and what they hold cannot reach the terminal."""

import json
import os
import shutil
import socket

import numpy as np
import pytest

from llm_jax import CheckpointError, LLMError, shown, untrusted
from llm_jax.config import ConfigError
from llm_jax.formats import open_checkpoint
from llm_jax.testing import tiny_config, tiny_params, write_gguf, write_safetensors
from llm_jax.untrusted import inside, read_object, require_file

CFG = tiny_config("qwen2", layers=1)
PARAMS = tiny_params(CFG)
ATTACK = "\x1b]0;owned\x07\x1b[2Jx"


@pytest.fixture
def folder(tmp_path):
    return write_safetensors(tmp_path / "m", PARAMS, CFG)


@pytest.mark.parametrize(
    ("text", "expected"),
    (
        ("model.layers.0.mlp", "model.layers.0.mlp"),
        ("naïve 東京 🙂 'a' \\x1b", "naïve 東京 🙂 'a' \\x1b"),
        (ATTACK, "\\x1b]0;owned\\x07\\x1b[2Jx"),
        ("a\nerror: b\r\t\x00\x7f\x9b", "a\\nerror: b\\r\\t\\x00\\x7f\\x9b"),
        ("\u202egpj.exe\u2028\ud800", "\\u202egpj.exe\\u2028\\ud800"),
        (7, "7"),
    ),
)
def test_shown(text, expected):
    assert shown(text) == expected
    assert shown(shown(text)) == expected


def test_shown_is_short():
    assert shown("a" * 10**6, 20) == "a" * 19 + "…"
    assert shown("a" * 20, 20) == "a" * 20


@pytest.mark.parametrize("kind", (LLMError, CheckpointError, ConfigError))
def test_every_error_of_the_package_escapes_what_it_is_told(kind):
    assert str(kind(f"{ATTACK}\nnext")) == "\\x1b]0;owned\\x07\\x1b[2Jx\nnext"
    assert str(kind()) == ""


def not_a_file(path, kind):
    """Puts something else than an ordinary file at `path`; what the message calls it."""
    if kind == "folder":
        path.mkdir()
        return "a folder"
    if kind == "device":
        path.symlink_to("/dev/zero")
        return "a device"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
        return "a socket"
    os.mkfifo(path)
    return "a named pipe"


KINDS = ("folder", "device", "socket", "pipe")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the path of a socket has at most 107 bytes
    said = not_a_file(tmp_path / "x", kind)
    with pytest.raises(CheckpointError, match=f"x is {said}; expected an ordinary file: remove"):
        require_file(tmp_path / "x")


def test_a_missing_file_and_a_link_to_nothing(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("link", "missing", "a\0b"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            require_file(tmp_path / name)


NAMES = (
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("generation_config.json", "chat_template.jinja", "model.safetensors.index.json"),
    *("special_tokens_map.json", "added_tokens.json", "additional_chat_templates/x.jinja"),
)


@pytest.mark.parametrize("kind", ("folder", "pipe"))
@pytest.mark.parametrize("name", NAMES)
def test_each_file_of_a_checkpoint_that_is_none(folder, name, kind):
    """Opening a named pipe would wait for ever."""
    path = folder / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    said = not_a_file(path, kind)
    with pytest.raises(CheckpointError, match=f"{path.name} is {said}"):
        checkpoint = open_checkpoint(folder)
        checkpoint.check(checkpoint.config())
        checkpoint.tokenizer()


@pytest.mark.parametrize("kind", ("device", "pipe", "socket"))
def test_a_path_that_is_neither_file_nor_folder(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    said = not_a_file(tmp_path / "x.gguf", kind)
    for path in (tmp_path / "x.gguf", tmp_path):  # itself, and as the one GGUF file of a folder
        with pytest.raises(CheckpointError, match=f"x.gguf is {said}"):
            open_checkpoint(path).config()


@pytest.mark.parametrize("path", ("a" * 5000, "~no-such-user/model", "\0"))
def test_paths_that_the_system_refuses(path):
    with pytest.raises(CheckpointError, match=r"cannot be read|does not exist"):
        open_checkpoint(path)


def test_files_that_may_not_be_read_are_named_by_the_reason(folder, tmp_path, monkeypatch):
    """Not as damaged ones: downloading again would not help."""
    denied = PermissionError(13, "Permission denied")

    def refuse(*args, **options):
        raise denied

    gguf = write_gguf(tmp_path / "x.gguf", PARAMS, CFG)
    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(CheckpointError, match=r"x.gguf cannot be read: Permission denied; check"):
        open_checkpoint(gguf).config()
    monkeypatch.setattr("safetensors.safe_open", refuse)
    with pytest.raises(CheckpointError, match="safetensors cannot be read: Permission denied"):
        open_checkpoint(folder).check(CFG)
    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: Permission denied"):
        open_checkpoint(folder).config()


@pytest.mark.parametrize(
    ("data", "said"),
    (
        (b"{", "is not valid JSON: .* download it again or correct it"),
        (b"", "is not valid JSON"),
        (b"[]", "holds list, not an object"),
        (b"7", "holds int, not an object"),
        (b'{"a": "\xff"}', "is not UTF-8 text .invalid start byte at byte 7"),
        (b"[" * 200_000, "is not valid JSON: maximum recursion depth"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        (b'{"\\u001b[2J": 1, "\\u001b[2J": 1}', r"the key '\\x1b\[2J' is there twice"),
    ),
)
def test_json_that_is_no_object(tmp_path, data, said):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"x.json {said}|x.json is not valid JSON: {said}"):
        read_object(tmp_path / "x.json")


def test_a_file_that_is_too_large_for_memory_is_not_read(tmp_path, monkeypatch):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole, which takes no space on the disk
    with pytest.raises(CheckpointError, match=r"has 1,099,511,627,776 bytes; expected at most"):
        read_object(tmp_path / "x.json")
    monkeypatch.setattr(untrusted, "LARGEST_TEXT", 2)
    (tmp_path / "x.json").write_text("{}")
    assert read_object(tmp_path / "x.json") == {}


OUTSIDE = ("../out.safetensors", "a/../../out.safetensors", "/etc/passwd", "", ".", "a\0b", "..")


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_a_folder(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"index names '.*', which is not inside .*download"):
        inside(tmp_path, name, "index")


def sharded(tmp_path, to):
    """A checkpoint of two files, the first of which the index calls `to`."""
    folder = write_safetensors(tmp_path / "m", PARAMS, CFG, shards=2)
    first = folder / "model-00001-of-00002.safetensors"
    target = tmp_path / "m" / to
    target.parent.mkdir(exist_ok=True)
    shutil.move(first, target)
    index = folder / "model.safetensors.index.json"
    stated = json.loads(index.read_text())
    places = stated["weight_map"].items()
    stated["weight_map"] = {k: to if v == first.name else v for k, v in places}
    index.write_text(json.dumps(stated))
    return folder


@pytest.mark.parametrize("absolute", (False, True))
def test_an_index_that_names_files_elsewhere(tmp_path, absolute):
    """Case rel_06: the check opened them, then loading ended in FileNotFoundError."""
    folder = sharded(tmp_path, str(tmp_path / "out.x") if absolute else "../out.x")
    with pytest.raises(CheckpointError, match=r"index.json names '.*out.x', which is not inside"):
        open_checkpoint(folder).check(CFG)


@pytest.mark.parametrize("link", (False, True))
def test_an_index_may_name_a_file_below_and_a_link(tmp_path, link):
    if link:  # as in the Hub's cache
        folder = write_safetensors(tmp_path / "m", PARAMS, CFG)
        shutil.move(folder / "model.safetensors", tmp_path / "blob")
        (folder / "model.safetensors").symlink_to("../blob")
    else:
        folder = sharded(tmp_path, "part/first.safetensors")
    loaded = open_checkpoint(folder).load(CFG)
    np.testing.assert_array_equal(loaded.embed_VD, PARAMS.embed_VD)
    np.testing.assert_array_equal(loaded.norm, PARAMS.norm)


@pytest.mark.parametrize("name", (ATTACK, "a\n  error: all is well", "\u202e", "a" * 10**5))
def test_tensor_names_are_shown_escaped(folder, name):
    """Case rel_20: a file could clear the screen, or set the title of the window."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: np.zeros(1, np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 problem") as caught:
        open_checkpoint(folder).check(CFG)
    first, *lines = str(caught.value).split("\n")
    assert first.isprintable() and len(lines) == 1
    assert lines[0].isprintable() and shown(name, 30)[:29] in lines[0] and len(lines[0]) < 600


def test_file_names_are_shown_escaped(tmp_path):
    (tmp_path / f"{ATTACK}\n").write_text("")
    with pytest.raises(CheckpointError, match="is not a checkpoint: it holds") as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).isprintable()
