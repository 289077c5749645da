"""Quantized caches of ordinary keys and values, against brute force."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feeding import one_by_one, text, whole

from llm_jax.attention import caches_for
from pallas_kernels.lowrank_attention.latents import dense
from palu_jax.latent import FormatError, encode
from palu_jax.rival import ChannelCache, KVFormat, kivi, to_quantized_cache

FORMATS = {
    "int8": KVFormat(8),
    "int4, window": KVFormat(4, window=3),
    "per channel": KVFormat(2, True, 4, 6),
    "per channel, odd": KVFormat(3, True, 8, 9),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_cache_gives_what_one_pass_gives(tiny, name):
    params = to_quantized_cache(tiny.params, tiny.cfg, FORMATS[name])
    tokens = text(tiny.cfg)
    want, _ = whole(params, tiny.cfg, tokens)
    for chunk in (1, 7):
        got, _ = one_by_one(params, tiny.cfg, tokens, chunk=chunk)
        chex.assert_trees_all_close(got, want, atol=1e-3)
    dense_logits, _ = whole(tiny.params, tiny.cfg, tokens)
    assert float(jnp.abs(want - dense_logits).max()) > 1e-4


def test_sixteen_bits_are_the_plain_cache(tiny):
    params = to_quantized_cache(tiny.params, tiny.cfg, KVFormat(16))
    tokens = text(tiny.cfg)
    got, want = (whole(p, tiny.cfg, tokens)[0] for p in (params, tiny.params))
    chex.assert_trees_all_close(got, want, atol=1e-5)


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
        want = np.asarray(dense(encode(jnp.asarray(group[None]), 3, (4,))))[0].T
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
