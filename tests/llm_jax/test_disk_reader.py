"""Arrays read from files past the page cache: their bytes, and what is said of broken files."""

import errno
import os
import threading

import jax
import ml_dtypes
import numpy as np
import pytest

from llm_jax.digest import array_digest
from llm_jax.disk import (
    BLOCK,
    DiskArray,
    DiskError,
    DiskReader,
    Slot,
    loaded,
    on_disk,
    slot_bytes,
)

RNG = np.random.default_rng(0)


def written(file, *parts):
    """A file of these parts, arrays or numbers of other bytes; and where the arrays are."""
    found, at = [], 0
    with file.open("wb") as out:
        for part in parts:
            data = part.tobytes() if isinstance(part, np.ndarray) else RNG.bytes(part)
            if isinstance(part, np.ndarray):
                here = (file, at, part.shape, part.dtype, array_digest(part), part.nbytes)
                found.append(DiskArray(*here))
            at += out.write(data)
    return found


def numbers(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def readers():
    return [t for t in threading.enumerate() if t.name.startswith("disk")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    for thread in readers():
        thread.join(2)
    assert not readers()


@pytest.mark.parametrize("before", [0, 1, 64, BLOCK - 4, BLOCK, BLOCK + 12])
@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 3 * 2**20])
def test_an_array_is_what_was_written_wherever_it_lies(tmp_path, before, size):
    a = RNG.integers(0, 256, size, np.uint8)
    (lying,) = written(tmp_path / "f", before, a, 100)
    np.testing.assert_array_equal(loaded([lying])[0], a)


def test_arrays_of_several_files_and_dtypes_share_a_slot(tmp_path):
    one = numbers(3, 700), RNG.integers(0, 9, (5,), np.uint8), numbers(2, 2, dtype=np.float16)
    two = numbers(50, 41, dtype=ml_dtypes.bfloat16)
    lying = [*written(tmp_path / "1", 77, *one), *written(tmp_path / "2", two)]
    reader, slot = DiskReader(), Slot(slot_bytes(lying))
    for _ in range(2):  # over what was there before
        for got, want in zip(reader.read(lying, slot), (*one, two), strict=True):
            assert got.dtype == want.dtype and np.shares_memory(got, slot.bytes)
            np.testing.assert_array_equal(got, want)
        slot.bytes[:] = 255
    assert reader.reads.direct and reader.reads.bytes >= 2 * sum(a.nbytes for a in lying)
    reader.close()


def test_rows_behind_what_is_stored_are_zeros(tmp_path):
    a = numbers(3, 5)
    (lying,) = written(tmp_path / "f", 12, a, 9000)
    longer = DiskArray(lying.file, lying.offset, (2000, 5), a.dtype, lying.digest, a.nbytes)
    got = loaded(longer)
    np.testing.assert_array_equal(got[:3], a)
    assert got.shape == (2000, 5) and not got[3:].any()


def test_it_is_a_leaf_like_the_array(tmp_path):
    a = numbers(3, 5)
    (lying,) = written(tmp_path / "f", a)
    tree = {"w": lying, "b": np.ones(2)}
    assert on_disk(tree) and not on_disk(loaded(tree))
    assert jax.tree.map(lambda x: (x.ndim, x.size, x.nbytes), tree)["w"] == (2, 15, 60)


@pytest.mark.parametrize("refused", ["open", "read"])
def test_a_file_system_without_direct_reads_goes_through_the_cache(tmp_path, monkeypatch, refused):
    a = numbers(300, 70)
    (lying,) = written(tmp_path / "f", 5, a)
    system_open, system_read, direct = os.open, os.preadv, set()

    def open_file(path, flags, *more):
        if flags & os.O_DIRECT and refused == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        handle = system_open(path, flags, *more)
        direct.update({handle} if flags & os.O_DIRECT else ())
        return handle

    def read(handle, *given):
        if handle in direct and refused == "read":
            direct.remove(handle)  # no longer once its flag is taken away
            raise OSError(errno.EINVAL, "Invalid argument")
        return system_read(handle, *given)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "preadv", read)
    reader = DiskReader()
    np.testing.assert_array_equal(loaded(lying, reader), a)
    assert not reader.reads.direct
    reader.close()


def cut(file, lying, monkeypatch):
    os.truncate(file, lying.offset + lying.stored - 1)


def vanish(file, lying, monkeypatch):
    file.unlink()


def flip(file, lying, monkeypatch):
    data = bytearray(file.read_bytes())
    data[lying.offset + lying.stored // 2] ^= 1
    file.write_bytes(data)


def fail(file, lying, monkeypatch):
    def read(*given):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", read)


FAULTS = {
    cut: "is shorter than it was",
    vanish: "No such file",
    flip: "is damaged",
    fail: "Input/output error",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [10, 3 * 2**20])
def test_a_fault_is_named_with_its_file_and_no_thread_stays(tmp_path, monkeypatch, fault, size):
    file = tmp_path / "layer"
    (lying,) = written(file, 100, numbers(size))
    fault(file, lying, monkeypatch)
    with pytest.raises(DiskError, match=FAULTS[fault]) as raised:
        loaded(lying)
    assert str(file) in str(raised.value)
    assert "start again" in str(raised.value)  # it says what to do
