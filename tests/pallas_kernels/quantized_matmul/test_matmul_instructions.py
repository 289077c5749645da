"""The instructions that unpack words, run one by one: Pallas does not interpret them."""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantized_matmul.packing import repack
from pallas_kernels.quantized_matmul.unpack import _code, _operand_asm, lift

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
    """The first input in the lower half: every field gives its code plus the lift, exact."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (1, 32, 600)).astype(np.uint8)
    codes[0, :4] = np.array([0, 2**bits - 1, 1, 2 ** (bits - 1)], np.uint8)[:, None]
    zeros = jnp.zeros((1, 600), jnp.bfloat16)
    w = repack(jnp.asarray(codes), zeros, zeros, bits)
    flat = np.pad(codes[0], ((0, 0), (0, w.words * w.fields - 600)))
    for block in range(w.words // 32):
        words = np.asarray(w.words_BNSc[block, 0])
        top = None if w.top_BNSc is None else np.asarray(w.top_BNSc[block, 0])
        for i in range(w.fields):
            own = flat[:, i * w.words + block * 32 :][:, :32].astype(np.float32)
            np.testing.assert_array_equal(_code(jnp.asarray(words), top, bits, i).T, own)
            for s, d in ((s, d) for s in (0, 7, 31) for d in range(0, 32, 2)):
                arguments = [words[s, d], words[s, d + 1]]
                if bits == 3:
                    arguments.append(int(top[s, d]) | int(top[s, d + 1]) << 16)
                found = np.uint32(execute(_operand_asm(bits, i), arguments))
                pair = found.reshape(1).view(ml_dtypes.bfloat16).astype(np.float32)
                np.testing.assert_array_equal(pair, own[d : d + 2, s] + lift(bits))
