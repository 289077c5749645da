"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: joined projections, long rope, partly rotated heads."""

from typing import Any

from llm_jax.config import SLIDING
from llm_jax.families.family import Family, windows
from llm_jax.values import Values


def _phi3(values: Values) -> dict[str, Any]:
    return windows(values, when_absent=SLIDING)


FAMILIES = (
    Family(
        "phi3", _phi3,
        fused={
            "model.layers.{}.self_attn.qkv_proj.weight": ("q", "k", "v"),
            "model.layers.{}.mlp.gate_up_proj.weight": ("gate", "up"),
        },
        gguf_fused={
            "blk.{}.attn_qkv.weight": ("q", "k", "v"),
            "blk.{}.ffn_up.weight": ("gate", "up"),
        },
        defaults=dict(rms_norm_eps=1e-5, max_position_embeddings=4096),
    ),
)  # fmt: skip
