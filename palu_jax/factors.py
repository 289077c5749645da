"""Factors as a cache stores them: rotated, class by class, for a group of heads.

They are also here for other people's models, as arrays in and arrays out:

    seen = Moment()
    for x_BTD in inputs:  # of the key and value projections, in somebody else's forward pass
        seen.add(x_BTD)
    k, v = low_rank(w_k_DF, w_v_DF, seen.moment_DD, None, 96, LatentFormat(4, 4))
    latents_BTR = x_BTD @ k.down_DR  # what a cache holds; keys are latents_BTR @ k.up_RF

Letters: D inputs, F outputs of a group of heads, R rank.
"""

import dataclasses
from typing import Any

import numpy as np

from palu_jax import PaluError
from palu_jax.decompose import Spectrum, spectrum
from palu_jax.format import LatentFormat
from palu_jax.hadamard import rotation


class FactorError(PaluError):
    """Arrays that do not fit or are not finite; the message says which."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """W = down up, nearly; float64 NumPy arrays."""

    down_DR: np.ndarray
    up_RF: np.ndarray
    error: float
    """E |(x W - x down up) M^(1/2)|^2, before latents are quantized."""


def low_rank(
    w_k_DF: Any,
    w_v_DF: Any,
    gram_DD: Any,
    metric: tuple[Any, Any] | None,
    rank: int | tuple[int, int],
    format: LatentFormat | None = None,
) -> tuple[LowRank, LowRank]:
    """The best factors of the key and value projections of one group of heads.

    `gram_DD` is E[x x^T] of their inputs; None: the identity, which gives an SVD of the weights.
    `metric` has for keys and for values the weight [F, F] of errors in the outputs, or None for the
    identity, which gives Palu's whitened factors; None: both. One `rank` is for keys and values.
    Latents that have fewer than 16 bits in the `format` are rotated as by `palu_jax.to_palu`; None:
    16 bits. Raises FactorError, and FormatError where blocks or classes of latents do not fit a
    rank.
    """
    form, found = format or LatentFormat(), []
    ranks = rank if isinstance(rank, tuple) else (rank, rank)
    gram_DD, metric = _square("gram_DD", gram_DD), metric or (None, None)
    for side, (name, given) in enumerate((("w_k_DF", w_k_DF), ("w_v_DF", w_v_DF))):
        w = _finite(name, given)
        if w.ndim != 2:
            raise FactorError(f"{name} has shape {w.shape}; expected [inputs, outputs]")
        m = _square(f"metric[{side}]", metric[side])
        for what, moment, size in (("gram_DD", gram_DD, len(w)), ("metric", m, w.shape[1])):
            if moment is not None and len(moment) != size:
                raise FactorError(
                    f"{what} is {moment.shape}; {name} of shape {w.shape} wants {(size, size)}"
                )
        if ranks[side] not in range(1, w.shape[1] + 1):
            raise FactorError(f"rank {ranks[side]} of {name}; expected 1 to {w.shape[1]}")
        form.layout(side, (ranks[side],))  # raises where blocks do not fit
        parts = spectrum(w, gram_DD, m)
        down, up = stored_factors(parts, ranks[side], form, side)
        found.append(LowRank(down, up, parts.error(ranks[side])))
    return found[0], found[1]


class Moment:
    """E[x x^T] and E[x] over vectors that come batch by batch, summed in float64.

    Of the inputs of the key and value projections it is the gram of `low_rank`; of the loss's
    gradients for their outputs it is the metric.
    """

    def __init__(self) -> None:
        self.count = 0
        """The number of vectors so far."""
        self._sum_D, self._sum_DD = np.zeros(0), np.zeros((0, 0))

    def add(self, x: Any) -> None:
        """Takes vectors [..., D] of any dtype; raises FactorError, and then adds nothing."""
        x = _finite("x", x)
        if x.ndim < 1 or x.shape[-1] < 1:
            raise FactorError(f"x has shape {x.shape}; expected [..., D]")
        if not self.count:
            self._sum_D, self._sum_DD = np.zeros(x.shape[-1]), np.zeros((x.shape[-1],) * 2)
        if x.shape[-1] != len(self._sum_D):
            raise FactorError(f"x has width {x.shape[-1]}; those before had {len(self._sum_D)}")
        x = x.reshape(-1, x.shape[-1])
        self._sum_D = self._sum_D + x.sum(0)
        self._sum_DD = self._sum_DD + x.T @ x
        self.count += len(x)

    @property
    def moment_DD(self) -> np.ndarray:
        """E[x x^T], float64; raises FactorError where nothing was added."""
        return self._sum_DD / self._counted()

    @property
    def mean_D(self) -> np.ndarray:
        """E[x], float64; raises FactorError where nothing was added."""
        return self._sum_D / self._counted()

    def _counted(self) -> int:
        if not self.count:
            raise FactorError("no vectors were added; there is no moment of nothing")
        return self.count


def _finite(name: str, given: Any) -> np.ndarray:
    found = np.asarray(given, np.float64)
    if not np.isfinite(found).all():
        raise FactorError(f"{name} holds NaN or infinity")
    return found


def _square(name: str, given: Any) -> np.ndarray | None:
    if given is None:
        return None
    found = _finite(name, given)
    if found.ndim != 2 or found.shape[0] != found.shape[1]:
        raise FactorError(f"{name} has shape {found.shape}; expected a square matrix")
    return found


def stored_factors(
    spectrum: Spectrum,
    rank: int,
    form: LatentFormat,
    side: int,
    group: int = 0,
    rotate: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """(down [D, R], up [R, F]) in float64 of a group's keys (side 0) or values (side 1).

    With `rotate`, each class of latents of fewer than 16 bits is rotated by itself.
    """
    down, up = spectrum.factors(rank)
    downs, ups, at = [], [], 0
    for size, bits in form.classes_of(side, group, rank):
        own, at = slice(at, at + size), at + size
        part = down[:, own], up[own]
        if rotate and bits < 16:
            part = _rotated(*part, form.block or size)
        downs.append(part[0])
        ups.append(part[1])
    return np.concatenate(downs, axis=1), np.concatenate(ups)


def _rotated(down_DR, up_RF, block: int):
    """The factors with their latents rotated, `block` latents at a time.

    A block takes every n-th latent, so that each block has some of the large ones.
    """
    count = down_DR.shape[1] // block
    order = np.arange(count * block).reshape(block, count).T.reshape(-1)
    q = rotation(block)
    down, up = down_DR[:, order], up_RF[order]
    down = (down.reshape(-1, count, block) @ q).reshape(down.shape)
    return down, (q.T @ up.reshape(count, block, -1)).reshape(up.shape)
