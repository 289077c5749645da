"""Reference and interpreted kernels against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.quantized_matmul import api, quantized_matmul, reference, repack, why_not
from pallas_kernels.quantized_matmul.reference import quantized_matmul_by_parts
from pallas_kernels.quantized_matmul.tiling import Tiling

slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow)
"""One more case of a branch that a quick one takes, too."""
BUDGET = {
    # largest error over the largest result, beyond the result's own rounding (2**-8)
    "xla": 3e-3,  # weights rounded to bfloat16
    "kernel": 1e-5,  # weights never rounded
}


def matrix(bits, group=64, inputs=256, outputs=300, seed=0):
    """(packed, the same in float64): steps of all sizes, offsets that are no whole steps."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (inputs // group, group, outputs)).astype(np.uint8)
    step = jnp.asarray(rng.uniform(0.5, 2, (inputs // group, outputs)) / 2**bits, jnp.bfloat16)
    centre = rng.uniform(0.3, 0.7, step.shape).astype(np.float32)
    offset = -step * jnp.asarray(centre * (2**bits - 1), jnp.bfloat16)
    wide = lambda a: np.asarray(a.astype(jnp.float32), np.float64)[:, None]
    dense = (codes * wide(step) + wide(offset)).reshape(inputs, outputs)
    return repack(jnp.asarray(codes), step, offset, bits), dense


def rows(count, inputs=256, seed=1):
    draw = np.random.default_rng(seed).normal(size=(count, inputs))
    return jnp.asarray(draw, jnp.bfloat16)


def error(y, x, dense):
    exact = np.asarray(x.astype(jnp.float32), np.float64) @ dense
    assert y.shape == exact.shape and y.dtype == x.dtype
    rounding = 2**-8 * np.abs(exact) if y.dtype == jnp.bfloat16 else 0
    beyond = np.abs(np.asarray(y.astype(jnp.float32)) - exact) - rounding
    return beyond.max() / np.abs(exact).max()


def kernel(x, w, cfg):
    return quantized_matmul(x, w, implementation="triton", tiling=cfg, interpret=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, slow(17)])
def test_reference(bits, count):
    w, dense = matrix(bits)
    x = rows(count)
    assert error(quantized_matmul(x, w), x, dense) < BUDGET["xla"]
    wide = x.astype(jnp.float32)
    assert error(quantized_matmul(wide, w), wide, dense) < 1e-5


@pytest.mark.quick_cases(
    "4-64-1-Tiling(rows=8, splits=1, warps=2, stages=3)",
    "4-64-17-Tiling(rows=16, splits=4, warps=2, stages=3)",
    "4-64-48-Tiling(rows=64, splits=2, warps=4, stages=3)",
    "8-64-2-Tiling(rows=8, splits=2, warps=2, stages=3)",
    "3-64-5-Tiling(rows=8, splits=2, warps=2, stages=3)",
)
@pytest.mark.parametrize(
    "bits, group, count, cfg",
    [
        (4, 64, 1, Tiling(8, 1)),
        slow(4, 32, 5, Tiling(8, 3)),
        slow(4, 16, 8, Tiling(8, 16)),
        slow(4, 128, 16, Tiling(16, 2)),
        slow(4, 256, 3, Tiling(8, 4)),
        (4, 64, 17, Tiling(16, 4)),
        slow(4, 64, 50, Tiling(16, 2)),
        (4, 64, 48, Tiling(64, 2, 4)),
        slow(4, 32, 21, Tiling(32, 3, 4)),
        slow(3, 128, 96, Tiling(64, 1, 8)),
        slow(8, 64, 40, Tiling(32, 2, 4)),
        (8, 64, 2, Tiling(8, 2)),
        slow(8, 128, 17, Tiling(8, 2)),
        (3, 64, 5, Tiling(8, 2)),
        slow(3, 128, 9, Tiling(16, 1)),
        slow(2, 32, 16, Tiling(16, 1)),
        (2, 64, 1, Tiling(8, 3)),
    ],
    ids=str,
)
def test_kernel(bits, group, count, cfg):
    """300 outputs are no multiple of any block, nor are 5, 17 and 50 rows of the programs'."""
    w, dense = matrix(bits, group)
    x = rows(count)
    assert error(kernel(x, w, cfg), x, dense) < BUDGET["kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("bits, outputs", [slow(4, 300), (4, 1200), slow(3, 1100)])
def test_parts(monkeypatch, bits, outputs):
    """One block at a time, and two where the last part has one."""
    w, dense = matrix(bits, outputs=outputs)
    x = rows(140)
    for blocks in (1, 2):
        monkeypatch.setattr(reference, "DENSE_WEIGHTS", blocks * 256 * 32 * w.fields)
        assert error(quantized_matmul_by_parts(x, w), x, dense) < BUDGET["xla"]
        wide = x.astype(jnp.float32)
        assert error(quantized_matmul_by_parts(wide, w), wide, dense) < 1e-5


def test_many_rows_go_by_parts_on_a_gpu(monkeypatch):
    w, dense = matrix(4)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    seen, by_parts = [], api.quantized_matmul_by_parts
    watched = lambda x, *rest: (seen.append(x.shape), by_parts(x, *rest))[1]
    monkeypatch.setattr(api, "quantized_matmul_by_parts", watched)
    x = rows(129)
    assert error(quantized_matmul(x, w), x, dense) < BUDGET["xla"] and seen == [(129, 256)]


@pytest.mark.slow
def test_splits_change_rounding_only():
    w, _ = matrix(4, 32)
    x = rows(2)
    whole, split = (kernel(x, w, Tiling(8, splits)) for splits in (1, 4))
    steps = np.asarray(jnp.abs(whole.astype(jnp.float32) - split.astype(jnp.float32)))
    assert (steps <= 2**-7 * np.abs(np.asarray(whole, np.float32)) + 1e-4).all()


@pytest.mark.slow
def test_terms_are_what_is_added_up():
    w, dense = matrix(4)
    x = rows(3)
    cfg = Tiling(8, 3)
    terms = quantized_matmul(x, w, tiling=cfg, interpret=True, terms=True)
    assert terms.shape == (3, 3, 300) and terms.dtype == jnp.float32
    exact = np.asarray(x.astype(jnp.float32), np.float64) @ dense
    np.testing.assert_allclose(np.asarray(terms).sum(0), exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.slow
def test_nan_stays_in_its_row_and_its_column_of_words():
    w, _ = matrix(4, 64, outputs=300)
    x = rows(3)
    cfg = Tiling(8, 2)
    clean = kernel(x, w, cfg)
    bad_row = kernel(x.at[1, 70].set(jnp.nan), w, cfg)
    assert jnp.isnan(bad_row[1]).all()
    np.testing.assert_array_equal(bad_row[::2], clean[::2])
    scale = w.scale_BQSK.at[0, 2, 7, 1].set(jnp.nan)  # a step of output 64 + 7
    bad_column = kernel(x, dataclasses.replace(w, scale_BQSK=scale), cfg)
    at = np.arange(300) % 64 == 7
    assert jnp.isnan(bad_column[:, 64 + 7]).all()
    np.testing.assert_array_equal(bad_column[:, ~at], clean[:, ~at])


def test_leading_axes_and_one_compilation():
    w, dense = matrix(4, 64, outputs=64)
    x = rows(6).reshape(2, 3, 256)
    y = jax.jit(lambda x, w: quantized_matmul(x, w, interpret=True))(x, w)
    assert y.shape == (2, 3, 64)
    assert error(y.reshape(6, 64), x.reshape(6, 256), dense) < BUDGET["kernel"]


def test_what_is_left_to_xla_and_what_is_wrong():
    w, _ = matrix(4)
    x = rows(2)
    assert why_not(x, w) is None
    assert "float32" in why_not(x.astype(jnp.float32), w)
    assert "129 rows" in why_not(jax.ShapeDtypeStruct((129, 256), jnp.bfloat16), w)
    odd, odd_dense = matrix(4, group=8)
    assert "group 8" in why_not(x, odd)
    assert error(quantized_matmul(x, odd, interpret=True), x, odd_dense) < BUDGET["xla"]
    with pytest.raises(NotImplementedError, match="group 8"):
        quantized_matmul(x, odd, implementation="triton")
    with pytest.raises(ValueError, match="does not fit"):
        quantized_matmul(x[:, :-1], w)
    with pytest.raises(ValueError, match="empty"):
        quantized_matmul(x[:0], w)
    with pytest.raises(ValueError, match="mosaic"):
        quantized_matmul(x, w, implementation="mosaic")
    for cfg, why in (
        (Tiling(rows=48), "48 rows a program"),
        (Tiling(splits=5), "5 splits of 4 chunks"),
        (Tiling(warps=3), "3 warps"),
    ):
        with pytest.raises(ValueError, match=why):
            kernel(x, w, cfg)
