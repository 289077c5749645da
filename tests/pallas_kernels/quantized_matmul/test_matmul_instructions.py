"""The instructions that unpack words, run one by one: Pallas does not interpret them."""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantized_matmul.packing import repack
from pallas_kernels.quantized_matmul.unpack import (
    _number_asm,
    _operand_asm,
    code,
    lift,
    number,
    place,
)

U32 = np.uint32
as_f32 = lambda r: np.uint32(r).view(np.float32)
as_u32 = lambda f: np.float32(f).view(np.uint32)


def permuted(a, b, selector):
    """prmt.b32: four bytes picked out of the eight of a and b."""
    bytes_ = list(int(a).to_bytes(4, "little") + int(b).to_bytes(4, "little"))
    picked = [bytes_[selector >> 4 * i & 7] for i in range(4)]
    return U32(int.from_bytes(bytes(picked), "little"))


def rounded(high, low):
    """cvt.rn.bf16x2.f32: two float32 as bfloat16, the first in the high half."""
    halves = np.asarray([low, high], np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    return U32(int(halves[0]) | int(halves[1]) << 16)


RUN = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "prmt.b32": lambda a, b, s: permuted(a, b, int(s)),
    "lop3.b32": lambda a, b, c, table: (a & b) | c if table == 0xEA else None,
    "sub.rn.f32": lambda a, b: as_u32(as_f32(a) - as_f32(b)),
    "cvt.rn.bf16x2.f32": lambda a, b: rounded(as_f32(a), as_f32(b)),
}


def execute(text: str, arguments: list) -> int:
    """Register $0 after the instructions, $1 and so on being the arguments."""
    registers = {f"${i + 1}": U32(a) for i, a in enumerate(arguments)}

    def value(name):
        if name in registers:
            return registers[name]
        return U32(int(name.removeprefix("0f"), 16 if name[:2] in ("0x", "0f") else 10))

    body = text[text.index("{") + 1 : text.rindex("}")]
    for line in (part.strip() for part in body.split(";")):
        if not line or line.startswith(".reg"):
            continue
        name, operands = line.split(None, 1)
        target, *sources = re.split(r",\s*", operands)
        registers[target] = RUN[name](*map(value, sources))
    return int(registers["$0"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_two_words_become_two_numbers(bits):
    """The lower half comes from the first word; every field gives its code plus the lift, exact."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (1, 32, 600)).astype(np.uint8)
    codes[0, :4] = np.array([0, 2**bits - 1, 1, 2 ** (bits - 1)], np.uint8)[:, None]
    zeros = jnp.zeros((1, 600), jnp.bfloat16)
    w = repack(jnp.asarray(codes), zeros, zeros, bits)
    words, columns = np.asarray(w.words_DS), w.words_DS.shape[1]
    top = None if w.top_DS is None else np.asarray(w.top_DS)
    flat = np.pad(codes[0], ((0, 0), (0, columns * w.fields - 600)))
    for i in range(w.fields):
        for d in range(0, 32, 2):
            for s in (0, 7, columns - 1):
                arguments = [words[d, s], words[d + 1, s]]
                if bits == 3:
                    arguments.append(int(top[d, s]) | int(top[d + 1, s]) << 16)
                found = np.uint32(execute(_operand_asm(bits, i), arguments))
                pair = found.reshape(1).view(ml_dtypes.bfloat16).astype(np.float32)
                expected = flat[d : d + 2, i * columns + s].astype(np.float32) + lift(bits)
                np.testing.assert_array_equal(pair, expected)
        own = flat[:, i * columns : (i + 1) * columns].astype(np.float32)
        np.testing.assert_array_equal(code(w.words_DS, w.top_DS, bits, i), own)
        more = place(bits, i)[1]
        for interpret in (True, False) if bits == 3 else (True,):
            found = number(w.words_DS, w.top_DS, bits, i, interpret)
            np.testing.assert_array_equal(found, own + more)
        if bits != 3:
            for word, expected in zip(words[:3, 5], own[:3, 5], strict=True):
                found = np.uint32(execute(_number_asm(bits, i), [word])).view(np.float32)
                assert found == expected + more
