"""The transformer: embed, blocks, unembed. Methods change the parameters, never this file."""

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.attention import Step, attention, rms_norm
from llm_jax.config import Config
from llm_jax.linear import embedding_rows, linear
from llm_jax.params import MLP, JoinedMLP, Layer, Params
from pallas_kernels.precision import precision


def embed(params: Params, tokens_BT: jax.Array, cfg: Config) -> jax.Array:
    """The tokens' embeddings, [B, T, D]."""
    return embedding_rows(params.embed_VD, tokens_BT).astype(cfg.dtype)


def block(
    layer: Layer, x_BTD: jax.Array, cache: Any, step: Step, cfg: Config
) -> tuple[jax.Array, Any]:
    """One decoder layer: (x_BTD, the layer's cache with the new tokens written)."""
    with jax.named_scope("attention"):
        h = rms_norm(x_BTD, layer.attn_norm, cfg.norm_eps)
        y, cache = attention(layer.attn, h, cache, step, cfg)
        x_BTD = x_BTD + y
    with jax.named_scope("mlp"):
        h = rms_norm(x_BTD, layer.mlp_norm, cfg.norm_eps)
        return x_BTD + mlp(layer.mlp, h), cache


def mlp(p: MLP | JoinedMLP, x_BTD: jax.Array) -> jax.Array:
    """down(silu(gate(x)) * up(x))."""
    if isinstance(p, JoinedMLP):
        gate, up = jnp.split(linear(p.gate_up, x_BTD), 2, axis=-1)
    else:
        gate, up = linear(p.gate, x_BTD), linear(p.up, x_BTD)
    return linear(p.down, jax.nn.silu(gate) * up)


def unembed(params: Params, x_BTD: jax.Array, cfg: Config) -> jax.Array:
    """Logits in float32, [B, T, V]; a tied head reads the embedding table."""
    with jax.named_scope("head"):
        h = rms_norm(x_BTD, params.norm, cfg.norm_eps)
        if params.head_DV is not None:  # logits rounded to 16 bits would tie
            return linear(params.head_DV, h, jnp.float32)[..., : cfg.vocab]  # it may be padded
        return jnp.einsum(
            "BTD,VD->BTV",
            h,
            params.embed_VD,
            precision=precision(h.dtype),
            preferred_element_type=jnp.float32,
        )


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
