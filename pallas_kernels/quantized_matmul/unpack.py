"""Unpacks words to operands in registers, with integer instructions where possible.

bfloat16 0x4300 | n is 128 + n for n below 128: setting bits beside a code makes a number of it.
The 128 is subtracted later, once for a group instead of once for a weight.
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
    """Instructions for the two words of two inputs ($1, $2; 3 bits: $3, both their third bits) to
    field i of both as two bfloat16, $0."""
    fields = fields_of(bits)
    word, width, j = f"${1 + i // (fields // 2)}", 32 // fields, i % (fields // 2)
    if bits == 8:  # 0x4B0000nn is 2**23 + n
        return f"""{{ .reg .b32 a, b, m; .reg .f32 x, y;
mov.b32 m, 0x4B000000;
prmt.b32 a, {word}, m, 0x754{j}; prmt.b32 b, {word}, m, 0x754{j + 2};
mov.b32 x, a; mov.b32 y, b;
sub.rn.f32 x, x, 0f4B000000; sub.rn.f32 y, y, 0f4B000000;
cvt.rn.bf16x2.f32 $0, y, x; }}"""
    down = f"shr.u32 t, {word}, {width * j};" if j else f"mov.b32 t, {word};"
    mask = f"0x{2**width - 1:04x}{2**width - 1:04x}"
    if bits == 3:
        up = f"shl.b32 u, $3, {2 - i};" if i < 2 else f"shr.u32 u, $3, {i - 2};"
        return f"""{{ .reg .b32 t, u; {down}
lop3.b32 t, t, {mask}, 0x43004300, 0xEA;
{up} and.b32 u, u, 0x00040004; or.b32 $0, t, u; }}"""
    return f"{{ .reg .b32 t; {down} lop3.b32 $0, t, {mask}, 0x43004300, 0xEA; }}"


def _code(words_Sc, top_Sc, bits: int, i: int):
    """Field i of a block of words as int32 [S, c]; plain arithmetic."""
    fields = fields_of(bits)
    word, width, j = i // (fields // 2), 32 // fields, i % (fields // 2)
    S, c = words_Sc.shape
    of_pair = words_Sc.reshape(S, c // 2, 2)[:, :, word] >> jnp.uint32(width * j)
    both = jnp.stack([of_pair, of_pair >> jnp.uint32(16)], axis=-1).reshape(S, c)
    found = both & jnp.uint32(2**width - 1)
    if bits == 3:
        found = found | (((top_Sc.astype(jnp.uint32) >> jnp.uint32(i)) & jnp.uint32(1)) << 2)
    return found.astype(jnp.int32)


def operand(
    words_Sc: jax.Array, top_Sc: jax.Array | None, bits: int, i: int, interpret: bool
) -> jax.Array:
    """Field i of a block of words, `lift` added, as bfloat16 [S, c]: exact.

    The instructions take two neighbours along c at a time, which every layout that Triton can give
    to a block with c as its fastest axis has side by side.
    """
    if interpret:
        return (_code(words_Sc, top_Sc, bits, i) + lift(bits)).astype(jnp.bfloat16)
    like = jax.ShapeDtypeStruct(words_Sc.shape, jnp.bfloat16)
    args, constraints = [words_Sc], "=r,r,r"
    if bits == 3:
        args, constraints = [words_Sc, top_Sc], "=r,r,r,r"
    return _asm(_operand_asm(bits, i), args, constraints, 2, like)


def fma(a: jax.Array, b: jax.Array, c: jax.Array, interpret: bool) -> jax.Array:
    """a * b + c in float32, rounded once. XLA's Triton never contracts; it would be two steps."""
    if interpret:
        return a * b + c
    return _asm("fma.rn.f32 $0, $1, $2, $3;", [a, b, c], "=r,r,r,r", 1, c)
