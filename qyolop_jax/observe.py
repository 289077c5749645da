"""Observers: the range of values that 8 bits are spread over, from a stream of arrays.

An observer takes arrays with `add` and gives (low, high) with `range`. A histogram of fixed size
stands for all values seen; when a value falls outside, it doubles its reach and halves its
resolution.
"""

import dataclasses
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike

from qyolop_jax import QyolopError

ObserverKind = Literal["absmax", "ema", "percentile", "mse"]
BINS = 8192
"""Bins of a histogram, a power of two; a step is at most 2 / 4096 of the largest magnitude."""


class ObserveError(QyolopError):
    """An impossible observer, or one that saw no value; the message says what to do."""


class Observer(Protocol):
    """Collects values and gives their range."""

    def add(self, values: ArrayLike) -> None:
        """Takes an array of any shape. ObserveError if it is empty or not finite."""

    def range(self) -> tuple[float, float]:
        """(low, high). ObserveError before the first `add`."""
        raise NotImplementedError


def observer(kind: ObserverKind, percentile: float = 99.99, symmetric: bool = False) -> Observer:
    """A new `Observer`; `percentile` is for the kind of that name, `symmetric` for mse."""
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
    """ObserveError unless the percentile is above 50 and at most 100."""
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
        """See `Observer`."""
        values = _checked(values)
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))

    def range(self) -> tuple[float, float]:
        """See `Observer`."""
        if self.low > self.high:
            raise ObserveError("nothing was observed; add a batch first")
        return self.low, self.high


@dataclasses.dataclass
class Average:
    """Moving averages of the extremes of each `add`, beginning with the first."""

    decay: float = 0.9
    ends: tuple[float, float] | None = None

    def add(self, values: ArrayLike) -> None:
        """See `Observer`."""
        values = _checked(values)
        now = float(values.min()), float(values.max())
        old = self.ends or now
        self.ends = tuple(
            self.decay * a + (1 - self.decay) * b for a, b in zip(old, now, strict=True)
        )

    def range(self) -> tuple[float, float]:
        """See `Observer`."""
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
        """See `Observer`."""
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
        """The edges of the bins [BINS + 1]."""
        if self.reach is None:
            raise ObserveError("nothing was observed; add a batch first")
        return np.linspace(-self.reach, self.reach, BINS + 1)

    def quantile(self, share: float) -> float:
        """The value below which `share` of all values lie, to a bin's width; in the extremes."""
        edges = self.edges
        total = np.concatenate([[0], np.cumsum(self.counts)])
        found = np.interp(share * total[-1], total, edges)
        return float(np.clip(found, self.extremes.low, self.extremes.high))


class Percentile(Histogram):
    """Leaves out 100 - percentile percent of the values at each end."""

    def __init__(self, percentile: float = 99.99):
        check_percentile(percentile)
        super().__init__()
        self.share = percentile / 100

    def range(self) -> tuple[float, float]:
        """See `Observer`."""
        return self.quantile(1 - self.share), self.quantile(self.share)


class SquaredError(Histogram):
    """The range, multiplied by the factor in `CUTS` that gives the least squared error."""

    CUTS = np.linspace(0.1, 1, 91)

    def __init__(self, symmetric: bool = False):
        super().__init__()
        self.symmetric = symmetric

    def range(self) -> tuple[float, float]:
        """See `Observer`."""
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
