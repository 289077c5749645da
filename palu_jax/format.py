"""How a Palu cache stores latents: `LatentFormat`, and `MixedFormat` with classes of bits."""

import dataclasses

from llm_jax.config import DTYPES
from pallas_kernels.lowrank_attention.latents import LATENT_BITS, Bits
from palu_jax import PaluError

GroupClasses = tuple[tuple[int, int], ...]
"""The (rank, bits) of each class of a group's latents, in the order of the latents."""
Classes = tuple[tuple[tuple[GroupClasses, ...], tuple[GroupClasses, ...]], ...]
"""For each layer the classes of its key groups and of its value groups."""


class FormatError(PaluError):
    """An impossible cache format; the message says what is possible."""


@dataclasses.dataclass(frozen=True)
class LatentFormat:
    """How latents are stored. Keys and values may differ; with 16 bits they are not quantized."""

    key_bits: int = 16
    value_bits: int = 16
    clip: tuple[float, ...] | None = None
    """Shares of a block's range to try; the one with the least squared error is used.
    None: the whole range, and at 2 bits also shares down to 0.6."""
    block: int = 0
    """Number of latents that share a step and an offset; 0: all of a group of heads."""
    sinks: int = 0
    """Number of first tokens kept in 16 bits."""
    window: int = 0
    """Number of newest tokens kept in 16 bits; older ones are read as quantized."""
    dtype: str | None = None
    """The dtype of 16-bit latents; None: the model's."""

    def __post_init__(self):
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) not in LATENT_BITS:
                known = ", ".join(map(str, LATENT_BITS))
                raise FormatError(f"{name} is {getattr(self, name)}; possible are {known}")
        for name in ("block", "sinks", "window"):
            if not 0 <= getattr(self, name) < 2**31:
                raise FormatError(f"{name} is {getattr(self, name)}; expected 0 to {2**31 - 1}")
        if self.clip is not None and not (self.clip and all(0 < c <= 1 for c in self.clip)):
            raise FormatError(f"clip is {self.clip}; expected shares above 0 and at most 1")
        if self.dtype not in (None, *DTYPES):
            raise FormatError(f"dtype is {self.dtype!r}; possible are {', '.join(DTYPES)}")

    def shares(self, bits: int) -> tuple[float, ...]:
        """The shares of a block's range that `quantize_latents` tries at this number of bits."""
        if self.clip is not None:
            return self.clip
        return (1.0, 0.9, 0.8, 0.7, 0.6) if bits == 2 else (1.0,)

    def blocks(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the quantization blocks of groups with these ranks, or of classes with these.

        Raises FormatError where blocks do not divide a rank.
        """
        if not self.block:
            return tuple(ranks)
        if bad := [r for r in ranks if r % self.block]:
            raise FormatError(f"blocks of {self.block} latents do not divide a rank of {bad[0]}")
        return (self.block,) * (sum(ranks) // self.block)

    def layer(self, index: int) -> "LatentFormat":
        """The format of one layer."""
        return self

    def classes_of(self, side: int, group: int, rank: int) -> GroupClasses:
        """The classes of a group's latents: keys are side 0, values side 1."""
        return ((rank, (self.key_bits, self.value_bits)[side]),)

    def layout(self, side: int, ranks: tuple[int, ...]) -> tuple[Bits, tuple[int, ...]]:
        """(bits, sizes) of the blocks of keys (side 0) or values (1) whose groups have these ranks,
        as `Latents` takes them.

        Raises FormatError where they do not fit the ranks.
        """
        classes = [c for g, rank in enumerate(ranks) for c in self.classes_of(side, g, rank)]
        found = [(size, bits) for rank, bits in classes for size in self.blocks((rank,))]
        sizes, bits = zip(*found, strict=True)
        return (bits[0] if len(set(bits)) == 1 else bits), sizes

    @property
    def keeps_exact(self) -> bool:
        """Whether some tokens are kept in 16 bits beside their codes."""
        return bool(self.sinks or self.window) and min(self.key_bits, self.value_bits) < 16


@dataclasses.dataclass(frozen=True)
class MixedFormat(LatentFormat):
    """Latents in classes: a group's first latents have more bits than the rest of them.

    A class is one block with a step, an offset and a rotation of its own. `key_bits` and
    `value_bits` become the most bits of any class.
    """

    classes: Classes = ()
    """Those of all layers; of one layer in the format of a layer."""

    def __post_init__(self):
        known = LATENT_BITS[:-1]
        for i, layer in enumerate(self.classes):
            for rank, bits in (c for side in layer for group in side for c in group):
                if rank < 1 or bits not in known:
                    raise FormatError(
                        f"layer {i}: a class of {rank} latents in {bits} bits; possible are ranks "
                        f"from 1 on and {', '.join(map(str, known))} bits"
                    )
        sides = [side for layer in self.classes for side in layer]
        if not (sides and all(side and all(side) for side in sides)):
            raise FormatError("a group without classes; give one or more (rank, bits)")
        if self.block:
            raise FormatError(f"block is {self.block}; classes are blocks already, so it must be 0")
        for side, name in enumerate(("key_bits", "value_bits")):
            groups = (group for layer in self.classes for group in layer[side])
            object.__setattr__(self, name, max(bits for group in groups for _, bits in group))
        super().__post_init__()

    def layout(self, side: int, ranks: tuple[int, ...]) -> tuple[Bits, tuple[int, ...]]:
        """As in `LatentFormat`, for the first layer."""
        if (count := len(self.classes[0][side])) != len(ranks):
            raise FormatError(f"classes for {count} groups; there are {len(ranks)}")
        return super().layout(side, ranks)

    def layer(self, index: int) -> "MixedFormat":
        """The format of one layer."""
        return dataclasses.replace(self, classes=(self.classes[index],))

    def classes_of(self, side: int, group: int, rank: int) -> GroupClasses:
        """The classes of a group's latents in the first layer; raises FormatError where they do not
        add up to the rank."""
        found = self.classes[0][side][group]
        if sum(r for r, _ in found) != rank:
            raise FormatError(f"classes {found} do not add up to a rank of {rank}")
        return found
