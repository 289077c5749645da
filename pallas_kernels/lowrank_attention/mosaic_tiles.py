"""What the Mosaic kernel is made of: shared memory for tiles, and how codes are opened.

Letters: S slots, M columns of scores.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lowrank_attention.absorption import SLOW
from pallas_kernels.lowrank_attention.mosaic_plan import COLUMNS, TILE, Plan, Stored


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
    """Latents [TILE, width] of one half of a block of codes.

    Codes are centred, so that their offsets are small and lose nothing in 16 bits. In bfloat16 one
    fused instruction scales two codes.
    """
    layout = plgpu.Layout.WGMMA_UPCAST_2X
    codes = plgpu.load(codes_ref, layout=layout)
    step, offset = (
        plgpu.load(scale_ref.at[i], layout=layout.reduce(1)).astype(jnp.float32) for i in range(2)
    )
    if bits == 8:
        codes, offset = codes ^ jnp.int8(-128), offset + 128 * step
    else:
        offset = offset + 8 * step
        codes = codes & jnp.int8(15) if half == 0 else (codes ^ jnp.int8(-128)) & jnp.int8(-16)
        step = step if half == 0 else step * 0.0625  # of 16 times a number from -8 to 7
    work = dtype if dtype == jnp.bfloat16 else jnp.float32
    wide = codes.astype(jnp.bfloat16).astype(work)
    if bits == 4 and half == 0:
        wide = wide - 8
    down = lambda a: lax.broadcast_in_dim(a.astype(work), wide.shape, (0,))
    return (wide * down(step) + down(offset)).astype(dtype)


def scratch_for(plan: Plan) -> dict[str, Any]:
    """Shared memory and barriers of a program, by the names of the kernel's arguments."""
    k, v, heads = plan.k, plan.v, plan.heads
    bar = lambda arrivals, *many: plgpu.Barrier(
        num_arrivals=arrivals, **(dict(num_barriers=many[0]) if many else {})
    )
    matrix = (k.halves, heads * SLOW, k.width)
    copies = lambda stored: stored.parts + (2 if stored.bits < 16 else 0)
    return dict(
        fast=tiled(matrix, plan.dtype),
        slow=tiled(matrix, plan.dtype),
        tables=tiled((plan.slots, 2, TILE, SLOW), jnp.bfloat16),
        mask=plgpu.SMEM((plan.slots, TILE), jnp.float32) if plan.masked else None,
        ks=slots_for(k, plan, k.width),
        vs=slots_for(v, plan, 64),
        kopen=tiled((2, k.halves, TILE, k.width), plan.dtype) if k.bits < 16 else None,
        vopen=tiled((2, TILE, 128), plan.dtype) if v.bits < 16 else None,
        weights=tiled((4, COLUMNS, TILE), plan.dtype),
        scratch=plgpu.SMEM((2, 4 * TILE), jnp.float32),
        bars=dict(
            fast=bar(k.halves),
            slow_full=bar(k.halves * heads),
            slow_empty=bar(2),
            k_full=bar(copies(k) + 2 + plan.masked, plan.slots),
            k_empty=bar(1, plan.slots),
            v_full=bar(copies(v), plan.slots),
            v_empty=bar(1, plan.slots),
        ),
    )
