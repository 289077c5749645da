"""From the metadata of a GGUF file to a `Config`, by way of the family's own translation."""

import math
from collections.abc import Collection
from typing import Any

from llm_jax.config import EPS, SCALE, SIZES, Config
from llm_jax.families import FAMILIES, Family
from llm_jax.rope import FACTOR, THETA, LinearRope, RopeScaling, YarnRope
from llm_jax.values import ConfigError, Values, short

ARCHITECTURES: dict[str, Family] = {}
"""Supported values of general.architecture; the files of Mistral and Mixtral say llama."""
for _family in FAMILIES.values():
    ARCHITECTURES.setdefault(_family.architecture, _family)

NEEDED = dict(
    layers="block_count",
    d_model="embedding_length",
    heads="attention.head_count",
    d_ff="feed_forward_length",
    norm_eps="attention.layer_norm_rms_epsilon",
)
"""Field of `Config` -> the key that must be there."""
_SCALES = dict(
    embedding_multiplier="embedding_scale",
    attention_multiplier="attention.scale",
    residual_multiplier="residual_scale",
    logits_scaling="logit_scale",
)
"""Granite's constant factors."""
_SCALED = ("granite",)
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, whose scores are scaled by the width a head of the model would have."""


def from_gguf(
    arch: str, values: Values, vocab: int, tensors: Collection[str], dtype: str | None
) -> Config:
    """The `Config` of a model of that architecture.

    `values` are the metadata below "arch."; `vocab` is the number of rows of the embedding table.
    Which biases and which head a model has, the names of its `tensors` tell. Llama 3.1's scaling of
    the rotary positions is a tensor of its own and not read here.
    """
    for name, key in (NEEDED | dict(kv_heads="attention.head_count_kv")).items():
        if values.is_list(key):
            raise ConfigError(f"{name} differs from layer to layer; this is not supported")
    if not values.flag("attention.causal", True):
        values.refuse("attention.causal", "true")
    size = lambda name, key, *default: values.integer(key, 1, SIZES[name], *default)
    d_model, heads = size("d_model", NEEDED["d_model"]), size("heads", NEEDED["heads"])
    head_dim = size("head_dim", "attention.key_length", d_model // heads)
    if size("head_dim", "attention.value_length", head_dim) != head_dim:
        values.refuse("attention.value_length", f"{head_dim}, the length of a key")
    rotated = size("head_dim", "rope.dimension_count", head_dim)
    if size("vocab", "vocab_size", vocab) != vocab:
        values.refuse("vocab_size", f"{vocab}, the rows of the embedding table")
    experts = values.integer("expert_count", 0, 2**14, 0)
    family = FAMILIES["mixtral"] if arch == "llama" and experts else ARCHITECTURES[arch]
    layers, length = size("layers", NEEDED["layers"]), size("max_length", "context_length", 2048)
    hf = dict(family.defaults) | _like_config_json(family, values, layers, head_dim, experts)
    hf |= dict(
        num_hidden_layers=layers,
        hidden_size=d_model,
        max_position_embeddings=length,
        attention_bias="blk.0.attn_q.bias" in tensors,
        num_attention_heads=heads,
        intermediate_size=size("d_ff", NEEDED["d_ff"]),
    )
    more = family.fields(Values(hf, f"{arch}: "))
    more |= dict(
        qkv_bias="blk.0.attn_q.bias" in tensors, o_bias="blk.0.attn_output.bias" in tensors
    )
    return Config(
        **dict(
            layers=layers,
            d_model=d_model,
            heads=heads,
            kv_heads=size("kv_heads", "attention.head_count_kv", heads),
            head_dim=head_dim,
            d_ff=size("d_ff", NEEDED["d_ff"]),
            vocab=vocab,
            rope_theta=values.number("rope.freq_base", *THETA, 10_000.0),
            rope_scaling=_scaling(values, length, family),
            rotary_dim=None if rotated == head_dim else rotated,
            # 9.99999997e-07 in the file is 1e-6
            norm_eps=float(f"{values.number(NEEDED['norm_eps'], *EPS):.6g}"),
            tied="output.weight" not in tensors,
            max_length=length,
            dtype=dtype or "bfloat16",
            family=family.model_type,
        )
        | more
    )


def _like_config_json(
    family: Family, values: Values, layers: int, head_dim: int, experts: int
) -> dict[str, Any]:
    """What config.json would say, for the family's translation."""
    found: dict[str, Any] = dict(
        sliding_window=values.integer("attention.sliding_window", 0, SIZES["max_length"], None)
    )
    scaled = family.model_type in _SCALED
    for name, key in _SCALES.items():
        if key in values and not scaled:
            values.refuse(key, "none; it is not supported")
        if scaled:
            found[name] = values.number(key, *SCALE, 1.0)
    for name, key in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        found[name] = values.number(key, *SCALE, None)
    if family.architecture in _LARGEST_GEMMA:
        large = layers == _LARGEST_GEMMA[family.architecture]
        width = values.integer(NEEDED["d_model"], 1, SIZES["d_model"])
        heads = values.integer(NEEDED["heads"], 1, SIZES["heads"])
        found["query_pre_attn_scalar"] = width / heads if large else head_dim
        found["rope_local_base_freq"] = values.number("rope.freq_base_swa", *THETA, 10_000.0)
    if experts:
        width = values.integer("expert_feed_forward_length", 1, SIZES["d_ff"], None)
        shared = values.integer("expert_shared_feed_forward_length", 1, SIZES["d_ff"], None)
        found |= dict(
            num_experts=experts,
            num_local_experts=experts,
            num_experts_per_tok=values.integer("expert_used_count", 1, experts),
            moe_intermediate_size=width,
            shared_expert_intermediate_size=shared,
            norm_topk_prob=family.model_type == "qwen3_moe",  # as llama.cpp computes it
        )
    return found


def _scaling(values: Values, length: int, family: Family) -> RopeScaling | None:
    """The stretch of the rotary positions. A factor without a type is linear, as in llama.cpp."""
    factor = None
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        given = values.number(key, 0, FACTOR[1], None)
        factor = given if factor is None else factor
    kind = values.text("rope.scaling.type", None)
    if kind is None:
        kind = "none" if factor in (None, 0, 1) else "linear"
    if kind == "none":
        if factor not in (None, 0, 1):
            values.refuse("rope.scaling.factor", "1, because the scaling's type is none")
        return None
    if values.number("rope.scaling.attn_factor", *SCALE, 1.0) != 1:
        values.refuse("rope.scaling.attn_factor", "1; no other is supported")
    if kind == "linear":
        if factor is None or factor < 1:
            values.refuse("rope.scaling.factor", "a number of at least 1")
        return None if factor == 1 else LinearRope(factor)
    if kind == "yarn":
        factor = values.number("rope.scaling.factor", *FACTOR)
        original = values.integer(
            "rope.scaling.original_context_length", 1, SIZES["max_length"], length
        )
        # gpt-oss blends without rounding the ends; llama.cpp rounds them for every model.
        return YarnRope(
            factor, original, 0.1 * math.log(factor) + 1, truncate=family.model_type != "gpt_oss"
        )
    raise ConfigError(f"rope scaling {short(kind)} is not supported; known are linear and yarn")
