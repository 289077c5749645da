"""The transformer: embed, blocks, unembed. Every method changes the parameters, never this file."""

import jax
import jax.numpy as jnp

from llm_jax.attention import Step, add_norm, attention, rms_norm
from llm_jax.config import Config
from llm_jax.linear import linear, lookup, precision, summed, unsummed
from llm_jax.params import MLP, JoinedMLP, Layer, Params


def embed(params: Params, tokens_BT, cfg: Config):
    """The tokens' embeddings, [B, T, D]."""
    return lookup(params.embed_VD, tokens_BT).astype(cfg.dtype)


def block(layer: Layer, x_BTD, cache, step: Step, cfg: Config):
    """One decoder layer: (x_BTD, the layer's cache with the new tokens in)."""
    x_BTD, y, cache = open_block(layer, x_BTD, None, cache, step, cfg)
    return x_BTD + summed(y, x_BTD.dtype), cache


def open_block(layer: Layer, x_BTD, y, cache, step: Step, cfg: Config):
    """(x, y, cache): the layer behind x + y with its own last sum, x + y, left to who comes next.

    A y is an array, `Terms` or, as an argument, None.
    """
    with jax.named_scope("attention"):
        x_BTD, h = add_norm(x_BTD, y, layer.attn_norm, cfg.norm_eps)
        y, cache = attention(layer.attn, h, cache, step, cfg)
    with jax.named_scope("mlp"):
        x_BTD, h = add_norm(x_BTD, y, layer.mlp_norm, cfg.norm_eps)
        return x_BTD, mlp(layer.mlp, h), cache


def mlp(p: MLP | JoinedMLP, x_BTD):
    """down(silu(gate(x)) * up(x)), maybe as `Terms`."""
    if isinstance(p, JoinedMLP):
        gate, up = jnp.split(linear(p.gate_up, x_BTD), 2, axis=-1)
    else:
        gate, up = linear(p.gate, x_BTD), linear(p.up, x_BTD)
    return unsummed(p.down, jax.nn.silu(gate) * up)


def unembed(params: Params, x_BTD, cfg: Config):
    """Logits in float32, [B, T, V]; a tied head reads the embedding table."""
    return _head(params, rms_norm(x_BTD, params.norm, cfg.norm_eps), cfg)


def _head(params: Params, h_BTD, cfg: Config):
    with jax.named_scope("head"):
        if params.head_DV is not None:  # logits rounded to 16 bits would tie; it may be padded
            return linear(params.head_DV, h_BTD, jnp.float32)[..., : cfg.vocab]
        return jnp.einsum(
            "BTD,VD->BTV",
            h_BTD,
            params.embed_VD,
            precision=precision(h_BTD.dtype),
            preferred_element_type=jnp.float32,
        )


def _open(params: Params, tokens_BT, caches, step: Step, cfg: Config):
    """(x, y, caches): what leaves the last layer is x + y."""
    x, y, new = embed(params, tokens_BT, cfg), None, []
    for layer, cache in zip(params.layers, caches, strict=True):
        x, y, cache = open_block(layer, x, y, cache, step, cfg)
        new.append(cache)
    return x, y, tuple(new)


def hidden(params: Params, tokens_BT, caches, step: Step, cfg: Config):
    """(x_BTD after the last layer, the caches): `forward` without the head."""
    x, y, caches = _open(params, tokens_BT, caches, step, cfg)
    return (x if y is None else x + summed(y, x.dtype)), caches


def forward(params: Params, tokens_BT, caches, step: Step, cfg: Config):
    """(logits_BTV in float32, caches). All parameters must be on the device."""
    x, y, caches = _open(params, tokens_BT, caches, step, cfg)
    _, h = add_norm(x, y, params.norm, cfg.norm_eps)
    return _head(params, h, cfg), caches
