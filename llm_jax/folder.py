"""Checkpoints as Hugging Face keeps them: a folder with config.json and safetensors files."""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import CheckpointError
from llm_jax.checkpoint import Contents, TensorInfo
from llm_jax.config import Config
from llm_jax.digest import json_digest
from llm_jax.hf_config import from_hf
from llm_jax.hf_names import HFNamed
from llm_jax.leftovers import plain_name
from llm_jax.lowbit import LowBit, Scheme
from llm_jax.lowbit_scaled import scheme_of
from llm_jax.safetensors_file import Part, parts_of, safetensors
from llm_jax.tokenizer import Tokenizer
from llm_jax.tokenizer_files import tokenizer_of
from llm_jax.untrusted import inside, read_object
from llm_jax.values import ConfigError, Values, short

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclasses.dataclass(frozen=True)
class _Files:
    """What the headers of a folder's files say, and what is wrong with the files."""

    parts: dict[str, Part]
    """The tensors; names are without the prefixes of wrappers."""
    problems: tuple[str, ...]
    places: dict[str, str]
    """The file that should hold each tensor, where there is an index."""
    unreadable: frozenset[str]


@dataclasses.dataclass(frozen=True)
class SafetensorsFolder(HFNamed):
    """config.json and one or more safetensors files, named as `transformers` names them."""

    path: Path

    def config(self, dtype: str | None = None) -> Config:
        if not (self.path / "config.json").exists():
            raise CheckpointError(
                f"{self.path} has no config.json; download it from the model's repository too"
            )
        hf = _of_text(read_object(self.path / "config.json"))
        try:
            cfg = from_hf(hf, dtype)
        except ConfigError as error:
            raise CheckpointError(f"{self.path / 'config.json'}: {error}") from error
        _ = self._scheme  # named here where it is not known
        # A head that differs from the table is used, whatever the config says, as in transformers.
        return dataclasses.replace(cfg, tied=cfg.tied and not self.own_head(cfg))

    def tokenizer(self) -> Tokenizer:
        tokenizer = tokenizer_of(self.path)
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
        files, (weights, wrong) = self._files, self._low_bit
        hidden = {part.name for weight in weights.values() for part in weight.parts}
        for name in wrong:  # what is wrong with it is said once, not for each of its parts
            stem = name.rpartition(".")[0]
            for part in files.parts:
                own = part.rpartition(".")[0] == stem and not part.endswith((".weight", ".bias"))
                if own or part == name or part.startswith((f"{name}_", f"{name}.")):
                    hidden.add(part)
        found = {
            name: TensorInfo(part.file, name, part.shape, part.dtype)
            for name, part in files.parts.items()
            if name not in hidden
        }
        for name, weight in weights.items():
            file = weight.parts[0].file
            found[name] = TensorInfo(file, name, weight.shape, weight.form, weight.bits)
        problems = (*files.problems, *wrong.values())
        return Contents(found, problems, files.places, files.unreadable, frozenset(wrong))

    def left_out(self, cfg: Config) -> dict[str, str]:
        needed, low = self.needed(cfg), self._low_bit[0]
        zero = {}
        for name, tensor in self.contents.tensors.items():
            stem = name.removesuffix("bias")
            extra = name not in needed and stem != name and f"{stem}weight" in low
            if extra and not self.reader(tensor, "", cfg)(0, tensor.shape[0]).any():
                zero[name] = "biases of zero"  # GPTQ's tools write them for every matrix
        return super().left_out(cfg) | zero

    @property
    def weight_files(self) -> set[Path]:
        return {part.file for part in self._files.parts.values()}

    def digest(self) -> str:
        quantization = self._quantization
        if quantization is None:
            return super().digest()
        return json_digest([super().digest(), quantization])  # it says what the bytes mean

    @functools.cached_property
    def _quantization(self) -> dict[str, Any] | None:
        """How config.json says that the weights are quantized."""
        if not (self.path / "config.json").exists():
            return None
        return _of_text(read_object(self.path / "config.json")).get("quantization_config") or None

    @functools.cached_property
    def _scheme(self) -> Scheme | None:
        """How the weights are quantized, if they are."""
        try:
            given = Values(dict(quantization_config=self._quantization))
            config = given.mapping("quantization_config")
            return None if config is None else scheme_of(config)
        except ConfigError as error:
            raise CheckpointError(f"{self.path / 'config.json'}: {error}") from error

    @functools.cached_property
    def _low_bit(self) -> tuple[dict[str, LowBit], dict[str, str]]:
        """(the weights in a low-bit form by name, what is wrong with others by name)."""
        return ({}, {}) if self._scheme is None else self._scheme.weights(self._files.parts)

    @functools.cached_property
    def _files(self) -> _Files:
        """What the headers of the files say."""
        safetensors()  # a missing package is no fault of a file
        problems, parts, lost = [], {}, set()
        files, places = self._weight_files(problems)
        for name in files:
            file = inside(self.path, name, INDEX)
            try:
                if not file.exists():
                    problems.append(f"{name} is missing, though {INDEX} names it; download it")
                    lost.add(name)
                    continue
                found = parts_of(file)
            except (CheckpointError, OSError, ValueError) as error:  # or a name no file can have
                problems.append(str(error))
                lost.add(name)
                continue
            for raw, part in found.items():
                key = plain_name(raw)
                if key in parts:
                    problems.append(f"{name}: {raw} is also in {parts[key].file.name}")
                    continue
                parts[key] = dataclasses.replace(part, name=key)
        places = {plain_name(raw): file for raw, file in places.items()}
        return _Files(parts, tuple(problems), places, frozenset(lost))

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
                f"{file.name} is an adapter and would not be used; move it to a folder of its "
                "own, and pass that as the adapter (--adapter) if it is meant"
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

    def reader(
        self, tensor: TensorInfo, field: str, cfg: Config
    ) -> Callable[[int, int], np.ndarray]:
        if (weight := self._low_bit[0].get(tensor.name)) is not None:
            return weight.open()
        rows = self._files.parts[tensor.name].array()
        return lambda start, stop: rows[start:stop]


def _of_text(hf: dict[str, Any]) -> dict[str, Any]:
    """The description of the language model, where config.json has one of several models."""
    text = hf.get("text_config")
    if not isinstance(text, dict) or "num_hidden_layers" in hf or "model_type" not in text:
        return hf
    outer = ("torch_dtype", "dtype", "tie_word_embeddings", "quantization_config", "eos_token_id")
    return {name: hf[name] for name in outer if name in hf} | text
