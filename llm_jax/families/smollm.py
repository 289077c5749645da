"""SmolLM3: a Llama in which every fourth layer has no rotary positions."""

from typing import Any

from llm_jax.config import FULL, SIZES, UNROTATED
from llm_jax.families.family import Family
from llm_jax.values import ConfigError, Values


def _smollm3(values: Values) -> dict[str, Any]:
    if values.flag("use_sliding_window") or "sliding_attention" in values.list_of(
        str, "layer_types"
    ):
        raise ConfigError("smollm3 with sliding windows is not supported")
    layers = values.integer("num_hidden_layers", 1, SIZES["layers"])
    every = values.integer("no_rope_layer_interval", 1, SIZES["layers"], 4)
    rotated = values.list_of(int, "no_rope_layers") or [(i + 1) % every for i in range(layers)]
    if len(rotated) != layers:
        values.refuse("no_rope_layers", f"{layers} entries, one a layer")
    bias = values.flag("attention_bias")
    return dict(
        layer_kinds=tuple(FULL if r else UNROTATED for r in rotated),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=values.flag("mlp_bias"),
    )


FAMILIES = (Family("smollm3", _smollm3, defaults=dict(tie_word_embeddings=True), rope_theta=2e6),)
