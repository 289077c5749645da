"""What the Triton kernels share: where a group's latents lie and how a tile of them is read.

Letters: B batch, S slots, P packed bytes, C columns of a chunk, g groups.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lowrank_attention.latents import Latents

MAGIC = 128.0
"""bfloat16 0x4300 + n is 128 + n: bytes become numbers by putting 0x43 beside them."""
LOW = """{ .reg .b32 n;
and.b32 n, $2, 0x0F0F0F0F;
prmt.b32 $0, n, 0x43434343, 0x4140;
prmt.b32 $1, n, 0x43434343, 0x4342; }"""
HIGH = LOW.replace("and.b32 n, $2,", "shr.u32 n, $2, 4; and.b32 n, n,")


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a group's latents lie in a token's row of `Latents.codes_BSP`, for kernels."""

    bits: int
    rank: int

    @property
    def size(self) -> int:
        """Columns of codes that a group takes."""
        return self.rank * self.bits // 8 if self.bits < 16 else self.rank

    @property
    def chunk(self) -> int:
        """Columns that are read at once: the largest power of two that divides `size`."""
        most = 64 if self.bits == 4 else 128
        return min(most, self.size & -self.size)

    @property
    def chunks(self) -> range:
        """First columns of the chunks."""
        return range(0, self.size, self.chunk)

    def firsts(self, chunks: int | None = None) -> list[int]:
        """First latents of the (first) chunks' parts in order; with 4 bits a chunk has two."""
        halves = (0, self.rank // 2) if self.bits == 4 else (0,)
        return [c + half for c in self.chunks[:chunks] for half in halves]

    @property
    def magic(self) -> float:
        """What is added to every code on its way into the tensor cores."""
        return MAGIC if self.bits == 4 else 0.0


@dataclasses.dataclass(frozen=True)
class LatentTiling:
    """How the slots are cut up."""

    tile: int = 64
    span: int = 1024
    """Slots of a program."""
    width: int = 32
    """Columns of a head in one product."""

    def rows(self, bits: int, columns: int) -> int:
        """The least columns of weights that a product takes."""
        return 16 if bits == 16 else 8


def tiling(batch: int, programs: int, slots: int) -> LatentTiling:
    """Spans as long as possible that still give a GPU enough programs."""
    cfg = LatentTiling()
    while cfg.span > 256 and batch * programs * -(-slots // cfg.span) < 256:
        cfg = dataclasses.replace(cfg, span=cfg.span // 2)
    return cfg


def operand_dtype(latents: Latents) -> Any:
    """The dtype in which products with these latents are taken."""
    return latents.codes_BSP.dtype if latents.bits == 16 else jnp.dtype(jnp.bfloat16)


def spread(codes: jax.Array, interpret: bool) -> list[jax.Array]:
    """The low and the high halves of bytes [tile, C], each as bfloat16 128 + half."""
    if interpret:
        wide = codes.astype(jnp.int32)
        return [(half + int(MAGIC)).astype(jnp.bfloat16) for half in (wide & 15, wide >> 4)]
    shape = [jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)]
    return [
        plgpu.elementwise_inline_asm(
            asm, args=[codes], constraints="=r,=r,r", pack=4, result_shape_dtypes=shape
        )[0]
        for asm in (LOW, HIGH)
    ]


def read_latents(
    ref: Any,
    index: Any,
    column: Any,
    ok: Any,
    packing: Packing,
    interpret: bool,
    chunks: int | None = None,
) -> list[jax.Array]:
    """The parts [tile, C] of a group's (first) chunks; code 0 where not `ok` (None: all are)."""
    parts = []
    for c in packing.chunks[:chunks]:
        raw = masked_load(ref, (*index, pl.ds(column + c, packing.chunk)), ok)
        if packing.bits == 16:
            parts.append(raw)
        elif packing.bits == 8:
            parts.append(raw.astype(jnp.int32).astype(jnp.bfloat16))
        else:
            parts += spread(raw, interpret)
    return parts


def masked_load(ref: Any, index: Any, ok: Any, other: Any = 0) -> jax.Array:
    """The block of `ref` at `index`, `other` in rows that are not `ok` (None: all are)."""
    if ok is None:
        return ref[index]
    at = ref.at[index]
    there = ok if len(at.shape) == 1 else jnp.broadcast_to(ok[:, None], at.shape)
    return plgpu.load(at, mask=there, other=jnp.asarray(other, ref.dtype))


def read_scale(refs: Any, index: Any, ok: Any) -> list[jax.Array]:
    """(step, offset) float32 [tile] of a group's block; step 1 and offset 0 where not `ok`."""
    pairs = zip(refs, (1, 0), strict=True)
    return [masked_load(ref, index, ok, other).astype(jnp.float32) for ref, other in pairs]


def tile_range(
    length: jax.Array, x: jax.Array, tile: int, span: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(first, first that is perhaps not whole, end) of the tiles of span x."""
    first = x * (span // tile)
    clip = lambda n: jnp.clip(n, first, first + span // tile)
    return first, clip(length // tile), clip(pl.cdiv(length, tile))


def stored(latents: Latents) -> list[jax.Array]:
    """The arrays of latents that a kernel gets."""
    if latents.bits == 16:
        return [latents.codes_BSP]
    return [latents.codes_BSP, latents.step_BSg, latents.offset_BSg]
