"""What the Mosaic kernel is made of: shared memory for tiles, and how codes are opened.

Letters: S slots, M columns of scores.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lowrank_attention.mosaic_plan import TILE, Plan, Stored


def tiled(shape: tuple[int, ...], dtype: Any, minor: int | None = None) -> Any:
    """Shared memory for an operand of a product: tiles of 8 rows, the widest swizzle that fits.

    `minor` is what tiles must divide, by default a row: copies start at whole tiles only.
    """
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle((minor or shape[-1]) * bits)
    transforms = plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def largest(x_SM: jax.Array, scratch: Any, interpret: bool) -> jax.Array:
    """The largest of each column, [M]. `scratch` is this warpgroup's own.

    `jnp.max` would do, but two warpgroups would get one scratch and overwrite each other's numbers.
    """
    if interpret:
        return jnp.max(x_SM, axis=0)
    columns = plgpu.Layout.WGMMA.reduce(0)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((x_SM.shape[1],), jnp.float32, layout=columns),
    )
    def reduced(_, x, scratch):
        return x.reduce("max", 0, scratch)

    return reduced(x_SM, scratch)


def slots_for(stored: Stored, plan: Plan, columns: int) -> list[Any]:
    """Shared memory for tiles, and for their steps and offsets.

    `columns` are those of a product that reads 16-bit numbers where they lie.
    """
    codes = plan.slots, stored.parts, TILE, stored.width
    if stored.bits == 16:
        return [tiled(codes, plan.dtype, columns)]
    columns = math.gcd(stored.size, stored.width)
    return [tiled(codes, jnp.int8, columns), plgpu.SMEM((plan.slots, 2, TILE), jnp.bfloat16)]


def opened(codes_ref: Any, scale_ref: Any, half: int, bits: int, dtype: Any) -> jax.Array:
    """Latents [TILE, width] of one half of a block of codes, computed in float32."""
    layout = plgpu.Layout.WGMMA_UPCAST_2X
    codes = plgpu.load(codes_ref, layout=layout)
    step, offset = (
        plgpu.load(scale_ref.at[i], layout=layout.reduce(1)).astype(jnp.float32) for i in range(2)
    )
    if bits == 8:
        codes, offset = codes ^ jnp.int8(-128), offset + 128 * step
    elif half == 0:
        codes = codes & jnp.int8(15)
    else:  # 16 times a number from -8 to 7
        codes, offset = (codes ^ jnp.int8(-128)) & jnp.int8(-16), offset + 8 * step
        step = step * 0.0625
    wide = codes.astype(jnp.bfloat16).astype(jnp.float32)
    down = lambda a: lax.broadcast_in_dim(a, wide.shape, (0,))
    return (wide * down(step) + down(offset)).astype(dtype)
