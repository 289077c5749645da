"""The latents of one projection as a cache stores them: 16-bit floats, or packed codes.

Letters: B batch, S slots, R all latents of a token, r latents of a block, P packed bytes of a
token, g blocks.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from pallas_kernels.bit_fields import block_bytes, unpack_codes

LATENT_BITS = (2, 3, 4, 8, 16)
Bits = int | tuple[int, ...]
"""The bits of all blocks, or of each."""
_static = functools.partial(dataclasses.field, metadata=dict(static=True))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Latents:
    """Latents of S tokens in blocks side by side; a token's block has one step and one offset.

    value = code * step + offset. With 16 bits `codes_BSP` holds the values themselves, [B, S, R],
    and there is no step and no offset.
    """

    codes_BSP: jax.Array
    """uint8, block after block, each packed as `bit_fields` says. A block of r codes takes
    `block_bytes(r, bits)` bytes."""
    step_BSg: jax.Array | None
    """bfloat16."""
    offset_BSg: jax.Array | None
    """bfloat16: the value of code 0."""
    bits: int | tuple[int, ...] = _static()
    """Of all blocks; a tuple where blocks differ, none of them with 16."""
    blocks: tuple[int, ...] = _static()
    """Latents of each block."""

    @property
    def rank(self) -> int:
        return sum(self.blocks)


def each_block(bits: Bits, blocks: tuple[int, ...]) -> list[tuple[int, int]]:
    """(latents, bits) of each block."""
    each = (bits,) * len(blocks) if isinstance(bits, int) else bits
    return list(zip(blocks, each, strict=True))


def dense(latents: Latents, dtype: Any = jnp.float32) -> jax.Array:
    """The values [B, S, R]; float32 arithmetic, rounded once to `dtype`."""
    if latents.bits == 16:
        return latents.codes_BSP.astype(dtype)
    with jax.named_scope("dequantize"):
        parts, at, first = [], 0, 0
        step, offset = (a.astype(jnp.float32) for a in (latents.step_BSg, latents.offset_BSg))
        for (size, bits), group in itertools.groupby(each_block(latents.bits, latents.blocks)):
            count = len(list(group))
            width = block_bytes(size, bits)
            packed = latents.codes_BSP[..., at : at + count * width]
            packed = packed.reshape(*packed.shape[:-1], count, width)
            codes = unpack_codes(packed, bits, size).astype(jnp.float32)
            own = slice(first, first + count)
            value = (codes * step[..., own, None] + offset[..., own, None]).astype(dtype)
            parts.append(value.reshape(*value.shape[:-2], -1))
            at, first = at + count * width, first + count
        return jnp.concatenate(parts, axis=-1)
