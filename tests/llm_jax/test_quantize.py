"""Low-bit weights: the documented bytes, the errors allowed, and an HQQ written in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.linear import embedding_rows, linear
from llm_jax.quantize import (
    Quantized,
    QuantizedTable,
    check_grouping,
    codes_of,
    dequantize,
    quantize,
    quantized_bytes,
)
from pallas_kernels.bit_fields import pack_codes
from pallas_kernels.quantized_matmul.packing import BITS

bf16 = lambda x: np.asarray(x, np.float32).astype(jnp.bfloat16).astype(np.float64)


def as_quantized(codes_QgF, bits):
    Q, group, F = codes_QgF.shape
    one = jnp.ones((Q, F), jnp.bfloat16)
    return Quantized(pack_codes(jnp.asarray(codes_QgF), bits, 1), one, one, bits, group)


def weights(D, F, seed=0, scale=0.02):
    """A matrix as trained ones are: normal, with a few outliers."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(D, F)) * scale
    return np.where(rng.random((D, F)) < 0.002, 8 * w, w).astype(np.float32)


# ---------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from([(1, 8, 1), (3, 16, 5), (2, 64, 2)]))
def test_unpack_inverts_pack(bits, seed, shape):
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)
    w = as_quantized(codes, bits)
    assert w.codes_QpF.dtype == jnp.uint8 and codes_of(w).dtype == jnp.uint8
    chex.assert_shape(w.codes_QpF, (shape[0], shape[1] * bits // 8, shape[2]))
    np.testing.assert_array_equal(codes_of(w), codes)


@pytest.mark.parametrize("bits", BITS)
def test_layout_is_the_documented_one(bits):
    g = 16
    c = np.random.default_rng(bits).integers(0, 2**bits, (2, g, 3))
    rows = {
        8: lambda: [c[:, j] for j in range(g)],
        4: lambda: [c[:, j] | c[:, j + g // 2] << 4 for j in range(g // 2)],
        2: lambda: [sum(c[:, j + i * g // 4] << 2 * i for i in range(4)) for j in range(g // 4)],
        3: lambda: (
            [sum((c[:, j + i * g // 4] & 3) << 2 * i for i in range(4)) for j in range(g // 4)]
            + [sum((c[:, j + i * g // 8] >> 2) << i for i in range(8)) for j in range(g // 8)]
        ),
    }[bits]()
    got = pack_codes(jnp.asarray(c, jnp.uint8), bits, 1)
    np.testing.assert_array_equal(got, np.stack(rows, 1))


def test_dequantize_is_code_times_step_plus_offset():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (2, 8, 3), dtype=np.uint8)
    step, offset = rng.normal(size=(2, 2, 3)).astype(jnp.bfloat16)
    w = Quantized(jnp.asarray(codes), jnp.asarray(step), jnp.asarray(offset), 8, 8)
    want = codes * step.astype(np.float64)[:, None] + offset.astype(np.float64)[:, None]
    np.testing.assert_array_equal(dequantize(w), want.astype(np.float32).reshape(16, 3))
    np.testing.assert_array_equal(
        dequantize(w, jnp.bfloat16), want.astype(np.float32).astype(jnp.bfloat16).reshape(16, 3)
    )
    # the same bits whether a compiler may fuse the product and the sum or not
    np.testing.assert_array_equal(jax.jit(dequantize)(w), dequantize(w))


@pytest.mark.parametrize("group", [8, 64])
@pytest.mark.parametrize("bits", BITS)
def test_quantized_bytes_are_the_real_ones(bits, group):
    w = quantize(jnp.asarray(weights(128, 6)), bits, group, 0)
    assert w.shape == (128, 6) and w.ndim == 2
    real = sum(a.nbytes for a in jax.tree.leaves(w))
    assert real == quantized_bytes(128, 6, bits, group) == 128 * 6 * (bits + 32 / group) / 8


# ------------------------------------------------------------------------------- error budgets

BUDGET = {
    # bits -> most mean |error| over mean |w| in groups of 64, (nearest, HQQ)
    2: (0.530, 0.510),
    3: (0.238, 0.228),
    4: (0.111, 0.105),
    8: (0.0067, 0.0066),
}


@pytest.fixture(scope="module")
def sample():
    return weights(512, 48)


@pytest.fixture(scope="module")
def both(sample):
    """bits -> (nearest, HQQ) of the sample."""
    w = jnp.asarray(sample)
    return {bits: tuple(quantize(w, bits, 64, n) for n in (0, 20)) for bits in BITS}


def group_errors(w_DF, quantized):
    """Mean absolute error of each group [Q, F]."""
    e = np.abs(np.asarray(dequantize(quantized), np.float64) - w_DF)
    return e.reshape(-1, quantized.group, w_DF.shape[1]).mean(1)


@pytest.mark.quick_cases("3", "4", "8")
@pytest.mark.parametrize("bits", BITS)
def test_errors_are_within_budget(sample, both, bits):
    errors = [group_errors(sample, w).mean() / np.abs(sample).mean() for w in both[bits]]
    for error, budget in zip(errors, BUDGET[bits], strict=True):
        assert 0.9 * budget < error < budget  # much less would mean that something else is measured


@pytest.mark.parametrize("bits", BITS)
def test_nearest_is_off_by_a_quarter_step_on_average(sample, both, bits):
    """And by half a step at most, but for the rounding of step and offset to 8 bits."""
    nearest = both[bits][0]
    step = np.asarray(nearest.step_QF, np.float64)
    assert abs(group_errors(sample, nearest).mean() / step.mean() - 0.25) < 0.02
    worst = np.abs(np.asarray(dequantize(nearest)) - sample).reshape(8, 64, -1).max(1)
    assert (worst <= step * (0.5 + 2**bits * 2**-8) * 1.05).all()


@pytest.mark.parametrize("bits", BITS)
def test_hqq_is_not_worse_than_nearest_in_any_group(sample, both, bits):
    nearest, hqq = (group_errors(sample, w) for w in both[bits])
    # the offset is rounded to bfloat16 behind the choice: that much, and no more
    slack = np.abs(np.asarray(both[bits][1].offset_QF, np.float64)) * 2**-9
    assert (hqq <= nearest + slack).all()
    if bits < 8:
        assert hqq.mean() < 0.97 * nearest.mean()


def hqq_in_float64(w_DF, bits, group, iterations):
    """(step, zero) of every group by the published iteration, the best zero kept."""
    levels = 2**bits - 1
    D, F = w_DF.shape
    steps, zeros = np.zeros((2, D // group, F))
    for i, f in np.ndindex(D // group, F):
        w = w_DF[i * group : (i + 1) * group, f].astype(np.float64)
        step = bf16(max((w.max() - w.min()) / levels, np.abs(w).max() / 256, 1e-30))
        zero, beta, tried = np.round(-w.min() / step), 10.0, []
        for _ in range(iterations + 1):
            q = np.clip(np.round(w / step + zero), 0, levels)
            r = (q - zero) * step
            tried.append((np.abs(w - r).mean(), zero))
            e = w - r
            with np.errstate(divide="ignore"):
                shrunk = np.maximum(np.abs(e) - np.abs(e) ** (0.7 - 1) / beta, 0)
            zero = (q - (w - np.sign(e) * shrunk) / step).mean()
            beta *= 1.01
        steps[i, f], zeros[i, f] = step, min(tried, key=lambda pair: pair[0])[1]
    return steps, zeros


@pytest.mark.parametrize("scale", [0.02, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_is_the_published_iteration(bits, scale):
    """Large weights too, on which the shrinkage is not all or nothing."""
    w = weights(256, 24, seed=bits, scale=scale)
    step, zero = hqq_in_float64(w, bits, 64, 20)
    got = quantize(jnp.asarray(w), bits, 64, 20)
    np.testing.assert_array_equal(np.asarray(got.step_QF, np.float64), step)
    found = np.asarray(got.offset_QF, np.float64)
    ulp = np.abs(zero * step) * 2**-7
    same = np.abs(found + zero * step) <= ulp
    assert same.mean() > 0.95  # a tie that rounds the other way in float32 may end elsewhere
    offset = bf16(-zero * step)
    q = np.clip(np.round((w.reshape(4, 64, 24) - offset[:, None]) / step[:, None]), 0, 2**bits - 1)
    reference = np.abs(q * step[:, None] + offset[:, None] - w.reshape(4, 64, 24)).mean(1)
    np.testing.assert_allclose(group_errors(w, got).mean(), reference.mean(), rtol=5e-3)


def test_codes_are_the_nearest_to_the_stored_step_and_offset(sample, both):
    """So nothing is lost by rounding step and offset first."""
    for w in (one for pair in both.values() for one in pair):
        step, offset = (np.asarray(a, np.float64)[:, None] for a in (w.step_QF, w.offset_QF))
        x = (sample.astype(np.float64).reshape(8, 64, -1) - offset) / step
        q = np.clip(np.round(x), 0, 2**w.bits - 1)
        differs = q != np.asarray(codes_of(w))
        assert (np.abs(np.abs(x - np.floor(x)) - 0.5)[differs] < 1e-3).all()


# --------------------------------------------------------------------------------- hard groups

HARD = {
    # 16 numbers -> most absolute error, as a share of the largest, at any number of bits
    "zero": (np.zeros(16), 0.0),
    "constant": (np.full(16, 0.3), 1.5 * 2**-8),
    "negative constant": (np.full(16, -7.7), 1.5 * 2**-8),
    "nearly constant": (100 + np.linspace(0, 0.1, 16), 1.5 * 2**-8),
    "tiny": (np.linspace(-1e-9, 2e-9, 16), 1 / 3),  # every step is 0 in float16
    "tiny constant": (np.full(16, 1e-9), 1.5 * 2**-8),
    "very tiny": (np.linspace(-1e-20, 1e-20, 16), 1 / 2),
    "below everything": (np.linspace(-1e-38, 1e-38, 16), 1.01),
    "huge": (np.linspace(-1e30, 2e30, 16), 1 / 3),
    "one outlier": (np.r_[1e4, np.zeros(15)], 1 / 3),
    "all positive": (np.linspace(1, 2, 16), 1 / 4),
    "all negative": (np.linspace(-2, -1, 16), 1 / 4),
}


@pytest.mark.parametrize("iterations", [0, 20])
@pytest.mark.parametrize("bits", BITS)
def test_hard_groups(bits, iterations):
    """One matrix with a hard group in every column, beside an ordinary one: finite and near."""
    columns = np.stack([np.r_[w, np.linspace(-1, 1, 16)] for w, _ in HARD.values()], 1)
    w = quantize(jnp.asarray(columns, jnp.float32), bits, 16, iterations)
    back = np.asarray(dequantize(w), np.float64)
    assert np.isfinite(back).all()
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in (w.step_QF, w.offset_QF))
    for i, (name, (group, share)) in enumerate(HARD.items()):
        error = np.abs(back[:16, i] - group).max()
        assert error <= share * np.abs(group).max() * 1.01, name
        assert np.abs(back[16:, i] - columns[16:, i]).max() <= 0.36, name


def test_an_all_zero_matrix_stays_zero():
    w = quantize(jnp.zeros((32, 4)), 4, 16, 20)
    assert not np.asarray(dequantize(w)).any()


@pytest.mark.parametrize("bits", [3, 4])
def test_blocks_of_columns_change_nothing(bits):
    """2**21 rows leave two columns a block; the same groups as a short matrix are one block."""
    D, F = 2**21, 4
    w = weights(D, F, seed=5)
    got = quantize(jnp.asarray(w), bits, 64, 0)
    flat = np.moveaxis(w.reshape(-1, 64, F), 0, 1).reshape(64, -1)  # column q * F + f
    want = quantize(jnp.asarray(flat), bits, 64, 0)
    chex.assert_shape(got.codes_QpF, (D // 64, 8 * bits, F))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        rows_first = np.moveaxis(np.asarray(a).reshape(D // 64, -1, F), 0, 1)
        np.testing.assert_array_equal(rows_first.reshape(b.shape), b)


@pytest.mark.parametrize("bits", BITS)
def test_every_column_is_quantized_alone(bits):
    w = weights(64, 7, seed=6)  # 7 has no divisor but 1 and 7
    whole = quantize(jnp.asarray(w), bits, 16, 5)
    for f in (0, 3, 6):
        one = quantize(jnp.asarray(w[:, f : f + 1]), bits, 16, 5)
        chex.assert_trees_all_equal(one, jax.tree.map(lambda a, f=f: a[..., f : f + 1], whole))


# -------------------------------------------------------------------------------------- in use


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("bits", BITS)
def test_linear_is_the_product_with_the_dense_matrix(bits, dtype, tolerance):
    w = quantize(jnp.asarray(weights(64, 5), dtype), bits, 16)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 64)), dtype)
    got = jax.jit(linear)(w, x)
    assert got.dtype == dtype
    want = np.asarray(x, np.float64) @ np.asarray(dequantize(w, dtype), np.float64)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance / 10
    )


@pytest.mark.parametrize("bits", BITS)
def test_table_looks_up_rows(bits):
    table_VD = weights(11, 32)
    table = QuantizedTable(quantize(jnp.asarray(table_VD.T), bits, 16, 0))
    assert table.shape == (11, 32)
    tokens = jnp.array([[0, 10, 3], [3, 3, 7]])
    dense = np.asarray(dequantize(table.rows_DV)).T
    np.testing.assert_array_equal(jax.jit(embedding_rows)(table, tokens), dense[np.asarray(tokens)])
    np.testing.assert_array_equal(
        embedding_rows(jnp.asarray(table_VD), tokens), table_VD[np.asarray(tokens)]
    )


@pytest.mark.parametrize(
    "rows, bits, group, words",
    [
        (64, 5, 64, "5 bits a weight are not supported; choose one of (2, 3, 4, 8)"),
        (64, 4, 0, "group size 0 cannot be packed; it must be a multiple of 8"),
        (64, 4, 12, "group size 12 cannot be packed"),
        (96, 4, 64, "q has 96 inputs, not a multiple of group 64; these fit: [32, 16, 8]"),
        (100, 4, 64, "these fit: []"),
    ],
)
def test_what_cannot_be_quantized_says_why(rows, bits, group, words):
    with pytest.raises(ValueError) as caught:
        check_grouping("q", rows, bits, group)
    assert words in str(caught.value)


def test_quantize_checks_its_matrix():
    with pytest.raises(ValueError, match="the matrix has 96 inputs"):
        quantize(jnp.zeros((96, 2)), 4, 64)
