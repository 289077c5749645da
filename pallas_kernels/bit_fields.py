"""Low-bit codes side by side in bytes: the one layout of quantized weights and of latents.

A run of r codes becomes p bytes. 8 bits: p = r. 4 bits: byte j holds code j (low half) and code
j + p (high half). 2 bits: byte j holds codes j + i * p for i = 0 … 3. 3 bits: ceil(r / 4) bytes of
the two low bits, packed like 2 bits, then ceil(r / 8) bytes of the third bit, byte j holding codes
j + i * ceil(r / 8). Codes beyond r are zero.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp


def block_bytes(size: int, bits: int) -> int:
    """Bytes that `size` codes take when packed."""
    if bits == 3:
        return -(-size // 4) + -(-size // 8)
    return -(-size * bits // 8)


def pack_codes(codes: jax.Array, bits: int, axis: int = -1) -> jax.Array:
    """uint8 codes below 2**bits, packed along `axis`: r of them become `block_bytes(r, bits)`."""
    if bits == 8:
        return codes
    if bits == 3:
        low, high = _pack_fields(codes & 3, 2, axis), _pack_fields(codes >> 2, 1, axis)
        return jnp.concatenate([low, high], axis=axis)
    return _pack_fields(codes, bits, axis)


def unpack_codes(
    packed: Any, bits: int, size: int, axis: int = -1, array_module: ModuleType = jnp
) -> Any:
    """The `size` uint8 codes that `pack_codes` packed; with array_module=numpy in NumPy."""
    if bits == 8:
        return packed
    if bits == 3:
        low, high = array_module.split(packed, [-(-size // 4)], axis=axis)
        low = _unpack_fields(low, 2, size, axis, array_module)
        return low | (_unpack_fields(high, 1, size, axis, array_module) << 2)
    return _unpack_fields(packed, bits, size, axis, array_module)


def _pack_fields(codes, bits, axis):
    count, size = 8 // bits, codes.shape[axis]
    if more := -size % count:
        padding = [(0, 0)] * codes.ndim
        padding[axis] = (0, more)
        codes = jnp.pad(codes, padding)
    parts = jnp.split(codes, count, axis=axis)
    return functools.reduce(jnp.bitwise_or, (part << (i * bits) for i, part in enumerate(parts)))


def _unpack_fields(packed, bits, size, axis, array_module):
    parts = [(packed >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]
    codes = array_module.concatenate(parts, axis=axis)
    if codes.shape[axis] == size:
        return codes
    index = [slice(None)] * codes.ndim
    index[axis] = slice(size)
    return codes[tuple(index)]
