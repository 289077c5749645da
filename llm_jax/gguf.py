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
from llm_jax.checkpoint import Checkpoint, Contents, TensorInfo
from llm_jax.config import EPS, FAMILIES, SIZES, THETA, Config, Llama3Rope
from llm_jax.extras import need
from llm_jax.gguf_header import Header, TensorRecord
from llm_jax.gguf_parts import Part, open_parts
from llm_jax.gguf_tokenizer import from_metadata
from llm_jax.tokenizer import Tokenizer
from llm_jax.values import ConfigError, Values, short

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Supported values of general.architecture; Mistral's files say llama."""

_FACTORS = ("rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor")
"""What scales the rotary positions; llama.cpp reads the second where the first is missing."""
_UNSUPPORTED = ("attention.scale", "logit_scale", "residual_scale", "embedding_scale")


@dataclasses.dataclass(frozen=True)
class GGUF(Checkpoint):
    """A GGUF file of a llama, mistral, qwen2 or qwen3 model, or the first part of a split one."""

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
        try:
            cfg = self._config(arch, Values(inside, start), dtype)
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        return dataclasses.replace(cfg, rope_scaling=self._rope_scaling(cfg))

    def _config(self, arch: str, values: Values, dtype: str | None) -> Config:
        """The description without the scaling of the rotary positions."""
        needed = dict(
            layers="block_count",
            d_model="embedding_length",
            heads="attention.head_count",
            d_ff="feed_forward_length",
            norm_eps="attention.layer_norm_rms_epsilon",
        )
        missing = [f"{arch}.{key}" for key in needed.values() if key not in values]
        table = self.contents.tensors.get(self.names["embed_VD"])
        if table is None:
            missing.append(self.names["embed_VD"])
        if missing:
            raise CheckpointError(f"{self.path} lacks {', '.join(missing)}")
        for name, key in (needed | dict(kv_heads="attention.head_count_kv")).items():
            if values.is_list(key):
                raise ConfigError(f"{name} differs from layer to layer; this is not supported")
        if values.integer("expert_count", 0, 2**16, 0):
            raise ConfigError("mixture of experts; this is not supported")
        if (scaling := values.text("rope.scaling.type", "none")) != "none":
            raise ConfigError(f"rope scaling {short(scaling)} is not supported")
        for key in _FACTORS:
            if values.number(key, 0, 1e6, 1.0) not in (0, 1):
                values.refuse(key, "1; rope scaling is not supported")
        for key in _UNSUPPORTED:
            if key in values:
                values.refuse(key, "none; it is not supported")
        if not values.flag("attention.causal", True):
            values.refuse("attention.causal", "true")
        size = lambda name, key, *default: values.integer(key, 1, SIZES[name], *default)
        d_model, heads = size("d_model", needed["d_model"]), size("heads", needed["heads"])
        head_dim = size("head_dim", "attention.key_length", d_model // heads)
        if (rotated := size("head_dim", "rope.dimension_count", head_dim)) != head_dim:
            raise ConfigError(f"only {rotated} of {head_dim} head dimensions rotate")
        if size("head_dim", "attention.value_length", head_dim) != head_dim:
            values.refuse("attention.value_length", f"{head_dim}, the length of a key")
        vocab = table.shape[0]
        if size("vocab", "vocab_size", vocab) != vocab:
            values.refuse("vocab_size", f"{vocab}, the rows of {table.name}")
        length = size("max_length", "context_length", 2048)
        window = values.integer("attention.sliding_window", 0, SIZES["max_length"], 0)
        qkv_bias, qk_norm = FAMILIES[arch]
        return Config(
            layers=size("layers", needed["layers"]),
            d_model=d_model,
            heads=heads,
            kv_heads=size("kv_heads", "attention.head_count_kv", heads),
            head_dim=head_dim,
            d_ff=size("d_ff", needed["d_ff"]),
            vocab=vocab,
            rope_theta=values.number("rope.freq_base", *THETA, 10_000.0),
            # 9.99999997e-07 in the file is 1e-6
            norm_eps=float(f"{values.number(needed['norm_eps'], *EPS):.6g}"),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            tied=self.names["head_DV"] not in self.contents.tensors,
            max_length=min(length, window or length),
            dtype=dtype or "bfloat16",
            family=arch,
        )

    def _rope_scaling(self, cfg: Config) -> Llama3Rope | None:
        """Llama 3.1's scaling, recovered from the divisors of the frequencies that GGUF stores."""
        tensor = self.contents.tensors.get("rope_freqs.weight")
        if tensor is None:
            return None
        plain = rope_frequencies(cfg)
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
        if self.metadata["general.architecture"] == "llama" and field in ("q", "k"):
            pairs = np.arange(tensor.shape[0]).reshape(-1, cfg.head_dim // 2, 2)
            order = pairs.swapaxes(1, 2).reshape(-1)
            return lambda start, stop: gguf.dequantize(raw[order[start:stop]], kind)
        return lambda start, stop: gguf.dequantize(raw[start:stop], kind)


def _gguf() -> ModuleType:
    return need("gguf", "models", "reading GGUF files")
