"""The compiled decoder gives the bits of the NumPy one, with and without XLA's optimizations."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from placement import is_offloaded

from llm_jax.linear import linear
from llm_jax.packed import packed
from llm_jax.params import JoinedAttention, JoinedMLP, Layer, init_layer
from llm_jax.quantize import Quantized, codes_of, quantize
from llm_jax.stream import to_device
from llm_jax.testing import tiny_config
from pallas_kernels.bit_fields import pack_codes
from pallas_kernels.quantized_matmul import codes_and_scales
from pallas_kernels.residual_decode import reference, residual_decode, why_not
from pallas_kernels.residual_decode.code import pad, predict_weights
from subspec_jax.draft_model import substitutes
from subspec_jax.offload import offload, streamed_bytes
from subspec_jax.random_weights import split_layer as split_random
from subspec_jax.residual.encode import encode
from subspec_jax.residual.split import (
    Split,
    decode_layer,
    gaussian_room,
    is_split,
    split_shapes,
    widened,
    width_of,
)

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
    return w, encode(w, q, code), packed(q)


def decoded(r, q):
    return jax.jit(lambda r, q: residual_decode(r, q))(r, q)


@pytest.mark.quick_cases(
    "plain-shape0-float16-planes",
    "plain-shape1-bfloat16-levels",
    "optimized-shape1-bfloat16-levels",
    "optimized-shape0-float16-planes",
    "plain-shape2-bfloat16-planes",
)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(128, 64), (192, 130), (64, 1)])
def test_bits_are_those_of_the_weights(code, dtype, shape, compiler):
    w, r, q = pair(*shape, code, dtype)
    got = decoded(r, q)
    assert got.dtype == w.dtype and got.shape == w.shape
    np.testing.assert_array_equal(bits(got), bits(w))


@pytest.mark.quick_cases("levels-16640", "planes-1")
@pytest.mark.parametrize("slab", [1, 64 * 130 * 2, 64 * 130 * 6])
@pytest.mark.parametrize("code", CODES)
def test_slabs_one_after_another(code, slab, monkeypatch):
    monkeypatch.setattr(reference, "SLAB_WEIGHTS", slab)
    w, r, q = pair(384, 130, code)
    np.testing.assert_array_equal(bits(decoded(r, q)), bits(w))


@pytest.mark.parametrize("code", CODES)
def test_every_pattern(code, compiler):
    """Against substitutes whose scales are every pattern too: NaN, infinite, subnormal."""
    rng = np.random.default_rng(1)
    draw = lambda *s: rng.permutation(2**16).astype(np.uint16).reshape(s).view(ml_dtypes.bfloat16)
    codes = rng.integers(0, 16, (64, 8, 1024), np.uint8)
    q = Quantized(pack_codes(jnp.asarray(codes), 4, 1), draw(64, 1024), draw(64, 1024), 4, 8)
    w = np.tile(draw(64, 1024), (8, 1))
    r = encode(w, q, code)
    np.testing.assert_array_equal(bits(decoded(r, packed(q))), bits(w))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_predictions_do_not_depend_on_the_compiler(dtype, compiler):
    """All steps and offsets, beyond what weights have: no fused sum, no flushed subnormal."""
    rng = np.random.default_rng(2)
    draw = lambda: rng.permutation(2**16).astype(np.uint16).reshape(64, -1).view(ml_dtypes.bfloat16)
    codes = rng.integers(0, 256, (64, 4, 1024), np.uint8)
    step, offset = draw(), draw()
    with np.errstate(over="ignore", invalid="ignore"):
        offset[::2] = -100 * step[::2].astype(np.float32)  # cancels
    want = predict_weights(codes, step, offset, 7, dtype, np)
    run = jax.jit(lambda c, s, o: predict_weights(c, s, o, 7, dtype, jnp))
    for got, expected in zip(run(codes, step, offset), want, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("code", CODES)
def test_one_program_for_layers_that_were_padded_alike(code):
    run = jax.jit(lambda r, q: residual_decode(r, q))
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
    run = jax.jit(residual_decode)
    for word in (0, 40, 128, 130, 133, 200, r.words.size // 2):
        for flip in (1, 0x80000000, 0xFFFFFFFF):
            words = r.words.copy()
            words.ravel()[word] ^= flip
            assert run(dataclasses.replace(r, words=words), q).shape == w.shape


def split_layer():
    """(a joined layer of `Split` matrices, the same layer with plain ones)."""
    shapes = dict(qkv=(64, 128), o=(64, 64), gate_up=(64, 192), down=(128, 64))
    made = {n: pair(*s, "levels", seed=i) for i, (n, s) in enumerate(shapes.items())}
    made["down"] = pair(128, 64, "planes")
    norm = jnp.ones(64, jnp.bfloat16)

    def layer(one):
        part = {n: one(*m) for n, m in made.items()}
        attn = JoinedAttention(part["qkv"], part["o"], jnp.ones(128, jnp.bfloat16))
        return Layer(norm, attn, norm, JoinedMLP(part["gate_up"], part["down"]))

    return layer(lambda w, r, q: Split(q, r)), layer(lambda w, r, q: jnp.asarray(w))


@pytest.mark.slow
def test_a_layer_streams_as_its_residuals():
    """`offload` and `fetch` keep it like any layer; substitutes and vectors stay on the device."""
    split, want = split_layer()
    kept = offload(split)
    residuals = [w.residual for w in jax.tree.leaves(split, is_leaf=is_split) if is_split(w)]
    assert len(residuals) == 4 and is_offloaded(kept)
    assert streamed_bytes(kept) == sum(r.nbytes for r in residuals)
    stay = jax.tree.leaves(substitutes(kept))
    assert {a.sharding.memory_kind for a in stay} == {"device"}
    fetched = to_device(kept)
    there = lambda tree: [a.unsafe_buffer_pointer() for a in jax.tree.leaves(substitutes(tree))]
    assert there(fetched) == there(kept)
    got = jax.jit(decode_layer)(fetched)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.quick_cases("float32")
@pytest.mark.parametrize("out_dtype", [None, jnp.float32])
def test_a_product_is_that_of_the_exact_matrix(out_dtype):
    split, want = split_layer()
    w, dense = split.mlp.down, want.mlp.down.at[:1, :5].set(1)  # no NaN
    w = dataclasses.replace(w, residual=encode(np.asarray(dense), unpacked(w.substitute), "levels"))
    x = jax.random.normal(jax.random.key(0), (1, 5, 128), jnp.bfloat16)
    run = jax.jit(lambda w: linear(w, x, out_dtype))
    got, expected = run(w), run(dense)
    assert got.dtype == expected.dtype == (out_dtype or jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def unpacked(w):
    """The `Quantized` of a `Packed`, in NumPy."""
    codes, step, offset = codes_and_scales(w)
    return jax.tree.map(
        np.asarray, Quantized(pack_codes(codes, w.bits, 1), step, offset, w.bits, w.group)
    )


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_weights_fit_into_the_room_planned_for_them(bits):
    cfg = tiny_config("qwen2", dtype="bfloat16", d_model=256, d_ff=512)
    room = gaussian_room(cfg, bits, 64)
    shapes = split_shapes(cfg, bits, 64, room)
    made = split_random(init_layer(jax.random.key(bits), cfg), shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, made)


@pytest.mark.slow
def test_codes_unpack_alike_in_numpy():
    for n_bits, group in ((2, 8), (3, 16), (4, 64), (8, 32)):
        q = quantize(jnp.asarray(pair(128, 24, "levels")[0][:, :24]), n_bits, group, 0)
        host = jax.tree.map(np.asarray, q)
        np.testing.assert_array_equal(codes_of(host, np), codes_of(q))


@pytest.mark.parametrize("columns, wide", [(480, 512), (1536, 1536), (920, 1024), (900, 900)])
def test_columns_are_added_where_the_kernel_needs_few(columns, wide):
    """To whole tiles of 64 words of 8 codes, and only up to an eighth."""
    assert width_of(columns, 4) == wide
    rng = np.random.default_rng(0)
    dense = jnp.asarray(rng.normal(0, 0.05, (64, columns)), jnp.bfloat16)
    full = widened(np.asarray(dense), 4)
    q = quantize(jnp.asarray(full), 4, 16, 0)
    exact = jax.tree.map(jnp.asarray, encode(full, jax.tree.map(np.asarray, q), "levels"))
    w = Split(dataclasses.replace(packed(q), columns=columns), exact)
    assert full.shape == exact.shape == (64, wide) and w.shape == (64, columns)
    if wide % 512 == 0:
        assert not (reason := why_not(*w.pair)) or "Triton" in reason
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.bfloat16)
    chex.assert_trees_all_equal(jax.jit(linear)(w, x), jax.jit(linear)(dense, x))
    chex.assert_trees_all_equal(decode_layer((w,))[0], dense)
    chex.assert_trees_all_equal(linear(w.substitute, x).shape, (3, columns))
