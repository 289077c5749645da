"""The transformer: embed, blocks, unembed. Methods change the parameters, never this file."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.attention import Step, attention_of_each, rms_norm
from llm_jax.cards import own_rows, side_by_side
from llm_jax.config import Config
from llm_jax.linear import embedding_rows, linear
from llm_jax.mlp import mlp
from llm_jax.params import Layer, Params
from pallas_kernels.precision import precision
from pallas_kernels.tree_attention.reference import capped


def embed(params: Params, tokens_BT: jax.Array, cfg: Config) -> jax.Array:
    """The tokens' embeddings, [B, T, D]."""
    return scaled(embedding_rows(params.embed_VD, tokens_BT).astype(cfg.dtype), cfg.embed_scale)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times a constant that is rounded to x's dtype; x itself where the constant is 1."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def attention_branch(
    layer: Layer, x_BTD: jax.Array, cache: Any, step: Step, cfg: Config
) -> tuple[jax.Array, Any]:
    """(x with what the attention adds, the layer's cache with the new tokens written)."""
    with jax.named_scope("attention"):
        h = normed_input(x_BTD, layer.attn_norm, cfg)
        y, cache = attention_of_each(layer.attn, h, cache, step, cfg)
        return added(x_BTD, y, layer.attn_out_norm, cfg), cache


def mlp_branch(
    layer: Layer, x_BTD: jax.Array, cfg: Config, mlp: Callable[..., jax.Array] = mlp
) -> jax.Array:
    """x with what the MLP or the experts add."""
    with jax.named_scope("mlp"):
        y = mlp(layer.mlp, normed_input(x_BTD, layer.mlp_norm, cfg), cfg)
        return added(x_BTD, y, layer.mlp_out_norm, cfg)


@functools.singledispatch
def block(
    layer: Any, x_BTD: jax.Array, cache: Any, step: Step, cfg: Config
) -> tuple[jax.Array, Any]:
    """One decoder layer: (x_BTD, the layer's cache with the new tokens written).

    The default kind is a `Layer`; layers of other models register their own.
    """
    x_BTD, cache = attention_branch(layer, x_BTD, cache, step, cfg)
    return mlp_branch(layer, x_BTD, cfg), cache


def normed_input(x_BTD: jax.Array, gain: jax.Array | None, cfg: Config) -> jax.Array:
    """A branch's input: normed where the family norms before its branches."""
    return x_BTD if gain is None else rms_norm(x_BTD, gain, cfg.norm_eps)


def added(x_BTD: jax.Array, y_BTD: jax.Array, gain: jax.Array | None, cfg: Config) -> jax.Array:
    """x + y, y normed where the family norms after its branches."""
    return x_BTD + scaled(normed_input(y_BTD, gain, cfg), cfg.residual_scale)


def unembed(params: Params, x_BTD: jax.Array, cfg: Config) -> jax.Array:
    """Logits in float32, [B, T, V]; a tied head reads the embedding table."""
    with jax.named_scope("head"):
        h = normed_input(x_BTD, params.norm, cfg)
        if params.head_DV is not None:  # logits rounded to 16 bits would tie
            logits_BTV = side_by_side(linear(params.head_DV, h, jnp.float32), cfg)
        else:
            # A table whose rows do not divide would be copied at every step to be padded.
            apart = cfg.vocab % cfg.cards == 0
            table_VD = own_rows(params.embed_VD, cfg.cards) if apart else params.embed_VD
            logits_BTV = jnp.einsum(
                "BTD,VD->BTV",
                h,
                table_VD,
                precision=precision(h.dtype),
                preferred_element_type=jnp.float32,
            )
            logits_BTV = side_by_side(logits_BTV, cfg) if apart else logits_BTV
        return final_logits(logits_BTV[..., : cfg.vocab], cfg)  # maybe padded


def final_logits(logits: jax.Array, cfg: Config) -> jax.Array:
    """The head's products with the family's scale and cap; neither changes their order."""
    logits = scaled(logits, cfg.logit_scale)
    return capped(logits, cfg.logit_softcap)


def hidden(
    params: Params, tokens_BT: jax.Array, caches: Any, step: Step, cfg: Config
) -> tuple[jax.Array, tuple]:
    """(x_BTD after the last layer, the caches): `forward` without the head."""
    x, new = embed(params, tokens_BT, cfg), []
    for layer, cache in zip(params.layers, caches, strict=True):
        x, cache = block(layer, x, cache, step, cfg)
        new.append(cache)
    return x, tuple(new)


def forward(
    params: Params, tokens_BT: jax.Array, caches: Any, step: Step, cfg: Config
) -> tuple[jax.Array, tuple]:
    """(logits_BTV in float32, caches). All parameters must be on the device."""
    x, caches = hidden(params, tokens_BT, caches, step, cfg)
    return unembed(params, x, cfg), caches
