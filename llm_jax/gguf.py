"""GGUF files: one file with metadata, tokenizer and (quantized) tensors, dequantized on loading."""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from llm_jax import CheckpointError
from llm_jax.attention import rope_frequencies
from llm_jax.checkpoint import (
    Checkpoint,
    Contents,
    Piece,
    TensorInfo,
    pieces_of,
    table_shapes,
)
from llm_jax.config import Config
from llm_jax.extras import need
from llm_jax.families import FAMILIES, GGUF_NAMES
from llm_jax.gguf_config import ARCHITECTURES, NEEDED, from_gguf
from llm_jax.gguf_header import Header, TensorRecord, layout_problems, read_header
from llm_jax.gguf_tokenizer import from_metadata
from llm_jax.rope import Llama3Rope, RopeScaling
from llm_jax.tokenizer import Tokenizer
from llm_jax.untrusted import require_file, unreadable
from llm_jax.values import ConfigError, Values, short

_PARTS = ("split.count", 0, 2**16, 0)
MERGE = "put them together with `llama-gguf-split --merge FIRST_PART MODEL.gguf`"
"""What to do with the parts of a split file."""


@dataclasses.dataclass(frozen=True)
class GGUF(Checkpoint):
    """One GGUF file of a family in `llm_jax.families`."""

    path: Path

    names: ClassVar = GGUF_NAMES
    dtypes: ClassVar = frozenset(
        ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
        + ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
    )
    harmless: ClassVar = re.compile(r"^rope_freqs\.weight$")

    def config(self, dtype: str | None = None) -> Config:
        arch = self.metadata.get("general.architecture")
        if arch not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(
                f"{self.path}: architecture is {short(arch)}; supported are {known}"
            )
        start = f"{arch}."
        inside = {k.removeprefix(start): v for k, v in self.metadata.items() if k.startswith(start)}
        missing = [start + key for key in NEEDED.values() if inside.get(key) is None]
        table = self.header.tensors.get(self.names["embed_VD"])
        if table is None:
            missing.append(self.names["embed_VD"])
        if missing:
            raise CheckpointError(f"{self.path} lacks {', '.join(missing)}")
        values, tensors = Values(inside, start), self.header.tensors
        try:
            cfg = from_gguf(arch, values, table.shape[0], tensors, dtype)
            return dataclasses.replace(cfg, rope_scaling=self._rope_scaling(cfg))
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def _rope_scaling(self, cfg: Config) -> RopeScaling | None:
        """The scaling that the metadata name, or Llama 3.1's, recovered from the divisors of the
        frequencies that GGUF stores."""
        for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
            if name in self.header.tensors:
                raise ConfigError(f"{name}: long rope in GGUF files is not supported; take the "
                                  "safetensors folder")  # fmt: skip
        tensor = self.header.tensors.get("rope_freqs.weight")
        if tensor is None:
            return cfg.rope_scaling
        plain = rope_frequencies(dataclasses.replace(cfg, rope_scaling=None))
        stored = np.zeros(0)
        if (
            tensor.dtype == "F32"
            and tensor.shape == plain.shape
            and tensor.stop <= len(self._bytes)
        ):
            stored = self.reader(_info(self.path, tensor), "", cfg)(0, tensor.shape[0])
        for known in (None, *(Llama3Rope(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))):
            divisors = plain / rope_frequencies(dataclasses.replace(cfg, rope_scaling=known))
            if stored.shape == divisors.shape and np.allclose(stored, divisors, rtol=1e-4):
                return known
        raise CheckpointError(
            f"{self.path}: rope_freqs.weight is not Llama 3.1's scaling (factor 8) or 3.2's (32)"
        )

    def pieces(self, field: str, cfg: Config, layer: int | None = None) -> list[Piece]:
        family = FAMILIES[cfg.family]
        names = {**self.names, **family.gguf_names}
        shape = (table_shapes(cfg) if layer is None else cfg.layer_shapes(layer))[field]
        if not field.startswith("expert_"):
            return pieces_of(field, shape, cfg, names, family.gguf_fused, layer)
        parts, turn = [(field, slice(None))], len(shape) == 3
        if field.startswith("expert_gate_up"):
            half, rest = shape[-1] // 2, field.removeprefix("expert_gate_up")
            parts = [(f"expert_gate{rest}", slice(half)), (f"expert_up{rest}", slice(half, None))]
            shape = (*shape[:-1], half)
        stored = (*shape[:-2], shape[-1], shape[-2]) if turn else shape
        return [
            Piece(names[part].format(layer), stored, at=(..., columns), turn=turn)
            for part, columns in parts
        ]

    def tokenizer(self) -> Tokenizer:
        return self.with_rows(from_metadata(self.metadata, self.path))

    @property
    def metadata(self) -> dict[str, Any]:
        """The file's key/value pairs; arrays are lists."""
        return self.header.metadata

    @functools.cached_property
    def header(self) -> Header:
        """Metadata and tensor records; raises `CheckpointError` for a file cut inside them."""
        _gguf()  # a missing package is no fault of the file
        try:
            header = read_header(self.path, self._bytes)
        except CheckpointError:
            raise
        except Exception as error:  # damaged bytes fail in any way; the cause is always the file
            raise CheckpointError(
                f"{self.path} is truncated or corrupt: its header cannot be read ({error}); "
                "download it again"
            ) from error
        self._check_kind(Values(header.metadata))
        return header

    def _check_kind(self, values: Values) -> None:
        """Raises for a file that is not a whole model."""
        try:
            kind, parts = values.text("general.type", "model"), values.integer(*_PARTS)
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        if kind != "model":
            raise CheckpointError(f"{self.path} holds no model: its general.type is {short(kind)}")
        if parts > 1:
            raise CheckpointError(f"{self.path} is one of {parts} parts of a split file; {MERGE}")

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
        tensors = {name: _info(self.path, t) for name, t in self.header.tensors.items()}
        return Contents(tensors, layout_problems(self.header, len(self._bytes), self.path.name))

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
        if len(tensor.shape) == 3:  # a stack of experts, read an expert at a time
            inner = raw.reshape(*tensor.shape[:2], -1)
            return lambda start, stop: gguf.dequantize(inner[start:stop], kind)
        if FAMILIES[cfg.family].paired_rows and field in ("q", "k"):
            pairs = np.arange(tensor.shape[0]).reshape(-1, cfg.head_dim // 2, 2)
            order = pairs.swapaxes(1, 2).reshape(-1)
            return lambda start, stop: gguf.dequantize(raw[order[start:stop]], kind)
        return lambda start, stop: gguf.dequantize(raw[start:stop], kind)


def _gguf() -> ModuleType:
    return need("gguf", "models", "reading GGUF files")


def _info(path: Path, record: TensorRecord) -> TensorInfo:
    return TensorInfo(path, record.name, record.shape, record.dtype)
