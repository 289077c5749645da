"""Qwen2-MoE and Qwen3-MoE: Qwen's attention over many small experts."""

from typing import Any

from llm_jax.config import FULL, SIZES, SLIDING, Experts
from llm_jax.families.family import Family, sparse_layers, windows
from llm_jax.families.llama import WINDOW, optional_window
from llm_jax.values import Values


def _experts(values: Values, **more: Any) -> Experts:
    layers = values.integer("num_hidden_layers", 1, SIZES["layers"])
    count = "num_experts" if "num_experts" in values else "num_local_experts"
    return Experts(
        count=values.integer(count, 1, 2**14),
        chosen=values.integer("num_experts_per_tok", 1, 2**14),
        d_ff=values.integer("moe_intermediate_size", 1, SIZES["d_ff"]),
        normalize=values.flag("norm_topk_prob"),
        dense_layers=sparse_layers(values, layers),
        **more,
    )


def _qwen2_moe(values: Values) -> dict[str, Any]:
    width = values.integer("shared_expert_intermediate_size", 1, SIZES["d_ff"])
    experts = _experts(values, shared_d_ff=width, shared_gate=True)
    bias = values.flag("qkv_bias", True)
    return dict(qkv_bias=bias, experts=experts) | _every_other_layer(values)


def _every_other_layer(values: Values) -> dict[str, Any]:
    """Qwen2-MoE's windows: in every other one of the first max_window_layers. transformers writes
    a sliding_window of 0 where none is used."""
    named = values.list_of(str, "layer_types")
    if "sliding_attention" in named:
        return windows(values)
    if named or not values.flag("use_sliding_window"):
        return {}
    layers = values.integer("num_hidden_layers", 1, SIZES["layers"])
    last = values.integer("max_window_layers", 0, SIZES["layers"], 28)
    kinds = tuple(SLIDING if i < last and i % 2 == 0 else FULL for i in range(layers))
    found = windows(values, when_absent=SLIDING)
    return found | dict(layer_kinds=kinds) if found and SLIDING in kinds else {}


def _qwen3_moe(values: Values) -> dict[str, Any]:
    bias = values.flag("attention_bias")
    found = dict(qk_norm=True, qkv_bias=bias, o_bias=bias, experts=_experts(values))
    return found | optional_window(values)


FAMILIES = (
    Family("qwen2_moe", _qwen2_moe, defaults=WINDOW, gguf="qwen2moe"),
    Family("qwen3_moe", _qwen3_moe, defaults=WINDOW, gguf="qwen3moe"),
)
