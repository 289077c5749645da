"""Llama and its relatives: pre-norm layers with grouped-query attention and a gated MLP."""

from typing import Any

from llm_jax.config import FULL, SLIDING
from llm_jax.families.family import Family, windows
from llm_jax.values import Values


def _llama(values: Values) -> dict[str, Any]:
    """Llama's own attention_bias is on all four projections."""
    bias = values.flag("attention_bias")
    return dict(qkv_bias=bias, o_bias=bias, mlp_bias=values.flag("mlp_bias"))


def _mistral(values: Values) -> dict[str, Any]:
    return windows(values, when_absent=SLIDING)


def optional_window(values: Values) -> dict[str, Any]:
    """Qwen's layers slide where use_sliding_window says so, from max_window_layers on."""
    sliding = values.flag("use_sliding_window")
    if not sliding or values.list_of(str, "layer_types"):
        return windows(values)
    layers = values.integer("num_hidden_layers", 1, 10_000)
    first = values.integer("max_window_layers", 0, 10_000, 28)
    found = windows(values, when_absent=SLIDING)
    kinds = tuple(SLIDING if i >= first else FULL for i in range(layers))
    return found | dict(layer_kinds=kinds) if found and SLIDING in kinds else {}


def _qwen2(values: Values) -> dict[str, Any]:
    return dict(qkv_bias=True) | optional_window(values)


def _qwen3(values: Values) -> dict[str, Any]:
    bias = values.flag("attention_bias")
    return dict(qk_norm=True, qkv_bias=bias, o_bias=bias) | optional_window(values)


WINDOW = dict(sliding_window=4096)
FAMILIES = (
    Family("llama", _llama, paired_rows=True),
    Family("mistral", _mistral, defaults=WINDOW, gguf="llama", paired_rows=True),
    Family("ministral", _mistral, defaults=WINDOW, gguf="llama", paired_rows=True),
    Family("qwen2", _qwen2, defaults=WINDOW),
    Family("qwen3", _qwen3, defaults=WINDOW),
)
