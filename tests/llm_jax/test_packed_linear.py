"""Joined low-bit matrices as one kind of `linear`."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.linear import linear
from llm_jax.packed import packed
from llm_jax.quantize import quantize


def matrices(sizes, bits=4, group=32):
    rng = np.random.default_rng(0)
    return [
        quantize(jnp.asarray(rng.normal(size=(64, f)), jnp.float32), bits, group) for f in sizes
    ]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
def test_one_product_gives_what_three_gave(bits):
    q, k, v = matrices((48, 16, 16), bits)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 64)), jnp.bfloat16)
    joined = jnp.split(linear(packed(q, k, v), x), (48, 64), axis=-1)
    for found, w in zip(joined, (q, k, v), strict=True):
        np.testing.assert_array_equal(found, linear(w, x))


def test_only_like_matrices_join():
    (a,), (b,) = matrices((8,)), matrices((8,), group=64)
    with pytest.raises(ValueError, match="do not join"):
        packed(a, b)
