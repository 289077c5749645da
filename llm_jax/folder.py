"""Checkpoints as Hugging Face keeps them: a folder with config.json and safetensors files."""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from llm_jax import CheckpointError
from llm_jax.checkpoint import Checkpoint, Contents, TensorInfo
from llm_jax.config import Config, ConfigError, from_hf
from llm_jax.extras import need
from llm_jax.tokenizer import Tokenizer, from_folder
from llm_jax.untrusted import inside, read_object, require_file, unreadable

INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class SafetensorsFolder(Checkpoint):
    """config.json and one or more safetensors files, named as `transformers` names them."""

    path: Path

    names: ClassVar = dict(
        embed_VD="model.embed_tokens.weight",
        norm="model.norm.weight",
        head_DV="lm_head.weight",
        attn_norm="model.layers.{}.input_layernorm.weight",
        mlp_norm="model.layers.{}.post_attention_layernorm.weight",
        gate="model.layers.{}.mlp.gate_proj.weight",
        up="model.layers.{}.mlp.up_proj.weight",
        down="model.layers.{}.mlp.down_proj.weight",
        **{name: f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkvo"},
        **{f"{name}_bias": f"model.layers.{{}}.self_attn.{name}_proj.bias" for name in "qkv"},
        **{f"{name}_norm": f"model.layers.{{}}.self_attn.{name}_norm.weight" for name in "qk"},
    )
    dtypes: ClassVar = frozenset(("BF16", "F16", "F32"))
    harmless: ClassVar = re.compile(r"rotary_emb\.inv_freq$")

    def config(self, dtype: str | None = None) -> Config:
        if not (self.path / "config.json").exists():
            raise CheckpointError(
                f"{self.path} has no config.json; download it from the model's repository too"
            )
        hf = read_object(self.path / "config.json")
        if quantization := hf.get("quantization_config"):
            raise CheckpointError(
                f"{self.path}: the weights are quantized ({quantization.get('quant_method')}); "
                "use the unquantized repository or a GGUF file"
            )
        try:
            return from_hf(hf, dtype)
        except (ConfigError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path / 'config.json'}: {error}") from error

    def tokenizer(self) -> Tokenizer:
        return from_folder(self.path)

    @property
    def text_files(self) -> tuple[Path, ...]:
        kinds = (".json", ".jinja", ".model", ".txt")
        return tuple(sorted(f for f in self.path.iterdir() if f.suffix in kinds and f.is_file()))

    @functools.cached_property
    def contents(self) -> Contents:
        _safetensors()  # a missing package is no fault of a file
        problems, tensors, lost = [], {}, set()
        places = (
            read_object(self.path / INDEX).get("weight_map", {})
            if (self.path / INDEX).exists()
            else {}
        )
        # Without an index: model.safetensors alone, because some repositories add a second copy.
        whole = [f for f in ("model.safetensors",) if (self.path / f).exists()]
        files = sorted(set(places.values())) or whole
        for name in files or sorted(file.name for file in self.path.glob("*.safetensors")):
            if not inside(self.path, name, INDEX).exists():
                problems.append(f"{name} is missing, though {INDEX} names it; download it")
                lost.add(name)
                continue
            try:
                shard = self._handle(self.path / name)
            except CheckpointError as error:
                problems.append(str(error))
                lost.add(name)
                continue
            except Exception as error:  # SafetensorError
                problems.append(f"{name} is truncated or corrupt ({error}); download it again")
                lost.add(name)
                continue
            for key in shard.keys():  # noqa: SIM118 - a safe_open handle is not iterable
                if key in tensors:
                    problems.append(f"{name}: {key} is also in {tensors[key].file.name}")
                    continue
                header = shard.get_slice(key)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                tensors[key] = TensorInfo(self.path / name, key, shape, dtype)
        return Contents(tensors, tuple(problems), places, frozenset(lost))

    def reader(
        self, tensor: TensorInfo, field: str, cfg: Config
    ) -> Callable[[int, int], np.ndarray]:
        rows = self._handle(tensor.file).get_slice(tensor.name)
        return lambda start, stop: rows[start:stop]

    @functools.cached_property
    def _handles(self) -> dict[Path, Any]:
        return {}

    def _handle(self, file: Path):
        """The file's open (memory-mapped) safetensors handle."""
        if file not in self._handles:
            require_file(file)
            try:
                self._handles[file] = _safetensors().safe_open(str(file), framework="numpy")
            except OSError as error:  # too many open files, no permission: no fault of the bytes
                raise unreadable(file, error) from error
        return self._handles[file]


def _safetensors() -> ModuleType:
    return need("safetensors", "models", "reading safetensors files")
