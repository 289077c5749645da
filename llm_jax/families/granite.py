"""Granite 3: a Llama whose embeddings, scores, branches and logits have constant factors."""

from typing import Any

from llm_jax.config import SCALE
from llm_jax.families.family import Family
from llm_jax.values import Values


def _granite(values: Values) -> dict[str, Any]:
    bias = values.flag("attention_bias")
    return dict(
        embed_scale=values.number("embedding_multiplier", *SCALE, 1.0),
        query_scale=values.number("attention_multiplier", *SCALE, 1.0),
        residual_scale=values.number("residual_multiplier", *SCALE, 1.0),
        logit_scale=1 / values.number("logits_scaling", *SCALE, 1.0),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=values.flag("mlp_bias"),
    )


FAMILIES = (Family("granite", _granite, paired_rows=True),)
