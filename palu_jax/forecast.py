"""The predicted change of the loss where latents are cut and rounded, in nats a token.

An item is the keys or the values of one group of heads in one layer. It has eigenvalues
a_1 >= a_2 >= ...; its latents are scaled to their fourth roots, and every class of them is rotated.
Latents of which the first r1 have b1 bits and the next r2 have b2 bits are predicted to cost

    TRUNCATION sum_{j > r1 + r2} a_j + noise(b1, r1) (sum_{j <= r1} a_j^(1/2))^2 / r1
        + SECOND noise(b2, r2) (sum_{r1 < j <= r1 + r2} a_j^(1/2))^2 / r2,

where noise(b, r) = NOISE D(b, r), and D is the mean squared error of a Gaussian block of r latents
over its variance. Under the gradient objective this is a change of the loss, so items can be
compared.
"""

import functools
import math
from typing import Any

import jax
import numpy as np

from pallas_kernels.lowrank_attention.latents import dense
from palu_jax.format import LatentFormat
from palu_jax.latent import quantize_latents
from palu_jax.rank import truncation

TRUNCATION, NOISE = 3.1, 0.27
"""Change of the loss over the metric's error, fitted to seven conversions of SmolLM2 (truncation
2.5 to 3.7, noise 0.24 to 0.29). Truncation drops the same subspace in every token, so its errors
add up; rounding errors of different tokens average out."""
SECOND = 5.0
"""How many times as much the loss changes by rounding a second class; fitted to two conversions of
SmolLM2 (6 and 4), calibrated on 8,192 tokens. So few tokens make small eigenvalues too small: by
the metric of other text such plans err 2 (keys) to 7 times (values) as much, plans of one class 1.2
to 2.7 times."""


def predicted_error(energy_F: Any, bits: int) -> np.ndarray:
    """[F + 1]: the change of the loss if 0 … F latents of an item are kept with `bits` bits."""
    ends = np.arange(1, len(energy_F) + 1)
    cost = TRUNCATION * truncation(np.asarray(energy_F, np.float64))
    return cost + np.concatenate([[0.0], rounding(energy_F, np.zeros_like(ends), ends, bits)])


def rounding(energy_F: Any, start: np.ndarray, end: np.ndarray, bits: int) -> np.ndarray:
    """The change of the loss by rounding classes of the latents start … end - 1; `end` is above
    `start`."""
    if bits == 16:
        return np.zeros(np.shape(end))
    root = np.sqrt(np.maximum(np.asarray(energy_F, np.float64), 0))
    sums, size = np.concatenate([[0.0], np.cumsum(root)]), end - start
    return NOISE * distortion(bits, size) * (sums[end] - sums[start]) ** 2 / size


def distortion(bits: int, size: Any) -> np.ndarray:
    """D(b, r) for block sizes r: the mean squared error of `quantize_latents` over the variance of
    Gaussian blocks.

    It is measured on a fixed sample for powers of two, and interpolated in log r.
    """
    if bits == 16:
        return np.zeros(np.shape(size))
    size = np.asarray(size, np.float64)
    powers = np.arange(2, max(3, math.ceil(math.log2(size.max()))) + 1)
    sampled = [_sampled(bits, int(p)) for p in powers]
    return np.exp(np.interp(np.log2(size), powers, np.log(sampled)))


@functools.cache
def _sampled(bits: int, power: int) -> float:
    size = 2**power
    z = np.random.default_rng(power).standard_normal((max(16, 2**14 // size), size))
    z = z.astype(np.float32)
    packed = jax.jit(quantize_latents, static_argnums=(1, 2, 3))(
        z, bits, (size,), LatentFormat(bits).shares(bits)
    )
    back = np.asarray(jax.jit(dense, static_argnums=1)(packed, "float32"))
    return float(np.mean((back - z) ** 2) / np.mean(z**2))
