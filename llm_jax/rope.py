"""Rotary positions: the kinds of scaling, the frequencies they give, and how config.json says it.

Sources: Su et al. 2021 (arXiv 2104.09864); YaRN (2309.00071); LongRoPE (2402.13753); Llama 3.1.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from llm_jax.values import ConfigError, Values, short

THETA = (1.0, 1e15)
"""Lowest and highest base of the rotary frequencies."""
FACTOR = (1.0, 1e6)
"""Lowest and highest factor by which positions are stretched."""
LONGEST = 2**31 - 1
"""The largest position."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A stretch of the rotary positions, made for longer texts than the model saw at first."""

    name: ClassVar[str]
    """Its `rope_type` in config.json."""

    def frequencies(self, plain_h: np.ndarray, theta: float) -> np.ndarray:
        """Radians per position of each pair, float64, from those without scaling."""
        raise NotImplementedError

    @property
    def magnitude(self) -> float:
        """What cosine and sine are multiplied by; 1 where angles alone change."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LinearRope(RopeScaling):
    """All positions divided by a factor (`linear`)."""

    factor: float
    name: ClassVar = "linear"

    def __post_init__(self):
        Values(vars(self), "rope scaling: ").number("factor", *FACTOR)

    def frequencies(self, plain_h, theta):
        return plain_h / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Rope(RopeScaling):
    """Llama 3.1's stretch of the low frequencies (`llama3`).

    Wavelengths shorter than original/high_freq_factor are kept, those longer than
    original/low_freq_factor divided by `factor`; between, it blends linearly (in 1/wavelength).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int
    name: ClassVar = "llama3"

    def __post_init__(self):
        values = Values(vars(self), "rope scaling: ")
        values.number("factor", *FACTOR)
        low = values.number("low_freq_factor", 1e-6, 1e6)
        high = values.number("high_freq_factor", 1e-6, 1e6)
        values.integer("original_max_length", 1, LONGEST)
        if low >= high:
            values.refuse("high_freq_factor", f"more than low_freq_factor, {low:g}")

    def frequencies(self, plain_h, theta):
        turns = self.original_max_length * plain_h / (2 * math.pi)
        keep = np.clip(
            (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1
        )
        return plain_h * keep + plain_h / self.factor * (1 - keep)


@dataclasses.dataclass(frozen=True)
class YarnRope(RopeScaling):
    """YaRN: pairs that turn often are kept, those that turn rarely are stretched (`yarn`).

    Between `fast` and `slow` turns over the original length it blends linearly in the pair's
    number. `attention_factor` multiplies cosine and sine.
    """

    factor: float
    original_max_length: int
    attention_factor: float
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    """Whether the ends of the blend are rounded outwards to whole pairs."""
    name: ClassVar = "yarn"

    def __post_init__(self):
        values = Values(vars(self), "rope scaling: ")
        values.number("factor", *FACTOR)
        values.integer("original_max_length", 1, LONGEST)
        values.number("attention_factor", 1e-3, 1e3)
        fast, slow = values.number("fast", 1e-6, 1e6), values.number("slow", 1e-6, 1e6)
        if fast < slow:
            values.refuse("fast", f"at least beta_slow, {slow:g}")

    def frequencies(self, plain_h, theta):
        half = len(plain_h)

        def pair(turns):  # the pair that turns this often over the original length
            if theta == 1:
                return 0.0
            per_turn = self.original_max_length / (turns * 2 * math.pi)
            return half * math.log(per_turn) / math.log(theta)

        low, high = pair(self.fast), pair(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        high = low + 0.001 if low == high else high
        stretched = np.clip((np.arange(half) - low) / (high - low), 0, 1)
        return plain_h / self.factor * stretched + plain_h * (1 - stretched)

    @property
    def magnitude(self) -> float:
        return self.attention_factor


@dataclasses.dataclass(frozen=True)
class LongRope(RopeScaling):
    """LongRoPE: a divisor for each pair, found by search (`longrope`).

    There are two lists: for texts within the original length, and for longer ones. transformers
    changes from one to the other in the middle of a text, though the keys in its cache are rotated
    already. Here a model has the first list, and `Config.max_length` is the original length.
    """

    divisors: tuple[float, ...]
    attention_factor: float
    name: ClassVar = "longrope"

    def __post_init__(self):
        values = Values(vars(self) | {"divisors": list(self.divisors)}, "rope scaling: ")
        for divisor in values.list_of(float, "divisors"):
            if not 1e-3 <= divisor <= 1e6:  # NaN is in no range
                values.refuse("divisors", "numbers from 0.001 to 1e+06")
        values.number("attention_factor", 1e-3, 1e3)

    def frequencies(self, plain_h, theta):
        if len(self.divisors) != len(plain_h):
            raise ConfigError(
                f"rope scaling has {len(self.divisors)} divisors; expected {len(plain_h)}, one for "
                "each rotated pair"
            )
        return plain_h / np.asarray(self.divisors)

    @property
    def magnitude(self) -> float:
        return self.attention_factor


SCALINGS = {kind.name: kind for kind in (LinearRope, Llama3Rope, YarnRope, LongRope)}
"""Every kind of scaling, by its name in config.json."""


def frequencies(rotated: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each of the pairs of `rotated` head dimensions, float32."""
    half = rotated // 2
    plain_h = theta ** (-np.arange(half, dtype=np.float64) / half)
    found = plain_h if scaling is None else scaling.frequencies(plain_h, theta)
    return found.astype(np.float32)


def read_rope(
    values: Values, rope: Values, usual: float = 10_000.0
) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) that an object about rope in config.json describes.

    `usual` is the theta of a file that names none.
    """
    inner, outer = (v.number("rope_theta", *THETA, None) for v in (rope, values))
    if inner and outer and inner != outer:
        rope.refuse("rope_theta", f"what rope_theta outside says, {outer:g}; keep one of them")
    return inner or outer or usual, _scaling(values, rope)


def _scaling(values: Values, rope: Values) -> RopeScaling | None:
    names = [name for name in ("rope_type", "type") if name in rope]
    kinds = {_alias(rope.text(name)) for name in names}
    if len(kinds) > 1:
        rope.refuse("type", "what rope_type says; keep one of them")
    if not kinds and "factor" in rope:
        rope.refuse("rope_type", "a type beside the factor, such as llama3")
    kind = min(kinds, default="default")
    if kind == "dynamic":
        # It stretches what is longer than max_position_embeddings; nothing here is.
        rope.number("factor", *FACTOR)
        return None
    if kind == "default":
        if rope.number("factor", 0, 1e6, 1.0) != 1:
            rope.refuse("factor", "1, because the type is default; name the type that is meant")
        return None
    if kind not in SCALINGS:
        known = ", ".join(("default", *SCALINGS, "dynamic"))
        raise ConfigError(f"rope type {short(kind)} is not supported; known are {known}")
    return _READERS[kind](values, rope)


def _alias(kind: str) -> str:
    """`su` is the first name of longrope. `mrope` of text alone gives all parts of a head the same
    position, which is the default."""
    return {"su": "longrope", "mrope": "default"}.get(kind, kind)


def _linear(values: Values, rope: Values) -> LinearRope | None:
    factor = rope.number("factor", *FACTOR)
    return None if factor == 1 else LinearRope(factor)


def _llama3(values: Values, rope: Values) -> Llama3Rope:
    return Llama3Rope(
        factor=rope.number("factor", *FACTOR),
        low_freq_factor=rope.number("low_freq_factor", 1e-6, 1e6),
        high_freq_factor=rope.number("high_freq_factor", 1e-6, 1e6),
        original_max_length=rope.integer("original_max_position_embeddings", 1, LONGEST),
    )


def original_length(values: Values, rope: Values) -> int:
    """The length before the stretch: of the object about rope, or else of the model."""
    for found in (rope, values):
        length = found.integer("original_max_position_embeddings", 1, LONGEST, None)
        if length is not None:
            return length
    return values.integer("max_position_embeddings", 1, LONGEST, 2048)


def _yarn(values: Values, rope: Values) -> YarnRope:
    factor = rope.number("factor", *FACTOR)
    longer = lambda by: 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0
    one, all_ = (rope.number(name, 0, 1e3, None) for name in ("mscale", "mscale_all_dim"))
    given = rope.number("attention_factor", 1e-3, 1e3, None)
    return YarnRope(
        factor=factor,
        original_max_length=original_length(values, rope),
        attention_factor=given or (longer(one) / longer(all_) if one and all_ else longer(1.0)),
        fast=rope.number("beta_fast", 1e-6, 1e6, None) or 32.0,
        slow=rope.number("beta_slow", 1e-6, 1e6, None) or 1.0,
        truncate=rope.flag("truncate", True),
    )


def _longrope(values: Values, rope: Values) -> LongRope:
    """The scaling of texts within the original length."""
    longest = values.integer("max_position_embeddings", 1, LONGEST, 2048)
    original = original_length(values, rope)
    divisors = tuple(rope.numbers("short_factor", 1e-3, 1e6))
    factor = rope.number("factor", *FACTOR, None) or max(1.0, longest / original)
    given = rope.number("attention_factor", 1e-3, 1e3, None)
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRope(divisors, given or grown)


_READERS = dict(linear=_linear, llama3=_llama3, yarn=_yarn, longrope=_longrope)


def scaling_from_dict(fields: dict | None) -> RopeScaling | None:
    """The scaling whose fields were written by `dataclasses.asdict`; None for None."""
    if fields is None:
        return None
    for kind in SCALINGS.values():
        if {f.name for f in dataclasses.fields(kind)} == set(fields):
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            return kind(**values)
    raise ConfigError(f"no rope scaling has the fields {', '.join(sorted(fields))}")
