"""What stands in front of the tensors of a GGUF file.

Layout (version 2 and 3, little endian): magic, version, counts; then key/value metadata; then a
record for each tensor (name, dimensions fastest first, type, offset); then, aligned, the tensors.
Lengths and counts are bounded before anything is made of them.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import CheckpointError
from llm_jax.extras import need
from llm_jax.values import short

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""Metadata type -> struct code; 8 is a string and 9 an array."""

_HEADER, _STRING, _ARRAY = 2**26, 2**24, 2**22
"""Most bytes of a header and of a string, most entries of an array. Gemma's 262,144 tokens and
their merges are about a quarter of the first."""
_PAIRS, _TENSORS, _DIMENSIONS = 2**14, 2**17, 4
"""The most key/value pairs, tensors, and dimensions of a tensor."""


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """Where a tensor lies in the file. `row_bytes` is None for a type this machine cannot size."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    row_bytes: int | None

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape[:-1]) * (self.row_bytes or 0)


@dataclasses.dataclass(frozen=True)
class Header:
    """Everything in front of the tensors' data."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorRecord]
    alignment: int = 32
    """Every tensor starts at a multiple of it."""


def read_header(path: Path, data: np.ndarray) -> Header:
    """The header in `data`, the bytes of a GGUF file.

    The reader of the gguf package makes an array of every metadata entry. For Qwen2.5's 300,000
    tokens and merges that takes 7.8 s on two cores; this takes 0.3 s.
    """
    gguf = need("gguf", "models", "reading GGUF files")
    view, at = memoryview(data)[:_HEADER], 0

    def take(code):
        nonlocal at
        (value,) = struct.unpack_from("<" + code, view, at)
        at += struct.calcsize("<" + code)
        return value

    def text():
        nonlocal at
        length = take("Q")
        if length > min(_STRING, len(view) - at):
            raise ValueError(f"a string of {length} bytes starts at {at}")
        at += length
        return str(view[at - length : at], "utf-8")

    def value(kind):
        nonlocal at
        if kind == 8:
            return text()
        if kind != 9:
            return take(scalar(kind))
        inner, count = take("I"), take("Q")
        code = "Q" if inner == 8 else scalar(inner)  # a string has its length in front
        if count > min(_ARRAY, (len(view) - at) // struct.calcsize("<" + code)):
            raise ValueError(f"an array of {count} entries starts at {at}")
        if inner == 8:
            return [text() for _ in range(count)]
        entries = struct.unpack_from(f"<{count}{code}", view, at)
        at += struct.calcsize(f"<{count}{code}")
        return list(entries)

    def scalar(kind):
        if kind not in SCALARS:
            raise ValueError(f"a value of type {kind} starts at {at}")
        return SCALARS[kind]

    def count(largest, what):
        if (number := take("Q")) > largest:
            raise ValueError(f"it counts {number} {what}; at most {largest} are supported")
        return number

    if bytes(view[:4]) != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it does not start with GGUF")
    at = 4
    if (version := take("I")) not in (2, 3):
        raise CheckpointError(
            f"{path} is GGUF version {version}; supported are 2 and 3, little endian"
        )
    tensor_count, pairs = count(_TENSORS, "tensors"), count(_PAIRS, "pairs")
    metadata = {}
    for _ in range(pairs):
        if (key := text()) in metadata:
            raise ValueError(f"{short(key)} is there twice")
        metadata[key] = value(take("I"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {short(alignment)}; expected a power of two")
    records = {}
    for _ in range(tensor_count):
        name, dimensions = text(), take("I")
        if name in records:
            raise ValueError(f"{short(name)} is there twice")
        if not 1 <= dimensions <= _DIMENSIONS:
            raise ValueError(f"{short(name)} has {dimensions} dimensions")
        shape = tuple(take("Q") for _ in range(dimensions))[::-1]
        if not 0 < math.prod(shape) < 2**60:
            raise ValueError(f"{short(name)} has shape {list(shape)}")
        records[name] = (shape, take("I"), take("Q"))
    base = -(-at // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in records.items():
        try:
            dtype = gguf.GGMLQuantizationType(kind)
        except ValueError:
            tensors[name] = TensorRecord(name, shape, f"type {kind}", base + offset, None)
            continue
        block, size = gguf.GGML_QUANT_SIZES[dtype]
        if shape[-1] % block:
            raise ValueError(f"{short(name)} has rows of {shape[-1]}, not of blocks of {block}")
        row_bytes = shape[-1] // block * size
        tensors[name] = TensorRecord(name, shape, dtype.name, base + offset, row_bytes)
    return Header(metadata, tensors, alignment)


def layout_problems(header: Header, size: int, file: str) -> tuple[str, ...]:
    """What is wrong with where the tensors lie in a file of `size` bytes."""
    problems, end, last = [], 0, ""
    sized = (tensor for tensor in header.tensors.values() if tensor.row_bytes is not None)
    for tensor in sorted(sized, key=lambda tensor: (tensor.start, tensor.stop)):
        name, again = tensor.name, "download it again"
        if tensor.stop > size:
            problems.append(
                f"{file} is truncated: {name} ends at byte {tensor.stop:,} "
                f"and the file at {size:,}; {again}"
            )
        if tensor.start % header.alignment:
            problems.append(
                f"{file}: {name} starts at byte {tensor.start:,}; expected a multiple of "
                f"{header.alignment}; {again}"
            )
        if tensor.start < end:
            problems.append(
                f"{file}: {name} starts at byte {tensor.start:,}, inside of {last}; {again}"
            )
        if tensor.stop > end:
            end, last = tensor.stop, name
    return tuple(problems)
