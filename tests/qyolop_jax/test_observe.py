"""Observers against NumPy over everything they were shown."""

import numpy as np
import pytest

from qyolop_jax.observe import BINS, Histogram, ObserveError, observer


def heavy_tailed(seed=0, count=50_000):
    return np.random.default_rng(seed).standard_t(3, count).astype(np.float32)


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99])
def test_percentile_is_numpys_to_a_bin(percentile):
    values = heavy_tailed()
    one = observer("percentile", percentile)
    for part in np.array_split(values, 7):  # grows in between
        one.add(part)
    want = np.percentile(values, [100 - percentile, percentile])
    gap = np.sort(values)[::-1][:8]  # neighbours in the tail lie far apart
    assert np.abs(np.subtract(one.range(), want)).max() < 2 * one.reach / BINS + gap[0] - gap[7]
    if percentile < 99.9:
        np.testing.assert_allclose(one.range(), want, atol=2 * 2 * one.reach / BINS)


def test_percentile_100_is_the_extremes():
    values = heavy_tailed()
    one = observer("percentile", 100.0)
    one.add(values)
    assert one.range() == (values.min(), values.max())


def test_histogram_in_parts_is_the_histogram_of_all():
    small, large = heavy_tailed(1) * 1e-3, heavy_tailed(2)
    parts, order = Histogram(), [small, large]
    for values in order:
        parts.add(values)
    whole = Histogram()
    whole.add(np.concatenate(order))
    assert parts.reach == whole.reach
    np.testing.assert_array_equal(parts.counts, whole.counts)
    want = np.histogram(np.concatenate(order), whole.edges)[0]
    np.testing.assert_array_equal(whole.counts, want)


def test_absmax_and_its_moving_average():
    batches = [heavy_tailed(i, 1000) for i in range(4)]
    absmax, ema = observer("absmax"), observer("ema")
    low = high = None
    for values in batches:
        absmax.add(values)
        ema.add(values)
        low = values.min() if low is None else 0.9 * low + 0.1 * values.min()
        high = values.max() if high is None else 0.9 * high + 0.1 * values.max()
    together = np.concatenate(batches)
    assert absmax.range() == (together.min(), together.max())
    np.testing.assert_allclose(ema.range(), (low, high), rtol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_the_best_of_brute_force(symmetric):
    values = heavy_tailed(3, 20_000)
    one = observer("mse", symmetric=symmetric)
    one.add(values)

    def error(low, high):
        step = (high - low) / (254 if symmetric else 255)
        near = np.clip(np.round(values / step), np.round(low / step), np.round(high / step))
        return ((near * step - values) ** 2).mean()

    full = (-np.abs(values).max(), np.abs(values).max()) if symmetric else one.extremes.range()
    errors = [error(full[0] * cut, full[1] * cut) for cut in np.linspace(0.05, 1, 400)]
    assert error(*one.range()) <= 1.01 * min(errors)
    assert error(*one.range()) < 0.97 * errors[-1]


@pytest.mark.parametrize("percentile", [50.0, 100.5, -1.0])
def test_percentile_out_of_range(percentile):
    with pytest.raises(ObserveError, match="above 50 and at most 100"):
        observer("percentile", percentile)


def test_what_cannot_be_observed():
    with pytest.raises(ObserveError, match="possible are absmax, ema, percentile and mse"):
        observer("median")
    for kind in ("absmax", "ema", "percentile", "mse"):
        with pytest.raises(ObserveError, match="nothing was observed"):
            observer(kind).range()
        with pytest.raises(ObserveError, match="not finite"):
            observer(kind).add([1.0, np.nan])
        with pytest.raises(ObserveError, match="empty array"):
            observer(kind).add([])
