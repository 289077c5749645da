"""Moments and gradients against a differentiation of the whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.attention import attention, causal_step, rms_norm
from llm_jax.cache import empty_caches
from llm_jax.model import forward
from llm_jax.testing import tiny_config, tiny_params
from palu_jax.calibration import CalibrationError, ProbedAttention, calibrate

B, T = 2, 9


def tokens(cfg, seed=0, batch=B):
    return np.random.default_rng(seed).integers(0, cfg.vocab, (batch, T)).astype(np.int32)


def loss(params, tokens_BT, cfg, dk, dv):
    """Summed over a sequence's predictions; label of position t is token t + 1."""
    layers = tuple(
        dataclasses.replace(l, attn=ProbedAttention(l.attn, dk[i], dv[i]))
        for i, l in enumerate(params.layers)
    )
    params = dataclasses.replace(params, layers=layers)
    caches = empty_caches(cfg, len(tokens_BT), T)
    logits = forward(params, tokens_BT, caches, causal_step(0, T, T), cfg)[0]
    logp = jax.nn.log_softmax(logits[:, :-1], -1)
    return -jnp.take_along_axis(logp, tokens_BT[:, 1:, None], -1).sum()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_statistics(family):
    cfg = tiny_config(family)
    params = tiny_params(cfg)
    batches = [tokens(cfg), tokens(cfg, 1, 1)]
    found = calibrate(params, batches, cfg)
    assert (found.tokens, found.sequences, found.gradients) == (3 * T, 3, True)
    text = np.concatenate(batches)
    zero = jnp.zeros((cfg.layers, 3, T, cfg.kv_heads, cfg.head_dim))
    grads = jax.grad(loss, argnums=(3, 4))(params, jnp.asarray(text), cfg, zero, zero)
    inputs = layer_inputs(params, text, cfg)
    for i, layer in enumerate(found.layers):
        x = np.asarray(inputs[i], np.float64)
        np.testing.assert_allclose(
            layer.gram_DD, np.einsum("btd,bte->de", x, x) / (3 * T), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(layer.mean_D, x.mean((0, 1)), rtol=1e-4, atol=1e-5)
        for g, gram, fisher in (
            (grads[0][i], layer.grad_k_FF, layer.fisher_k_DF),
            (grads[1][i], layer.grad_v_FF, layer.fisher_v_DF),
        ):
            g = np.asarray(g, np.float64).reshape(3, T, -1)
            want = np.einsum("btf,bte->fe", g, g) / (3 * T)
            np.testing.assert_allclose(gram, want, rtol=2e-3, atol=1e-4 * np.abs(want).max())
            want = (np.einsum("btd,btf->bdf", x, g) ** 2).mean(0)
            np.testing.assert_allclose(fisher, want, rtol=2e-3, atol=1e-4 * want.max())


def layer_inputs(params, text, cfg):
    """What each layer's attention sees, caught at the seam."""
    caught = []

    @dataclasses.dataclass(frozen=True)
    class Caught:
        attn: object

    @attention.register
    def _(p: Caught, x, cache, step, cfg):
        caught.append(x)
        return attention(p.attn, x, cache, step, cfg)

    layers = tuple(dataclasses.replace(l, attn=Caught(l.attn)) for l in params.layers)
    params = dataclasses.replace(params, layers=layers)
    caches = empty_caches(cfg, len(text), T)
    forward(params, jnp.asarray(text), caches, causal_step(0, T, T), cfg)
    return caught


def test_query_moments():
    cfg = tiny_config("qwen3")
    params = tiny_params(cfg)
    text = tokens(cfg)
    found = calibrate(params, [text], cfg, gradients=False)
    assert not found.gradients and found.layers[0].fisher_k_DF is None
    a = params.layers[0].attn
    x = layer_inputs(params, text, cfg)[0]
    q = rms_norm((x @ a.q).reshape(B, T, cfg.heads, -1), a.q_norm, cfg.norm_eps)
    q = np.asarray(q, np.float64).reshape(B, T, cfg.kv_heads, -1, cfg.head_dim)
    want = np.einsum("btkgh,btkgi->khi", q, q) / (B * T)
    np.testing.assert_allclose(found.layers[0].query_KHH, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_layers_and_table_may_be_on_the_host():
    cfg = tiny_config("qwen2")
    params = tiny_params(cfg)
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    away = lambda layer: jax.tree.map(lambda a: jax.device_put(a, host) if a.ndim > 1 else a, layer)
    hosted = dataclasses.replace(
        params, embed_VD=np.asarray(params.embed_VD), layers=tuple(map(away, params.layers))
    )
    one, two = (calibrate(p, [tokens(cfg)], cfg) for p in (params, hosted))
    for a, b in zip(jax.tree.leaves(vars(one.layers[1])), jax.tree.leaves(vars(two.layers[1]))):
        np.testing.assert_array_equal(a, b)


def test_no_text():
    cfg = tiny_config("qwen2")
    with pytest.raises(CalibrationError, match="at least one batch"):
        calibrate(tiny_params(cfg), [], cfg)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (np.zeros(5, int), r"has shape \(5,\)"),
        (np.zeros((0, 8), int), r"has shape \(0, 8\)"),
        (np.zeros((0, 8)), r"has shape \(0, 8\)"),
        (np.zeros((2, 1), int), r"has shape \(2, 1\)"),
        ([], r"has shape \(0,\)"),
        (np.full((1, 8), 288), "token id 288 is outside the vocabulary; .* 0 to 287"),
        (np.full((1, 8), -1), "token id -1 is outside"),
        (np.full((1, 8), 2**40), "token id 1099511627776 is outside"),
        (np.full((1, 8), 0.5), "of type float64; expected whole numbers"),
        (np.full((1, 8), np.nan), "of type float64"),
        (np.full((1, 8), True), "of type bool"),
        ([[1, 2], [3]], "differ in length"),
        ([["a", "b"]], "of type <U1"),
    ],
)
def test_text_that_the_model_cannot_read(batch, words):
    """The first batch that cannot be used is named; JAX would have clamped its ids."""
    cfg = tiny_config("qwen2")
    with pytest.raises(CalibrationError, match=f"^batch 1.*{words}"):
        calibrate(tiny_params(cfg), [batch], cfg)
