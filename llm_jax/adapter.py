"""LoRA adapters: folders as peft writes them, merged into a checkpoint while it is read.

A matrix W becomes W + scaling B A, with sums in float32 and one rounding to the model's dtype, as
`merge_and_unload` of peft has it. On a quantized base, W is what it dequantizes to.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import CheckpointError
from llm_jax.digest import file_digest, json_digest
from llm_jax.leftovers import plain_name
from llm_jax.safetensors_file import FLOATS, Part, parts_of
from llm_jax.untrusted import read_object
from llm_jax.values import ConfigError, Values, short

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_SAFE_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base model's weights as they are."""
_KNOWN = frozenset(
    ("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config")
    + ("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern")
    + ("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config")
    + ("megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r")
    + ("rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora")
    + ("use_rslora",)
)
"""Settings that are read here, or that matter for training alone."""
_PIECE = re.compile(
    r"(?P<module>.+)\.(?P<piece>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?|base_layer\.weight)"
)
_LONGEST_PATTERN, _REPEATS = 200, 2
"""The most characters of a pattern for modules, and the most repetitions that it may have."""


@dataclasses.dataclass(frozen=True)
class Delta:
    """What is added to one matrix."""

    a: Part
    """[rank, in]; of an embedding table, [rank, vocabulary]."""
    b: Part
    """[out, rank]; of an embedding table, [model, rank]."""
    scaling: float
    magnitude: Part | None = None
    """The norms of the rows after merging (DoRA)."""
    table: bool = False
    """Whether it is for an embedding table."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix in the file, [out, in]."""
        a, b = self.a.shape[1], self.b.shape[0]
        return (a, b) if self.table else (b, a)

    def merged(self, rows: Callable, dtype: str) -> Callable[[int, int], np.ndarray]:
        """A function (start, stop) -> those rows after merging, in `dtype`."""
        a, b, scaling, kind = self.a.floats(), self.b.floats(), self.scaling, np.dtype(dtype)
        norms = None if self.magnitude is None else self.magnitude.floats().reshape(-1)

        def read(start: int, stop: int) -> np.ndarray:
            with np.errstate(over="ignore", invalid="ignore"):  # named by whoever reads the rows
                base = rows(start, stop).astype(kind).astype(np.float32)
                if self.table:  # peft rounds what it adds to a table, too
                    more = ((b @ a[:, start:stop]).T * scaling).astype(kind).astype(np.float32)
                    return (base + more).astype(kind)
                found = base + (b[start:stop] @ a) * scaling
                if norms is not None:
                    length = np.sqrt(np.square(found, dtype=np.float64).sum(axis=1))
                    found *= (norms[start:stop] / length.astype(np.float32))[:, None]
                return found.astype(kind)

        return read


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A folder with adapter_config.json and adapter_model.safetensors."""

    path: Path

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """adapter_config.json, after a check that all of it is understood."""
        if not (self.path / CONFIG).exists():
            raise CheckpointError(f"{self.path} is no adapter: it has no {CONFIG}")
        found = read_object(self.path / CONFIG)
        try:
            values = Values(found)
            if values.text("peft_type", None) != "LORA":
                values.refuse("peft_type", "LORA; no other kind of adapter is supported")
            if values.text("bias", "none") != "none":
                values.refuse("bias", "none; adapters with biases are not supported")
            if found.get("init_lora_weights", True) not in _SAFE_STARTS:
                values.refuse(
                    "init_lora_weights",
                    "true, false, gaussian, orthogonal or eva; others change the base model: "
                    "convert the adapter to a plain one with peft",
                )
            for name, value in found.items():
                if name not in _KNOWN and value:
                    values.refuse(name, "nothing; this setting is not supported")
            values.integer("r", 1, 2**16, 8)
            values.number("lora_alpha", -1e6, 1e6, 8)
            for name in ("use_dora", "use_rslora"):
                values.flag(name)
        except ConfigError as error:
            raise CheckpointError(f"{self.path / CONFIG}: {error}") from error
        return found

    @property
    def base(self) -> str | None:
        """The path or the repository of the model that it was trained on, where it says so."""
        name = self.settings.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @functools.cached_property
    def _parts(self) -> dict[tuple[str, str], Part]:
        """(module, piece) -> tensor; tensors that replace the model's own have an empty piece."""
        _ = self.settings  # what cannot be merged is named before anything is read
        if not (self.path / WEIGHTS).exists():
            raise CheckpointError(
                f"{self.path} has no {WEIGHTS}; where there is an adapter_model.bin, load it with "
                "peft and save it again (save_pretrained)"
            )
        found = {}
        for raw, part in parts_of(self.path / WEIGHTS).items():
            name = plain_name(raw)
            piece = _PIECE.fullmatch(name)
            key = (name, "") if piece is None else (piece["module"], piece["piece"])
            if key[1] == "base_layer.weight":
                key = f"{key[0]}.weight", ""
            if key in found:
                raise CheckpointError(f"{self.path / WEIGHTS}: {raw} is there twice")
            if part.dtype not in FLOATS:
                raise CheckpointError(
                    f"{self.path / WEIGHTS}: {raw} is stored as {part.dtype}; expected "
                    f"{', '.join(FLOATS)}"
                )
            found[key] = part
        return found

    @functools.cached_property
    def saved(self) -> dict[str, Part]:
        """Tensors that take the place of the model's own, by name."""
        return {name: part for (name, piece), part in self._parts.items() if not piece}

    @functools.cached_property
    def deltas(self) -> dict[str, Delta]:
        """What is added to each matrix, by the name of its weight."""
        modules: dict[str, dict[str, Part]] = {}
        for (module, piece), part in self._parts.items():
            if piece:
                modules.setdefault(module, {})[piece.removesuffix(".weight")] = part
        return {f"{name}.weight": self._delta(name, own) for name, own in modules.items()}

    def _delta(self, module: str, own: dict[str, Part]) -> Delta:
        where = f"{self.path / WEIGHTS}: {module}"
        table = "lora_embedding_A" in own or "lora_embedding_B" in own
        names = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A", "lora_B")
        if missing := [name for name in names if name not in own]:
            raise CheckpointError(f"{where} has no {missing[0]}; save the adapter again")
        a, b = (own[name] for name in names)
        rank = int(self._setting("rank_pattern", module, self.settings.get("r", 8)))
        flat = len(a.shape) != 2 or len(b.shape) != 2
        if flat or a.shape[0] != rank or b.shape[1] != rank:
            raise CheckpointError(
                f"{where} has {names[0]} of shape {list(a.shape)} and {names[1]} of shape "
                f"{list(b.shape)}; expected [{rank}, …] and […, {rank}], the rank of {CONFIG}"
            )
        alpha = float(self._setting("alpha_pattern", module, self.settings.get("lora_alpha", 8)))
        rslora, dora = (self.settings.get(name) for name in ("use_rslora", "use_dora"))
        scaling = alpha / (math.sqrt(rank) if rslora else rank)
        magnitude = own.get("lora_magnitude_vector")
        if bool(dora) != (magnitude is not None):
            says = "is missing" if dora else "is there, and use_dora is false"
            raise CheckpointError(f"{where}: lora_magnitude_vector {says}")
        if dora and table:
            raise CheckpointError(f"{where}: DoRA of an embedding table is not supported")
        if magnitude is not None and math.prod(magnitude.shape) != b.shape[0]:
            raise CheckpointError(
                f"{where}: lora_magnitude_vector has shape {list(magnitude.shape)}; expected "
                f"{b.shape[0]} numbers"
            )
        return Delta(a, b, scaling, magnitude, table)

    def _setting(self, name: str, module: str, default: Any) -> Any:
        """The value of rank_pattern or alpha_pattern for a module: of the first key that fits."""
        patterns = self.settings.get(name) or {}
        values = Values(patterns if isinstance(patterns, dict) else {name: patterns}, f"{name}.")
        try:
            for key in values:
                if _pattern(key, name).match(module):
                    whole = name == "rank_pattern"
                    return values.integer(key, 1, 2**16) if whole else values.number(key, -1e6, 1e6)
        except ConfigError as error:
            raise CheckpointError(f"{self.path / CONFIG}: {error}") from error
        return default

    def saves(self, module: str) -> bool:
        """Whether the module is one of modules_to_save, and so a copy of its own."""
        names = self.settings.get("modules_to_save") or []
        return isinstance(names, list) and any(module.endswith(str(name)) for name in names)

    def digest(self) -> str:
        """What identifies the adapter by its content."""
        return json_digest([file_digest(self.path / WEIGHTS), self.settings])

    def __str__(self) -> str:
        ranks = sorted({delta.a.shape[0] for delta in self.deltas.values()})
        kind = "DoRA" if self.settings.get("use_dora") else "LoRA"
        saved = f", {len(self.saved)} tensors replaced" if self.saved else ""
        rank = " and ".join(map(str, ranks)) or "0"
        return f"{self.path.name} ({kind} of rank {rank} on {len(self.deltas)} matrices{saved})"


def _pattern(key: str, name: str) -> re.Pattern:
    """What peft makes of a key: it matches the end of a module's name.

    Raises ConfigError for one that could take for ever: a repetition of a repetition, or many.
    """
    repeats = len(re.findall(r"[*+?{]", key))
    if len(key) > _LONGEST_PATTERN or repeats > _REPEATS or re.search(r"\)[*+?{]|[*+}][*+{]", key):
        raise ConfigError(f"{name} has the pattern {short(key)}; expected names of modules")
    try:
        return re.compile(rf"(?:.*\.)?(?:{key})$")
    except re.error as error:
        raise ConfigError(f"{name} has the pattern {short(key)}: {error}") from error


def is_adapter(path: str | Path) -> bool:
    """Whether a path is the folder of an adapter, without a model of its own beside it."""
    path = Path(path).expanduser()
    if not (path / CONFIG).exists() or (path / "config.json").exists():
        return False
    return not {file.name for file in path.glob("*.safetensors")} - {WEIGHTS}
