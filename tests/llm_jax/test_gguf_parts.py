"""GGUF models in several parts: read as one, and named where they are not all of one model."""

import struct

import jax
import numpy as np
import pytest

from llm_jax import CheckpointError
from llm_jax.formats import open_checkpoint
from llm_jax.gguf import GGUF
from llm_jax.testing import tiny_config, tiny_params, write_gguf

gguf = pytest.importorskip("gguf", reason="the gguf package writes the files under test")


@pytest.fixture
def cfg():
    return tiny_config("llama", layers=1)


@pytest.fixture
def split(tmp_path, cfg):
    """The first of the parts of a tiny model."""
    return write_gguf(tmp_path / "parts" / "tiny.gguf", tiny_params(cfg), cfg, split=5)


def test_a_split_file_is_the_model(split, cfg):
    parts = sorted(split.parent.iterdir())
    assert len(parts) == 3 and split == parts[0]
    for given in (*parts, split.parent):
        found = open_checkpoint(given)
        assert found == GGUF(split)
        assert found.config("float32") == cfg
        jax.tree.map(np.testing.assert_array_equal, found.load(cfg), tiny_params(cfg))
    assert found.tokenizer().encode("the cat") == GGUF(split).tokenizer().encode("the cat")


def test_the_digest_is_of_all_parts(split):
    before = open_checkpoint(split).digest()
    last = max(split.parent.iterdir())
    data = bytearray(last.read_bytes())
    data[-70] ^= 1
    last.write_bytes(data)
    assert open_checkpoint(split).digest() != before


def test_parts_that_are_missing_are_named(split):
    parts = sorted(split.parent.iterdir())
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"one of 3 parts, of which tiny-00002-of-00003.gguf"):
        open_checkpoint(split.parent).config()
    parts[0].unlink()
    with pytest.raises(CheckpointError, match=r"tiny-00001-of-00003.gguf cannot be read: No such"):
        open_checkpoint(parts[2]).config()


def test_parts_in_another_order(split):
    parts = sorted(split.parent.iterdir())
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=r"00002-of-00003.gguf says that it is part 2 of 3"):
        open_checkpoint(split).config()


def test_parts_that_hold_fewer_tensors_than_there_are(split):
    data = bytearray(split.read_bytes())
    key = b"split.tensors.count"
    at = data.index(key) + len(key) + 4  # behind the type
    (count,) = struct.unpack_from("<i", data, at)
    struct.pack_into("<i", data, at, count + 1)
    split.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"hold {count} tensors; expected {count + 1}: they"):
        open_checkpoint(split).config()


def test_a_tensor_in_two_parts(split, cfg):
    parts = sorted(split.parent.iterdir())
    held = [[t.name for t in gguf.GGUFReader(part).tensors] for part in parts]
    one, two = next((a, b) for a in held[0] for b in held[1] if len(a) == len(b))
    parts[1].write_bytes(parts[1].read_bytes().replace(two.encode(), one.encode()))
    with pytest.raises(CheckpointError, match=f"00002-of-00003.gguf: {one} is also in .*00001-of"):
        open_checkpoint(split).check(cfg)


def test_folders_with_parts_of_several_models(split):
    for file in sorted(split.parent.iterdir()):
        (split.parent / file.name.replace("tiny", "tall")).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="holds several GGUF files; pass one of them"):
        open_checkpoint(split.parent)
