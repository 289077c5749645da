"""The latents of one projection as a cache stores them: 16-bit floats, or packed codes.

Letters: B batch, S slots, R all latents of a token, r latents of a block, P packed bytes of a
token, g blocks.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

BITS = (2, 3, 4, 8, 16)
_static = functools.partial(dataclasses.field, metadata=dict(static=True))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Latents:
    """Latents of S tokens in blocks side by side; a token's block has one step and one offset.

    value = code * step + offset. With 16 bits `codes_BSP` holds the values themselves, [B, S, R],
    and there is no step and no offset.
    """

    codes_BSP: jax.Array
    """uint8, block after block. A block of r codes takes p = ceil(r * bits / 8) bytes. 4 bits: byte
    j holds code j (low half) and code j + p (high half); 2 bits: codes j + i * p for i = 0 … 3; 3
    bits: ceil(r / 4) bytes of the two low bits, packed like 2 bits, then ceil(r / 8) bytes of the
    third bit, byte j holding codes j + i * ceil(r / 8). Codes beyond r are zero."""
    step_BSg: jax.Array | None
    """bfloat16."""
    offset_BSg: jax.Array | None
    """bfloat16: the value of code 0."""
    bits: int = _static()
    blocks: tuple[int, ...] = _static()
    """Latents of each block."""

    @property
    def rank(self) -> int:
        return sum(self.blocks)


def block_bytes(size: int, bits: int) -> int:
    """Bytes that `size` codes take when packed."""
    if bits == 3:
        return -(-size // 4) + -(-size // 8)
    return -(-size * bits // 8)


def _fields(codes_Xr, bits):
    """[..., r] fields of 1, 2 or 4 bits in bytes [..., ceil(r * bits / 8)]."""
    many = 8 // bits
    size = -(-codes_Xr.shape[-1] // many)
    padding = [(0, 0)] * (codes_Xr.ndim - 1) + [(0, size * many - codes_Xr.shape[-1])]
    parts = jnp.split(jnp.pad(codes_Xr, padding), many, axis=-1)
    return functools.reduce(jnp.bitwise_or, (part << (i * bits) for i, part in enumerate(parts)))


def _unfields(bytes_Xp, bits, size):
    """The inverse of `_fields`."""
    parts = [(bytes_Xp >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]
    return jnp.concatenate(parts, axis=-1)[..., :size]


def pack(codes_Xr: jax.Array, bits: int) -> jax.Array:
    """uint8 codes [..., r] of one block, below 2**bits, as bytes [..., block_bytes(r, bits)]."""
    if bits == 3:
        return jnp.concatenate([_fields(codes_Xr & 3, 2), _fields(codes_Xr >> 2, 1)], axis=-1)
    return codes_Xr if bits == 8 else _fields(codes_Xr, bits)


def unpack(bytes_Xp: jax.Array, bits: int, size: int) -> jax.Array:
    """The uint8 codes [..., size] of one packed block."""
    if bits == 3:
        low, high = jnp.split(bytes_Xp, [-(-size // 4)], axis=-1)
        return _unfields(low, 2, size) | (_unfields(high, 1, size) << 2)
    return bytes_Xp if bits == 8 else _unfields(bytes_Xp, bits, size)


def dense(latents: Latents, dtype=jnp.float32) -> jax.Array:
    """The values [B, S, R]; float32 arithmetic, rounded once to `dtype`."""
    if latents.bits == 16:
        return latents.codes_BSP.astype(dtype)
    with jax.named_scope("dequantize"):
        parts, at, first = [], 0, 0
        step, offset = (a.astype(jnp.float32) for a in (latents.step_BSg, latents.offset_BSg))
        for size, group in itertools.groupby(latents.blocks):
            count = len(list(group))
            width = block_bytes(size, latents.bits)
            packed = latents.codes_BSP[..., at : at + count * width]
            packed = packed.reshape(*packed.shape[:-1], count, width)
            codes = unpack(packed, latents.bits, size).astype(jnp.float32)
            own = slice(first, first + count)
            value = (codes * step[..., own, None] + offset[..., own, None]).astype(dtype)
            parts.append(value.reshape(*value.shape[:-2], -1))
            at, first = at + count * width, first + count
        return jnp.concatenate(parts, axis=-1)
