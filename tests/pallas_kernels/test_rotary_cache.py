"""Turned heads and cache writes: the kernel in the interpreter and the reference against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.float64 import rotary_cache as expected
from pallas_kernels.lowering import lower_for
from pallas_kernels.rotary_cache import rotary_cache, why_not

# terms, tokens, query heads, kv heads, head size, slots, at
SHAPES = [(14, 6, 28, 4, 128, 64, 17), (1, 1, 4, 2, 32, 8, 0), (3, 7, 6, 1, 64, 16, 9)]


def inputs(X, T, N, K, H, S, at, dtype=jnp.bfloat16, bias=True, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    angle = rng.uniform(0, 6.3, (T, H // 2))
    F = (N + 2 * K) * H
    cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    k, v = (draw(3, S, K, H).astype(dtype) for _ in range(2))
    place = jnp.ones(T, jnp.int32), at + jnp.arange(T, dtype=jnp.int32)
    return draw(X, T, F), draw(F).astype(dtype) if bias else None, cos, sin, k, v, place


@pytest.mark.quick_cases(
    "kernel-shape0-bfloat16-True",
    "kernel-shape1-float16-False",
    "kernel-shape2-bfloat16-False",
    "reference-shape0-float16-True",
    "reference-shape1-bfloat16-False",
    "reference-shape2-bfloat16-True",
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernel"])
def test_heads_are_turned_and_kept(shape, dtype, bias, interpret):
    arguments = inputs(*shape, dtype, bias)
    found = rotary_cache(*arguments, interpret=interpret)
    step = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-11
    for a, want in zip(found, expected(*arguments), strict=True):
        assert a.dtype == dtype and a.shape == want.shape
        error = np.abs(np.asarray(a, np.float64) - want)
        assert (error <= step * np.abs(want) + 1e-5).all()


@pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernel"])
def test_no_other_slot_changes(interpret):
    arguments = inputs(*SHAPES[0])
    for old, new in zip(arguments[4:6], rotary_cache(*arguments, interpret=interpret)[1:]):
        old, new = (np.array(a, np.float32) for a in (old, new))
        old[1, 17:23] = new[1, 17:23]
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernel"])
def test_tokens_of_several_sequences_have_their_own_places(interpret):
    """Two rows in another order, one token behind the last slot, one in a row that is not there."""
    *given, _ = inputs(*SHAPES[0])
    place = tuple(jnp.array(a, jnp.int32) for a in ([2, 2, 0, 0, 1, 3], [5, 6, 62, 63, 64, 8]))
    found = rotary_cache(*given, place, interpret=interpret)
    for a, want in zip(found, expected(*given, place), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), want, rtol=2.0**-8, atol=1e-5)


def test_it_lowers_to_one_kernel_that_writes_in_place():
    arguments = inputs(*SHAPES[0])
    assert why_not(arguments[0], *arguments[4:6]) is None
    program = lower_for(lambda *a: rotary_cache(*a, implementation="triton"), *arguments)
    assert program.count("__gpu$xla.gpu.triton") == 1 and "rotary_cache" in program
    assert program.count("#stablehlo.output_operand_alias<") == 2


@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_takes_the_kernel(monkeypatch, there):
    monkeypatch.setattr(device, "on_gpu", lambda: there)
    program = lower_for(lambda *a: rotary_cache(*a), *inputs(*SHAPES[0]))
    assert program.count("__gpu$xla.gpu.triton") == there


@pytest.mark.parametrize(
    "shape, dtype, reason",
    [
        (SHAPES[0], jnp.float32, "a cache of float32"),
        ((2, 1, 4, 2, 48, 8, 0), jnp.bfloat16, "heads of 48"),
        ((65, 1, 4, 2, 32, 8, 0), jnp.bfloat16, "65 terms"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(shape, dtype, reason):
    arguments = inputs(*shape, dtype)
    assert reason in why_not(arguments[0], *arguments[4:6])
    with pytest.raises(NotImplementedError, match=reason):
        rotary_cache(*arguments, implementation="triton")
    found, want = rotary_cache(*arguments), expected(*arguments)
    np.testing.assert_allclose(np.asarray(found[0], np.float64), want[0], rtol=0.01, atol=0.1)


def test_shapes_that_do_not_fit():
    y, bias, cos, *rest = inputs(*SHAPES[0])
    with pytest.raises(ValueError, match="do not fit"):
        rotary_cache(y[..., :-1], bias, cos, cos, *rest[1:])
    with pytest.raises(ValueError, match="do not fit"):
        rotary_cache(y, bias, cos[:-1], cos[:-1], *rest[1:])
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        rotary_cache(y, bias, cos, cos, *rest[1:], implementation="cuda")
