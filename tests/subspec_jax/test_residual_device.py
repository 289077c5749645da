"""The compiled decoder gives the bits of the NumPy one, with and without XLA's optimizations."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llm_jax.params import MLP, Attention, Layer
from llm_jax.quantize import Quantized, pack, quantize, unpack
from subspec_jax import residual_device
from subspec_jax.offload import fetch, host_bytes, is_offloaded, offload
from subspec_jax.residual import pad, predict
from subspec_jax.residual_encode import encode

CODES = ("planes", "levels")


@pytest.fixture(params=[True, False], ids=["plain", "optimized"])
def compiler(request):
    """The package's tests compile without optimizations; fused sums need them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", request.param)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def bits(a):
    return np.asarray(a).view(np.uint16)


def pair(D, F, code, dtype="bfloat16", seed=0, group=64):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((D, F), np.float32) * 0.02).astype(jnp.dtype(dtype))
    w.reshape(-1)[:5] = [np.nan, np.inf, -0.0, 1e-7, 0.0]
    q = quantize(jnp.asarray(w), 4, group)
    return w, encode(w, q, code), q


def decoded(r, q):
    return jax.jit(lambda r, q: residual_device.decode(r, q))(r, q)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(128, 64), (192, 130), (64, 1)])
def test_bits_are_those_of_the_weights(code, dtype, shape, compiler):
    w, r, q = pair(*shape, code, dtype)
    got = decoded(r, q)
    assert got.dtype == w.dtype and got.shape == w.shape
    np.testing.assert_array_equal(bits(got), bits(w))


@pytest.mark.parametrize("slab", [1, 64 * 130 * 2, 64 * 130 * 6])
@pytest.mark.parametrize("code", CODES)
def test_slabs_one_after_another(code, slab, monkeypatch):
    monkeypatch.setattr(residual_device, "SLAB", slab)
    w, r, q = pair(384, 130, code)
    np.testing.assert_array_equal(bits(decoded(r, q)), bits(w))


@pytest.mark.parametrize("code", CODES)
def test_every_pattern(code, compiler):
    """Against substitutes whose scales are every pattern too: NaN, infinite, subnormal."""
    rng = np.random.default_rng(1)
    draw = lambda *s: rng.permutation(2**16).astype(np.uint16).reshape(s).view(ml_dtypes.bfloat16)
    codes = rng.integers(0, 16, (64, 8, 1024), np.uint8)
    q = Quantized(pack(jnp.asarray(codes), 4), draw(64, 1024), draw(64, 1024), 4, 8)
    w = np.tile(draw(64, 1024), (8, 1))
    r = encode(w, q, code)
    np.testing.assert_array_equal(bits(decoded(r, q)), bits(w))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_predictions_do_not_depend_on_the_compiler(dtype, compiler):
    """All steps and offsets, beyond what weights have: no fused sum, no flushed subnormal."""
    rng = np.random.default_rng(2)
    draw = lambda: rng.permutation(2**16).astype(np.uint16).reshape(64, -1).view(ml_dtypes.bfloat16)
    codes = rng.integers(0, 256, (64, 4, 1024), np.uint8)
    step, offset = draw(), draw()
    with np.errstate(over="ignore", invalid="ignore"):
        offset[::2] = -100 * step[::2].astype(np.float32)  # cancels
    want = predict(codes, step, offset, 7, dtype, np)
    run = jax.jit(lambda c, s, o: predict(c, s, o, 7, dtype, jnp))
    for got, expected in zip(run(codes, step, offset), want, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("code", CODES)
def test_one_program_for_layers_that_were_padded_alike(code):
    run = jax.jit(lambda r, q: residual_device.decode(r, q))
    pairs = [pair(128, 96, code, seed=s) for s in range(3)]
    rows = max(r.words.shape[0] for _, r, _ in pairs) + 1
    room = max(r.patches for _, r, _ in pairs) + 7
    for w, r, q in pairs:
        np.testing.assert_array_equal(bits(run(pad(r, rows, room), q)), bits(w))
    assert run._cache_size() == 1


@pytest.mark.parametrize("code", CODES)
def test_damage_changes_weights_and_nothing_else(code):
    """Any word may be wrong, offsets and the head included: no exception, no other shape."""
    w, r, q = pair(128, 96, code)
    run = jax.jit(residual_device.decode)
    for word in (0, 40, 128, 130, 133, 200, r.words.size // 2):
        for flip in (1, 0x80000000, 0xFFFFFFFF):
            words = r.words.copy()
            words.ravel()[word] ^= flip
            assert run(dataclasses.replace(r, words=words), q).shape == w.shape


def test_a_layer_streams_as_its_residuals():
    """`offload` and `fetch` keep it like any layer: matrices move, vectors stay."""
    shapes = dict(q=(64, 64), k=(64, 32), v=(64, 32), o=(64, 64), gate=(64, 96), up=(64, 96))
    made = {n: pair(*s, "levels", seed=i) for i, (n, s) in enumerate(shapes.items())}
    made["down"] = pair(128, 64, "planes")
    norm = jnp.ones(64, jnp.bfloat16)

    def layer(i):
        part = {n: m[i] for n, m in made.items()}
        attn = Attention(**{n: part[n] for n in "qkvo"}, q_bias=norm)
        return Layer(norm, attn, norm, MLP(part["gate"], part["up"], part["down"]))

    kept = offload(layer(1))
    assert is_offloaded(kept) and host_bytes(kept) == sum(r.nbytes for _, r, _ in made.values())
    got = jax.jit(residual_device.decode_layer)(fetch(kept), layer(2))
    assert jax.tree.structure(got) == jax.tree.structure(layer(0))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(layer(0)), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def test_codes_unpack_alike_in_numpy():
    for n_bits, group in ((2, 8), (3, 16), (4, 64), (8, 32)):
        q = quantize(jnp.asarray(pair(128, 24, "levels")[0][:, :24]), n_bits, group, 0)
        host = jax.tree.map(np.asarray, q)
        np.testing.assert_array_equal(unpack(host, np), unpack(q))
