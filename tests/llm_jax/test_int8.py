"""Products of whole numbers against the same sums in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.int8 import Int8, int8
from llm_jax.linear import linear, terms


def rounded(a, axis):
    """(codes, scales) in float64, halves to even as the CPU rounds."""
    scale = np.abs(a).max(axis, keepdims=True) / 127
    scale = np.where(scale > 0, scale, 1.0)
    return np.rint(a / scale), scale


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_product_is_that_of_the_rounded_numbers(shape, size):
    rng = np.random.default_rng(0)
    shape = (*shape[:-1], 96)
    x, w = rng.normal(size=shape) * size, rng.normal(size=(96, 40)) * rng.uniform(0.1, 9, 40)
    x, w = x.astype(np.float32), w.astype(np.float32)
    (a, step), (b, scale) = rounded(x.astype(float), -1), rounded(w.astype(float), 0)
    found = np.asarray(linear(int8(jnp.asarray(w)), jnp.asarray(x)))
    scale = scale[0] if x.ndim == 1 else scale
    expected = (a @ b) * step * scale
    # A number between two codes may be rounded to the other one in float32.
    near = step * scale * 127 * 2
    assert found.shape == expected.shape == (*shape[:-1], 40) and found.dtype == np.float32
    assert (np.abs(found - expected) <= 1e-5 * np.abs(expected) + near).all()
    assert np.mean(np.isclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())) > 0.9
    exact = x.astype(float) @ w
    assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


def test_codes_reach_127_and_zeros_stay_zero():
    w = jnp.array([[1.0, 0.0, -4.0], [0.5, 0.0, 2.0]])
    found = int8(w)
    np.testing.assert_array_equal(found.code_DF, [[127, 0, -127], [64, 0, 64]])
    np.testing.assert_allclose(found.scale_F, [1 / 127, 1.0, 4 / 127])
    assert not np.any(linear(found, jnp.zeros((3, 2))))
    assert (found.shape, found.ndim) == ((2, 3), 2)


def test_a_nan_stays_in_its_row():
    x = jnp.ones((2, 4)).at[0, 1].set(jnp.nan)
    found = linear(int8(jnp.ones((4, 3))), x)
    assert jnp.isnan(found[0]).all() and jnp.allclose(found[1], 4.0, rtol=1e-2)


def test_dtypes_and_one_term():
    w, x = int8(jnp.ones((64, 8))), jnp.ones((2, 64), jnp.bfloat16)
    assert linear(w, x).dtype == jnp.bfloat16
    assert linear(w, x, jnp.float32).dtype == jnp.float32
    assert terms(w, x).shape == (1, 2, 8)


def test_one_row_is_multiplied_as_two_are():
    """A product of one row took thirty times as long; its numbers are the same."""
    w = jax.eval_shape(int8, jax.ShapeDtypeStruct((64, 32), jnp.float32))
    text = jax.jit(linear).lower(w, jax.ShapeDtypeStruct((1, 1, 64), jnp.float32)).as_text()
    assert "tensor<64x32xi8>) -> tensor<2x32xi32>" in text
    rng = np.random.default_rng(0)
    w, x = int8(jnp.asarray(rng.normal(size=(64, 32)))), jnp.asarray(rng.normal(size=(3, 64)))
    np.testing.assert_array_equal(linear(w, x[:1]), linear(w, x)[:1])


def test_the_compiled_product_is_one_of_whole_numbers():
    w = jax.eval_shape(int8, jax.ShapeDtypeStruct((64, 32), jnp.float32))
    assert isinstance(w, Int8) and w.code_DF.dtype == jnp.int8
    text = jax.jit(linear).lower(w, jax.ShapeDtypeStruct((2, 64), jnp.float32)).as_text()
    assert "tensor<64x32xi8>) -> tensor<2x32xi32>" in text
