"""Weights in fp8, int8 and packed integers with scales by matrix, row, group or block.

fp8 as DeepSeek and Qwen publish it, compressed-tensors as vLLM's tools write it; and which method a
`quantization_config` names.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from llm_jax import CheckpointError
from llm_jax.lowbit import Grid, LowBit, Parts, Rows, Scheme, groups_of, unpack
from llm_jax.lowbit_methods import awq, bitsandbytes, gptq, mxfp4
from llm_jax.safetensors_file import FLOATS, Part
from llm_jax.values import Values

FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = (*FLOATS, "F8_E8M0")
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
"""Formats of compressed-tensors; "mixed-precision" has one of them in each group."""


def fp8(config: Values) -> Scheme:
    """An 8-bit float x a scale: of its block, of its row, or of the whole matrix."""
    block = config.list_of(int, "weight_block_size")
    if block and (len(block) != 2 or min(block) < 1):
        config.refuse("weight_block_size", "two lengths, such as [128, 128]")

    def read(name: str, weight: Part, parts: Parts) -> LowBit:
        parts.take(name, FP8, (None, None))
        scale = parts.maybe(f"{name}_scale_inv", SCALES) or parts.maybe(f"{name}_scale", SCALES)
        if scale is None:
            raise CheckpointError(f"{name}_scale_inv is missing")
        scales = Grid.of(scale, weight.shape, (block[0], block[1]) if block else None)
        return parts.weight(name, "FP8", weight.shape, lambda: _scaled(weight, scales))

    return Scheme(lambda part: part.name if part.dtype in FP8 else None, read)


def _scaled(weight: Part, scales: Grid, zeros: Grid | None = None) -> Rows:
    """(stored - zero) x scale."""
    columns = weight.shape[1]
    scale, zero = scales.over(columns), zeros and zeros.over(columns)

    def rows(start: int, stop: int) -> np.ndarray:
        found = weight.array()[start:stop].astype(np.float32)
        if zero is not None:
            found -= zero(start, stop)
        found *= scale(start, stop)
        return found

    return rows


@dataclasses.dataclass(frozen=True)
class _Group:
    """What one of the config_groups says about its weights."""

    kind: str
    bits: int
    block: tuple[int, int] | None
    symmetric: bool

    @classmethod
    def of(cls, values: Values) -> "_Group":
        kind, bits = values.text("type", "int"), values.integer("num_bits", 1, 64, 8)
        if (kind, bits) not in (("float", 8), ("int", 8), ("int", 4), ("int", 2)):
            values.refuse("num_bits", f"8 for floats; 2, 4 or 8 for integers (type is {kind})")
        size = values.integer("group_size", -1, 2**24, None)
        if size == 0:
            values.refuse("group_size", "-1 (all inputs), or a number of inputs")
        strategy = values.text("strategy", None)
        strategy = strategy or ("tensor" if size is None else "group" if size > 0 else "channel")
        if strategy == "block":
            block = values.list_of(int, "block_structure")
            if len(block) != 2 or min(block) < 1:
                values.refuse("block_structure", "two lengths, such as [128, 128]")
            return cls(kind, bits, (block[0], block[1]), values.flag("symmetric", True))
        if strategy not in ("tensor", "channel", "group"):
            values.refuse("strategy", "tensor, channel, group or block")
        grouped = (1, size) if strategy == "group" and size and size > 0 else None
        if strategy == "group" and grouped is None:
            values.refuse("group_size", "a number of inputs, because the strategy is group")
        return cls(kind, bits, grouped, values.flag("symmetric", True))


def compressed_tensors(config: Values) -> Scheme:
    """Scaled 8-bit floats and integers, and integers packed into words of 32 bits.

    Which group of the configuration a weight belongs to follows from its tensors: the first group
    with its dtype, bits and number of scales.
    """
    if (kind := config.text("format", None)) not in (None, "mixed-precision", *FORMATS):
        config.refuse("format", f"one of {', '.join(FORMATS)}, not {kind}")
    for name in ("transform_config", "sparsity_config"):
        given = config.mapping(name)
        if given is not None and given.text("format", None) != "dense":
            config.refuse(name, "none; only dense, plainly quantized weights are supported")
    described = config.mapping("config_groups")
    groups = []
    for name in described or ():
        found = described.mapping(name)
        weights = found and found.mapping("weights")
        if weights is not None:
            groups.append(_Group.of(weights))
    if not groups:
        config.refuse("config_groups", "an object that describes quantized weights")

    def target(part: Part) -> str | None:
        if part.name.endswith(".weight_packed"):
            return part.name.removesuffix("_packed")
        return part.name if part.dtype in (*FP8, "I8") and part.name.endswith(".weight") else None

    def read(name: str, first: Part, parts: Parts) -> LowBit:
        return (_whole if first.name == name else _packed)(name, first, parts, groups)

    return Scheme(target, read)


def _whole(name: str, weight: Part, parts: Parts, groups: list[_Group]) -> LowBit:
    kind = "int" if weight.dtype == "I8" else "float"
    parts.take(name, (*FP8, "I8"), (None, None))
    scale = parts.take(f"{name}_scale", SCALES)
    group, scales = _chosen(groups, kind, {8}, scale, weight.shape)
    zero = parts.maybe(f"{name}_zero_point", ("I8", *SCALES, *FP8))
    _require_zero(name, zero, group)
    zeros = zero and Grid.of(zero, weight.shape, group.block)
    form = "INT8" if kind == "int" else "FP8"
    return parts.weight(name, form, weight.shape, lambda: _scaled(weight, scales, zeros))


def _packed(name: str, first: Part, parts: Parts, groups: list[_Group]) -> LowBit:
    words = parts.take(f"{name}_packed", ("I32",), (None, None))
    lengths = parts.take(f"{name}_shape", ("I64", "I32"), (2,))
    rows, columns = (int(n) for n in lengths.array())
    fitting = {
        group.bits
        for group in groups
        if columns > 0 and words.shape == (rows, -(-columns * group.bits // 32))
    }
    if not fitting:
        known = " or ".join(sorted({str(group.bits) for group in groups}))
        raise CheckpointError(
            f"{words.file.name}: {words.name} has shape {list(words.shape)}, and {lengths.name} "
            f"says {[rows, columns]}; expected these weights in {known} bits"
        )
    scale, matrix = parts.take(f"{name}_scale", SCALES), (rows, columns)
    group, scales = _chosen(groups, "int", fitting, scale, matrix)
    bits = group.bits
    packed = -(-rows * bits // 32), scales.shape[1]
    zero = parts.maybe(f"{name}_zero_point", ("I32",), packed)
    _require_zero(name, zero, group)
    index = parts.maybe(f"{name}_g_idx", ("I32",), (columns,))

    def opened() -> Rows:
        middle, order, values = np.float32(2 ** (bits - 1)), None, None
        if index is not None and (index.array() != -1).any():
            order = groups_of(index, scales.shape[1])
        scale = (scales if order is None else _ordered(scales)).over(columns)
        if zero is not None:
            values = unpack(zero.array().T, bits)[:, :rows].T.astype(np.float32)
        zeros = None
        if values is not None:
            zeros = (scales if order is None else _ordered(scales)).over(columns, values)

        def at(start: int, stop: int) -> np.ndarray:
            found = unpack(words.array()[start:stop], bits)[:, :columns].astype(np.float32)
            turn = (lambda a: a) if order is None else (lambda a: a[:, order])
            found -= middle if zeros is None else turn(zeros(start, stop))
            found *= turn(scale(start, stop))
            return found

        return at

    return parts.weight(name, f"INT{bits}", matrix, opened)


def _ordered(scales: Grid) -> Grid:
    """The grid with one column a group, for weights whose columns name their groups."""
    return dataclasses.replace(scales, block=(scales.block[0], 1))


def _chosen(
    groups: list[_Group], kind: str, bits: set[int], scale: Part, matrix: tuple[int, int]
) -> tuple[_Group, Grid]:
    """The first group that a weight can belong to, and its scales."""
    error = CheckpointError(f"no group of config_groups describes {kind} weights of these bits")
    for group in groups:
        if group.kind == kind and group.bits in bits:
            try:
                return group, Grid.of(scale, matrix, group.block)
            except CheckpointError as wrong:
                error = wrong
    raise error


def _require_zero(name: str, zero: Part | None, group: _Group) -> None:
    if zero is None and not group.symmetric:
        raise CheckpointError(f"{name}_zero_point is missing, and its group is not symmetric")


METHODS: dict[str, Callable[[Values], Scheme]] = {
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "fbgemm_fp8": fp8,
    "fp8": fp8,
    "gptq": gptq,
    "mxfp4": mxfp4,
}


def scheme_of(config: Values) -> Scheme:
    """How the weights of a folder are quantized, from its `quantization_config`.

    Raises ConfigError for a method, or a variant of one, that is not known.
    """
    method = config.text("quant_method", None)
    if method not in METHODS:
        config.refuse("quant_method", f"one of {', '.join(METHODS)}")
    return METHODS[method](config)
