"""OLMo 2 and 3: norms after each branch and over whole queries and keys; OLMo 3 has windows."""

from typing import Any

from llm_jax.families.family import Family, windows
from llm_jax.values import Values


def _olmo2(values: Values) -> dict[str, Any]:
    bias = values.flag("attention_bias")
    return dict(
        norms="after", qk_norm=True, qk_norm_whole=True, wide_gains=True, qkv_bias=bias, o_bias=bias
    )


_NORMS = dict(
    attn_out_norm="model.layers.{}.post_attention_layernorm.weight",
    mlp_out_norm="model.layers.{}.post_feedforward_layernorm.weight",
)
FAMILIES = (
    Family("olmo2", _olmo2, _NORMS, defaults=dict(rms_norm_eps=1e-5)),
    Family(
        "olmo3", lambda values: _olmo2(values) | windows(values), _NORMS,
        defaults=dict(rms_norm_eps=1e-5, sliding_window=4096), rope_theta=5e5,
    ),
)  # fmt: skip
