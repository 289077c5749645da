"""Reference and interpreted kernels against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import quantized_matmul, repack, why_not
from pallas_kernels.quantized_matmul.tiling import Tiling

BUDGET = {
    # way -> largest error over the largest result, beyond the result's own rounding (2**-8)
    "xla": 3e-3,  # weights rounded to bfloat16
    "dense": 3e-3,
    "group": 1e-5,  # weights never rounded
    "vector": 5e-5,  # a lift of 2048 in float32 sums
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
@pytest.mark.parametrize("count", [1, 17])
def test_reference(bits, count):
    w, dense = matrix(bits)
    x = rows(count)
    assert error(quantized_matmul(x, w), x, dense) < BUDGET["xla"]
    wide = x.astype(jnp.float32)
    assert error(quantized_matmul(wide, w), wide, dense) < 1e-5


@pytest.mark.parametrize(
    "bits, group, count, cfg",
    [
        (4, 64, 1, Tiling("group", 16, 16, 1)),
        (4, 32, 5, Tiling("group", 16, 16, 3)),
        (4, 32, 16, Tiling("group", 16, 16, 2, together=2, ahead=True)),
        (4, 128, 16, Tiling("group", 16, 16, 2)),
        (4, 64, 17, Tiling("group", 16, 32, 4, ahead=True)),
        (8, 64, 2, Tiling("group", 16, 16, 2)),
        (3, 64, 5, Tiling("group", 16, 16, 2)),
        (2, 32, 16, Tiling("group", 16, 16, 1)),
        (4, 64, 289, Tiling("dense", 16, 128, 1, parts=2)),
        (8, 128, 17, Tiling("dense", 16, 64, 2, ahead=True)),
        (3, 64, 1, Tiling("dense", 16, 16, 2, parts=4)),
        (4, 64, 2, Tiling("vector", 16, 16, 2, together=2)),
        (8, 32, 1, Tiling("vector", 16, 16, 2, together=4)),
        (3, 128, 1, Tiling("vector", 16, 16, 1, together=1)),
        (2, 64, 1, Tiling("vector", 16, 16, 1, together=4)),
    ],
    ids=lambda v: v.way if isinstance(v, Tiling) else str(v),
)
def test_kernels(bits, group, count, cfg):
    """300 outputs are no multiple of any tile, nor are 5, 17 and 289 rows."""
    w, dense = matrix(bits, group)
    x = rows(count)
    assert error(kernel(x, w, cfg), x, dense) < BUDGET[cfg.way]


@pytest.mark.parametrize("way, together", [("group", 1), ("dense", 1), ("vector", 2)])
def test_splits_change_rounding_only(way, together):
    w, _ = matrix(4, 32)
    x = rows(2)
    whole = kernel(x, w, Tiling(way, 16, 16, 1, together=together))
    split = kernel(x, w, Tiling(way, 16, 16, 4, together=together))
    steps = np.asarray(jnp.abs(whole.astype(jnp.float32) - split.astype(jnp.float32)))
    assert (steps <= 2**-7 * np.abs(np.asarray(whole, np.float32)) + 1e-4).all()


@pytest.mark.parametrize("way", ["group", "dense", "vector"])
def test_nan_stays_in_its_row_and_its_column(way):
    w, _ = matrix(4, 64, outputs=40)
    x = rows(3)
    cfg = Tiling(way, 16, 16, 2, together=1)
    clean = kernel(x, w, cfg)
    bad_row = kernel(x.at[1, 70].set(jnp.nan), w, cfg)
    assert jnp.isnan(bad_row[1]).all()
    np.testing.assert_array_equal(bad_row[::2], clean[::2])
    scale = w.scale_QF.at[2, 7].set(0x7FC0)  # the step is NaN
    bad_column = kernel(x, dataclasses.replace(w, scale_QF=scale), cfg)
    at = np.arange(40) == 7
    assert jnp.isnan(bad_column[:, at]).all()
    np.testing.assert_array_equal(bad_column[:, ~at], clean[:, ~at])


def test_leading_axes_and_one_compilation():
    w, dense = matrix(4, 64, outputs=64)
    x = rows(6).reshape(2, 3, 256)
    y = jax.jit(lambda x, w: quantized_matmul(x, w, interpret=True))(x, w)
    assert y.shape == (2, 3, 64)
    assert error(y.reshape(6, 64), x.reshape(6, 256), dense) < BUDGET["group"]


def test_what_is_left_to_xla_and_what_is_wrong():
    w, _ = matrix(4)
    x = rows(2)
    assert why_not(x, w) is None
    assert "float32" in why_not(x.astype(jnp.float32), w)
    assert "513 rows" in why_not(jax.ShapeDtypeStruct((513, 256), jnp.bfloat16), w)
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
        (Tiling(tile=24), "tile 24"),
        (Tiling("vector", 16), "splits"),
        (Tiling("vector", 16, splits=1, together=8), "8 groups at once"),
        (Tiling("group", 16, rows=8), "from 16"),
        (Tiling("fast", 16), "way"),
    ):
        bad = cfg if why != "splits" else dataclasses.replace(cfg, splits=9)
        with pytest.raises(ValueError, match=why):
            kernel(x, w, bad)
