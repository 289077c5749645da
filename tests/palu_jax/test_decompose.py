"""Factors against their theory, in float64."""

import numpy as np
import pytest

from palu_jax.decompose import block_diagonal, key_metric, spectrum, value_metric

rng = np.random.default_rng(0)
D, F = 24, 10
W = rng.normal(size=(D, F)) * np.geomspace(3, 0.1, F)
X = rng.normal(size=(500, D)) @ rng.normal(size=(D, D))
GRAM = X.T @ X / len(X)
M = rng.normal(size=(F, F))
METRIC = M @ M.T + 0.1 * np.eye(F)


def loss(w, gram, metric):
    gram, metric = (np.eye(D) if gram is None else gram), (np.eye(F) if metric is None else metric)
    return np.trace(w.T @ gram @ w @ metric)


@pytest.mark.parametrize("gram", [None, GRAM], ids=["plain", "whitened"])
@pytest.mark.parametrize("metric", [None, METRIC], ids=["identity", "metric"])
@pytest.mark.parametrize("rank", [1, 4, F])
def test_the_error_is_the_sum_of_discarded_eigenvalues(gram, metric, rank):
    found = spectrum(W, gram, metric)
    down, up = found.factors(rank)
    assert down.shape == (D, rank) and up.shape == (rank, F)
    scale = found.error(0)
    np.testing.assert_allclose(found.error(0), loss(W, gram, metric))
    np.testing.assert_allclose(
        loss(W - down @ up, gram, metric), found.error(rank), atol=1e-9 * scale
    )


@pytest.mark.parametrize("rank", [2, 5])
def test_whitened_factors_are_palus(rank):
    """W S by SVD with the Cholesky factor S of the Gram matrix, as the paper writes it."""
    s = np.linalg.cholesky(GRAM)
    u, sigma, vt = np.linalg.svd(W.T @ s)
    want = (u[:, :rank] * sigma[:rank]) @ vt[:rank] @ np.linalg.inv(s)
    down, up = spectrum(W, GRAM).factors(rank)
    np.testing.assert_allclose((down @ up).T, want, atol=1e-9)
    np.testing.assert_allclose(spectrum(W, GRAM).energy_F, sigma**2)


def test_every_objective_wins_under_its_own_measure():
    pairs = [(None, None), (GRAM, None), (GRAM, METRIC)]
    made = [W - np.matmul(*spectrum(W, *p).factors(4)) for p in pairs]
    for i, pair in enumerate(pairs):
        errors = [loss(e, *pair) for e in made]
        assert np.argmin(errors) == i


def test_singular_moments_are_no_obstacle():
    few = X[:5].T @ X[:5]  # rank 5 of 24
    found = spectrum(W, few, np.diag([1.0] * 4 + [0.0] * (F - 4)))
    down, up = found.factors(5)
    assert np.isfinite(down).all() and np.isfinite(up).all()
    error = X[:5] @ (W - down @ up)
    np.testing.assert_allclose(error[:, :4], 0, atol=1e-3 * np.abs(X[:5] @ W).max())
    assert np.isfinite(spectrum(np.zeros((D, F)), GRAM).factors(3)[0]).all()


def test_latents_carry_the_fourth_root_of_the_energy():
    """So that equal noise on rotated latents costs least; see `spectrum`."""
    found = spectrum(W, GRAM)
    down, _ = found.factors(F)
    np.testing.assert_allclose(np.diag(down.T @ GRAM @ down), np.sqrt(found.energy_F), rtol=1e-6)


def test_key_metric_is_the_mean_squared_change_of_scores():
    H, frequencies = 6, np.array([1.0, 0.3, 0.01])
    q = rng.normal(size=(200, H)) + rng.normal(size=H)
    error, distances = rng.normal(size=H), [1, 4, 30]
    total = 0.0
    for d in distances:
        cos, sin = np.cos(d * frequencies), np.sin(d * frequencies)
        a, b = error[:3], error[3:]
        turned = np.concatenate([a * cos - b * sin, b * cos + a * sin])
        total += np.mean((q @ turned) ** 2) / H
    metric = key_metric((q.T @ q / 200)[None], frequencies, distances)
    np.testing.assert_allclose(error @ metric[0] @ error, total / 3)


def test_value_metric_sums_the_heads_that_share():
    o = rng.normal(size=(4 * 3, D))  # 4 query heads of size 3, 2 kv heads
    error = rng.normal(size=3)
    want = sum(np.sum((error @ o[n * 3 : n * 3 + 3]) ** 2) for n in (2, 3))
    np.testing.assert_allclose(error @ value_metric(o, 4, 2)[1] @ error, want)
    both = block_diagonal(value_metric(o, 4, 2))
    assert both.shape == (6, 6) and not both[:3, 3:].any()
