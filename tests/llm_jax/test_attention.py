"""Attention, rotary positions and the whole forward pass, against float64 NumPy written apart."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.attention import (
    along_last,
    attend,
    attention,
    caches_for,
    causal_step,
    empty_cache,
    normed,
    qkv_heads,
    rms_norm,
    rope,
    rope_frequencies,
    rotated,
)
from llm_jax.cache import empty_caches
from llm_jax.linear import linear
from llm_jax.model import forward
from llm_jax.params import joined
from llm_jax.rope import Llama3Rope
from llm_jax.testing import TINY_FAMILIES, tiny_config, tiny_params
from pallas_kernels.precision import precision


def frequencies(cfg):
    """Radians a position, one pair at a time, in the words of Llama 3.1's description."""
    out = []
    for i in range(cfg.head_dim // 2):
        freq = 1.0 / cfg.rope_theta ** (2 * i / cfg.head_dim)
        if (s := cfg.rope_scaling) is not None:
            wavelength = 2 * np.pi / freq
            if wavelength > s.original_max_length / s.low_freq_factor:
                freq /= s.factor
            elif wavelength > s.original_max_length / s.high_freq_factor:
                smooth = (s.original_max_length / wavelength - s.low_freq_factor) / (
                    s.high_freq_factor - s.low_freq_factor
                )
                freq = (1 - smooth) * freq / s.factor + smooth * freq
        out.append(freq)
    return np.array(out)


def turned(x_TNH, position_T, cfg):
    """Pairs (i, i + H/2) as complex numbers, times e^(i angle)."""
    half = cfg.head_dim // 2
    z = x_TNH[..., :half] + 1j * x_TNH[..., half:]
    z = z * np.exp(1j * np.outer(position_T, frequencies(cfg)))[:, None]
    return np.concatenate([z.real, z.imag], -1)


def by_hand_norm(x, gain, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def reference_logits(params, tokens, cfg):
    """Logits [T, V] of a causal pass, head by head and position by position, in float64."""
    f64 = lambda a: np.asarray(a, np.float64)
    x = f64(params.embed_VD)[np.asarray(tokens)]
    T, H = len(tokens), cfg.head_dim
    for layer in params.layers:
        p = layer.attn
        h = by_hand_norm(x, f64(layer.attn_norm), cfg.norm_eps)
        q, k, v = (h @ f64(w) for w in (p.q, p.k, p.v))
        if cfg.qkv_bias:
            q, k, v = q + f64(p.q_bias), k + f64(p.k_bias), v + f64(p.v_bias)
        q, k, v = q.reshape(T, -1, H), k.reshape(T, -1, H), v.reshape(T, -1, H)
        if cfg.qk_norm:
            q, k = (
                by_hand_norm(q, f64(p.q_norm), cfg.norm_eps),
                by_hand_norm(k, f64(p.k_norm), cfg.norm_eps),
            )
        q, k = turned(q, np.arange(T), cfg), turned(k, np.arange(T), cfg)
        y = np.zeros((T, cfg.heads, H))
        for n in range(cfg.heads):
            kv = n // (cfg.heads // cfg.kv_heads)
            for t in range(T):
                scores = k[: t + 1, kv] @ q[t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                y[t, n] = weights / weights.sum() @ v[: t + 1, kv]
        x = x + y.reshape(T, -1) @ f64(p.o)
        h = by_hand_norm(x, f64(layer.mlp_norm), cfg.norm_eps)
        gate = h @ f64(layer.mlp.gate)
        x = x + (gate / (1 + np.exp(-gate)) * (h @ f64(layer.mlp.up))) @ f64(layer.mlp.down)
    h = by_hand_norm(x, f64(params.norm), cfg.norm_eps)
    return h @ (f64(params.embed_VD).T if cfg.tied else f64(params.head_DV))


jit_forward = jax.jit(forward, static_argnames="cfg")
TOKENS = [5, 17, 3, 3, 250, 8, 99, 41, 0, 287, 6]
VARIANTS = {name: dict(family=name) for name in TINY_FAMILIES} | {
    "tied": dict(family="llama", tied=True),
    "one kv head each": dict(family="qwen2", kv_heads=4),
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_forward_is_the_float64_model(changes):
    cfg = tiny_config(**changes)
    params = tiny_params(cfg)
    step = causal_step(0, len(TOKENS), len(TOKENS) + 3)
    caches = empty_caches(cfg, 1, len(TOKENS) + 3)
    logits, _ = jit_forward(params, jnp.array([TOKENS]), caches, step, cfg)
    chex.assert_shape(logits, (1, len(TOKENS), cfg.vocab))
    np.testing.assert_allclose(
        logits[0], reference_logits(params, TOKENS, cfg), rtol=2e-4, atol=2e-4
    )


def test_forward_in_bfloat16_is_near_the_float64_model():
    cfg = tiny_config("qwen2", dtype="bfloat16")
    params = tiny_params(cfg)
    step, caches = causal_step(0, len(TOKENS), 16), empty_caches(cfg, 1, 16)
    logits, caches = jit_forward(params, jnp.array([TOKENS]), caches, step, cfg)
    assert logits.dtype == jnp.float32 and caches[0].k_BSKH.dtype == jnp.bfloat16
    want = reference_logits(params, TOKENS, cfg)
    assert np.abs(np.asarray(logits[0]) - want).mean() < 0.02 * want.std()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1.6e-2)])
def test_rms_norm(dtype, tolerance):
    x = np.random.default_rng(0).normal(size=(3, 5, 32)) * np.logspace(-3, 3, 5)[:, None]
    gain = np.linspace(-2, 2, 32)
    got = rms_norm(jnp.asarray(x, dtype), jnp.asarray(gain, dtype), 1e-5)
    assert got.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(got, np.float64),
        by_hand_norm(x, gain, 1e-5),
        rtol=tolerance,
        atol=tolerance / 10,
    )


