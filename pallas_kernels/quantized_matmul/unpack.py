"""Words become operands in registers, with integer instructions alone wherever possible.

bfloat16 0x4300 | n is 128 + n for n below 128, and float32 0x43000000 | n << 16 is the same
number: a code becomes a number by setting bits beside it. The 128 is taken off later, once for a
group instead of once for a weight.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.quantized_matmul.packing import fields_of

LIFT = 128


def lift(bits: int) -> int:
    """What `operand` adds to every code."""
    return 0 if bits == 8 else LIFT


def _asm(text: str, args, constraints: str, pack: int, like):
    shape = [jax.ShapeDtypeStruct(like.shape, like.dtype)]
    return plgpu.elementwise_inline_asm(
        text, args=args, constraints=constraints, pack=pack, result_shape_dtypes=shape
    )[0]


def _operand_asm(bits: int, i: int) -> str:
    """Instructions for two words ($1, $2; 3 bits: $3, both their third bits) to two bfloat16 $0."""
    width = 32 // fields_of(bits)
    byte, shift = divmod(i * width, 8)
    if bits == 8:  # 0x4B0000nn is 2**23 + n
        return f"""{{ .reg .b32 a, b, m; .reg .f32 x, y;
mov.b32 m, 0x4B000000;
prmt.b32 a, $1, m, 0x754{byte}; prmt.b32 b, $2, m, 0x754{byte};
mov.b32 x, a; mov.b32 y, b;
sub.rn.f32 x, x, 0f4B000000; sub.rn.f32 y, y, 0f4B000000;
cvt.rn.bf16x2.f32 $0, y, x; }}"""
    own = f"0x{4 + byte}{4 + byte}{byte}{byte}"  # the byte of $1, then that of $2
    down = f"shr.u32 t, t, {shift};" if shift else ""
    mask = f"0x{2**width - 1:04x}{2**width - 1:04x}"
    if bits == 3:
        up = f"shl.b32 u, $3, {2 - i};" if i < 2 else f"shr.u32 u, $3, {i - 2};"
        return f"""{{ .reg .b32 t, u; prmt.b32 t, $1, $2, {own}; {down}
lop3.b32 t, t, {mask}, 0x43004300, 0xEA;
{up} and.b32 u, u, 0x00040004; or.b32 $0, t, u; }}"""
    return f"""{{ .reg .b32 t; prmt.b32 t, $1, $2, {own}; {down}
lop3.b32 $0, t, {mask}, 0x43004300, 0xEA; }}"""


def code(words, top, bits: int, i: int):
    """Field i of words as int32; plain arithmetic."""
    width = 32 // fields_of(bits)
    found = (words >> jnp.uint32(i * width)) & jnp.uint32(2**width - 1)
    if bits == 3:
        found = found | (((top.astype(jnp.uint32) >> jnp.uint32(i)) & jnp.uint32(1)) << 2)
    return found.astype(jnp.int32)


def operand(words, top, bits: int, i: int, interpret: bool):
    """Field i of words, `lift` added, as bfloat16: exact."""
    if interpret:
        return (code(words, top, bits, i) + lift(bits)).astype(jnp.bfloat16)
    like = jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)
    args, constraints = ([words, top], "=r,r,r,r") if bits == 3 else ([words], "=r,r,r")
    return _asm(_operand_asm(bits, i), args, constraints, 2, like)


def weights(words, top, step, offset, bits: int, i: int, interpret: bool):
    """Field i of words as dequantized bfloat16 weights; step and offset bfloat16, same shape."""
    if interpret:
        wide = code(words, top, bits, i).astype(jnp.float32) * step.astype(jnp.float32)
        return (wide + offset.astype(jnp.float32)).astype(jnp.bfloat16)
    lifted = operand(words, top, bits, i, interpret)
    down = "mov.b32 t, $1;"
    if lift(bits):  # minus 128, exact: 1 * t - 128
        down = """mov.b32 one, 0x3F803F80; mov.b32 less, 0xC300C300;
fma.rn.bf16x2 t, $1, one, less;"""
    text = f"{{ .reg .b32 t, one, less; {down} fma.rn.bf16x2 $0, t, $2, $3; }}"
    return _asm(text, [lifted, step, offset], "=r,r,r,r", 2, lifted)


def place(bits: int, i: int) -> tuple[int, int]:
    """(bit, lift): where field i goes in a float32, and what that adds to it.

    Two neighbouring fields share a shift; with 12 bits below the code the lift is 2048.
    """
    if bits == 8:
        return 15, 256
    if bits == 3 or i % 2:
        return 16, LIFT
    width = 32 // fields_of(bits)
    return 16 - width, LIFT << width


def _number_asm(bits: int, i: int) -> str:
    """Instructions for a word $1 to the float32 $0; not for 3 bits."""
    (bit, more), width = place(bits, i), 32 // fields_of(bits)
    by = bit - i * width
    move = f"shl.b32 t, $1, {by};" if by >= 0 else f"shr.u32 t, $1, {-by};"
    mask = f"0x{(2**width - 1) << bit:08x}"
    return f"{{ .reg .b32 t; {move} lop3.b32 $0, t, {mask}, 0x{_exponent(more):08x}, 0xEA; }}"


def _exponent(power: int) -> int:
    """The bits of float32 `power`, a power of two."""
    return (127 + power.bit_length() - 1) << 23


def number(words, top, bits: int, i: int, interpret: bool):
    """Field i of words as float32, lifted by `place(bits, i)[1]`: exact."""
    bit, more = place(bits, i)
    if interpret:
        return (code(words, top, bits, i) + more).astype(jnp.float32)
    if bits != 3:
        like = jax.ShapeDtypeStruct(words.shape, jnp.float32)
        return _asm(_number_asm(bits, i), [words], "=r,r", 1, like)
    moved = code(words, top, bits, i).astype(jnp.uint32) << jnp.uint32(bit)
    return jax.lax.bitcast_convert_type(moved | jnp.uint32(_exponent(more)), jnp.float32)


def fma(a, b, c, interpret: bool):
    """a * b + c in float32, rounded once. XLA's Triton never contracts; it would be two steps."""
    if interpret:
        return a * b + c
    return _asm("fma.rn.f32 $0, $1, $2, $3;", [a, b, c], "=r,r,r,r", 1, c)


def step_offset(scale):
    """(step, offset) float32 of words of `Packed.scale_QF`."""
    as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)
    return as_float(scale << jnp.uint32(16)), as_float(scale & jnp.uint32(0xFFFF0000))
