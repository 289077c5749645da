"""Headers of GGUF files that lie: every one is named, and nothing is allocated for its counts."""

import dataclasses
import struct
import time

import numpy as np
import pytest

from llm_jax import CheckpointError
from llm_jax.formats import open_checkpoint
from llm_jax.gguf import GGUF
from llm_jax.testing import tiny_config, tiny_params, write_gguf

pytest.importorskip("gguf", reason="the gguf package writes the files under test")
CFG = tiny_config("qwen2", layers=1)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(folder / "tiny.gguf", tiny_params(CFG), CFG).read_bytes()


def opened(path, data) -> GGUF:
    path = path / "tiny.gguf"
    path.write_bytes(data)
    return GGUF(path)


def refusal(path, data) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(path, data).check(CFG)
    return str(caught.value)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header(*pairs: bytes, tensors: tuple[bytes, ...] = (), counts=None) -> bytes:
    """A GGUF file of these key/value pairs and tensor records."""
    counts = counts or (len(tensors), len(pairs))
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join((*pairs, *tensors)) + bytes(99)


def record(name="x", shape=(8,), kind=0, offset=0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


def array(kind: int, count: int) -> bytes:
    return string("x") + struct.pack("<IIQ", 9, kind, count)


U8, STRING, ARRAY = 0, 8, 9


@pytest.mark.parametrize(
    ("data", "expected"),
    (
        (header(counts=(10**9, 0)), "it counts 1000000000 tensors; at most 131072"),
        (header(counts=(0, 2**63)), "it counts 9223372036854775808 pairs; at most 16384"),
        (header(array(U8, 10**9)), "an array of 1000000000 entries"),
        (header(array(STRING, 2**40)), "an array of 1099511627776 entries"),
        (header(array(ARRAY, 1)), "a value of type 9"),
        (header(array(77, 1)), "a value of type 77"),
        (header(string("x") + struct.pack("<I", 13)), "a value of type 13"),
        (header(string("x") + struct.pack("<IQ", STRING, 2**40)), "a string of 1099511627776"),
        (header(*2 * (string("x") + struct.pack("<IB", U8, 1),)), "'x' is there twice"),
        (header(tensors=(record(), record())), "'x' is there twice"),
        (header(tensors=(record(shape=()),)), "'x' has 0 dimensions"),
        (header(tensors=(record(shape=(1,) * 5),)), "'x' has 5 dimensions"),
        (header(tensors=(record(shape=(0, 8)),)), "'x' has shape [8, 0]"),
        (header(tensors=(record(shape=(2**32, 2**32)),)), "'x' has shape [4294967296, 4294967296]"),
        (header(tensors=(record(shape=(33,), kind=2),)), "'x' has rows of 33, not of blocks of 32"),
    ),
)
def test_counts_and_sizes_are_bounded(tmp_path, data, expected):
    started = time.perf_counter()
    said = refusal(tmp_path, data)
    assert "its header cannot be read" in said and expected in said
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("kind, value", (("I", 0), ("I", 3), ("I", 48), ("i", -32), ("f", 32.0)))
def test_alignment_is_a_power_of_two(tmp_path, kind, value):
    code = {"I": 4, "i": 5, "f": 6}[kind]
    pair = string("general.alignment") + struct.pack(f"<I{kind}", code, value)
    assert f"general.alignment is {value}; expected a power" in refusal(tmp_path, header(pair))


def test_another_alignment_is_honoured(tmp_path):
    pair = string("general.alignment") + struct.pack("<II", 4, 64)
    found = opened(tmp_path, header(pair, tensors=(record(),)) + bytes(99)).header
    assert found.tensors["x"].start % 64 == 0
    assert found.tensors["x"].shape == (8,)


def moved(good: bytes, name: str, change) -> bytes:
    """The file with another offset of one tensor; `change` gets the old one."""
    data = bytearray(good)
    at = data.index(string(name)) + len(string(name))
    (dimensions,) = struct.unpack_from("<I", data, at)
    at += 4 + 8 * dimensions + 4
    struct.pack_into("<Q", data, at, change(*struct.unpack_from("<Q", data, at)))
    return bytes(data)


def test_tensors_may_not_overlap(tmp_path, good):
    same = lambda offset: offset - 2 * 64 * 64  # k has half of the rows of q
    said = refusal(tmp_path, moved(good, "blk.0.attn_k.weight", same))
    assert "blk.0.attn_k.weight starts at byte" in said
    assert "inside of blk.0.attn_q.weight; download it again" in said
    first = refusal(tmp_path, moved(good, "blk.0.attn_v.weight", lambda offset: 0))
    assert "inside of" in first


def test_tensors_are_aligned(tmp_path, good):
    last = max(opened(tmp_path, good).header.tensors.values(), key=lambda t: t.start).name
    said = refusal(tmp_path, moved(good, last, lambda offset: offset - 4))
    assert f"{last} starts at byte" in said and "expected a multiple of 32" in said


@pytest.mark.parametrize("by", (32, 2**40, 2**63))
def test_tensors_are_inside_of_the_file(tmp_path, good, by):
    last = max(opened(tmp_path, good).header.tensors.values(), key=lambda t: t.start).name
    said = refusal(tmp_path, moved(good, last, lambda offset: offset + by))
    assert f"is truncated: {last} ends at byte" in said


def test_records_that_somebody_replaced_are_checked_too(tmp_path, good, monkeypatch):
    """As in ../shared/cases/rel_16: k and v of a layer are said to be the same bytes."""
    checkpoint = opened(tmp_path, good)
    tensors = checkpoint.header.tensors
    start = tensors["blk.0.attn_k.weight"].start
    tensors["blk.0.attn_v.weight"] = dataclasses.replace(
        tensors["blk.0.attn_v.weight"], start=start
    )
    with pytest.raises(CheckpointError, match=r"inside of blk.0.attn_"):
        checkpoint.check(CFG)


@pytest.mark.parametrize("value", (np.nan, np.inf))
@pytest.mark.parametrize("quant", ("F32", "Q8_0"))
def test_numbers_that_are_not_finite_are_named(tmp_path, value, quant):
    path = write_gguf(tmp_path / "x.gguf", tiny_params(CFG), CFG, quant)
    name = "blk.0.ffn_down.weight"
    tensor = GGUF(path).header.tensors[name]
    data = bytearray(path.read_bytes())
    number = np.float16(value) if quant == "Q8_0" else np.float32(value)  # the scale of a block
    at = tensor.start + 2 * tensor.row_bytes
    data[at : at + number.itemsize] = number.tobytes()
    path.write_bytes(data)
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity, first in row 2"):
        checkpoint.load(checkpoint.config("float32"))
