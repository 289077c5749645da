"""Mixtral: Mistral's attention over eight large experts, of which a token takes two."""

from typing import Any

from llm_jax.config import SIZES, SLIDING, Experts
from llm_jax.families.family import Family, windows
from llm_jax.values import Values


def _mixtral(values: Values) -> dict[str, Any]:
    experts = Experts(
        count=values.integer("num_local_experts", 1, 2**14, 8),
        chosen=values.integer("num_experts_per_tok", 1, 2**14, 2),
        d_ff=values.integer("intermediate_size", 1, SIZES["d_ff"]),
    )
    return dict(experts=experts) | windows(values, when_absent=SLIDING)


_BLOCK = "model.layers.{}.block_sparse_moe"
FAMILIES = (
    Family(
        "mixtral", _mixtral,
        dict(
            router=f"{_BLOCK}.gate.weight",
            expert_gate=f"{_BLOCK}.experts.{{}}.w1.weight",
            expert_down=f"{_BLOCK}.experts.{{}}.w2.weight",
            expert_up=f"{_BLOCK}.experts.{{}}.w3.weight",
        ),
        rope_theta=1e6, defaults=dict(rms_norm_eps=1e-5), gguf="llama", paired_rows=True,
    ),
)  # fmt: skip