@pytest.mark.parametrize("family", ["llama", "llama3"])
def test_rope_turns_complex_pairs(family):
    cfg = tiny_config(family)
    x = np.random.default_rng(1).normal(size=(2, 4, 3, cfg.head_dim))
    position = np.array([[0, 1, 2, 511], [7, 7, 3, 100]])  # any order, as in a tree
    got = rope(jnp.asarray(x, jnp.float32), jnp.asarray(position), cfg)
    want = np.stack([turned(x[b], position[b], cfg) for b in range(2)])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_rope_scores_depend_on_the_distance_alone():
    cfg = tiny_config("llama3")
    q, k = np.random.default_rng(2).normal(size=(2, cfg.head_dim))
    at = lambda x, p: np.asarray(
        rope(jnp.asarray(x, jnp.float32)[None, None, None], jnp.array([[p]]), cfg)
    )[0, 0, 0]
    scores = [at(q, 10 + shift) @ at(k, 3 + shift) for shift in (0, 1, 50, 200)]
    np.testing.assert_allclose(scores, scores[0], atol=1e-3)
    assert abs(at(q, 11) @ at(k, 3) - scores[0]) > 1e-2


def test_llama3_scaling_has_three_regimes():
    scaling = Llama3Rope(8.0, 1.0, 4.0, 8192)
    cfg = tiny_config("llama", head_dim=128, rope_theta=500_000.0, rope_scaling=scaling)
    plain = frequencies(dataclasses.replace(cfg, rope_scaling=None))
    got = rope_frequencies(cfg)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, frequencies(cfg), rtol=1e-6)
    ratio = plain / got
    kept, stretched = np.isclose(ratio, 1, rtol=1e-6), np.isclose(ratio, 8, rtol=1e-6)
    assert kept.sum() > 20 and stretched.sum() > 20 and (~kept & ~stretched).sum() >= 3
    np.testing.assert_allclose(rope_frequencies(dataclasses.replace(cfg, rope_scaling=None)), plain)


@pytest.mark.parametrize("N, K", [(4, 4), (4, 2), (6, 1)])
def test_attend_shares_kv_heads_and_obeys_the_mask(N, K):
    rng = np.random.default_rng(N * 10 + K)
    B, T, S, H = 2, 5, 9, 8
    q, k, v = (rng.normal(size=(B, n, h, H)) for n, h in ((T, N), (S, K), (S, K)))
    mask = rng.random((B, T, S)) < 0.5
    mask[..., 0] = True
    mask[0, 1] = np.arange(S) == 4  # one visible slot: its value, exactly
    got = attend(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), jnp.asarray(mask))
    want = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        seen = np.flatnonzero(mask[b, t])
        scores = k[b, seen, n // (N // K)] @ q[b, t, n] * H**-0.5
        weights = np.exp(scores - scores.max())
        want[b, t, n] = weights / weights.sum() @ v[b, seen, n // (N // K)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[0, 1], np.repeat(v[0, 4], N // K, 0).astype(np.float32))


def test_hidden_slots_do_not_matter():
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=(1, n, 2, 4)), jnp.float32) for n in (2, 6, 6))
    mask = jnp.asarray(rng.random((1, 2, 6)) < 0.5).at[..., 0].set(True)
    hidden = ~mask.any(1)[0][None, :, None, None] | jnp.zeros((1, 6, 2, 4), bool)
    dirty = [jnp.where(hidden, 1e30, a) for a in (k, v)]
    chex.assert_trees_all_equal(attend(q, k, v, mask), attend(q, *dirty, mask))


