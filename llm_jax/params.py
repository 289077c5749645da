"""Parameters as frozen dataclasses that are pytrees. Layers are in a tuple, so kinds can be mixed.

Letters: V vocabulary, D model, N query heads x head size, K kv heads x head size, F ffn.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llm_jax.config import Config

Weight = Any
"""A matrix [in, out]: a `jax.Array`, or any type registered with `llm_jax.linear.linear`."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Attention:
    """Grouped-query attention: four matrices, optional biases (Qwen2) and head norms (Qwen3)."""

    q: Weight
    k: Weight
    v: Weight
    o: Weight
    q_bias: jax.Array | None = None
    k_bias: jax.Array | None = None
    v_bias: jax.Array | None = None
    q_norm: jax.Array | None = None
    k_norm: jax.Array | None = None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MLP:
    """Gated MLP: down(silu(gate(x)) * up(x))."""

    gate: Weight
    up: Weight
    down: Weight


@register_dataclass
@dataclasses.dataclass(frozen=True)
class JoinedAttention:
    """`Attention` whose q, k and v are one matrix: one product in place of three."""

    qkv: Weight
    o: Weight
    qkv_bias: jax.Array | None = None
    q_norm: jax.Array | None = None
    k_norm: jax.Array | None = None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class JoinedMLP:
    """`MLP` whose gate and up are one matrix."""

    gate_up: Weight
    down: Weight


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """One pre-norm decoder layer."""

    attn_norm: jax.Array
    attn: Any
    mlp_norm: jax.Array
    mlp: Any


def joined(layer: Layer, join: Callable[..., Weight]) -> Layer:
    """A plain layer with four matrices: `join(q, k, v)`, `join(o)`, `join(gate, up)`, `join(down)`.

    `join` puts matrices side by side along their outputs.
    """
    a, m = layer.attn, layer.mlp
    bias = None if a.q_bias is None else jnp.concatenate((a.q_bias, a.k_bias, a.v_bias))
    attn = JoinedAttention(join(a.q, a.k, a.v), join(a.o), bias, a.q_norm, a.k_norm)
    return Layer(layer.attn_norm, attn, layer.mlp_norm, JoinedMLP(join(m.gate, m.up), join(m.down)))


def unjoined(layer: Layer, cfg: Config) -> Layer:
    """The plain layer that `joined` was given; all matrices are arrays."""
    a, heads = layer.attn, cfg.heads * cfg.head_dim
    cut = (heads, heads + cfg.kv_heads * cfg.head_dim)
    q, k, v = jnp.split(a.qkv, cut, axis=-1)
    biases = (None,) * 3 if a.qkv_bias is None else jnp.split(a.qkv_bias, cut)
    attn = Attention(q, k, v, a.o, *biases, a.q_norm, a.k_norm)
    mlp = MLP(*jnp.split(layer.mlp.gate_up, 2, axis=-1), layer.mlp.down)
    return Layer(layer.attn_norm, attn, layer.mlp_norm, mlp)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """A whole model. `head_DV` is None where the head is tied to the embedding."""

    embed_VD: Any
    layers: tuple[Layer, ...]
    norm: jax.Array
    head_DV: Weight | None = None


def init_layer(key: jax.Array, cfg: Config) -> Layer:
    """A random layer in the model's dtype, scaled so that activations keep their size."""
    keys = dict(
        zip(cfg.layer_matrices, jax.random.split(key, len(cfg.layer_matrices)), strict=True)
    )
    w = {
        name: jax.random.normal(keys[name], shape, cfg.dtype)
        * jnp.asarray(shape[0] ** -0.5, cfg.dtype)
        for name, shape in cfg.layer_matrices.items()
    }
    ones = lambda n: jnp.ones(n, cfg.dtype)
    bias = lambda n: jnp.zeros(n * cfg.head_dim, cfg.dtype) if cfg.qkv_bias else None
    head_norm = ones(cfg.head_dim) if cfg.qk_norm else None
    attn = Attention(
        **{name: w[name] for name in "qkvo"},
        q_bias=bias(cfg.heads),
        k_bias=bias(cfg.kv_heads),
        v_bias=bias(cfg.kv_heads),
        q_norm=head_norm,
        k_norm=head_norm,
    )
    mlp = MLP(w["gate"], w["up"], w["down"])
    return Layer(ones(cfg.d_model), attn, ones(cfg.d_model), mlp)


def init(key: jax.Array, cfg: Config) -> Params:
    """Random parameters on the default device, for tests and timings without a checkpoint."""
    table, head, *layers = jax.random.split(key, cfg.layers + 2)
    scale = jnp.asarray(cfg.d_model**-0.5, cfg.dtype)
    return Params(
        jax.random.normal(table, (cfg.vocab, cfg.d_model), cfg.dtype),
        tuple(init_layer(k, cfg) for k in layers),
        jnp.ones(cfg.d_model, cfg.dtype),
        None if cfg.tied else jax.random.normal(head, (cfg.d_model, cfg.vocab), cfg.dtype) * scale,
    )


def abstract(cfg: Config) -> Params:
    """The model's tree with shapes and dtypes in place of arrays: what a checkpoint must fill."""
    return jax.eval_shape(lambda: init(jax.random.key(0), cfg))
