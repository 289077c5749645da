"""Every 16-bit pattern survives, whatever its substitute; and the bits it takes."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.quantize import Quantized, codes_of, quantize
from pallas_kernels.bit_fields import pack_codes
from pallas_kernels.residual_decode.code import (
    COLUMNS,
    LANES,
    Residual,
    complete,
    differ,
    pad,
    predict_weights,
)
from subspec_jax.residual.encode import Table, choose, decode_numpy, encode, sample

CODES = ("planes", "levels")
DTYPES = ("bfloat16", "float16")


def bits(a):
    return np.asarray(a).view(np.uint16)


def gaussian(D, F, dtype="bfloat16", seed=0, scale=0.02):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((D, F), np.float32) * scale).astype(jnp.dtype(dtype))


def substitute(w, n_bits=4, group=64):
    return jax.tree.map(np.asarray, quantize(jnp.asarray(w), n_bits, group))


def arbitrary(D, F, n_bits=4, group=64, seed=0, scales=None):
    """A substitute that has nothing to do with any weights; scales are drawn from `scales`."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**n_bits, (D // group, group, F), np.uint8)
    draw = lambda: (
        rng.integers(0, 2**16, (D // group, F)).astype(np.uint16).view(ml_dtypes.bfloat16)
        if scales is None
        else rng.choice(np.asarray(scales, ml_dtypes.bfloat16), (D // group, F))
    )
    return Quantized(
        np.asarray(pack_codes(jnp.asarray(codes), n_bits, 1)), draw(), draw(), n_bits, group
    )


def assert_exact(w, q, code):
    r = encode(w, q, code)
    assert r.code == code and r.words.dtype == np.uint32 and r.words.shape[1] == LANES
    back = decode_numpy(r, q)
    assert back.dtype == w.dtype and back.shape == w.shape
    np.testing.assert_array_equal(bits(back), bits(w))
    return r


def every_pattern(dtype, seed=0):
    """[512, 128]"""
    order = np.random.default_rng(seed).permutation(2**16).astype(np.uint16)
    return order.view(jnp.dtype(dtype)).reshape(512, 128)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", [None, [0.01, -0.02, 1.0], [0.0]])
def test_all_patterns_against_arbitrary_codes(code, dtype, scales):
    """NaNs with every payload, infinities, -0 and subnormals are among them; so they are among the
    steps and offsets where `scales` is None."""
    assert_exact(every_pattern(dtype), arbitrary(512, 128, scales=scales), code)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_patterns_against_their_own_substitute(code, dtype):
    w = every_pattern(dtype)
    assert_exact(w, substitute(w), code)


@pytest.mark.parametrize("code", CODES)
def test_groups_that_are_not_like_others(code):
    """Constant, zero, tiny, huge and one-sided groups, and single odd numbers in usual ones."""
    w = gaussian(512, 70)
    w[:64] = 0.37
    w[64:128] = 0
    w[128:192] *= ml_dtypes.bfloat16(2.0**-120)  # most are subnormal
    w[192:256] *= ml_dtypes.bfloat16(1e38)
    w[256:320] = w[256:320] * ml_dtypes.bfloat16(0.01) + ml_dtypes.bfloat16(1)
    w[320, :6] = [np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40]
    w[384:448] = -0.0
    r = assert_exact(w, substitute(w), code)
    assert bits(w)[320, 3] == 0x8000 and bits(w)[384, 0] == 0x8000
    assert 8 * r.nbytes / w.size < 16


@given(
    st.sampled_from(CODES),
    st.sampled_from([(2, 8), (3, 16), (4, 64), (4, 128), (8, 32)]),
    st.integers(1, 5),
    st.integers(1, 3 * COLUMNS + 1),
    st.sampled_from([0.02, 1e-6, 1e4, 1e-38, 1e36]),
    st.integers(0, 9),
)
@settings(max_examples=12, deadline=None)
def test_any_shape_and_scale(code, grouping, Q, F, scale, seed):
    w = gaussian(Q * grouping[1], F, scale=np.float32(scale), seed=seed)
    assert_exact(w, arbitrary(*w.shape, *grouping, seed, [scale, -scale, 7 * scale]), code)


@pytest.mark.parametrize("code", CODES)
def test_a_table_that_fits_nothing_patches_everything(code, monkeypatch):
    """Then a weight takes a patch of 32 bits; nothing overflows."""
    w, q = gaussian(128, 128), substitute(gaussian(128, 128))
    length = 8 if code == "planes" else 0
    firsts = np.full(32, 30000, np.int32)
    useless = Table(7, np.full(32, length, np.int32), firsts)
    monkeypatch.setattr("subspec_jax.residual.encode.choose", lambda *_: useless)
    r = assert_exact(w, q, code)
    assert r.patches == w.size
    assert 8 * r.nbytes / w.size == pytest.approx(length + 32, abs=1)


@pytest.mark.parametrize("code, budget", [("planes", 9.1), ("levels", 7.6)])
@pytest.mark.parametrize("shape", [(1024, 1024), (1536, 1000)])
def test_bits_of_gaussian_weights(code, budget, shape):
    """All overhead counted. Measured: planes 9.06, levels 7.45."""
    w = gaussian(*shape)
    r = assert_exact(w, substitute(w), code)
    assert 8 * r.nbytes / w.size <= budget
    assert r.patches < 0.01 * w.size


def test_float16_has_three_more_bits_of_significand():
    w = gaussian(1024, 512, "float16")
    r = assert_exact(w, substitute(w), "levels")
    assert 8 * r.nbytes / w.size < 10.7


def test_weights_on_the_substitutes_grid_take_almost_nothing():
    q = substitute(gaussian(512, 256))
    step, offset = (a.astype(np.float32)[:, None] for a in (q.step_QF, q.offset_QF))
    w = (codes_of(q, np) * step + offset).astype(ml_dtypes.bfloat16).reshape(q.shape)
    r = assert_exact(w, q, "levels")
    assert 8 * r.nbytes / w.size < 0.1


# The format, read bit by bit by somebody who knows only the docstrings.


def read_slowly(r: Residual, q: Quantized):
    words = [int(x) for x in r.words.ravel()]
    stream = sum(word << (32 * i) for i, word in enumerate(words))
    codes, (D, F), g = codes_of(q, np), q.shape, q.group
    Q, T = D // g, -(-F // 64)
    out = np.zeros((D, F), np.uint16)
    patches = words[128 + Q * T : 128 + 2 * Q * T + 1]
    octaves, first_patch = words[32:34]
    for tile in range(Q * T):
        at = words[128 + tile] * (32 if r.low_DF is None else 8)
        for i in range(g):
            for f in range(tile % T * 64, min(F, tile % T * 64 + 64)):
                step, offset = float(q.step_QF[tile // T, f]), float(q.offset_QF[tile // T, f])
                value = np.float32(float(codes[tile // T, i, f]) * step + offset)
                size = int(bits(np.abs(value).astype(ml_dtypes.bfloat16)))
                step_size = int(bits(q.step_QF[tile // T, f]))
                floor = max(step_size - 128 * octaves, 0)
                quarter = (size - step_size + 2 * 128) // 32
                entry = words[min(max(quarter, 0), 31)]
                length, first = entry % 256, entry // 256 - 2**17
                d = tile // T * g + i
                if r.low_DF is None:
                    x = stream >> at & (2**length - 1)
                    at += length
                else:
                    x = int(r.low_DF[d, f])
                    if length == 16:
                        x, at = x + 256 * (stream >> at & 255), at + 8
                place = max(size - floor + 1, 0) + first + x
                sign = (value < 0) != (place < 0)
                place = -place - 1 if place < 0 else place
                out[d, f] = sign * 0x8000 + (place - 1 + floor if place else 0)
        for patch in words[first_patch + patches[tile] : first_patch + patches[tile + 1]]:
            row, column = patch >> 16 >> 6, patch >> 16 & 63
            out[tile // T * g + row, tile % T * 64 + column] = patch & 0xFFFF
    return out


@pytest.mark.parametrize("code", CODES)
def test_the_format_is_what_its_description_says(code):
    w = gaussian(64, 67)
    w[3, 66], w[40, 2], w[0, :2] = np.nan, 1e-30, [0.0, -0.0]
    q = substitute(w, group=32)
    r = encode(w, q, code)
    assert r.patches >= 2
    np.testing.assert_array_equal(read_slowly(r, q), bits(w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("octaves", [0, 7, 300])
def test_differences_and_patterns_are_inverse(dtype, octaves):
    """Of every pattern there is a number for: those above the floor, 0 and -0."""
    q = arbitrary(512, 128)
    p = predict_weights(codes_of(q, np), q.step_QF, q.offset_QF, octaves, dtype, np)
    pattern = bits(every_pattern(dtype)).astype(np.int32).reshape(p.level.shape)
    difference, possible = differ(p, pattern)
    np.testing.assert_array_equal(complete(p, difference, np)[possible], pattern[possible])
    size = pattern & 0x7FFF
    np.testing.assert_array_equal(possible, (size >= p.floor) | (size == 0))
    assert possible.mean() > (0.9 if octaves == 300 else 0.1)


def test_predictions_are_the_substitutes_values_in_the_weights_format():
    q = substitute(gaussian(256, 64))
    p = predict_weights(codes_of(q, np), q.step_QF, q.offset_QF, 300, "bfloat16", np)  # floor 0
    step, offset = (a.astype(np.float64)[:, None] for a in (q.step_QF, q.offset_QF))
    value = (codes_of(q, np) * step + offset).astype(np.float32)
    want = bits(value.astype(ml_dtypes.bfloat16)).astype(np.int32)
    np.testing.assert_array_equal(p.ordered - 1, want & 0x7FFF)
    np.testing.assert_array_equal(p.negative, want >> 15)
    level = np.floor(4 * np.log2(np.abs(value) / step + 1e-30)) + 8
    far = np.abs(p.level - np.clip(level, 0, 31))
    assert far.max() <= 1  # the exponent and two bits of the significand are nearly a logarithm


@pytest.mark.parametrize("code", CODES)
def test_a_chosen_table_beats_its_neighbours(code):
    """Windows were searched with a histogram; here they are moved by hand."""
    w = gaussian(512, 256)
    q = substitute(w)
    table = choose(*sample(w, q, w.size), code)

    def cost(table):
        p = predict_weights(codes_of(q, np), q.step_QF, q.offset_QF, table.octaves, "bfloat16", np)
        difference, possible = differ(p, bits(w).astype(np.int32).reshape(p.level.shape))
        x, length = difference - table.firsts[p.level], table.lengths[p.level]
        return int(length.sum() + 32 * np.sum((x < 0) | (x >> length != 0) | ~possible))

    best = cost(table)
    used = np.unique(
        predict_weights(codes_of(q, np), q.step_QF, q.offset_QF, 0, "bfloat16", np).level
    )
    for level in used:
        for move in (-9, -1, 1, 9):
            firsts = table.firsts.copy()
            firsts[level] += move
            assert cost(dataclasses.replace(table, firsts=firsts)) >= best
        for longer in (-1, 1) if code == "levels" else ():
            lengths = table.lengths.copy()
            lengths[level] = max(0, lengths[level] + longer)
            assert cost(dataclasses.replace(table, lengths=lengths)) >= best


def test_what_does_not_belong_together_raises():
    w = gaussian(128, 64)
    q = substitute(w)
    with pytest.raises(ValueError, match="q_proj is float32; residuals are of bfloat16 and float1"):
        encode(w.astype(np.float32), q, name="q_proj")
    with pytest.raises(ValueError, match=r"shape \[128, 63\], its substitute \[128, 64\]"):
        encode(w[:, :63], q)
    with pytest.raises(ValueError, match="code 'bytes' is not one of planes, levels"):
        encode(w, q, "bytes")
    with pytest.raises(ValueError, match="group 2048 is above 1024"):
        encode(gaussian(2048, 1), arbitrary(2048, 1, group=2048))


def test_padding():
    w = gaussian(128, 64)
    q = substitute(w)
    r = encode(w, q)
    more = pad(r, r.words.shape[0] + 3, r.patches + 100)
    assert more.words.shape[0] == r.words.shape[0] + 3 and more.patches == r.patches + 100
    np.testing.assert_array_equal(bits(decode_numpy(more, q)), bits(w))
    with pytest.raises(ValueError, match="does not fit into 1 rows"):
        pad(r, 1, r.patches)