def test_attention_softmax_stays_in_float32():
    """In bfloat16 the logits 256 and 257 are one number; their weights must not be."""
    q = jnp.full((1, 1, 1, 4), 16.0, jnp.bfloat16)
    k = (
        jnp.array([8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.125])
        .reshape(1, 2, 1, 4)
        .astype(jnp.bfloat16)
    )
    v = jnp.array([0.0] * 4 + [1.0] * 4).reshape(1, 2, 1, 4).astype(jnp.bfloat16)
    got = float(attend(q, k, v, jnp.ones((1, 1, 2), bool))[0, 0, 0, 0])
    assert abs(got - 1 / (1 + np.exp(-1))) < 5e-3  # 16 * 32 / 2 = 256 against 257


def test_causal_step():
    step = causal_step(3, 2, 7)
    assert int(step.at) == 3 and step.position_BT.tolist() == [[3, 4]]
    want = [[s <= t for s in range(7)] for t in (3, 4)]
    assert step.mask_BTS.tolist() == [want]
    assert step.slot_BS is None and step.causal and step.real is None
    padded = causal_step(3, 4, 7, 2)
    assert padded.real.dtype == jnp.int32 and int(padded.real) == 2
    leaves = jax.tree.leaves(jax.eval_shape(lambda at: causal_step(at, 2, 7), 3))
    assert len(leaves) == 3  # what is None or static takes no part in a program


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_heads_of_queries_keys_and_values(family):
    """With three matrices or one; normed and rotated by `rotated`."""
    cfg = tiny_config(family)
    layer = tiny_params(cfg).layers[0]
    x = jnp.asarray(np.random.default_rng(6).normal(size=(2, 3, cfg.d_model)), jnp.float32)
    one = joined(layer, lambda *w: jnp.concatenate(w, axis=-1)).attn
    parts = qkv_heads(layer.attn, x, cfg)
    for name, got, same in zip("qkv", parts, qkv_heads(one, x, cfg), strict=True):
        want = np.asarray(x, np.float64) @ np.asarray(getattr(layer.attn, name), np.float64)
        if (bias := getattr(layer.attn, f"{name}_bias")) is not None:
            want = want + np.asarray(bias, np.float64)
        want = want.reshape(2, 3, -1, cfg.head_dim)
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_allclose(same, want, atol=1e-5)
    at, gain = jnp.array([[4, 5, 9]]), layer.attn.q_norm
    normed_q = parts[0] if gain is None else rms_norm(parts[0], gain, cfg.norm_eps)
    np.testing.assert_array_equal(normed(parts[0], gain, cfg), normed_q)
    np.testing.assert_array_equal(rotated(parts[0], gain, at, cfg), rope(normed_q, at, cfg))


def test_values_may_have_a_width_of_their_own():
    rng = np.random.default_rng(5)
    q, k, v = (
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((2, 3, 4, 8), (2, 6, 2, 8), (2, 6, 2, 11))
    )
    mask = jnp.asarray(rng.random((1, 3, 6)) < 0.7).at[..., 0].set(True)
    whole = attend(q, k, v, mask)
    chex.assert_shape(whole, (2, 3, 4, 11))
    parts = [
        attend(q, k, jnp.pad(v[..., i : i + 8], ((0, 0),) * 3 + ((0, max(0, i - 3)),)), mask)
        for i in (0, 8)
    ]
    np.testing.assert_allclose(whole, jnp.concatenate(parts, -1)[..., :11], atol=1e-6)


def test_every_kind_of_attention_gets_its_own_cache():
    """By the type of its parameters; `KV` where nothing else is registered."""

    @dataclasses.dataclass(frozen=True)
    class Other:
        inner: object

    @empty_cache.register
    def _(p: Other, cfg, batch, slots, scratch=0):
        return ("other", batch, slots, scratch)

    cfg = tiny_config()
    first, second = tiny_params(cfg).layers
    second = dataclasses.replace(second, attn=Other(second.attn))
    params = dataclasses.replace(tiny_params(cfg), layers=(first, second))
    plain, other = caches_for(params, cfg, 3, 9, 4)
    assert other == ("other", 3, 9, 4) and plain.slots == 9
    chex.assert_trees_all_equal(plain, empty_caches(cfg, 3, 9)[0])


def test_attention_of_an_unknown_type_says_what_to_do():
    with pytest.raises(TypeError, match=r"type tuple; .*attention\.register"):
        attention((), jnp.zeros((1, 1, 4)), None, None, tiny_config())


def test_linear_and_its_precision():
    rng = np.random.default_rng(4)
    w, x = rng.normal(size=(6, 3)), rng.normal(size=(2, 5, 6))
    got = linear(jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, np.einsum("btd,df->btf", x, w), rtol=1e-5, atol=1e-6)
    assert precision(jnp.float32) == jax.lax.Precision.HIGHEST
    assert precision(jnp.bfloat16) is None
    assert along_last(jnp.ones(3), x).shape == (1, 1, 3)
