"""Checkpoints as Hugging Face keeps them: a folder with config.json and safetensors files."""

import dataclasses
import functools
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from llm_jax import CheckpointError
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
from llm_jax.families import FAMILIES
from llm_jax.families.family import HF_NAMES
from llm_jax.hf_config import from_hf
from llm_jax.tokenizer import Tokenizer, from_folder
from llm_jax.untrusted import inside, read_object, require_file, unique, unreadable
from llm_jax.values import ConfigError, Values, short

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclasses.dataclass(frozen=True)
class SafetensorsFolder(Checkpoint):
    """config.json and one or more safetensors files, named as `transformers` names them."""

    path: Path

    names: ClassVar = HF_NAMES
    dtypes: ClassVar = frozenset(("BF16", "F16", "F32"))
    harmless: ClassVar = re.compile(r"rotary_emb\.inv_freq$")

    def config(self, dtype: str | None = None) -> Config:
        if not (self.path / "config.json").exists():
            if (self.path / "adapter_config.json").exists():
                raise CheckpointError(
                    f"{self.path} is an adapter, not a model; merge it into its base model first "
                    "(merge_and_unload in peft)"
                )
            raise CheckpointError(
                f"{self.path} has no config.json; download it from the model's repository too"
            )
        hf = read_object(self.path / "config.json")
        try:
            if (quantized := Values(hf).mapping("quantization_config")) is not None:
                raise CheckpointError(
                    f"{self.path}: the weights are quantized "
                    f"({quantized.text('quant_method', None)}); "
                    "use the unquantized repository or a GGUF file"
                )
            cfg = from_hf(hf, dtype)
        except ConfigError as error:
            raise CheckpointError(f"{self.path / 'config.json'}: {error}") from error
        # A head that differs from the table is used, whatever the config says, as in transformers.
        return dataclasses.replace(cfg, tied=cfg.tied and not self.own_head(cfg))

    def tokenizer(self) -> Tokenizer:
        tokenizer = from_folder(self.path)
        eos = tuple(dict.fromkeys((*tokenizer.eos, *self._turn_ends())))
        return self.with_rows(dataclasses.replace(tokenizer, eos=eos))

    def _turn_ends(self) -> list[int]:
        """The ids that end a turn: of generation_config.json, or else of config.json."""
        for name in ("generation_config.json", "config.json"):
            if not (self.path / name).exists():
                continue
            ends = read_object(self.path / name).get("eos_token_id")
            ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
            try:
                found = Values(dict(eos_token_id=ends)).list_of(int, "eos_token_id")
            except ConfigError as error:
                raise CheckpointError(f"{self.path / name}: {error}") from error
            if found:
                return found
        return []

    @property
    def text_files(self) -> tuple[Path, ...]:
        kinds = (".json", ".jinja", ".model", ".txt")
        return tuple(sorted(f for f in self.path.iterdir() if f.suffix in kinds and f.is_file()))

    @functools.cached_property
    def contents(self) -> Contents:
        _safetensors()  # a missing package is no fault of a file
        problems, tensors, lost = [], {}, set()
        files, places = self._weight_files(problems)
        for name in files:
            file = inside(self.path, name, INDEX)
            try:
                if not file.exists():
                    problems.append(f"{name} is missing, though {INDEX} names it; download it")
                    lost.add(name)
                    continue
                shard = self._handle(file)
                _check_names(file)
            except CheckpointError as error:
                problems.append(str(error))
                lost.add(name)
                continue
            except Exception as error:  # SafetensorError, or a name that no file can have
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

    def _weight_files(self, problems: list[str]) -> tuple[list[str], dict[str, str]]:
        """The files that hold the model, and which of them should hold each tensor.

        model.safetensors is the model, as in transformers, whatever an index of other files says.
        Files that could be parts of another model, and adapters, are added to the problems.
        """
        present = {file.name for file in self.path.glob("*.safetensors")}
        places = self._index() if (self.path / INDEX).exists() else {}
        if WHOLE in present and WHOLE not in places.values():
            files, places = {WHOLE}, {}
        else:
            files = set(places.values()) or present
        source = INDEX if places else WHOLE
        for name in sorted(present - files):
            if name == WHOLE or SHARD.fullmatch(name):
                problems.append(
                    f"{name} is here too and may be another model, because {source} is used without"
                    " it; move the files away that are not meant"
                )
        for file in sorted(self.path.glob("adapter_*")):
            problems.append(
                f"{file.name} is an adapter and would not be used; merge it into the model "
                "(merge_and_unload in peft), or move it away"
            )
        return sorted(files), places

    def _index(self) -> dict[str, str]:
        """The index: tensor -> file."""
        places = read_object(self.path / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise CheckpointError(
                f"{self.path / INDEX}: weight_map is {short(places)}; expected an object that "
                "names the file of each tensor"
            )
        for name, file in places.items():
            if not isinstance(file, str) or not file:
                raise CheckpointError(
                    f"{self.path / INDEX}: the file of {short(name)} is {short(file)}; "
                    "expected a name"
                )
        return places

    def gain_offset(self, cfg: Config) -> float:
        return FAMILIES[cfg.family].gain_offset

    def pieces(self, field: str, cfg: Config, layer: int | None = None) -> list[Piece]:
        family = FAMILIES[cfg.family]
        names = family.hf_names
        shape = (table_shapes(cfg) if layer is None else cfg.layer_shapes(layer))[field]
        if not field.startswith("expert_"):
            return pieces_of(field, shape, cfg, names, family.fused, layer)
        if family.stacked_experts:
            name = names[field].format(layer)
            if not field.startswith("expert_gate_up"):
                return [Piece(name, shape)]
            half = shape[-1] // 2  # gate and up take turns in the file's last axis
            first, second = (..., slice(half)), (..., slice(half, None))
            return [
                Piece(name, shape, take=(0, 2), at=first),
                Piece(name, shape, take=(1, 2), at=second),
            ]
        count, inputs, outputs = shape
        parts = [(field, slice(None))]
        if field == "expert_gate_up":
            outputs //= 2
            parts = [("expert_gate", slice(outputs)), ("expert_up", slice(outputs, None))]
        return [
            Piece(names[part].format(layer, e), (outputs, inputs), at=(e, slice(None), columns),
                  turn=True)
            for e in range(count)
            for part, columns in parts
        ]  # fmt: skip

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


def _check_names(file: Path) -> None:
    """Raises ValueError where a safetensors header describes a tensor twice; the last would win."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        json.loads(opened.read(length), object_pairs_hook=unique)


def _safetensors() -> ModuleType:
    return need("safetensors", "models", "reading safetensors files")
