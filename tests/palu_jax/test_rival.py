"""Quantized caches of ordinary keys and values, against brute force."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feeding import one_by_one, text, whole

from llm_jax.attention import attention, caches_for, causal_step, empty_cache, rope_frequencies
from pallas_kernels.lowrank_attention.latents import dense
from palu_jax.format import FormatError
from palu_jax.latent import quantize_latents
from palu_jax.rival import ChannelCache, KVFormat, kivi, to_quantized_cache

jit_attention = jax.jit(attention, static_argnames="cfg")
FORMATS = {
    "int8": KVFormat(8),
    "int4, window": KVFormat(4, window=3),
    "per channel": KVFormat(2, True, 4, 6),
    "per channel, odd": KVFormat(3, True, 8, 9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4, window", "per channel, odd"])
def test_the_cache_gives_what_one_pass_gives(tiny, name):
    params = to_quantized_cache(tiny.params, tiny.cfg, FORMATS[name])
    tokens = text(tiny.cfg)
    want, _ = whole(params, tiny.cfg, tokens)
    got, _ = one_by_one(params, tiny.cfg, tokens)
    chex.assert_trees_all_close(got, want, atol=1e-3)
    dense_logits, _ = whole(tiny.params, tiny.cfg, tokens)
    assert float(jnp.abs(want - dense_logits).max()) > 1e-4


def by_hand(d, form, x_TD, cfg):
    """KIVI's attention over tokens [T, D] in float64, one query after another [T, D]."""
    H, K, T = cfg.head_dim, cfg.kv_heads, len(x_TD)
    f64 = lambda a: np.asarray(a, np.float64)
    angle = np.exp(1j * np.outer(np.arange(T), f64(rope_frequencies(cfg))))[:, None]

    def turned(a_TF):
        a = a_TF.reshape(T, -1, H)
        z = (a[..., : H // 2] + 1j * a[..., H // 2 :]) * angle
        return np.concatenate([z.real, z.imag], -1)

    q, k, v = (
        f64(x_TD) @ f64(w) + f64(b) for w, b in ((d.q, d.q_bias), (d.k, d.k_bias), (d.v, d.v_bias))
    )
    q, k, v = turned(q), turned(k), v.reshape(T, K, H)

    def quantized(rows):
        """Every row in codes of its own range."""
        a = jnp.asarray(rows, jnp.float32)[None]
        return np.asarray(dense(quantize_latents(a, form.bits, (a.shape[-1],))), np.float64)[0]

    low_k, low_v, g = k.copy(), v.copy(), form.group
    for first in range(0, T // g * g, g) if form.per_channel else ():
        for head in range(K):
            low_k[first : first + g, head] = quantized(k[first : first + g, head].T).T
    wide = min(g, H) if form.per_channel else H
    if not form.per_channel:
        low_k = quantized(k.reshape(-1, wide)).reshape(k.shape)
    low_v = quantized(v.reshape(-1, wide)).reshape(v.shape)
    y = np.zeros((T, cfg.heads, H))
    for t in range(T):
        old = t + 1 - form.window  # tokens before this one have left the window ...
        if form.per_channel:  # ... and are quantized when their group is full
            old = max(old, 0) // g * g
        for n in range(cfg.heads):
            kv = n // (cfg.heads // K)
            kinds = [(low_k, low_v) if s < old else (k, v) for s in range(t + 1)]
            score = np.array([a[s, kv] @ q[t, n] for s, (a, _) in enumerate(kinds)]) / np.sqrt(H)
            weight = np.exp(score - score.max())
            y[t, n] = weight @ [b[s, kv] for s, (_, b) in enumerate(kinds)] / weight.sum()
    return y.reshape(T, -1) @ f64(d.o)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_attention_is_what_the_papers_say(tiny, name):
    """Chunks longer and shorter than a group, and a padded one, against loops in float64."""
    cfg, form = tiny.cfg, FORMATS[name]
    p = to_quantized_cache(tiny.params, cfg, form).layers[0].attn
    x = np.random.default_rng(1).normal(size=(1, 24, cfg.d_model)).astype(np.float32)
    cache, at, got = empty_cache(p, cfg, 1, 40), 0, []
    for size, real in ((16, 11), (6, None), (6, None), (1, None)):
        fed = np.zeros((1, size, cfg.d_model), np.float32) + 9  # what fills up is large
        count = real or size
        fed[:, :count] = x[:, at : at + count]
        step = causal_step(at, size, 40, real)
        y, cache = jit_attention(p, fed, cache, step, cfg=cfg)
        got.append(y[0, :count])
        at += count
    want = by_hand(p.dense, form, x[0, :at], cfg)
    np.testing.assert_allclose(np.concatenate(got), want, rtol=1e-4, atol=1e-4)


def test_other_attention_is_refused(tiny):
    once = to_quantized_cache(tiny.params, tiny.cfg, KVFormat(4))
    with pytest.raises(FormatError, match="not CachedAttention"):
        to_quantized_cache(once, tiny.cfg, KVFormat(4))


def test_live_bytes_of_kivi(tiny):
    """130 slots: 5 groups of 32 keys a channel; values in blocks of a head; 128 + 32 exact rows."""
    cfg = tiny.cfg
    params = to_quantized_cache(tiny.params, cfg, kivi(2, "bfloat16"))
    (cache, _) = caches_for(params, cfg, 1, 130)
    F, nbytes = (
        cfg.kv_heads * cfg.head_dim,
        lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree)),
    )
    assert nbytes((cache.codes_BCP, cache.step_BCF, cache.offset_BCF)) == 5 * F * (32 // 4 + 4)
    assert nbytes(cache.v) == 130 * cfg.kv_heads * (cfg.head_dim // 4 + 4)
    assert nbytes(cache.exact) == 130 * 2 * F * 2  # no more than there are slots


def test_sixteen_bits_are_the_plain_cache(tiny):
    params = to_quantized_cache(tiny.params, tiny.cfg, KVFormat(16))
    tokens = text(tiny.cfg)
    got, want = (whole(p, tiny.cfg, tokens)[0] for p in (params, tiny.params))
    chex.assert_trees_all_close(got, want, atol=1e-5)


@pytest.mark.slow
def test_keys_are_quantized_per_channel_over_full_groups():
    """Written in uneven pieces; every full group equals what encoding it at once gives."""
    form, width = KVFormat(3, True, 4, 5), 8
    from llm_jax.testing import tiny_config, tiny_params

    cfg = tiny_config("llama", kv_heads=1, heads=2, head_dim=8, d_model=16, layers=1)
    params = to_quantized_cache(tiny_params(cfg), cfg, form)
    (cache,) = caches_for(params, cfg, 1, 22)
    assert isinstance(cache, ChannelCache)
    rng, at = np.random.default_rng(0), 0
    k, v = (rng.normal(size=(1, 22, width)).astype(np.float32) for _ in "kv")
    put = jax.jit(ChannelCache.write)
    for count in (1, 2, 9, 1, 1, 5, 3):
        part = slice(at, at + count)
        cache = put(cache, jnp.asarray(k[:, part]), jnp.asarray(v[:, part]), at)
        at += count
    stored = np.asarray(cache.stored(jnp.float32)[0])[0]
    for first in range(0, at // 4 * 4, 4):
        group = k[0, first : first + 4].T  # a row is a channel
        want = np.asarray(dense(quantize_latents(jnp.asarray(group[None]), 3, (4,))))[0].T
        np.testing.assert_allclose(stored[first : first + 4], want, atol=1e-6)
    per_group = cache.codes_BCP.nbytes / cache.codes_BCP.shape[1]
    assert per_group == width * 2  # four codes of three bits in two bytes: planes of whole bytes


def test_moving_tokens_between_channel_groups_is_refused(tiny):
    params = to_quantized_cache(tiny.params, tiny.cfg, kivi(4))
    (cache, *_) = caches_for(params, tiny.cfg, 1, 160)
    with pytest.raises(NotImplementedError, match="per channel"):
        cache.move(jnp.array([3]), 2)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((5,), "bits is 5"), ((4, True, 32, 8), "window is 8"), ((4, False, 0), "group is 0")],
)
def test_impossible_formats(arguments, word):
    with pytest.raises(FormatError, match=word):
        KVFormat(*arguments)


def test_groups_must_divide_heads(tiny):
    with pytest.raises(FormatError, match="groups of 12"):
        to_quantized_cache(tiny.params, tiny.cfg, KVFormat(4, group=12))


@pytest.mark.parametrize(
    ("change", "words"), [(dict(attn_softcap=50.0), "a cap"), (dict(sinks=True), "sinks")]
)
def test_attention_that_another_cache_has_not_is_refused(tiny, change, words):
    cfg = dataclasses.replace(tiny.cfg, **change)
    with pytest.raises(FormatError, match=f"models have {words}.* over these caches has not"):
        to_quantized_cache(tiny.params, cfg, KVFormat(4))
