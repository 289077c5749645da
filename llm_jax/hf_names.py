"""Parameters by the names that Hugging Face gives them, in a file or in memory."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import LLMError
from llm_jax.checkpoint import Checkpoint, Contents, Piece, TensorInfo, pieces_of, table_shapes
from llm_jax.config import Config
from llm_jax.families import FAMILIES
from llm_jax.families.family import HF_NAMES
from llm_jax.leftovers import plain_name
from llm_jax.params import GAINS, Params, named_parameters
from llm_jax.tokenizer import Tokenizer

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class HFNamed(Checkpoint):
    """A checkpoint whose tensors are called as in `transformers`."""

    names: ClassVar = HF_NAMES
    dtypes: ClassVar = frozenset(_DTYPES.values())
    harmless: ClassVar = re.compile(r"rotary_emb\.inv_freq$")

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


@dataclasses.dataclass(frozen=True, eq=False)
class _Arrays(HFNamed):
    """Tensors in memory."""

    path: Path
    arrays: Mapping[str, Any]

    def config(self, dtype: str | None = None) -> Config:
        raise LLMError("arrays have no config.json")

    def tokenizer(self) -> Tokenizer:
        raise LLMError("arrays have no tokenizer")

    @functools.cached_property
    def contents(self) -> Contents:
        found = {}
        for name, a in self.arrays.items():
            dtype = _DTYPES.get(str(a.dtype), str(a.dtype))
            found[name] = TensorInfo(self.path, name, tuple(a.shape), dtype)
        return Contents(found)

    def reader(self, tensor: TensorInfo, field: str, cfg: Config) -> Callable:
        array = self.arrays[tensor.name]
        return lambda start, stop: np.asarray(array[start:stop])


def params_from_hf(arrays: Mapping[str, Any], cfg: Config) -> Params:
    """The parameters in `cfg.dtype` on the default device, from arrays by their names in
    `transformers`, matrices [out, in].

    `cfg` comes from `llm_jax.hf_config.from_hf` of a config.json. Arrays are NumPy's or JAX's, in
    bfloat16, float16 or float32; prefixes of wrappers are understood. Raises one CheckpointError
    that lists every array that is missing, too many, or of another shape.
    """
    named = {plain_name(name): array for name, array in arrays.items()}
    return _Arrays(Path("the arrays"), named).load(cfg)


def params_to_hf(params: Params, cfg: Config) -> dict[str, np.ndarray]:
    """The arrays of a model by their names in `transformers`, matrices [out, in], in `cfg.dtype`.

    `params_from_hf` of the result gives the same parameters; norms' gains that a family stores less
    one (Gemma) are rounded there. Raises LLMError for parameters that are no arrays, such as
    low-bit ones, which have no such names.
    """
    names = _Arrays(Path("the arrays"), {})
    out: dict[str, np.ndarray] = {}
    for field in table_shapes(cfg):
        _spread(out, field, getattr(params, field), names.pieces(field, cfg), names, cfg)
    for i, layer in enumerate(params.layers):
        named = named_parameters(layer)
        for field in cfg.layer_shapes(i):
            pieces = names.pieces(field, cfg, i)
            _spread(out, field, named.get(field), pieces, names, cfg)
    return out


def _spread(
    out: dict[str, np.ndarray],
    field: str,
    array: Any,
    pieces: list[Piece],
    names: HFNamed,
    cfg: Config,
) -> None:
    """Writes a parameter into the tensors that hold it."""
    if not isinstance(array, jax.Array | np.ndarray):
        kind = "is not there" if array is None else f"is a {type(array).__name__}"
        raise LLMError(
            f"{pieces[0].name}: the parameter {field} {kind}; only a model of plain arrays has "
            "these names"
        )
    value = np.asarray(array)
    if field in GAINS and (offset := names.gain_offset(cfg)):
        value = value.astype(np.float32) - np.float32(offset)
    value = value.astype(jnp.dtype(cfg.dtype))
    for piece in pieces:
        part = value[piece.at]
        part = part.swapaxes(-1, -2) if piece.turn else part
        whole = out.setdefault(piece.name, np.empty(piece.shape, value.dtype))
        first, last = piece.rows or (0, len(whole))
        whole[first:last][..., slice(piece.take[0], None, piece.take[1])] = part
