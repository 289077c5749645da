"""MXFP4 matrices against the standard's table, value by value."""

import jax.numpy as jnp
import numpy as np

from llm_jax.linear import linear
from llm_jax.mxfp4 import Mxfp4, dense, encode, mxfp4_bytes

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1 without its sign, in the order of its codes (OCP MX 1.0, table 5)."""


def random_codes(seed=0, D=96, F=40):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (D, F))
    scale = rng.integers(100, 140, (D // 32, F))
    packed = (codes[0::2] | codes[1::2] << 4).astype(np.uint8)
    value = np.array(VALUES + tuple(-v for v in VALUES))[codes]
    exact = value * 2.0 ** (np.repeat(scale, 32, axis=0) - 127)
    return Mxfp4(jnp.asarray(packed), jnp.asarray(scale.astype(np.uint8))), exact


def test_every_code_has_its_value():
    w, exact = random_codes()
    np.testing.assert_array_equal(np.asarray(dense(w)), exact)
    np.testing.assert_array_equal(np.asarray(dense(w, jnp.bfloat16)).astype(float), exact)
    assert w.codes_pF.nbytes + w.scale_QF.nbytes == mxfp4_bytes(w.shape)


def test_numbers_of_this_form_are_kept_exactly():
    for seed in range(4):
        _, exact = random_codes(seed)
        exact[:32] *= np.random.default_rng(seed).integers(0, 2, (1, 40))  # groups of zeros
        for dtype in (jnp.float32, jnp.bfloat16):
            again = dense(encode(jnp.asarray(exact, dtype)))
            np.testing.assert_array_equal(np.asarray(again), exact)


def test_other_numbers_get_the_nearest_code():
    w = np.random.default_rng(1).normal(size=(64, 24)).astype(np.float32)
    got = np.asarray(dense(encode(jnp.asarray(w))))
    largest = np.abs(w).reshape(2, 32, 24).max(1)
    scale = np.repeat(2.0 ** (np.floor(np.log2(largest)) - 2), 32, axis=0)
    table = np.array([*VALUES, *(-v for v in VALUES)])
    nearest = np.abs(table[None, None] * scale[..., None] - w[..., None]).min(-1)
    np.testing.assert_allclose(np.abs(got - w), nearest, rtol=1e-5, atol=1e-7)


def test_a_product():
    w, exact = random_codes(3)
    x = np.random.default_rng(2).normal(size=(5, 96)).astype(np.float32)
    want = x.astype(float) @ exact
    np.testing.assert_allclose(
        np.asarray(linear(w, jnp.asarray(x))), want, rtol=2e-5, atol=1e-3 * np.abs(want).max()
    )
