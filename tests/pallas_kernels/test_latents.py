"""Packed latents, against bytes put together one code at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.bit_fields import pack_codes, unpack_codes
from pallas_kernels.lowrank_attention.latents import LATENT_BITS, Latents, block_bytes, dense

PACKED = [bits for bits in LATENT_BITS if bits < 16]


def fields(codes, bits):
    """Code j + i * p is in bits [i * bits, (i + 1) * bits) of byte j of p."""
    out = [0] * -(-len(codes) * bits // 8)
    for at, code in enumerate(codes):
        i, j = divmod(at, len(out))
        out[j] |= int(code) << i * bits
    return out


def packed_by_hand(codes, bits):
    if bits == 3:
        return fields([c & 3 for c in codes], 2) + fields([c >> 2 for c in codes], 1)
    return fields(codes, bits)


@pytest.mark.parametrize("bits", PACKED)
def test_layout(bits):
    for size in (1, 2, 3, 4, 5, 7, 8, 9, 16, 21, 64):
        codes = np.random.default_rng(size).integers(0, 2**bits, size).astype(np.uint8)
        got = pack_codes(jnp.asarray(codes), bits)
        assert got.tolist() == packed_by_hand(codes, bits)
        assert len(got) == block_bytes(size, bits)


def test_layout_of_the_docstring():
    assert pack_codes(jnp.array([1, 2, 3, 4, 5], jnp.uint8), 4).tolist() == [
        1 | 4 << 4,
        2 | 5 << 4,
        3,
    ]
    six = jnp.array([4, 1, 6, 3, 0, 7], jnp.uint8)  # low bits 0 1 2 3 0 3, high bits 1 0 1 0 0 1
    assert pack_codes(six, 3).tolist() == [0 | 2 << 2 | 0 << 4, 1 | 3 << 2 | 3 << 4, 0b100101]


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.sampled_from(PACKED), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_packing_round_trips(bits, size, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, 3, size)).astype(np.uint8)
    packed = pack_codes(jnp.asarray(codes), bits)
    assert packed.dtype == jnp.uint8 and packed.shape == (2, 3, block_bytes(size, bits))
    np.testing.assert_array_equal(unpack_codes(packed, bits, size), codes)


@pytest.mark.quick_cases("2-(5,)", "3-(7, 7, 3)", "4-(1, 12, 12, 9)", "8-(8, 8, 8)")
@pytest.mark.parametrize("blocks", [(5,), (8, 8, 8), (7, 7, 3), (1, 12, 12, 9)], ids=str)
@pytest.mark.parametrize("bits", PACKED)
def test_dense_is_code_times_step_plus_offset(bits, blocks):
    """Also where blocks are ragged; rounded to the dtype asked for once, behind float32."""
    rng = np.random.default_rng(bits)
    codes = [rng.integers(0, 2**bits, (2, 3, size)).astype(np.uint8) for size in blocks]
    step, offset = (
        jnp.asarray(rng.normal(size=(2, 3, len(blocks))) * scale, jnp.bfloat16)
        for scale in (0.1, 300)
    )
    packed = jnp.concatenate([pack_codes(jnp.asarray(c), bits) for c in codes], -1)
    latents = Latents(packed, step, offset, bits, blocks)
    assert latents.rank == sum(blocks)
    want = np.concatenate(
        [
            c * np.float64(step[..., i : i + 1]) + np.float64(offset[..., i : i + 1])
            for i, c in enumerate(codes)
        ],
        -1,
    )
    np.testing.assert_allclose(dense(latents), want, rtol=1e-6, atol=1e-5)
    for dtype in (jnp.bfloat16, jnp.float16):
        got = dense(latents, dtype)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, dense(latents).astype(dtype))


def test_sixteen_bits_are_the_values_themselves():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 6)), jnp.bfloat16)
    latents = Latents(values, None, None, 16, (4, 2))
    assert latents.rank == 6
    np.testing.assert_array_equal(dense(latents), values.astype(jnp.float32))
    assert len(jax.tree.leaves(latents)) == 1


@pytest.mark.parametrize("bits", PACKED)
def test_bytes_of_a_block(bits):
    for size in range(1, 200):
        parts = (2, 1) if bits == 3 else (bits,)
        assert block_bytes(size, bits) == sum((size * b + 7) // 8 for b in parts)
        assert 0 <= block_bytes(size, bits) - size * bits / 8 < len(parts)
