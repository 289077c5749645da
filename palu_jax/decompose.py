"""Low-rank factors of key and value projections: the best of their rank in a chosen metric.

A weight W [D, F] has inputs with the second moment C = E[x x^T], and M is a metric on the outputs.
The factors minimize E |(x W - x down up) M^(1/2)|^2. With A = M^(1/2) W^T C W M^(1/2) =
E diag(a) E^T they are down = W M^(1/2) E_r and up = E_r^T M^(-1/2), and the error is the sum of the
eigenvalues that are left out. (Palu takes an SVD of W S with C = S S^T. For M = I the optimum is
the same, but this way needs no Cholesky factors, which may fail, and no inverse of C, which need
not exist.)

Letters: D inputs, F outputs of a group of heads, R rank, K kv heads, H head size.
"""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The eigenvectors that give the factors of one group for any rank; float64 NumPy arrays."""

    down_DF: np.ndarray
    up_FF: np.ndarray
    energy_F: np.ndarray
    """Eigenvalues of A, largest first: one more rank reduces the squared error by the next one."""

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """(down [D, R], up [R, F])."""
        return self.down_DF[:, :rank], self.up_FF[:rank]

    def error(self, rank: int) -> float:
        """E |(x W - x down up) M^(1/2)|^2 at that rank."""
        return float(self.energy_F[rank:].sum())


def spectrum(
    w_DF: Any, gram_DD: Any = None, metric_FF: Any = None, floor: float = 1e-6
) -> Spectrum:
    """The best factors of every rank. None for C or M stands for the identity.

    Latent i is scaled to the fourth root of its eigenvalue, as in Palu. Rotated latents are
    quantized with equal noise, and this scale makes the noise in the output smallest. `floor` is
    the metric's lower bound as a part of its mean, so that no direction of the output is given up.

    Where no error counts, all energies are zero and any factors are right: with a metric of zero
    (an output projection of zero) they are those of the identity, and with inputs of zero, too.
    """
    w = np.asarray(w_DF, np.float64)
    metric, size = _scaled(metric_FF)
    if size == 0:
        return _weightless(spectrum(w, gram_DD))
    middle = w.T @ w if gram_DD is None else w.T @ np.asarray(gram_DD, np.float64) @ w
    if gram_DD is not None and not middle.any():
        return _weightless(spectrum(w))
    root, inverse = _roots(metric, w.shape[1], floor)
    a, e = np.linalg.eigh(root @ middle @ root)
    a, e = np.maximum(a[::-1], 0), e[:, ::-1]
    scale = np.maximum(a, a[0] * 1e-12 or 1.0) ** 0.25
    return Spectrum(w @ root @ e / scale, scale[:, None] * (e.T @ inverse), a * size)


def _weightless(found: Spectrum) -> Spectrum:
    return dataclasses.replace(found, energy_F=np.zeros_like(found.energy_F))


def _scaled(metric_FF):
    """(the metric over its size, its size): the mean of the diagonal as a power of 16, or 0.

    So factors have the size of the weights, however small the metric is, and a power of 16, whose
    fourth root is a power of 2, rounds nothing.
    """
    if metric_FF is None:
        return None, 1.0
    m = np.asarray(metric_FF, np.float64)
    mean = np.trace(m) / len(m)
    if mean <= 0:
        return m, 0.0
    size = 16.0 ** np.round(np.log2(mean) / 4)
    return m / size, size


def _roots(metric_FF, size, floor):
    """M^(1/2) and M^(-1/2)."""
    if metric_FF is None:
        return np.eye(size), np.eye(size)
    s, u = np.linalg.eigh((metric_FF + metric_FF.T) / 2)
    s = np.maximum(s, floor * np.trace(metric_FF) / size)
    return (u * np.sqrt(s)) @ u.T, (u / np.sqrt(s)) @ u.T


def key_metric(query_KHH: Any, frequencies: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """[K, H, H]: how much an error of an unrotated key changes scores, averaged over distances.

    A score is q^T R_d k, where R_d is the rotation by the distance of query and key. So an error e
    of the key costs e^T (mean over d of R_d^T E[q q^T] R_d) e. For pairs that turn fast only the
    query's energy in the pair counts, for slow pairs its direction too. `frequencies` [H/2] are
    radians a token.
    """
    q = np.asarray(query_KHH, np.float64)
    half = q.shape[-1] // 2
    out = np.zeros_like(q)
    for d in distances:
        cos, sin = np.cos(d * frequencies), np.sin(d * frequencies)
        turn = np.zeros((2 * half, 2 * half))
        i = np.arange(half)
        turn[i, i], turn[i, i + half] = cos, -sin
        turn[i + half, i], turn[i + half, i + half] = sin, cos
        out += turn.T @ q @ turn
    return out / len(distances) / (2 * half)


def value_metric(o_ND: Any, heads: int, kv_heads: int) -> np.ndarray:
    """[K, H, H]: how much an error of a value changes the output of the output projection.

    This is the sum of W_o,n W_o,n^T over the query heads n that read a kv head. How the errors of
    different heads add up depends on the text and is left out.
    """
    w = np.asarray(o_ND, np.float64)
    w = w.reshape(kv_heads, heads // kv_heads, -1, w.shape[1])
    return np.einsum("kghd,kgid->khi", w, w)


def block_diagonal(metric_KHH: np.ndarray) -> np.ndarray:
    """[F, F] with the metrics of the heads along the diagonal."""
    K, H, _ = metric_KHH.shape
    out = np.zeros((K, H, K, H))
    for k in range(K):
        out[k, :, k] = metric_KHH[k]
    return out.reshape(K * H, K * H)
