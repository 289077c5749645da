"""OLMo 2 and 3, with norms after each branch (OLMo 3 has windows), and OLMoE, with many experts.
All norm whole queries and keys."""

from typing import Any

from llm_jax.config import SCALE, SIZES, Experts
from llm_jax.families.family import Family, windows
from llm_jax.values import Values


def _whole_norms(values: Values) -> dict[str, Any]:
    bias = values.flag("attention_bias")
    return dict(qk_norm=True, qk_norm_whole=True, qkv_bias=bias, o_bias=bias)


def _olmo2(values: Values) -> dict[str, Any]:
    return _whole_norms(values) | dict(norms="after", wide_gains=True)


def _olmoe(values: Values) -> dict[str, Any]:
    if values.number("clip_qkv", *SCALE, None) is not None:
        values.refuse("clip_qkv", "null; queries, keys and values are not clipped here")
    experts = Experts(
        count=values.integer("num_experts", 1, 2**14),
        chosen=values.integer("num_experts_per_tok", 1, 2**14),
        d_ff=values.integer("intermediate_size", 1, SIZES["d_ff"]),
        normalize=values.flag("norm_topk_prob"),
    )
    return _whole_norms(values) | dict(experts=experts)


_NORMS = dict(
    attn_out_norm="model.layers.{}.post_attention_layernorm.weight",
    mlp_out_norm="model.layers.{}.post_feedforward_layernorm.weight",
)
_COMMON = dict(rms_norm_eps=1e-5)
FAMILIES = (
    Family("olmo2", _olmo2, _NORMS, defaults=_COMMON),
    Family(
        "olmo3", lambda values: _olmo2(values) | windows(values), _NORMS,
        defaults=_COMMON | dict(sliding_window=4096), rope_theta=5e5,
    ),
    Family(
        "olmoe", _olmoe,
        defaults=_COMMON | dict(
            num_experts=64, num_experts_per_tok=8, max_position_embeddings=4096
        ),
    ),
)  # fmt: skip
