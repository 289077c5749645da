"""Words and back, bit for bit, and what cannot be packed."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.quantize import dequantize, quantize, unpack
from pallas_kernels.quantized_matmul import repack, restore
from pallas_kernels.quantized_matmul.packing import BITS, codes, padded
from pallas_kernels.quantized_matmul.reference import dequantized
from pallas_kernels.quantized_matmul.shapes import MATMUL


@pytest.mark.parametrize("columns", [1, 300])
@pytest.mark.parametrize("bits", BITS)
def test_round_trip(bits, columns):
    rng = np.random.default_rng(bits)
    some = jnp.asarray(rng.integers(0, 2**bits, (3, 32, columns)), jnp.uint8)
    step, offset = jnp.asarray(rng.normal(size=(2, 3, columns)), jnp.bfloat16)
    w = repack(some, step, offset, bits)
    assert w.shape == (96, columns) and w.words_DS.shape[1] % 16 == 0
    for found, expected in zip(restore(w), (some, step, offset), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", BITS)
def test_dense_values_are_those_of_the_quantizer(bits):
    rng = np.random.default_rng(0)
    w = quantize(jnp.asarray(rng.normal(size=(128, 40)), jnp.float32), bits, 64)
    packed = repack(unpack(w), w.step_QF, w.offset_QF, bits)
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(dequantized(packed, dtype), dequantize(w, dtype))


def test_a_word_holds_one_input_of_outputs_far_apart():
    """The example of the docstring, and zeros in the padding."""
    some = jnp.asarray(np.random.default_rng(1).integers(0, 16, (1, 16, 20)), jnp.uint8)
    zeros = jnp.zeros((1, 20), jnp.bfloat16)
    w = repack(some, zeros, zeros, 4)
    low, high = int(some[0, 5, 3]), int(some[0, 5, 19])
    assert w.words_DS.shape == (16, 16) and int(w.words_DS[5, 3]) == low | high << 4
    assert int(codes(w)[5, 19]) == high


def test_bytes_are_counted():
    shape = MATMUL["qwen2.5-7b/gate"]
    assert shape.outputs == padded(shape.outputs, 4)
    assert shape.packed(4, 64).size_bytes == shape.inputs * shape.outputs * 9 // 16
    assert shape.packed(3, 64).size_bytes == shape.inputs * shape.outputs * 7 // 16


def test_what_cannot_be_packed():
    some, scale = jnp.zeros((2, 16, 8), jnp.uint8), jnp.zeros((2, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="5 bits"):
        repack(some, scale, scale, 5)
    with pytest.raises(ValueError, match="expected \\(2, 8\\)"):
        repack(some, scale[:1], scale, 4)
    for empty in ((0, 16, 8), (2, 16, 0)):
        none = jnp.zeros((empty[0], empty[2]), jnp.bfloat16)
        with pytest.raises(ValueError, match="empty"):
            repack(jnp.zeros(empty, jnp.uint8), none, none, 4)
