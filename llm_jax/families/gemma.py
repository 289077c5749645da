"""Gemma 1, 2 and 3: scaled embeddings, gains around one, norms around blocks, softcaps, windows."""

import math
from typing import Any

from llm_jax.config import FULL, SCALE, SIZES, SLIDING
from llm_jax.families.family import Family, windows
from llm_jax.rope import THETA
from llm_jax.values import Values


def _gemma(values: Values) -> dict[str, Any]:
    width = values.integer("hidden_size", 1, SIZES["d_model"])
    bias = values.flag("attention_bias")
    return dict(
        embed_scale=math.sqrt(width), wide_gains=True, activation="gelu_tanh",
        qkv_bias=bias, o_bias=bias,
    )  # fmt: skip


def _alternating(values: Values, period: int) -> dict[str, Any]:
    """Sliding layers, of which every `period`-th is full, where layer_types does not say it."""
    if values.list_of(str, "layer_types"):
        return windows(values)
    layers = values.integer("num_hidden_layers", 1, SIZES["layers"])
    kinds = tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(layers))
    return windows(values, when_absent=SLIDING) and windows(values, SLIDING) | dict(
        layer_kinds=kinds
    )


def _scale(values: Values) -> float:
    return values.number("query_pre_attn_scalar", *SCALE, 256) ** -0.5


def _gemma2(values: Values) -> dict[str, Any]:
    return _gemma(values) | _alternating(values, 2) | dict(
        norms="around",
        query_scale=_scale(values),
        attn_softcap=values.number("attn_logit_softcapping", *SCALE, None),
        logit_softcap=values.number("final_logit_softcapping", *SCALE, None),
    )  # fmt: skip


def _gemma3(values: Values) -> dict[str, Any]:
    period = values.integer("sliding_window_pattern", 1, SIZES["layers"], 6)
    found = _gemma2(values) | dict(layer_kinds=(), window=None) | _alternating(values, period)
    theta = values.number("rope_local_base_freq", *THETA, 10_000.0)
    if (rope := values.mapping("rope_parameters")) and "sliding_attention" in rope:
        theta = rope.mapping("sliding_attention").number("rope_theta", *THETA, theta)
    # Layers that cannot slide here, because no text is longer than the window, keep their base.
    layers = values.integer("num_hidden_layers", 1, SIZES["layers"])
    if not found["layer_kinds"]:
        named = values.list_of(str, "layer_types")
        local = lambda i: named[i] == "sliding_attention" if named else (i + 1) % period
        found["layer_kinds"] = tuple(SLIDING if local(i) else FULL for i in range(layers))
        found["window"] = values.integer("max_position_embeddings", 1, SIZES["max_length"], 131_072)
    return found | dict(qk_norm=True, sliding_theta=theta)


_NORMS = dict(
    attn_out_norm="model.layers.{}.post_attention_layernorm.weight",
    mlp_norm="model.layers.{}.pre_feedforward_layernorm.weight",
    mlp_out_norm="model.layers.{}.post_feedforward_layernorm.weight",
)
_COMMON = dict(
    head_dim=256, tie_word_embeddings=True, max_position_embeddings=8192, hidden_act="gelu_tanh"
)
FAMILIES = (
    Family("gemma", _gemma, gain_offset=1.0, defaults=_COMMON),
    Family(
        "gemma2", _gemma2, _NORMS, gain_offset=1.0,
        defaults=_COMMON | dict(
            sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
        ),
    ),
    Family(
        "gemma3_text", _gemma3, _NORMS, gain_offset=1.0, gguf="gemma3", rope_theta=1e6,
        defaults=_COMMON | dict(
            sliding_window=4096, max_position_embeddings=131_072
        ),
    ),
)  # fmt: skip
