"""Sums and norms: the kernel in the interpreter and the reference against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_norm import add_norm, api, why_not
from pallas_kernels.lowering import lower_for

# terms, rows, width: those of Qwen2.5-7B and 0.5B, SmolLM2, Qwen2.5-32B, and a small one
SHAPES = [(7, 6, 3584), (2, 22, 896), (4, 1, 576), (3, 2, 5120), (1, 5, 32)]
EPS = 1e-6


def inputs(X, T, D, dtype=jnp.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    gain = jnp.asarray(rng.uniform(0.5, 2, D), dtype)
    return draw(T, D).astype(dtype), draw(X, T, D), gain


def expected(x, y, gain):
    """(sum, norm), and how much of each a difference of one in x and y together is; in float64."""
    x, y, gain = (np.asarray(a, np.float64) for a in (x, y, gain))
    total, size = x + y.sum(0), np.abs(x) + np.abs(y.sum(0))
    scale = gain / np.sqrt((total**2).mean(-1, keepdims=True) + EPS)
    return (total, total * scale), (size, size * scale)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernel"])
def test_sums_and_norms(shape, dtype, interpret):
    arguments = inputs(*shape, dtype)
    found = add_norm(*arguments, EPS, interpret=interpret)
    step = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-11
    for a, want, size in zip(found, *expected(*arguments), strict=True):
        assert a.dtype == dtype and a.shape == want.shape
        # y, x + y, the norm and the product with the gain are rounded: half a unit each.
        error = np.abs(np.asarray(a, np.float64) - want)
        assert (error <= 4 * step * size).all() and error.mean() < step * size.mean()


def test_a_row_of_zeros_stays_one():
    zeros = [jnp.zeros_like(a) for a in inputs(2, 3, 64)]
    for interpret in (False, True):
        assert not np.any(
            [np.asarray(a, np.float32) for a in add_norm(*zeros, EPS, interpret=interpret)]
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_lowers_to_one_kernel(shape):
    arguments = inputs(*shape)
    assert why_not(*arguments[:2]) is None
    program = lower_for(lambda *a: add_norm(*a, EPS, implementation="triton"), *arguments)
    assert program.count("__gpu$xla.gpu.triton") == 1 and "add_norm" in program


@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_takes_the_kernel(monkeypatch, there):
    monkeypatch.setattr(api, "on_gpu", lambda: there)
    program = lower_for(lambda *a: add_norm(*a, EPS), *inputs(*SHAPES[0]))
    assert program.count("__gpu$xla.gpu.triton") == there


@pytest.mark.parametrize(
    "shape, dtype, reason",
    [
        (SHAPES[0], jnp.float32, "float32 rows"),
        ((2, 65, 64), jnp.bfloat16, "65 rows"),
        ((65, 1, 64), jnp.bfloat16, "65 terms"),
        ((2, 1, 33), jnp.bfloat16, "rows of 33"),
        ((2, 1, 32768), jnp.bfloat16, "rows of 32768"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(shape, dtype, reason):
    arguments = inputs(*shape, dtype)
    assert reason in why_not(*arguments[:2])
    with pytest.raises(NotImplementedError, match=reason):
        add_norm(*arguments, EPS, implementation="triton")
    found, (want, size) = add_norm(*arguments, EPS)[1], (v[1] for v in expected(*arguments))
    assert (np.abs(np.asarray(found, np.float64) - want) <= 4 * 2.0**-8 * size).all()


def test_shapes_that_do_not_fit():
    x, y, gain = inputs(2, 3, 64)
    for wrong in ((x, y[0], gain), (x, y[:, :2], gain), (x, y, gain[:-1])):
        with pytest.raises(ValueError, match="do not fit"):
            add_norm(*wrong, EPS)
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        add_norm(x, y, gain, EPS, implementation="cuda")
