"""Ranges of values from what streams past: what 8 bits are spread over.

An observer takes arrays with `add` and gives (low, high) with `range`. A histogram of fixed size
stands for all that was seen; it doubles its reach when a value falls outside, which loses nothing
but half of its resolution.
"""

import dataclasses
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike

from qyolop_jax import QyolopError

ObserverKind = Literal["absmax", "ema", "percentile", "mse"]
BINS = 8192
"""Of a histogram, a power of two; its steps are at most 2 / 4096 of the largest magnitude."""


class ObserveError(QyolopError):
    """An observer that cannot be, or one that saw nothing; the message says what to do."""


class Observer(Protocol):
    def add(self, values: ArrayLike) -> None: ...

    def range(self) -> tuple[float, float]: ...


def observer(kind: ObserverKind, percentile: float = 99.99, symmetric: bool = False) -> Observer:
    """A fresh `Observer`; `percentile` is for its own kind, `symmetric` for what mse searches."""
    if kind == "absmax":
        return Extremes()
    if kind == "ema":
        return Average()
    if kind == "percentile":
        return Percentile(percentile)
    if kind == "mse":
        return SquaredError(symmetric)
    raise ObserveError(f"observer {kind!r}; possible are absmax, ema, percentile and mse")


def check_percentile(percentile: float) -> None:
    if not 50 < percentile <= 100:
        raise ObserveError(f"percentile {percentile}; expected above 50 and at most 100")


def _checked(values) -> np.ndarray:
    values = np.asarray(values, np.float32).ravel()
    if not values.size:
        raise ObserveError("an empty array to observe; give at least one value")
    if not np.isfinite(values).all():
        raise ObserveError("values to observe are not finite; the network overflows before")
    return values


@dataclasses.dataclass
class Extremes:
    """The smallest and the largest value."""

    low: float = np.inf
    high: float = -np.inf

    def add(self, values: ArrayLike) -> None:
        values = _checked(values)
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))

    def range(self) -> tuple[float, float]:
        if self.low > self.high:
            raise ObserveError("nothing was observed; add a batch first")
        return self.low, self.high


@dataclasses.dataclass
class Average:
    """Moving averages of the extremes of every `add`; the first one counts as all before it."""

    decay: float = 0.9
    ends: tuple[float, float] | None = None

    def add(self, values: ArrayLike) -> None:
        values = _checked(values)
        now = float(values.min()), float(values.max())
        old = self.ends or now
        self.ends = tuple(
            self.decay * a + (1 - self.decay) * b for a, b in zip(old, now, strict=True)
        )

    def range(self) -> tuple[float, float]:
        if self.ends is None:
            raise ObserveError("nothing was observed; add a batch first")
        return self.ends


class Histogram:
    """Counts in `BINS` equal bins over [-reach, reach), `reach` a power of two."""

    def __init__(self):
        self.counts = np.zeros(BINS, np.int64)
        self.reach: float | None = None
        self.extremes = Extremes()

    def add(self, values: ArrayLike) -> None:
        values = _checked(values)
        self.extremes.add(values)
        most = max(float(np.abs(values).max()), 1e-30)
        if self.reach is None:
            self.reach = 2.0 ** (np.floor(np.log2(most)) + 1)
        while most >= self.reach:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.pad(pairs, BINS // 4)
            self.reach *= 2
        where = np.floor(values * np.float32(BINS / 2 / self.reach)).astype(np.int32) + BINS // 2
        self.counts += np.bincount(where, minlength=BINS)

    @property
    def edges(self) -> np.ndarray:
        if self.reach is None:
            raise ObserveError("nothing was observed; add a batch first")
        return np.linspace(-self.reach, self.reach, BINS + 1)

    def quantile(self, share: float) -> float:
        """The value below which `share` of all lie, to a bin's width; within the extremes."""
        edges = self.edges
        total = np.concatenate([[0], np.cumsum(self.counts)])
        found = np.interp(share * total[-1], total, edges)
        return float(np.clip(found, self.extremes.low, self.extremes.high))


class Percentile(Histogram):
    """Leaves out 100 - percentile per cent at each end."""

    def __init__(self, percentile: float = 99.99):
        check_percentile(percentile)
        super().__init__()
        self.share = percentile / 100

    def range(self) -> tuple[float, float]:
        return self.quantile(1 - self.share), self.quantile(self.share)


class SquaredError(Histogram):
    """The range cut by the share, of `CUTS`, whose 8 bits have the least squared error."""

    CUTS = np.linspace(0.1, 1, 91)

    def __init__(self, symmetric: bool = False):
        super().__init__()
        self.symmetric = symmetric

    def range(self) -> tuple[float, float]:
        edges = self.edges
        middles = (edges[:-1] + edges[1:]) / 2
        seen = self.counts > 0
        middles, counts = middles[seen], self.counts[seen]
        low, high = min(self.extremes.low, 0.0), max(self.extremes.high, 0.0)
        if self.symmetric:
            low, high = -max(-low, high), max(-low, high)
        if low == high:
            return low, high
        errors = []
        for cut in self.CUTS:
            step = cut * (high - low) / (254 if self.symmetric else 255)
            near = np.clip(np.round(middles / step), np.round(cut * low / step), None)
            near = np.minimum(near, np.round(cut * high / step))
            errors.append(((near * step - middles) ** 2 * counts).sum())
        best = self.CUTS[int(np.argmin(errors))]
        return float(best * low), float(best * high)
