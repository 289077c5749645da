"""A model on disk: checked against its description first, then read layer by layer.

What the headers say is compared with the model, and one error says everything that is wrong. Peak
memory while reading is what `place_layer` keeps and one layer. The formats are in `llm_jax.folder`
and `llm_jax.gguf`; `llm_jax.formats.open_checkpoint` tells which one a path has.
"""

import abc
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from llm_jax import CheckpointError, shown
from llm_jax.config import Config
from llm_jax.digest import file_digest, files_digest, json_digest
from llm_jax.leftovers import leftover, told
from llm_jax.params import GAINS, Layer, Params, abstract, layer_from
from llm_jax.tokenizer import Tokenizer

_ROWS = 512
"""Rows that are read, cast and transposed at a time; they fit into the CPU's caches."""
_LISTED = 10
"""The most problems that an error lists; a truncated file has one for each tensor."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header of its file describes it; matrices are [out, in]."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    bits: float | None = None
    """Bits a weight in the file, of one that is dequantized; `shape` is of the result."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the headers of a checkpoint say, and what is wrong with the files themselves."""

    tensors: dict[str, TensorInfo]
    problems: tuple[str, ...] = ()
    places: dict[str, str] = dataclasses.field(default_factory=dict)
    """The file that should hold each tensor, where there is an index."""
    unreadable: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()
    """Tensors that are there, and that `problems` say something about."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a parameter that one tensor of the files holds, and where it goes."""

    name: str
    """The tensor."""
    shape: tuple[int, ...]
    """Its shape in the file; matrices are [out, in]."""
    rows: tuple[int, int] | None = None
    """The rows of it that are taken; None: all."""
    take: tuple[int | None, int | None] = (None, None)
    """(first, step) of what is taken of its last axis; None: the usual."""
    at: tuple[Any, ...] = ()
    """The index of what it fills in the parameter."""
    turn: bool = False
    """Its last two axes change places."""


