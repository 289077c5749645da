"""Words and back, bit for bit, and what cannot be packed."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.quantize import codes_of, dequantize, quantize
from pallas_kernels.quantized_matmul import codes_and_scales, repack
from pallas_kernels.quantized_matmul.packing import BITS, codes, packed_bytes, padded_columns
from pallas_kernels.quantized_matmul.reference import dequantized
from pallas_kernels.quantized_matmul.shapes import MATMUL


@pytest.mark.parametrize("columns", [1, 300])
@pytest.mark.parametrize("bits", BITS)
def test_round_trip(bits, columns):
    rng = np.random.default_rng(bits)
    some = jnp.asarray(rng.integers(0, 2**bits, (3, 32, columns)), jnp.uint8)
    step, offset = jnp.asarray(rng.normal(size=(2, 3, columns)), jnp.bfloat16)
    w = repack(some, step, offset, bits)
    assert w.shape == (96, columns) and w.words % 32 == 0
    for found, expected in zip(codes_and_scales(w), (some, step, offset), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.quick_cases("3", "4")
@pytest.mark.parametrize("bits", BITS)
def test_dense_values_are_those_of_the_quantizer(bits):
    rng = np.random.default_rng(0)
    w = quantize(jnp.asarray(rng.normal(size=(128, 40)), jnp.float32), bits, 64)
    packed = repack(codes_of(w), w.step_QF, w.offset_QF, bits)
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(dequantized(packed, dtype), dequantize(w, dtype))


def test_two_words_hold_two_inputs_of_outputs_far_apart():
    """The example of the docstring, in the second block and chunk, and zeros in the padding."""
    some = jnp.asarray(np.random.default_rng(1).integers(0, 16, (2, 16, 500)), jnp.uint8)
    zeros = jnp.zeros((2, 500), jnp.bfloat16)
    w = repack(some, zeros, zeros, 4)
    assert w.words_BNSc.shape == (2, 2, 32, 16) and w.words == 64
    code = lambda d, i: int(some[1, d, i * 64 + 32 + 3]) if i * 64 + 35 < 500 else 0
    for word in (0, 1):
        fields = [code(6 + d, 4 * word + j) << 4 * j + 16 * d for d in (0, 1) for j in range(4)]
        assert int(w.words_BNSc[1, 1, 3, 6 + word]) == sum(fields)
    assert not (int(w.words_BNSc[1, 1, 31, 1]) & 0xF000F000)  # output 511
    assert int(codes(w)[35 + 64, 22]) == code(6, 1)


def test_a_chunk_is_a_group_or_64_inputs_of_it():
    for group, c in ((16, 16), (64, 64), (256, 64), (96, 96)):
        w = repack(jnp.zeros((1, group, 4), jnp.uint8), *jnp.zeros((2, 1, 4), jnp.bfloat16), 4)
        assert w.words_BNSc.shape == (1, group // c, 32, c)


def test_bytes_are_counted():
    shape = MATMUL["qwen2.5-7b/gate"]
    assert shape.outputs == padded_columns(shape.outputs, 4)
    assert shape.packed(4, 64).size_bytes == shape.inputs * shape.outputs * 9 // 16
    for bits, sixteenths in ((2, 5), (3, 7), (8, 18)):  # with 8 bits half of the scales are padding
        size = shape.inputs * shape.outputs * sixteenths // 16
        assert shape.packed(bits, 64).size_bytes == size == packed_bytes(3584, 18944, bits, 64)


def test_what_cannot_be_packed():
    some, scale = jnp.zeros((2, 16, 8), jnp.uint8), jnp.zeros((2, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="5 bits"):
        repack(some, scale, scale, 5)
    with pytest.raises(ValueError, match="expected \\(2, 8\\)"):
        repack(some, scale[:1], scale, 4)
    with pytest.raises(ValueError, match="groups of 5 inputs"):
        repack(jnp.zeros((2, 5, 8), jnp.uint8), scale, scale, 4)
    for empty in ((0, 16, 8), (2, 16, 0)):
        none = jnp.zeros((empty[0], empty[2]), jnp.bfloat16)
        with pytest.raises(ValueError, match="empty"):
            repack(jnp.zeros(empty, jnp.uint8), none, none, 4)
