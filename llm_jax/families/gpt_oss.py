"""gpt-oss: attention sinks, a window in every second layer, clamped experts with biases."""

from typing import Any

from llm_jax.config import SCALE, SIZES, Experts
from llm_jax.families.family import Family, windows
from llm_jax.values import Values


def _gpt_oss(values: Values) -> dict[str, Any]:
    if values.number("swiglu_alpha", *SCALE, 1.702) != 1.702:
        values.refuse("swiglu_alpha", "1.702; no other slope is supported")
    bias = values.flag("attention_bias", True)
    count = "num_local_experts" if "num_local_experts" in values else "num_experts"
    experts = Experts(
        count=values.integer(count, 1, 2**14),
        chosen=values.integer("num_experts_per_tok", 1, 2**14, 4),
        d_ff=values.integer("intermediate_size", 1, SIZES["d_ff"]),
        biases=True,
        clamp=values.number("swiglu_limit", *SCALE, 7.0),
    )
    found = dict(sinks=True, qkv_bias=bias, o_bias=bias, wide_gains=True, experts=experts)
    return found | windows(values)


_BLOCK = "model.layers.{}.mlp"
FAMILIES = (
    Family(
        "gpt_oss", _gpt_oss,
        dict(
            sinks="model.layers.{}.self_attn.sinks",
            router=f"{_BLOCK}.router.weight",
            router_bias=f"{_BLOCK}.router.bias",
            expert_gate_up=f"{_BLOCK}.experts.gate_up_proj",
            expert_gate_up_bias=f"{_BLOCK}.experts.gate_up_proj_bias",
            expert_down=f"{_BLOCK}.experts.down_proj",
            expert_down_bias=f"{_BLOCK}.experts.down_proj_bias",
        ),
        stacked_experts=True,
        defaults=dict(
            head_dim=64, sliding_window=128, max_position_embeddings=131_072,
            rms_norm_eps=1e-5,
        ),
        rope_theta=150_000.0,
        gguf="gpt-oss",
    ),
)  # fmt: skip
