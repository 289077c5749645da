"""What a Palu layer keeps of its tokens: packed latents, and exact ones of the first and newest.

Letters: B batch, T new tokens, S slots, X exact slots, R latents of a token, r latents of a block,
P packed bytes, g blocks.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llm_jax.cache import move_rows, write
from pallas_kernels.lowrank_attention.latents import BITS, Latents, block_bytes, dense, pack
from palu_jax import PaluError

_static = functools.partial(dataclasses.field, metadata=dict(static=True))


class FormatError(PaluError):
    """A cache format that cannot be; the message says what is possible."""


@dataclasses.dataclass(frozen=True)
class LatentFormat:
    """How latents are stored. Keys and values may differ; 16 bits means as they are."""

    key_bits: int = 16
    value_bits: int = 16
    clip: tuple[float, ...] | None = None
    """Shares of a block's range that are tried; the one with the least squared error is used.
    None: the whole range, and at 2 bits down to 0.6 of it."""
    block: int = 0
    """Latents that share a step and an offset; 0: all of a group of heads."""
    sinks: int = 0
    """First tokens kept in 16 bits."""
    window: int = 0
    """Newest tokens kept in 16 bits; a token is quantized once, when it leaves."""
    dtype: str | None = None
    """Of 16-bit latents; None: the model's."""

    def __post_init__(self):
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) not in BITS:
                known = ", ".join(map(str, BITS))
                raise FormatError(f"{name} is {getattr(self, name)}; possible are {known}")
        for name in ("block", "sinks", "window"):
            if getattr(self, name) < 0:
                raise FormatError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.clip is not None and not (self.clip and all(0 < c <= 1 for c in self.clip)):
            raise FormatError(f"clip is {self.clip}; expected shares above 0 and at most 1")

    def shares(self, bits: int) -> tuple[float, ...]:
        """What `encode` tries at so many bits."""
        if self.clip is not None:
            return self.clip
        return (1.0, 0.9, 0.8, 0.7, 0.6) if bits == 2 else (1.0,)

    def blocks(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the quantization blocks of groups with these ranks."""
        if not self.block:
            return tuple(ranks)
        if bad := [r for r in ranks if r % self.block]:
            raise FormatError(f"blocks of {self.block} latents do not divide a rank of {bad[0]}")
        return (self.block,) * (sum(ranks) // self.block)

    @property
    def keeps_exact(self) -> bool:
        return bool(self.sinks or self.window) and min(self.key_bits, self.value_bits) < 16


def encode(z_BTR, bits: int, blocks: tuple[int, ...], clip=(1.0,)) -> Latents:
    """The latents of T tokens as `bits`-bit codes, asymmetric, one step and offset a block.

    Offsets are rounded down and steps up in bfloat16, so that the whole range is covered. A range
    smaller than the block's own (`clip`) is taken where it lowers the squared error: at 2 bits the
    extremes of a Gaussian block cost more than they are worth.
    """
    if bits == 16:
        return Latents(z_BTR, None, None, bits, blocks)
    with jax.named_scope("quantize"):
        parts, at = [], 0
        for size, group in itertools.groupby(blocks):
            count = len(list(group))
            z = z_BTR[..., at : at + count * size].astype(jnp.float32)
            z = z.reshape(*z.shape[:-1], count, size)
            code, step, offset = _best(z, bits, clip)
            bytes_ = pack(code.astype(jnp.uint8), bits)
            parts.append((bytes_.reshape(*bytes_.shape[:-2], -1), step, offset))
            at += count * size
        codes, step, offset = (jnp.concatenate(p, axis=-1) for p in zip(*parts, strict=True))
        return Latents(codes, step.astype(jnp.bfloat16), offset.astype(jnp.bfloat16), bits, blocks)


def _best(z_Xr, bits, clip):
    """(codes [..., r], step, offset [...]) of the share of the range with the least error."""
    low, high = z_Xr.min(-1, keepdims=True), z_Xr.max(-1, keepdims=True)
    best = None
    for share in clip:
        middle, half = (low + high) / 2, (high - low) / 2 * share
        offset = _round(middle - half, -1)
        floor = jnp.maximum(jnp.abs(offset) * 2.0**-20, 1e-30)  # for a block without a range
        step = _round(jnp.maximum((middle + half - offset) / (2**bits - 1), floor), 1)
        code = jnp.clip(jnp.round((z_Xr - offset) / step), 0, 2**bits - 1)
        error = jnp.sum((code * step + offset - z_Xr) ** 2, -1, keepdims=True)
        found = (error, code, step, offset)
        if best is not None:
            less = error < best[0]
            found = tuple(jnp.where(less, a, b) for a, b in zip(found, best, strict=True))
        best = found
    return best[1], best[2][..., 0], best[3][..., 0]


def _round(x, toward: int):
    """float32 rounded to a bfloat16 value: up for `toward` 1, down for -1."""
    near = x.astype(jnp.bfloat16).astype(jnp.float32)
    beyond = (x - near) * toward > 0
    return (
        jnp.where(beyond, near + toward * jnp.abs(near) * 2.0**-7, near)
        .astype(jnp.bfloat16)
        .astype(jnp.float32)
    )


def empty_latents(batch: int, slots: int, bits: int, blocks: tuple[int, ...], dtype) -> Latents:
    """Zeroed slots on the default device."""
    if bits == 16:
        return Latents(jnp.zeros((batch, slots, sum(blocks)), dtype), None, None, bits, blocks)
    count = sum(block_bytes(size, bits) for size in blocks)
    meta = lambda: jnp.zeros((batch, slots, len(blocks)), jnp.bfloat16)
    codes = jnp.zeros((batch, slots, count), jnp.uint8)
    return Latents(codes, meta(), meta(), bits, blocks)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Exact:
    """Rows kept in 16 bits: of the first `sinks` slots, then a ring of the newest ones.

    Slot s is at place s, or behind the sinks at sinks + (s - sinks) % ring.
    """

    rows_BXR: jax.Array
    sinks: int = _static()

    @classmethod
    def empty(cls, batch, slots, width, sinks, window, scratch, dtype):
        ring = min(max(window + scratch, 1), slots)
        return cls(jnp.zeros((batch, min(sinks, slots) + ring, width), dtype), min(sinks, slots))

    def place(self, slot):
        ring = self.rows_BXR.shape[1] - self.sinks
        return jnp.where(slot < self.sinks, slot, self.sinks + (slot - self.sinks) % ring)

    def write(self, fresh_BTR, at, real=None) -> "Exact":
        """With the rows of slots at … at+T-1, or the first `real` of them; of more than the ring
        holds, the last stay."""
        place = np.arange(self.rows_BXR.shape[1])
        last = at + (fresh_BTR.shape[1] if real is None else real) - 1
        behind = (last - place) % (len(place) - self.sinks)
        slot = jnp.where(place < self.sinks, place, last - behind)  # the newest that belongs there
        new_X = (slot >= at) & (slot <= last) & ((place < self.sinks) | (slot >= self.sinks))
        taken = jnp.take(fresh_BTR.astype(self.rows_BXR.dtype), slot - at, axis=1, mode="clip")
        return Exact(jnp.where(new_X[None, :, None], taken, self.rows_BXR), self.sinks)

    def move(self, source, at) -> "Exact":
        taken = jnp.take(self.rows_BXR, self.place(source), axis=1)
        places = self.place(at + jnp.arange(source.shape[0]))
        return Exact(self.rows_BXR.at[:, places].set(taken), self.sinks)

    def view(self, fresh_BTR, at, slots: int):
        """[B, S, R] before `write`, with the new rows in: right for sinks, the newest slots and the
        new ones, anything elsewhere."""
        every = jnp.take(self.rows_BXR, self.place(jnp.arange(slots)), axis=1)
        return write(every, fresh_BTR, at)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class PaluCache:
    """Latents of the keys (before rotation) and values of one layer."""

    k: Latents
    v: Latents
    mean_coefficient_BS: jax.Array | None
    """The mean split's coefficient of each token, in 16 bits."""
    exact: Exact | None
    """Key and value latents side by side."""
    format: LatentFormat = dataclasses.field(metadata=dict(static=True))

    @property
    def slots(self) -> int:
        return self.k.codes_BSP.shape[1]

    @classmethod
    def empty(cls, format: LatentFormat, ranks, lead: bool, batch, slots, scratch, dtype):
        """Zeroed; `ranks` are those of the groups of K and of V."""
        dtype = jnp.dtype(format.dtype or dtype)
        k, v = (
            empty_latents(batch, slots, bits, format.blocks(r), dtype)
            for bits, r in zip((format.key_bits, format.value_bits), ranks, strict=True)
        )
        exact = None
        if format.keeps_exact:
            sizes = (k.rank + v.rank, format.sinks, format.window, scratch)
            exact = Exact.empty(batch, slots, *sizes, dtype)
        return cls(k, v, jnp.zeros((batch, slots), dtype) if lead else None, exact, format)

    def write(self, zk_BTR, zv_BTR, lead_BT, at, real=None) -> "PaluCache":
        """With T new tokens in slots at … at+T-1, `real` as in `Step`; nothing stored before is
        touched."""
        f = self.format
        put = lambda old, new: jax.tree.map(lambda a, b: write(a, b, at), old, new)
        k = put(self.k, encode(zk_BTR, f.key_bits, self.k.blocks, f.shares(f.key_bits)))
        v = put(self.v, encode(zv_BTR, f.value_bits, self.v.blocks, f.shares(f.value_bits)))
        lead = (
            None
            if self.mean_coefficient_BS is None
            else write(self.mean_coefficient_BS, lead_BT, at)
        )
        exact = self.exact and self.exact.write(jnp.concatenate([zk_BTR, zv_BTR], -1), at, real)
        return PaluCache(k, v, lead, exact, f)

    def move(self, source, at) -> "PaluCache":
        """Slots `source[R]` to at … at+R-1, exact latents with them."""
        rows = lambda tree: jax.tree.map(lambda a: move_rows(a, source, at), tree)
        exact = self.exact and self.exact.move(source, at)
        return PaluCache(
            rows(self.k), rows(self.v), rows(self.mean_coefficient_BS), exact, self.format
        )

    def stored(self, dtype):
        """(key latents, value latents) [B, S, R] as their codes say, every slot."""
        return dense(self.k, dtype), dense(self.v, dtype)

    def recent(self, zk_BTR, zv_BTR, at, dtype):
        """(key latents, value latents) [B, S, R] from `Exact.view`; of the cache before `write`."""
        both = self.exact.view(jnp.concatenate([zk_BTR, zv_BTR], -1), at, self.slots).astype(dtype)
        return both[..., : self.k.rank], both[..., self.k.rank :]


def rotation(size: int) -> np.ndarray:
    """An orthogonal [size, size] float64 matrix whose entries are as equal as can be.

    A Hadamard matrix over sqrt(size) (Sylvester's and Paley's constructions and their products)
    where one is known, else the Q of a fixed Gaussian matrix. The first row is constant: the first
    latent, which carries most of the energy, becomes the same addend of every rotated one, and a
    block's offset takes it up.
    """
    found = _hadamard(size)
    if found is None:
        gaussian = np.random.default_rng(size).normal(size=(size, size))
        gaussian[:, 0] = 1
        q, _ = np.linalg.qr(gaussian)
        return (q * np.sign(q[0, 0])).T
    return found * found[:1] / np.sqrt(size)  # columns with the sign that makes the first row +


def _hadamard(size: int) -> np.ndarray | None:
    """A matrix of ±1 with orthogonal rows, or None where these constructions give none."""
    if size in (1, 2):
        return np.array([[1.0, 1.0], [1.0, -1.0]])[:size, :size]
    if size % 4:
        return None
    if _is_prime(size - 1):  # Paley I: size - 1 = 3 mod 4
        q = size - 1
        s = np.zeros((size, size))
        s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, _jacobsthal(q)
        return s + np.eye(size)
    if (half := _hadamard(size // 2)) is not None:
        return np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), half)
    if _is_prime(q := size // 2 - 1) and q % 4 == 1:  # Paley II
        s = np.ones((q + 1, q + 1)) - np.eye(q + 1)
        s[1:, 1:] = _jacobsthal(q)
        eye = np.eye(q + 1)
        return np.kron(s, np.array([[1, 1], [1, -1]])) + np.kron(eye, np.array([[1, -1], [-1, -1]]))
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> np.ndarray:
    """Entry (i, j) is 1 where i - j is a nonzero square modulo the prime q, else -1; 0 at i = j."""
    squares = {i * i % q for i in range(1, q)}
    row = np.array([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    return row[(np.arange(q)[:, None] - np.arange(q)[None]) % q]
