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
from llm_jax.gguf_header import Header, TensorRecord
from llm_jax.gguf_parts import Part, open_parts
from llm_jax.gguf_tokenizer import from_metadata
from llm_jax.rope import Llama3Rope, RopeScaling
from llm_jax.tokenizer import Tokenizer
from llm_jax.values import ConfigError, Values, short


@dataclasses.dataclass(frozen=True)
class GGUF(Checkpoint):
    """A GGUF file of a family in `llm_jax.families`, or the first part of a split one."""

    path: Path

    names: ClassVar = GGUF_NAMES
    low_bit: ClassVar = frozenset(
        ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
        + ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")
        + ("TQ1_0", "TQ2_0", "MXFP4", "NVFP4")
    )
    """What the gguf package dequantizes."""
    dtypes: ClassVar = low_bit | {"F32", "F16", "BF16"}
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
        table = self.contents.tensors.get(self.names["embed_VD"])
        if table is None:
            missing.append(self.names["embed_VD"])
        if missing:
            raise CheckpointError(f"{self.path} lacks {', '.join(missing)}")
        values, tensors = Values(inside, start), self.contents.tensors
        try:
            cfg = from_gguf(arch, values, table.shape[0], tensors, dtype)
            return dataclasses.replace(cfg, rope_scaling=self._rope_scaling(cfg))
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def _rope_scaling(self, cfg: Config) -> RopeScaling | None:
        """The scaling that the metadata name, or Llama 3.1's, recovered from the divisors of the
        frequencies that GGUF stores."""
        for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
            if name in self.contents.tensors:
                raise ConfigError(f"{name}: long rope in GGUF files is not supported; take the "
                                  "safetensors folder")  # fmt: skip
        tensor = self.contents.tensors.get("rope_freqs.weight")
        if tensor is None:
            return cfg.rope_scaling
        plain = rope_frequencies(dataclasses.replace(cfg, rope_scaling=None))
        stored = np.zeros(0)
        record, data = self._record(tensor)
        if tensor.dtype == "F32" and tensor.shape == plain.shape and record.stop <= len(data):
            stored = self.reader(tensor, "", cfg)(0, tensor.shape[0])
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
    def parts(self) -> tuple[Part, ...]:
        """The file, or all the files that it is split into."""
        _gguf()  # a missing package is no fault of the file
        return open_parts(self.path)

    @property
    def header(self) -> Header:
        """Metadata and tensor records of the first file."""
        return self.parts[0].header

    @property
    def weight_files(self) -> set[Path]:
        return {part.path for part in self.parts}

    @functools.cached_property
    def contents(self) -> Contents:
        tensors, problems = {}, []
        for part in self.parts:
            problems += part.problems()
            for name, t in part.header.tensors.items():
                if name in tensors:
                    problems.append(f"{part.path.name}: {name} is also in {tensors[name].file}")
                bits = None
                if t.dtype in self.low_bit and t.row_bytes is not None:
                    bits = 8 * t.row_bytes / t.shape[-1]
                tensors[name] = TensorInfo(part.path, name, t.shape, t.dtype, bits)
        return Contents(tensors, tuple(problems))

    def _record(self, tensor: TensorInfo) -> tuple[TensorRecord, np.ndarray]:
        """Where a tensor lies, and the bytes of its file."""
        (part,) = (part for part in self.parts if part.path == tensor.file)
        return part.header.tensors[tensor.name], part.data

    def reader(
        self, tensor: TensorInfo, field: str, cfg: Config
    ) -> Callable[[int, int], np.ndarray]:
        """Rows of a tensor in float32. llama files store q and k rows so that rotated pairs are
        neighbours; a head's rows 0 2 4 … 1 3 5 … of the file are ours in order."""
        gguf = _gguf()
        record, data = self._record(tensor)
        kind = gguf.GGMLQuantizationType[tensor.dtype]
        raw = data[record.start : record.stop]
        if len(tensor.shape) == 1:
            return lambda start, stop: gguf.dequantize(raw[None], kind)[0, start:stop]
        raw = raw.reshape(*tensor.shape[:-1], -1)
        if FAMILIES[cfg.family].paired_rows and field in ("q", "k"):
            pairs = np.arange(tensor.shape[0]).reshape(-1, cfg.head_dim // 2, 2)
            order = pairs.swapaxes(1, 2).reshape(-1)
            return lambda start, stop: gguf.dequantize(raw[order[start:stop]], kind)
        return lambda start, stop: gguf.dequantize(raw[start:stop], kind)


def _gguf() -> ModuleType:
    return need("gguf", "models", "reading GGUF files")
