"""Low-rank factors of key and value projections, the best of their rank in a chosen metric.

Of a weight W [D, F] with inputs of second moment C = E[x x^T] and a metric M on the outputs, the
factors minimize E |(x W - x down up) M^(1/2)|^2. With A = M^(1/2) W^T C W M^(1/2) = E diag(a) E^T
they are down = W M^(1/2) E_r and up = E_r^T M^(-1/2), and the error is the sum of the eigenvalues
left out. (Palu takes an SVD of W S with C = S S^T; the same optimum for M = I, without Cholesky
factors, which fail, or inverses of C, which need not exist.)

Letters: D inputs, F outputs of a group of heads, R rank, K kv heads, H head size.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The eigenvectors behind the factors of one group, for any rank. float64 NumPy."""

    down_DF: np.ndarray
    up_FF: np.ndarray
    energy_F: np.ndarray
    """Eigenvalues of A, largest first: what a rank more takes off the squared error."""

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """(down [D, R], up [R, F])."""
        return self.down_DF[:, :rank], self.up_FF[:rank]

    def error(self, rank: int) -> float:
        """E |(x W - x down up) M^(1/2)|^2 at that rank."""
        return float(self.energy_F[rank:].sum())


def spectrum(w_DF, gram_DD=None, metric_FF=None, floor: float = 1e-6) -> Spectrum:
    """The best factors of every rank. None stands for the identity.

    Latent i is scaled to the fourth root of its eigenvalue, as in Palu: rotated latents are
    quantized with equal noise, whose share in the output is then least. `floor` bounds the metric
    from below (as a part of its mean), so that no direction of the output is given up entirely.
    """
    w = np.asarray(w_DF, np.float64)
    middle = w.T @ w if gram_DD is None else w.T @ np.asarray(gram_DD, np.float64) @ w
    root, inverse = _roots(metric_FF, w.shape[1], floor)
    a, e = np.linalg.eigh(root @ middle @ root)
    a, e = np.maximum(a[::-1], 0), e[:, ::-1]
    scale = np.maximum(a, a[0] * 1e-12 + 1e-300) ** 0.25
    return Spectrum(w @ root @ e / scale, scale[:, None] * (e.T @ inverse), a)


def _roots(metric_FF, size, floor):
    """M^(1/2) and M^(-1/2)."""
    if metric_FF is None:
        return np.eye(size), np.eye(size)
    m = np.asarray(metric_FF, np.float64)
    s, u = np.linalg.eigh((m + m.T) / 2)
    s = np.maximum(s, max(floor * np.trace(m) / size, 1e-300))
    return (u * np.sqrt(s)) @ u.T, (u / np.sqrt(s)) @ u.T


def key_metric(query_KHH, frequencies, distances) -> np.ndarray:
    """[K, H, H]: what an error of an unrotated key costs in scores, averaged over distances.

    A score is q^T R_d k with the rotation R_d of their distance, so an error e of the key costs
    e^T (mean over d of R_d^T E[q q^T] R_d) e. Pairs that turn fast keep only the energy of the
    query in the pair; slow ones keep its direction too. `frequencies` [H/2] are radians a token.
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


def value_metric(o_ND, heads: int, kv_heads: int) -> np.ndarray:
    """[K, H, H]: what an error of a value costs behind the output projection.

    The sum of W_o,n W_o,n^T over the query heads n that read a kv head; how the heads' errors add
    up depends on the text and is left out.
    """
    w = np.asarray(o_ND, np.float64)
    w = w.reshape(kv_heads, heads // kv_heads, -1, w.shape[1])
    return np.einsum("kghd,kgid->khi", w, w)


def block_diagonal(metric_KHH) -> np.ndarray:
    """[F, F] with the heads' metrics along the diagonal."""
    K, H, _ = metric_KHH.shape
    out = np.zeros((K, H, K, H))
    for k in range(K):
        out[k, :, k] = metric_KHH[k]
    return out.reshape(K * H, K * H)
