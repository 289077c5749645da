"""A checkpoint together with an adapter: what it reads is merged."""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llm_jax import CheckpointError
from llm_jax.adapter import WEIGHTS, Adapter
from llm_jax.checkpoint import Checkpoint, Contents, Piece, TensorInfo
from llm_jax.config import Config
from llm_jax.digest import json_digest
from llm_jax.families import FAMILIES
from llm_jax.families.family import HF_NAMES
from llm_jax.params import GAINS
from llm_jax.tokenizer import Tokenizer


class Adapted(Checkpoint):
    """The model of `base`, merged with `adapter`. Its tokenizer is the base model's."""

    def __init__(self, base: Checkpoint, adapter: Adapter):
        self.base, self.adapter = base, adapter
        self.path: Path = base.path
        self.names, self.dtypes, self.harmless = base.names, base.dtypes, base.harmless

    def config(self, dtype: str | None = None) -> Config:
        cfg = self.base.config(dtype)
        return dataclasses.replace(cfg, tied=cfg.tied and not self.own_head(cfg))

    def tokenizer(self) -> Tokenizer:
        return self.with_rows(self.base.tokenizer())

    @property
    def text_files(self) -> tuple[Path, ...]:
        return self.base.text_files

    @property
    def weight_files(self) -> set[Path]:
        return self.base.weight_files | {self.adapter.path / WEIGHTS}

    def digest(self) -> str:
        return json_digest([self.base.digest(), self.adapter.digest()])

    def pieces(self, field: str, cfg: Config, layer: int | None = None) -> list[Piece]:
        return self.base.pieces(field, cfg, layer)

    def gain_offset(self, cfg: Config) -> float:
        return self.base.gain_offset(cfg)

    def left_out(self, cfg: Config) -> dict[str, str]:
        return self.base.left_out(cfg) | super().left_out(cfg)

    def notices(self, cfg: Config) -> tuple[str, ...]:
        return *super().notices(cfg), f"merged with the adapter {self.adapter}"

    @functools.cached_property
    def contents(self) -> Contents:
        found, tensors = self.base.contents, dict(self.base.contents.tensors)
        file, problems = self.adapter.path.name + "/" + WEIGHTS, []
        for name, part in self.adapter.saved.items():
            own = self._own_name(name)
            if own in self._tied and not self.adapter.saves(name.removesuffix(".weight")):
                continue  # a copy of the table, which peft loads into the table again
            known = tensors.get(own)
            shape = part.shape if known is None else known.shape
            if part.shape != shape:
                problems.append(
                    f"{file}: {name} has shape {list(part.shape)}; expected {list(shape)}"
                )
            tensors[own] = TensorInfo(part.file, own, shape, part.dtype)
        for name, delta in self.adapter.deltas.items():
            own = self._own_name(name)
            known = tensors.get(own)
            if own in self._tied:
                problems.append(
                    f"{file}: {name} is changed, and this model's head is its embedding table"
                )
            elif known is None:
                problems.append(f"{file}: {name} is not in {self.path.name}")
            elif known.shape != delta.shape:
                problems.append(
                    f"{file}: {name} is changed by {list(delta.shape)} numbers; expected "
                    f"{list(known.shape)}"
                )
        if self._tied and self.adapter.saves(self._module("embed_VD")):
            problems += self._untied()
        return dataclasses.replace(found, tensors=tensors, problems=(*found.problems, *problems))

    def _untied(self) -> list[str]:
        head = self._module("head_DV")
        if self.adapter.saves(head):
            return []
        return [
            f"{self.adapter.path.name}: modules_to_save has the embedding table and not {head}, "
            "which would be the table of before; name both"
        ]

    def _module(self, field: str) -> str:
        return HF_NAMES[field].removesuffix(".weight")

    @functools.cached_property
    def _tied(self) -> frozenset[str]:
        """The name of the output head, if the base model's is its embedding table."""
        return frozenset((self.names["head_DV"],) if self.base.config().tied else ())

    @functools.cached_property
    def _own_names(self) -> dict[str, str]:
        """The adapter's names of tensors -> those of a GGUF file."""
        family = FAMILIES[self.base.config().family]
        own_names = self.names | dict(family.gguf_names)
        pairs = [(name, own_names.get(field)) for field, name in family.hf_names.items()]
        joined = {fields: name for name, fields in family.gguf_fused.items()}
        pairs += [(name, joined.get(fields)) for name, fields in family.fused.items()]
        patterns = [
            (re.compile(re.escape(theirs).replace(r"\{\}", r"(\d{1,9})")), own)
            for theirs, own in pairs
            if own is not None and theirs.count("{}") == own.count("{}")  # experts are stacked
        ]
        found = {}
        for name in (*self.adapter.saved, *self.adapter.deltas):
            for pattern, own in patterns:
                if match := pattern.fullmatch(name):
                    found[name] = own.format(*match.groups())
        return found

    def _own_name(self, name: str) -> str:
        return name if name in self.base.contents.tensors else self._own_names.get(name, name)

    @functools.cached_property
    def _changes(self) -> dict[str, str]:
        """Name of the base model's file -> the adapter's name, of matrices that are changed."""
        return {self._own_name(name): name for name in self.adapter.deltas}

    def own_head(self, cfg: Config) -> bool:
        head = self.contents.tensors.get(self.names["head_DV"])
        if head is not None and head.file == self.adapter.path / WEIGHTS:
            return True
        return self.base.own_head(cfg)

    def reader(
        self, tensor: TensorInfo, field: str, cfg: Config
    ) -> Callable[[int, int], np.ndarray]:
        if tensor.file == self.adapter.path / WEIGHTS:
            (part,) = (
                part
                for name, part in self.adapter.saved.items()
                if self._own_name(name) == tensor.name
            )
            array, offset = part.array(), 0.0
            if field in GAINS:  # an adapter has Hugging Face's gains, GGUF files have them added to
                offset = FAMILIES[cfg.family].gain_offset - self.gain_offset(cfg)
            rows = lambda start, stop: array[start:stop]
            if offset:
                rows = lambda start, stop: array[start:stop].astype(np.float32) + np.float32(offset)
        else:
            rows = self.base.reader(tensor, field, cfg)
        if (name := self._changes.get(tensor.name)) is None:
            return rows
        return self.adapter.deltas[name].merged(rows, cfg.dtype)


def adapted(base: Checkpoint, adapter: str | Path) -> Adapted:
    """The checkpoint merged with the adapter in that folder."""
    path = Path(adapter).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; expected one with adapter_config.json")
    return Adapted(base, Adapter(path))
