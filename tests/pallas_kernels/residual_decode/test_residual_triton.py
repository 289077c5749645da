"""The kernel that decodes residuals: bits in the interpreter, Triton IR for the models' shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llm_jax.linear import linear
from llm_jax.packed import packed
from llm_jax.quantize import Quantized, quantize
from llm_jax.registry import MODELS
from pallas_kernels import device
from pallas_kernels.bit_fields import pack_codes
from pallas_kernels.lowering import lower_for
from pallas_kernels.residual_decode import api, residual_decode, triton, why_not
from pallas_kernels.residual_decode.code import pad
from subspec_jax.residual.encode import encode
from subspec_jax.residual.split import Split, gaussian_room, split_shapes

slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow)
"""One more case of a branch that a quick one takes, too."""


def pair(D, F, bits=4, group=64, dtype="bfloat16", seed=0):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((D, F), np.float32) * 0.02).astype(jnp.dtype(dtype))
    w.reshape(-1)[:5] = [np.nan, np.inf, -0.0, 1e-7, 0.0]
    w[group // 2, :200] = np.float32(1e-30 if dtype == "bfloat16" else 1e-6)  # many patches
    q = quantize(jnp.asarray(w), bits, group)
    return w, encode(w, jax.tree.map(np.asarray, q), "levels"), packed(q)


def bits_of(r, q, count=1):
    r = jax.tree.map(jnp.asarray, r)
    parts = (residual_decode(r, q, None, part, count, interpret=True) for part in range(count))
    return np.concatenate([np.asarray(part) for part in parts], axis=1).view(np.uint16)


@pytest.mark.quick_cases("128-512-4-64-bfloat16")
@pytest.mark.parametrize(
    "D, F, bits, group, dtype",
    [
        (128, 512, 4, 64, "bfloat16"),
        slow(192, 1024, 4, 64, "float16"),
        (128, 1024, 2, 64, "bfloat16"),
        slow(64, 256, 8, 32, "bfloat16"),
        slow(32, 512, 4, 16, "bfloat16"),
    ],
)
def test_bits_are_those_of_the_weights(D, F, bits, group, dtype):
    w, r, q = pair(D, F, bits, group, dtype)
    assert why_not(r, q) is None and r.patches > 0
    np.testing.assert_array_equal(bits_of(r, q), w.view(np.uint16))
    np.testing.assert_array_equal(bits_of(r, q, q.fields // 2), w.view(np.uint16))
    wider = pad(r, r.words.shape[0] + 3, r.patches + 100)
    np.testing.assert_array_equal(bits_of(wider, q), w.view(np.uint16))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, slow(4), 8])
def test_a_product_takes_a_part_of_the_matrix_at_a_time(monkeypatch, parts):
    w = np.random.default_rng(1).standard_normal((128, 1024), np.float32).astype(jnp.bfloat16)
    low = quantize(jnp.asarray(w), 4, 64)
    r, q = encode(w, jax.tree.map(np.asarray, low), "levels"), packed(low)
    seen, decode = [], triton.residual_decode_triton
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(api, "PART_WEIGHTS", w.size // parts)
    watched = lambda r, q, part, count, interpret: (
        seen.append((part, count)), decode(r, q, part, count, interpret=True)
    )[1]  # fmt: skip
    monkeypatch.setattr(triton, "residual_decode_triton", watched)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 128)), jnp.bfloat16)
    y = linear(Split(q, jax.tree.map(jnp.asarray, r)), x, jnp.float32)
    assert seen == [(part, parts) for part in range(parts)]
    want = np.asarray(x, np.float64) @ w.astype(np.float64)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_every_pattern():
    """Against substitutes whose scales are every pattern too: NaN, infinite, subnormal."""
    rng = np.random.default_rng(1)
    draw = lambda *s: rng.permutation(2**16).astype(np.uint16).reshape(s).view(ml_dtypes.bfloat16)
    codes = rng.integers(0, 16, (64, 16, 1024), np.uint8)
    q = Quantized(pack_codes(jnp.asarray(codes), 4, 1), draw(64, 1024), draw(64, 1024), 4, 16)
    w = np.tile(draw(64, 1024), (16, 1))
    r = encode(w, jax.tree.map(np.asarray, q), "levels")
    np.testing.assert_array_equal(bits_of(r, packed(q)), w.view(np.uint16))


@pytest.mark.slow
def test_damage_stays_in_bounds():
    """Any word may be wrong: other weights, but no endless loop and nothing outside."""
    w, r, q = pair(64, 512)
    for word in (0, 33, 40, 128, 133, 137, 200):
        for flip in (1, 0x80000000, 0xFFFFFFFF):
            words = r.words.copy()
            words.ravel()[word] ^= flip
            assert bits_of(dataclasses.replace(r, words=words), q).shape == w.shape


@pytest.mark.parametrize(
    "name", ["qwen2.5-7b", slow("qwen2.5-32b"), slow("llama-3.1-8b"), slow("qwen3-8b")]
)
def test_layers_of_the_models_lower_to_four_kernels(name):
    cfg = dataclasses.replace(MODELS[name].config, dtype="bfloat16")
    layer = split_shapes(cfg, 4, 64, gaussian_room(cfg, 4, 64))
    for w in (layer.attn.qkv, layer.attn.o, layer.mlp.gate_up, layer.mlp.down):
        assert why_not(w.residual, w.substitute) is None
        run = lambda w: residual_decode(w.residual, w.substitute, "triton")
        program = lower_for(run, w)
        assert program.count("__gpu$xla.gpu.triton") == 1 and "residual_decode" in program


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(F=500), "no multiple of 512"),
        slow(dict(F=640), "640 columns are no multiple of 512"),
        (dict(bits=3, F=1024), "3 bits"),
        (dict(D=256, group=128), "group 128"),
        slow(dict(D=120, group=24), "group 24"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(change, reason):
    w, r, q = pair(**(dict(D=128, F=512) | change))
    assert reason in why_not(r, q)
    with pytest.raises(NotImplementedError, match=reason):
        residual_decode(r, q, "triton")
    got = np.asarray(residual_decode(jax.tree.map(jnp.asarray, r), q))
    np.testing.assert_array_equal(got.view(np.uint16), w.view(np.uint16))


def test_planes_are_left_to_xla():
    w, r, q = pair(128, 512)
    r = dataclasses.replace(r, low_DF=np.zeros(w.shape, np.uint8))
    assert "code planes" in why_not(r, q)
    with pytest.raises(ValueError, match="one of 'xla', 'triton'"):
        residual_decode(r, q, "cuda")
