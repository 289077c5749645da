"""Digests follow the content, whatever the path, and are not taken from a file that changed."""

import os
import time

import numpy as np
import pytest
import xxhash

from llm_jax import digest
from llm_jax.digest import array_digest, file_digest, files_digest, json_digest
from llm_jax.formats import open_checkpoint
from llm_jax.testing import tiny_config, tiny_params, write_gguf, write_safetensors


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("THIMBLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "digests"


@pytest.fixture
def hashed(monkeypatch):
    """The sizes of the files that are read."""
    seen, exact = [], digest.hash_file
    monkeypatch.setattr(
        digest, "hash_file", lambda path: seen.append(path.stat().st_size) or exact(path)
    )
    return seen


def write(path, content: bytes, age=10):
    """A file that was last changed `age` seconds ago, as far as its times tell."""
    path.write_bytes(content)
    os.utime(path, ns=(time.time_ns() - age * 10**9,) * 2)
    return path


@pytest.mark.parametrize("size", [0, 1, 1000, 4096, 4097, 3 * 4096 + 5])
def test_a_file_is_the_digest_of_the_digests_of_its_parts(tmp_path, monkeypatch, size):
    monkeypatch.setattr(digest, "PART", 4096)
    content = np.random.default_rng(size).bytes(size)
    parts = (content[at : at + 4096] for at in range(0, size, 4096))
    want = xxhash.xxh3_128(b"".join(xxhash.xxh3_128_digest(part) for part in parts)).hexdigest()
    assert file_digest(write(tmp_path / "a", content)) == want


def test_one_bit_anywhere_changes_it(tmp_path):
    content = bytearray(np.random.default_rng(0).bytes(2000))
    found = {file_digest(write(tmp_path / "whole", content))}
    for at in range(0, 2000, 97):
        content[at] ^= 1
        found.add(file_digest(write(tmp_path / str(at), content)))
    assert len(found) == 1 + len(range(0, 2000, 97))


def test_it_is_kept_until_the_file_changes(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(digest, "SETTLED_NS", 0)  # no test waits until a file is old
    path = write(tmp_path / "a", b"one" * 100)
    first = file_digest(path)
    assert file_digest(path) == first == file_digest(str(path)) and hashed == [300]
    times = path.stat()
    path.write_bytes(b"two" * 100)  # the same size, and the same time of modification
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digest(path) != first and hashed == [300, 300]
    moved = path.rename(tmp_path / "b")
    assert file_digest(moved) != first and len(hashed) == 3


def test_a_file_that_has_just_changed_is_read_again(tmp_path, hashed, cache):
    """It may change once more within the same tick of the file system's clock."""
    path = write(tmp_path / "a", b"1", age=0)
    assert file_digest(path) == file_digest(path) and len(hashed) == 2
    assert not cache.exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"state": 3}', b"\xff", b'{"state": {}}', b"[" * 10**5]
)
def test_a_damaged_cache_is_passed_over(tmp_path, cache, monkeypatch, content):
    monkeypatch.setattr(digest, "SETTLED_NS", 0)
    path = write(tmp_path / "a", b"1")
    want = file_digest(path)
    (kept,) = cache.iterdir()
    kept.write_bytes(content)
    assert file_digest(path) == want


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "SETTLED_NS", 0)
    write(tmp_path / "file", b"")
    monkeypatch.setenv("THIMBLE_CACHE", str(tmp_path / "file"))
    path = write(tmp_path / "a", b"1")
    assert file_digest(path) == file_digest(path)


def test_arrays_and_json():
    a = np.arange(12, dtype=np.int16).reshape(3, 4)
    assert array_digest(a) == xxhash.xxh3_128_hexdigest(a.tobytes())
    assert array_digest(a.T) == xxhash.xxh3_128_hexdigest(a.T.tobytes()) != array_digest(a)
    assert array_digest(a.view(np.uint16)) == array_digest(a)
    assert array_digest(np.zeros((0, 3))) == xxhash.xxh3_128_hexdigest(b"")
    assert array_digest(np.float32(2)) == xxhash.xxh3_128_hexdigest(np.float32(2).tobytes())
    assert json_digest({"a": 1, "b": [2]}) == json_digest({"b": [2], "a": 1}) != json_digest({})


CFG = tiny_config("llama", layers=2, d_model=32, d_ff=64)


def test_a_checkpoint_is_its_weights(tmp_path):
    """Not its place; and for the identity the texts count too."""
    params = tiny_params(CFG)
    one, two, other, shards = (
        open_checkpoint(write_safetensors(tmp_path / name, p, CFG, shards=n))
        for name, p, n in (
            ("one", params, 1),
            ("two", params, 1),
            ("other", tiny_params(CFG, 1), 1),
            ("shards", params, 2),
        )
    )
    assert one.digest() == two.digest() == files_digest([one.path / "model.safetensors"])
    assert len({one.digest(), other.digest(), shards.digest()}) == 3
    assert one.identity() == two.identity() != other.identity()
    before = one.digest()
    (one.path / "chat_template.jinja").write_text("{{ messages }}")
    assert one.digest() == before and one.identity() != two.identity()


def test_a_gguf_file_is_its_bytes(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_params(CFG), CFG)
    assert open_checkpoint(path).digest() == files_digest([path])
