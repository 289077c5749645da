"""Joined low-bit matrices as one kind of `linear`."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import linear as linears
from llm_jax import model
from llm_jax.attention import caches_for, causal_step
from llm_jax.linear import Terms, linear, summed, terms, unsummed
from llm_jax.packed import packed
from llm_jax.params import joined
from llm_jax.quantize import quantize
from llm_jax.testing import tiny_config, tiny_params
from pallas_kernels.add_norm import api as add_norm_api
from pallas_kernels.quantized_matmul import Packed


def matrices(sizes, bits=4, group=32):
    rng = np.random.default_rng(0)
    return [
        quantize(jnp.asarray(rng.normal(size=(64, f)), jnp.float32), bits, group) for f in sizes
    ]


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


@pytest.fixture
def in_three_terms(monkeypatch):
    """Low-bit products come in parts, as on a GPU; float32, each with what the others lack."""

    def parts(w, x):
        y = linear(w, x, jnp.float32)
        return jnp.stack([0.25 * y + 1, 0.5 * y - 2, 0.25 * y + 1])

    dispatch = terms.dispatch
    monkeypatch.setattr(
        linears, "terms", lambda w, x: (parts if type(w) is Packed else dispatch(type(w)))(w, x)
    )


def test_a_product_in_terms(in_three_terms):
    (w,) = matrices((48,))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 64)), jnp.bfloat16)
    y = unsummed(packed(w), x)
    assert isinstance(y, Terms) and y.y_XBTF.shape == (3, 2, 5, 48)
    got, want = (np.asarray(v, np.float32) for v in (summed(y, x.dtype), linear(packed(w), x)))
    np.testing.assert_allclose(got, want, rtol=2.0**-7, atol=1e-2)
    dense = jnp.ones((64, 3), jnp.bfloat16)
    np.testing.assert_array_equal(unsummed(dense, x), linear(dense, x))


@pytest.mark.parametrize("plain", [(), (1,)], ids=["all low", "one plain"])
def test_sums_left_to_the_next_layer(in_three_terms, monkeypatch, plain):
    """The same logits and hidden rows as where every product is added up at once, a layer of plain
    arrays between low-bit ones or not; each sum is taken with the norm behind it."""
    cfg = dataclasses.replace(tiny_config("qwen2", layers=3), dtype="bfloat16")
    low = lambda *w: packed(*(quantize(v, 4, 32, 0) for v in w))
    layers = tiny_params(cfg).layers
    layers = tuple(l if i in plain else joined(l, low) for i, l in enumerate(layers))
    params = dataclasses.replace(tiny_params(cfg), layers=layers)
    tokens, calls = jnp.asarray([[3, 1, 4, 1, 5]]), []
    count = lambda *a, **k: calls.append(a) or add_norm_reference(*a, **k)
    add_norm_reference = add_norm_api.add_norm_reference

    def run(function):
        caches = caches_for(params, cfg, 1, 8)
        return np.asarray(
            function(params, tokens, caches, causal_step(0, 5, 8), cfg)[0], np.float32
        )

    monkeypatch.setattr(add_norm_api, "add_norm_reference", count)
    in_terms = run(model.forward), run(model.hidden)
    assert len(calls) == 2 * 2 * (3 - len(plain)) - 1  # hidden has no norm at its end
    monkeypatch.setattr(linears, "terms", terms)
    calls.clear()
    at_once = run(model.forward), run(model.hidden)
    assert not calls
    for a, b in zip(in_terms, at_once, strict=True):
        assert np.abs(a - b).max() < 0.03 * np.abs(b).max()
