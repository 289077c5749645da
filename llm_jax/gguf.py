"""GGUF files: one file with metadata, tokenizer and (quantized) tensors, dequantized on loading.

Layout (version 2 and 3, little endian): magic, version, counts; then key/value metadata; then a
record for each tensor (name, dimensions fastest first, type, offset); then, aligned, the tensors.
"""

import dataclasses
import functools
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from llm_jax import CheckpointError
from llm_jax.attention import rope_frequencies
from llm_jax.checkpoint import Checkpoint, Contents, TensorInfo
from llm_jax.config import FAMILIES, Config, ConfigError, Llama3Rope
from llm_jax.extras import need
from llm_jax.gguf_tokenizer import from_metadata
from llm_jax.tokenizer import Tokenizer
from llm_jax.untrusted import require_file, unreadable

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""Metadata type -> struct code; 8 is a string and 9 an array."""

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Supported values of general.architecture; Mistral's files say llama."""


@dataclasses.dataclass(frozen=True)
class GGUF(Checkpoint):
    """One GGUF file of a llama, mistral, qwen2 or qwen3 model."""

    path: Path

    names: ClassVar = dict(
        embed_VD="token_embd.weight",
        norm="output_norm.weight",
        head_DV="output.weight",
        attn_norm="blk.{}.attn_norm.weight",
        mlp_norm="blk.{}.ffn_norm.weight",
        o="blk.{}.attn_output.weight",
        **{name: f"blk.{{}}.attn_{name}.weight" for name in "qkv"},
        **{f"{name}_bias": f"blk.{{}}.attn_{name}.bias" for name in "qkv"},
        **{f"{name}_norm": f"blk.{{}}.attn_{name}_norm.weight" for name in "qk"},
        **{name: f"blk.{{}}.ffn_{name}.weight" for name in ("gate", "up", "down")},
    )
    dtypes: ClassVar = frozenset(
        ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
        + ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
    )
    harmless: ClassVar = re.compile(r"^rope_freqs\.weight$")

    def config(self, dtype: str | None = None) -> Config:
        arch = self.metadata.get("general.architecture")
        if arch not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(f"{self.path}: architecture is {arch!r}; supported are {known}")
        get = lambda key, default=None: self.metadata.get(f"{arch}.{key}", default)
        needed = dict(
            layers="block_count",
            d_model="embedding_length",
            heads="attention.head_count",
            d_ff="feed_forward_length",
            norm_eps="attention.layer_norm_rms_epsilon",
        )
        number = lambda key: isinstance(get(key), int | float | list)
        missing = [f"{arch}.{key}" for key in needed.values() if not number(key)]
        if self.names["embed_VD"] not in self.header.tensors:
            missing.append(self.names["embed_VD"])
        if missing:
            raise CheckpointError(f"{self.path} lacks {', '.join(missing)}")
        sizes = {name: get(key) for name, key in needed.items()}
        kv_heads = get("attention.head_count_kv", sizes["heads"])
        unequal = [k for k, v in (sizes | {"kv_heads": kv_heads}).items() if isinstance(v, list)]
        if unequal or get("expert_count"):
            what = f"{unequal[0]} differs from layer to layer" if unequal else "mixture of experts"
            raise CheckpointError(f"{self.path}: {what}; this is not supported")
        if (scaling := get("rope.scaling.type", "none")) != "none":
            raise CheckpointError(f"{self.path}: rope scaling {scaling!r} is not supported")
        head_dim = get("attention.key_length") or sizes["d_model"] // max(1, sizes["heads"])
        if (rotated := get("rope.dimension_count", head_dim)) != head_dim:
            raise CheckpointError(
                f"{self.path}: only {rotated} of {head_dim} head dimensions rotate"
            )
        length = get("context_length", 2048)
        qkv_bias, qk_norm = FAMILIES[arch]
        sizes["norm_eps"] = float(f"{sizes['norm_eps']:.6g}")  # 9.99999997e-07 in the file is 1e-6
        try:
            cfg = Config(
                **sizes,
                kv_heads=kv_heads,
                head_dim=head_dim,
                vocab=self.header.tensors[self.names["embed_VD"]].shape[0],
                rope_theta=float(get("rope.freq_base", 10_000.0)),
                qkv_bias=qkv_bias,
                qk_norm=qk_norm,
                tied=self.names["head_DV"] not in self.header.tensors,
                max_length=min(length, get("attention.sliding_window") or length),
                dtype=dtype or "bfloat16",
                family=arch,
            )
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        return dataclasses.replace(cfg, rope_scaling=self._rope_scaling(cfg))

    def _rope_scaling(self, cfg: Config) -> Llama3Rope | None:
        """Llama 3.1's scaling, recovered from the divisors of the frequencies that GGUF stores."""
        tensor = self.header.tensors.get("rope_freqs.weight")
        if tensor is None:
            return None
        stored = self.reader(_info(self.path, tensor), "", cfg)(0, tensor.shape[0])
        plain = rope_frequencies(cfg)
        for known in (None, *(Llama3Rope(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))):
            divisors = plain / rope_frequencies(dataclasses.replace(cfg, rope_scaling=known))
            if stored.shape == divisors.shape and np.allclose(stored, divisors, rtol=1e-4):
                return known
        raise CheckpointError(
            f"{self.path}: rope_freqs.weight is not Llama 3.1's scaling (factor 8) or 3.2's (32)"
        )

    def tokenizer(self) -> Tokenizer:
        return from_metadata(self.metadata, self.path)

    @property
    def metadata(self) -> dict[str, Any]:
        """The file's key/value pairs; arrays are lists."""
        return self.header.metadata

    @functools.cached_property
    def header(self) -> "Header":
        """Metadata and tensor records; raises `CheckpointError` for a file cut inside them."""
        _gguf()  # a missing package is no fault of the file
        try:
            return read_header(self.path, self._bytes)
        except CheckpointError:
            raise
        except Exception as error:  # damaged bytes fail in any way; the cause is always the file
            raise CheckpointError(
                f"{self.path} is truncated or corrupt: its header cannot be read ({error}); "
                "download it again"
            ) from error

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        if require_file(self.path).st_size == 0:
            raise CheckpointError(f"{self.path} is empty; download it again")
        try:
            return np.memmap(self.path, np.uint8, "r")
        except OSError as error:
            raise unreadable(self.path, error) from error

    @functools.cached_property
    def contents(self) -> Contents:
        size, problems = len(self._bytes), []
        for tensor in self.header.tensors.values():
            if tensor.row_bytes is not None and tensor.stop > size:
                problems.append(
                    f"{self.path.name} is truncated: {tensor.name} ends at byte {tensor.stop:,} "
                    f"and the file at {size:,}; download it again"
                )
        tensors = {name: _info(self.path, t) for name, t in self.header.tensors.items()}
        return Contents(tensors, tuple(problems))

    def reader(
        self, tensor: TensorInfo, field: str, cfg: Config
    ) -> Callable[[int, int], np.ndarray]:
        """Rows of a tensor in float32. llama files store q and k rows so that rotated pairs are
        neighbours; a head's rows 0 2 4 … 1 3 5 … of the file are ours in order."""
        gguf = _gguf()
        record = self.header.tensors[tensor.name]
        kind = gguf.GGMLQuantizationType[tensor.dtype]
        raw = self._bytes[record.start : record.stop]
        if len(tensor.shape) == 1:
            return lambda start, stop: gguf.dequantize(raw[None], kind)[0, start:stop]
        raw = raw.reshape(tensor.shape[0], -1)
        if self.metadata["general.architecture"] == "llama" and field in ("q", "k"):
            pairs = np.arange(tensor.shape[0]).reshape(-1, cfg.head_dim // 2, 2)
            order = pairs.swapaxes(1, 2).reshape(-1)
            return lambda start, stop: gguf.dequantize(raw[order[start:stop]], kind)
        return lambda start, stop: gguf.dequantize(raw[start:stop], kind)


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
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        return self.start + rows * (self.row_bytes or 0)


@dataclasses.dataclass(frozen=True)
class Header:
    """Everything in front of the tensors' data."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorRecord]


def _gguf() -> ModuleType:
    return need("gguf", "models", "reading GGUF files")


def _info(path: Path, record: TensorRecord) -> TensorInfo:
    return TensorInfo(path, record.name, record.shape, record.dtype)


def read_header(path: Path, data: np.ndarray) -> Header:
    """The header in `data`, the bytes of a GGUF file.

    The reader of the gguf package makes an array of every metadata entry. For Qwen2.5's 300,000
    tokens and merges that takes 7.8 s on two cores; this takes 0.3 s.
    """
    gguf = _gguf()
    view, at = memoryview(data), 0

    def take(code):
        nonlocal at
        (value,) = struct.unpack_from("<" + code, view, at)
        at += struct.calcsize("<" + code)
        return value

    def text():
        nonlocal at
        length = take("Q")
        if at + length > len(view):
            raise ValueError(f"a string of {length} bytes starts at {at}")
        at += length
        return str(view[at - length : at], "utf-8")

    def value(kind):
        nonlocal at
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = take("I"), take("Q")
            if count > len(view):
                raise ValueError(f"an array of {count} entries starts at {at}")
            if inner in SCALARS:
                entries = struct.unpack_from(f"<{count}{SCALARS[inner]}", view, at)
                at += struct.calcsize(f"<{count}{SCALARS[inner]}")
                return list(entries)
            return [value(inner) for _ in range(count)]
        return take(SCALARS[kind])

    if bytes(view[:4]) != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it does not start with GGUF")
    at = 4
    if (version := take("I")) not in (2, 3):
        raise CheckpointError(
            f"{path} is GGUF version {version}; supported are 2 and 3, little endian"
        )
    tensor_count, pairs = take("Q"), take("Q")
    metadata = {}
    for _ in range(pairs):
        key = text()
        metadata[key] = value(take("I"))
    found = []
    for _ in range(tensor_count):
        name, dimensions = text(), take("I")
        shape = tuple(take("Q") for _ in range(dimensions))[::-1]
        found.append((name, shape, take("I"), take("Q")))
    alignment = metadata.get("general.alignment", 32)
    base = -(-at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in found:
        if name in tensors:
            raise ValueError(f"{name} is there twice")
        try:
            dtype = gguf.GGMLQuantizationType(kind)
        except ValueError:
            tensors[name] = TensorRecord(name, shape, f"type {kind}", base + offset, None)
            continue
        block, size = gguf.GGML_QUANT_SIZES[dtype]
        row_bytes = shape[-1] // block * size
        tensors[name] = TensorRecord(name, shape, dtype.name, base + offset, row_bytes)
    return Header(metadata, tensors)