def table_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter that is not of a layer, by name; the head is [in, out]."""
    shapes = dict(embed_VD=(cfg.vocab, cfg.d_model), norm=(cfg.d_model,))
    return shapes if cfg.tied else shapes | dict(head_DV=(cfg.d_model, cfg.vocab))


def pieces_of(
    field: str,
    shape: tuple[int, ...],
    cfg: Config,
    names: Mapping[str, str],
    fused: Mapping[str, tuple[str, ...]],
    layer: int | None,
) -> list[Piece]:
    """The pieces of a parameter of `shape` that is not a stack of experts."""
    name = names.get(field, field).format(layer)
    turn = len(shape) == 2 and field != "embed_VD"
    stored = shape[::-1] if turn else shape
    for tensor, fields in fused.items():
        if field in fields and layer is not None:
            sizes = [cfg.layer_shapes(layer)[f][-1] for f in fields]
            at = fields.index(field)
            first, total = sum(sizes[:at]), sum(sizes)
            rows = first, first + sizes[at]
            return [Piece(tensor.format(layer), (total, *stored[1:]), rows, turn=turn)]
    return [Piece(name, stored, turn=turn)]


class Checkpoint(abc.ABC):
    """A model on disk. A format says what it holds (`contents`) and how rows of it are read."""

    path: Path
    names: ClassVar[Mapping[str, str]]
    """Parameter -> its tensor, as most families call it."""
    dtypes: ClassVar[frozenset[str]]
    harmless: ClassVar[re.Pattern]
    """Names of tensors that may be there and are not needed."""

    @abc.abstractmethod
    def config(self, dtype: str | None = None) -> Config:
        """The model's description, in `dtype`, or in the dtype that the checkpoint was made in."""

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    @property
    @abc.abstractmethod
    def contents(self) -> Contents:
        """What the headers say; read once."""

    @abc.abstractmethod
    def pieces(self, field: str, cfg: Config, layer: int | None = None) -> list[Piece]:
        """The tensors that hold a parameter, of a layer where it is given."""

    def gain_offset(self, cfg: Config) -> float:
        """What is added to the norms' gains."""
        return 0.0

    @abc.abstractmethod
    def reader(
        self, tensor: TensorInfo, field: str, cfg: Config
    ) -> Callable[[int, int], np.ndarray]:
        """A function (start, stop) -> those rows of a tensor, in any float dtype."""

    @property
    def weight_files(self) -> set[Path]:
        """The files that hold the weights."""
        return {tensor.file for tensor in self.contents.tensors.values()}

    def digest(self) -> str:
        """What identifies the weights: a digest of all bytes of the files that hold them."""
        return files_digest(self.weight_files)

    def identity(self) -> str:
        """What identifies all that is read: weights, configuration, tokenizer, chat template."""
        return json_digest([self.digest(), {f.name: file_digest(f) for f in self.text_files}])

    @property
    def text_files(self) -> tuple[Path, ...]:
        """The files that hold no weights; none where one file holds everything."""
        return ()

    def needed(self, cfg: Config) -> dict[str, tuple[int, ...]]:
        """The tensors of the model: name in the file -> shape there."""
        fields = [(field, None) for field in table_shapes(cfg)]
        fields += [(field, i) for i in range(cfg.layers) for field in cfg.layer_shapes(i)]
        return {p.name: p.shape for f, i in fields for p in self.pieces(f, cfg, i)}

    def left_out(self, cfg: Config) -> dict[str, str]:
        """Tensors of the files that are no part of the model, and that it can do without: their
        names, and what they are."""
        needed = self.needed(cfg)
        others = (name for name in self.contents.tensors if name not in needed)
        return {name: kind for name in others if (kind := leftover(name, cfg.layers))}

    def notices(self, cfg: Config) -> tuple[str, ...]:
        """What a user should know before the weights are used; a line each."""
        low = [t for t in self.contents.tensors.values() if t.bits is not None]
        lines = []
        if low:
            count = sum(math.prod(t.shape) for t in low)
            bits = sum(math.prod(t.shape) * t.bits for t in low) / count
            forms = ", ".join(sorted({t.dtype for t in low}))
            lines.append(
                f"stored as {forms}, {bits:.2f} bits a weight ({len(low)} matrices): the target "
                f"is the model that they dequantize to, in {cfg.dtype}"
            )
        if left_out := self.left_out(cfg):
            lines.append(told(left_out))
        return tuple(lines)

    def check(self, cfg: Config) -> None:
        """Raises one `CheckpointError` that lists everything that does not fit the model."""
        found, problems = self.contents, list(self.contents.problems)
        needed, left_out = self.needed(cfg), self.left_out(cfg)
        for name, shape in needed.items():
            tensor = found.tensors.get(name)
            if tensor is None:
                if name in found.broken:
                    continue
                place = found.places.get(name)
                if not found.unreadable or (place and place not in found.unreadable):
                    problems.append(f"{place or self.path.name}: {name} is missing")
                continue
            where = f"{tensor.file.name}: {name}"
            if tensor.shape != shape:
                problems.append(f"{where} has shape {list(tensor.shape)}; expected {list(shape)}")
            if not self._is_known(tensor):
                known = ", ".join(sorted(self.dtypes))
                problems.append(f"{where} is stored as {tensor.dtype}; supported are {known}")
        for name, tensor in found.tensors.items():
            tied_head = cfg.tied and name == self.names["head_DV"]
            known = name in needed or name in left_out or tied_head
            if not (known or self.harmless.search(name)):
                problems.append(f"{tensor.file.name}: {name} is not part of this model")
        if problems:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            more = len(problems) - _LISTED
            listed = problems[:_LISTED] + ([f"and {more} more"] if more > 0 else [])
            lines = "".join(f"\n  {shown(line)}" for line in listed)
            raise CheckpointError(f"{self.path} cannot be loaded, {count}:{lines}")
        if cfg.tied and self.own_head(cfg):
            raise CheckpointError(
                f"{self.path}: {self.names['head_DV']} differs from the embedding table, so the "
                "model is not tied; take the description that config() gives"
            )

    def _is_known(self, tensor: TensorInfo) -> bool:
        """Whether `reader` can read it."""
        return tensor.bits is not None or tensor.dtype in self.dtypes

    def experts_in_mxfp4(self, cfg: Config) -> bool:
        """Whether all experts are stored in MXFP4."""
        names = [
            piece.name
            for layer in filter(cfg.has_experts, range(cfg.layers))
            for field in ("expert_gate_up", "expert_down")
            for piece in self.pieces(field, cfg, layer)
        ]
        found = [tensor for name in names if (tensor := self.contents.tensors.get(name))]
        return bool(found) and all(tensor.dtype.upper() == "MXFP4" for tensor in found)

    def own_head(self, cfg: Config) -> bool:
        """Whether the file has an output head that differs from the embedding table."""
        table, head = (
            self.contents.tensors.get(self.names[name]) for name in ("embed_VD", "head_DV")
        )
        if table is None or head is None:
            return False
        same = table.shape == head.shape and table.dtype == head.dtype
        if not same or not self._is_known(head):
            return True
        one, two = self.reader(table, "embed_VD", cfg), self.reader(head, "head_DV", cfg)
        blocks = _blocks(0, table.shape[0])
        return any(one(*rows).tobytes() != two(*rows).tobytes() for rows in blocks)

    def with_rows(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer, which refuses texts with tokens that the embedding table has no row for.

        Some checkpoints have such tokens and never use them. Those that end turns are left out.
        Raises `CheckpointError` where none is left, and for an end that is no token at all.
        """
        table = self.contents.tensors.get(self.names["embed_VD"])
        if table is None or not table.shape:
            return tokenizer  # `check` says what is wrong
        rows = table.shape[0]
        ends = tuple(i for i in tokenizer.eos if 0 <= i < rows)
        if beyond := set(tokenizer.eos).difference(ends):
            unknown = beyond.difference(tokenizer.hf.get_vocab().values())
            if wrong := unknown or (not ends and beyond):
                raise CheckpointError(
                    f"{self.path}: the tokenizer ends a turn with id {min(wrong)}, and the "
                    f"embedding table has {rows} rows; take the tokenizer and "
                    "generation_config.json of this very model"
                )
        return dataclasses.replace(tokenizer, eos=ends, rows=rows)

    def model_shapes(self, cfg: Config) -> Params:
        """What `load` returns, as shapes and dtypes; reads no weights."""
        return abstract(cfg)

    def load(
        self,
        cfg: Config,
        place_layer: Callable[[int, Layer], Layer] | None = None,
        place: Callable[[str, np.ndarray], Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Params:
        """The parameters in `cfg.dtype`, after `check`; arrays go to the default device.

        `place_layer(index, layer)` and `place(name, array)` may put them elsewhere: they get fresh
        C-contiguous NumPy arrays, matrices [in, out], first embed_VD, norm and head_DV, then each
        layer. `progress(done, total)` counts layers.
        """
        self.check(cfg)
        place_layer = place_layer or (lambda index, layer: jax.device_put(layer))
        place = place or (lambda name, array: jax.device_put(array))
        tables = {name: place(name, self.read(name, cfg)) for name in table_shapes(cfg)}
        layers = []
        for index in range(cfg.layers):
            layers.append(place_layer(index, self.layer(index, cfg)))
            if progress:
                progress(index + 1, cfg.layers)
        return Params(layers=tuple(layers), **tables)

    def read(self, field: str, cfg: Config, index: int | None = None) -> np.ndarray:
        """One parameter, of a layer where `index` is given; matrices are [in, out].

        In `cfg.dtype`; norms' gains in `cfg.gain_dtype`.
        """
        shape = (table_shapes(cfg) if index is None else cfg.layer_shapes(index))[field]
        gain = field in GAINS
        out = np.empty(shape, np.dtype(cfg.gain_dtype if gain else cfg.dtype))
        for piece in self.pieces(field, cfg, index):
            tensor = self.contents.tensors[piece.name]
            _fill(out, tensor, piece, self.reader(tensor, field, cfg))
        if gain and (offset := self.gain_offset(cfg)):
            out += np.asarray(offset, out.dtype)
        return out

    def layer(self, index: int, cfg: Config) -> Layer:
        """One layer as NumPy arrays in `cfg.dtype`."""
        return layer_from(
            {f: self.read(f, cfg, index) for f in cfg.layer_shapes(index)}, index, cfg
        )


def _blocks(start: int, stop: int, inner: int = 1) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows that are read at a time; a row has `inner` rows of its own."""
    step = max(1, _ROWS // inner)
    return ((at, min(at + step, stop)) for at in range(start, stop, step))


def _fill(out: np.ndarray, tensor: TensorInfo, piece: Piece, rows: Callable) -> None:
    """Writes a piece to its place in the parameter's fresh array, block by block."""
    view = out[piece.at]
    view = view.swapaxes(-1, -2) if piece.turn else view
    first, last = piece.rows or (0, tensor.shape[0])
    inner = math.prod(tensor.shape[1:-1])
    for start, stop in _blocks(first, last, inner):
        stored = rows(start, stop)
        with np.errstate(over="ignore", invalid="ignore"):  # named below
            block = stored.astype(out.dtype, copy=False)
        if not _finite(block):
            where, dtype = f"{tensor.file}: {tensor.name}", out.dtype.name
            if _finite(stored):
                raise CheckpointError(f"{where} has numbers beyond {dtype}; load it in bfloat16")
            bad = np.flatnonzero(~np.isfinite(block.reshape(len(block), -1)).all(axis=1))
            raise CheckpointError(
                f"{where} holds NaN or infinity, first in row {start + bad[0]}; the file is "
                "damaged, or the training failed: take another checkpoint"
            )
        view[start - first : stop - first] = block[..., slice(piece.take[0], None, piece.take[1])]


def _finite(block: np.ndarray) -> bool:
    """Whether all numbers are finite: of the bits of either sign, infinity and NaN are largest."""
    block = np.ascontiguousarray(block)
    infinity = int(np.array(np.inf, block.dtype).view(f"u{block.itemsize}"))
    positive, negative = block.view(f"i{block.itemsize}"), block.view(f"u{block.itemsize}")
    sign = 1 << (8 * block.itemsize - 1)
    return bool(positive.max() < infinity and negative.max() < infinity + sign)
