"""Weights that a safetensors folder keeps in a low-bit form, as the rows they dequantize to.

A weight's parts are tensors with names of their own, such as qweight, qzeros and scales. Products
are float32, so that a weight is rounded once, to the dtype that it is loaded in. What each method
calls its parts and how it packs them is in `llm_jax.lowbit_methods` and `llm_jax.lowbit_scaled`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from llm_jax import CheckpointError
from llm_jax.safetensors_file import Part

Rows = Callable[[int, int], np.ndarray]
"""(start, stop) -> those rows of a weight, in float32."""


@dataclasses.dataclass(frozen=True)
class LowBit:
    """One weight in a low-bit form."""

    name: str
    form: str
    """What it is called in messages, such as GPTQ."""
    shape: tuple[int, ...]
    """Of the weight that it dequantizes to, [out, in]."""
    parts: tuple[Part, ...]
    open: Callable[[], Rows]
    """Reads the small parts; raises CheckpointError for values that cannot be meant."""

    @property
    def bits(self) -> float:
        """Bits a weight in the file, all parts counted."""
        return 8 * sum(part.bytes for part in self.parts) / max(1, math.prod(self.shape))


class Parts:
    """The tensors of a folder, from which a form takes those of one weight."""

    def __init__(self, stored: Mapping[str, Part]):
        self._stored = stored
        self.taken: list[Part] = []

    def take(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int | None, ...]) -> Part:
        """The part of that name. None as a length is any; no shapes: any shape.

        Raises CheckpointError if it is not there, or has another dtype or shape.
        """
        part = self._stored.get(name)
        if part is None:
            raise CheckpointError(f"{name} is missing")
        where = f"{part.file.name}: {name}"
        if part.dtype not in dtypes:
            raise CheckpointError(f"{where} is stored as {part.dtype}; expected {_or(dtypes)}")
        if shapes and not any(_fits(part.shape, shape) for shape in shapes):
            lengths = (["any" if n is None else str(n) for n in shape] for shape in shapes)
            known = _or(f"[{', '.join(each)}]" for each in lengths)
            raise CheckpointError(f"{where} has shape {list(part.shape)}; expected {known}")
        if not part.bytes:
            raise CheckpointError(f"{where} is empty")
        self.taken.append(part)
        return part

    def maybe(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int | None, ...]):
        """The same, or None if there is no such part."""
        return self.take(name, dtypes, *shapes) if name in self._stored else None

    def weight(self, name: str, form: str, shape: tuple[int, ...], rows: Callable) -> LowBit:
        """The weight that the parts taken so far are."""
        return LowBit(name, form, shape, tuple(self.taken), rows)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w in (None, n) for n, w in zip(shape, wanted))


def _or(names: Iterable[str]) -> str:
    return " or ".join(names)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the weights of a folder are quantized: which tensors begin one, and how it is read."""

    target: Callable[[Part], str | None]
    """The name of the weight that a part begins; None for all other parts."""
    read: Callable[[str, Part, Parts], LowBit]
    """The weight of that name; CheckpointError says what is wrong with its parts."""

    def weights(self, stored: Mapping[str, Part]) -> tuple[dict[str, LowBit], dict[str, str]]:
        """(the low-bit weights by name, what is wrong with others by name)."""
        found, problems = {}, {}
        for part in stored.values():
            if (name := self.target(part)) is None:
                continue
            try:
                weight = self.read(name, part, Parts(stored))
                if name in found or (name in stored and stored[name] not in weight.parts):
                    raise CheckpointError(f"{name} is there in two forms")
                found[name] = weight
            except CheckpointError as error:
                problems[name] = f"{part.file.name}: {name} cannot be dequantized: {error}"
        return found, problems


@dataclasses.dataclass(frozen=True)
class Grid:
    """Scales (or zero points) of a matrix: one, one a row, or one a block."""

    part: Part
    shape: tuple[int, int]
    """[rows, columns] of the scales."""
    block: tuple[int, int]
    """Rows and columns of the matrix that share a scale."""

    @classmethod
    def of(cls, part: Part, matrix: tuple[int, int], block: tuple[int, int] | None) -> "Grid":
        """Raises CheckpointError if the part's shape is none that fits. No block: one a row."""
        rows, columns = matrix
        if math.prod(part.shape) == 1:
            return cls(part, (1, 1), matrix)
        if block is None:
            if part.shape in ((rows,), (rows, 1)):
                return cls(part, (rows, 1), (1, columns))
            wanted = f"one scale, or {rows}, one a row"
        else:
            shape = -(-rows // block[0]), -(-columns // block[1])
            if part.shape == shape:
                return cls(part, shape, block)
            wanted = f"{list(shape)}, a scale for {block[0]} x {block[1]} weights"
        where = f"{part.file.name}: {part.name}"
        raise CheckpointError(f"{where} has shape {list(part.shape)}; expected {wanted}")

    def over(self, columns: int, values: np.ndarray | None = None) -> Rows:
        """(start, stop) -> the scales of those rows, [rows, 1] or [rows, columns].

        `values` replace the part's own, where they are packed."""
        grid = (self.part.floats() if values is None else values).reshape(self.shape)

        def rows(start: int, stop: int) -> np.ndarray:
            chosen = grid[np.arange(start, stop) // self.block[0]]
            if self.shape[1] == 1:
                return chosen
            return chosen.repeat(self.block[1], axis=1)[:, :columns]

        return rows


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 2, 4 or 8 bits as uint8, lowest bits first, along the last axis."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    codes = (data[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8(2**bits - 1)
    return codes.reshape(*data.shape[:-1], -1)


def groups_of(index: Part, groups: int) -> np.ndarray:
    """The group of each column; CheckpointError if one is not below `groups`."""
    found = np.array(index.array())
    if found.min() < 0 or found.max() >= groups:
        raise CheckpointError(
            f"{index.file.name}: {index.name} names the group {found.max()} or {found.min()}; "
            f"expected 0 to {groups - 1}"
        )
    return found
