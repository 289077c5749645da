"""GPTQ, AWQ, MXFP4 and bitsandbytes: how their weights are called, packed and dequantized."""

import functools
import json
from collections.abc import Callable

import numpy as np

from llm_jax import CheckpointError
from llm_jax.lowbit import LowBit, Parts, Rows, Scheme, groups_of, unpack
from llm_jax.safetensors_file import FLOATS, Part
from llm_jax.values import ConfigError, Values

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of a word's eight that each group of four bits holds, lowest bits first."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The sixteen numbers of a 4-bit float with two bits of exponent and one of mantissa."""
STATE = ".quant_state.bitsandbytes__"
_STATE_BYTES = 2**16
"""The longest description of a bitsandbytes weight; real ones have about 170 bytes."""


def gptq(config: Values) -> Scheme:
    """(code - zero) x scale, codes packed along the inputs; each input has a group."""
    bits = config.integer("bits", 2, 8)
    if bits not in (2, 4, 8):
        config.refuse("bits", "2, 4 or 8")
    size, ordered = _group_size(config), config.flag("desc_act")
    named = "checkpoint_format" if "checkpoint_format" in config else "format"
    version = config.text(named, None) or "gptq"
    if version not in ("gptq", "gptq_v2"):
        config.refuse(named, "gptq or gptq_v2")
    more = 1 if version == "gptq" else 0  # the first version stores zero points less one

    def read(name: str, first: Part, parts: Parts) -> LowBit:
        stem = name.removesuffix("weight")
        words = parts.take(f"{stem}qweight", ("I32",), (None, None))
        inputs, outputs = words.shape[0] * 32 // bits, words.shape[1]
        groups = -(-inputs // (size or inputs))
        zeros = parts.take(f"{stem}qzeros", ("I32",), (groups, -(-outputs * bits // 32)))
        scales = parts.take(f"{stem}scales", FLOATS, (groups, outputs))
        take = parts.take if ordered else parts.maybe
        index = take(f"{stem}g_idx", ("I32",), (inputs,))

        def opened() -> Rows:
            zero = unpack(zeros.array(), bits)[:, :outputs].T.astype(np.int32)
            zero = ((zero + more) & (2**bits - 1)).astype(np.float32)
            scale = scales.floats().T
            order = np.arange(inputs) // (size or inputs)
            if index is not None:
                order = groups_of(index, groups)
            spread = _spread(order, size or inputs)

            def rows(start: int, stop: int) -> np.ndarray:
                codes = unpack(words.array()[:, start:stop].T, bits).astype(np.float32)
                codes -= spread(zero[start:stop])
                codes *= spread(scale[start:stop])
                return codes

            return rows

        return parts.weight(name, "GPTQ", (outputs, inputs), opened)

    return Scheme(functools.partial(_ends, "qweight"), read)


def awq(config: Values) -> Scheme:
    """(code - zero) x scale, codes packed along the outputs, in the order of the gemm version."""
    if config.integer("bits", 2, 8, 4) != 4:
        config.refuse("bits", "4")
    if config.text("version", "gemm").lower() != "gemm":
        config.refuse("version", "gemm")
    size = _group_size(config)
    place = np.argsort(AWQ_ORDER)

    def codes(words: np.ndarray) -> np.ndarray:
        found = unpack(words, 4)
        return found.reshape(len(found), -1, 8)[..., place].reshape(len(found), -1)

    def read(name: str, first: Part, parts: Parts) -> LowBit:
        stem = name.removesuffix("weight")
        words = parts.take(f"{stem}qweight", ("I32",), (None, None))
        inputs, outputs = words.shape[0], words.shape[1] * 8
        groups = -(-inputs // (size or inputs))
        zeros = parts.take(f"{stem}qzeros", ("I32",), (groups, words.shape[1]))
        scales = parts.take(f"{stem}scales", FLOATS, (groups, outputs))

        def opened() -> Rows:
            zero, scale = codes(zeros.array()).T.astype(np.float32), scales.floats().T
            spread = _spread(np.arange(inputs) // (size or inputs), size or inputs)

            def rows(start: int, stop: int) -> np.ndarray:
                first, last = start // 8, -(-stop // 8)
                found = codes(words.array()[:, first:last]).T[start - 8 * first :][: stop - start]
                found = found.astype(np.float32, order="C")
                found -= spread(zero[start:stop])
                found *= spread(scale[start:stop])
                return found

            return rows

        return parts.weight(name, "AWQ", (outputs, inputs), opened)

    return Scheme(functools.partial(_ends, "qweight"), read)


def mxfp4(config: Values) -> Scheme:
    """4-bit floats, of which 32 share an exponent. Experts [E, out, in] become [E, in, out]."""

    def read(name: str, first: Part, parts: Parts) -> LowBit:
        matrix, experts = (None, None, 16), (None, None, None, 16)
        blocks = parts.take(f"{name}_blocks", ("U8",), matrix, experts)
        scales = parts.take(f"{name}_scales", ("U8",), blocks.shape[:-1])
        *outer, groups, _ = blocks.shape
        shape = (*outer, 32 * groups)
        if len(outer) > 1:
            shape = (outer[0], 32 * groups, outer[1])

        def opened() -> Rows:
            def rows(start: int, stop: int) -> np.ndarray:
                codes = unpack(blocks.array()[start:stop], 4)
                exponents = scales.array()[start:stop, ..., None].astype(np.int32) - 127
                with np.errstate(over="ignore"):  # whoever reads the rows says so
                    found = np.ldexp(E2M1[codes], exponents)
                found = found.reshape(*found.shape[:-2], -1)
                return found.swapaxes(1, 2) if found.ndim > 2 else found

            return rows

        return parts.weight(name, "MXFP4", shape, opened)

    begins = lambda part: part.name.removesuffix("_blocks")
    return Scheme(lambda part: begins(part) if part.name.endswith("_blocks") else None, read)


def bitsandbytes(config: Values) -> Scheme:
    """NF4 and FP4: a table's entry x the largest of a block; or int8 x the largest of a row."""

    def target(part: Part) -> str | None:
        if part.name.endswith(".SCB"):
            return f"{part.name.removesuffix('SCB')}weight"
        return part.name.partition(STATE)[0] if STATE in part.name else None

    def read(name: str, first: Part, parts: Parts) -> LowBit:
        return (_int8 if first.name.endswith(".SCB") else _nf4)(name, first, parts)

    return Scheme(target, read)


def _int8(name: str, first: Part, parts: Parts) -> LowBit:
    weight = parts.take(name, ("I8",), (None, None))
    largest = parts.take(first.name, ("F32",), (weight.shape[0],))
    layout = parts.maybe(f"{name}_format", ("U8",), (), (1,))

    def opened() -> Rows:
        if layout is not None and layout.array().any():
            raise CheckpointError(f"{layout.file}: {layout.name} is not 0, the order by rows")
        scale = largest.floats()[:, None]
        return lambda start, stop: (
            weight.array()[start:stop] * scale[start:stop] * np.float32(1 / 127)
        )

    return parts.weight(name, "LLM.int8", weight.shape, opened)


def _nf4(name: str, first: Part, parts: Parts) -> LowBit:
    described = parts.take(first.name, ("U8",), (None,))
    try:
        state = Values(_state(described), f"{first.name}: ")
        form = first.name.partition(STATE)[2]
        if form not in ("nf4", "fp4") or state.text("quant_type") != form:
            state.refuse("quant_type", "nf4 or fp4, as the name says")
        shape = tuple(state.list_of(int, "shape"))
        if len(shape) != 2 or min(shape) < 1 or max(shape) > 2**32:
            state.refuse("shape", "two lengths")
        size = state.integer("blocksize", 1, 2**20)
        nested = state.integer("nested_blocksize", 1, 2**20, None)
        offset = state.number("nested_offset", -1e30, 1e30) if nested else 0.0
    except ConfigError as error:
        raise CheckpointError(f"{first.file.name}: {error}") from error
    count = shape[0] * shape[1]
    blocks = -(-count // size)
    weight = parts.take(name, ("U8", "I8", "BF16", "F16", "F32"))
    if weight.bytes != -(-count // 2):
        where = f"{weight.file.name}: {name} has {weight.bytes:,} bytes"
        raise CheckpointError(f"{where}; expected half of the {count:,} weights")
    table = parts.take(f"{name}.quant_map", ("F32",), (16,))
    largest = parts.take(f"{name}.absmax", ("U8" if nested else "F32",), (blocks,))
    if nested:
        outer = parts.take(f"{name}.nested_absmax", ("F32",), (-(-blocks // nested),))
        levels = parts.take(f"{name}.nested_quant_map", ("F32",), (256,))

    def opened() -> Rows:
        entries, scale = table.floats(), largest.array()
        if nested:
            outer_scale = outer.floats()[np.arange(blocks) // nested]
            scale = levels.floats()[scale] * outer_scale + np.float32(offset)
        data = np.ascontiguousarray(weight.array()).view(np.uint8).reshape(-1)

        def rows(start: int, stop: int) -> np.ndarray:
            begin, end = start * shape[1], stop * shape[1]
            part = data[begin // 2 : -(-end // 2)]
            codes = np.stack([part >> 4, part & 15], axis=-1).reshape(-1)  # the first one is high
            codes = codes[begin % 2 :][: end - begin]
            found = entries[codes] * scale[np.arange(begin, end) // size]
            return found.reshape(stop - start, shape[1])

        return rows

    return parts.weight(name, form.upper(), shape, opened)


def _state(part: Part) -> dict:
    """The JSON object that a tensor of bytes holds."""
    if part.bytes > _STATE_BYTES:
        raise ConfigError(f"{part.bytes:,} bytes; expected at most {_STATE_BYTES:,}")
    try:
        found = json.loads(part.array().tobytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{part.name} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{part.name} holds {type(found).__name__}, not an object")
    return found


def _spread(order: np.ndarray, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from numbers of groups to those of columns; `order` is each column's group.

    Repeating takes a third of the time of choosing, where the groups are in order.
    """
    if (order == np.arange(len(order)) // size).all():
        return lambda groups: groups.repeat(size, axis=1)[:, : len(order)]
    return lambda groups: groups[:, order]


def _ends(suffix: str, part: Part) -> str | None:
    """X.weight for X.qweight."""
    stem = part.name.removesuffix(f".{suffix}")
    return None if stem == part.name else f"{stem}.weight"


def _group_size(config: Values) -> int | None:
    """Inputs that share a scale; None: all."""
    size = config.integer("group_size", -1, 2**24)
    if size == 0:
        config.refuse("group_size", "-1 (all inputs), or a number of inputs")
    return None if size == -1 else size
