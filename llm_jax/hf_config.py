"""From a Hugging Face config.json to a `Config`."""

from typing import Any

from llm_jax.config import EPS, SIZES, Config
from llm_jax.families import FAMILIES
from llm_jax.rope import LongRope, RopeScaling, original_length, read_rope
from llm_jax.values import ConfigError, Values, short

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
_TEXT = {"gemma3": "gemma3_text", "mistral3": "mistral"}
"""Models that also take pictures -> the family of their `text_config`, if it does not say it."""


def from_hf(hf: dict[str, Any], dtype: str | None = None) -> Config:
    """The `Config` described by a Hugging Face `config.json`, given as a dictionary.

    Raises `ConfigError` for a value of a wrong type or size, for two values that contradict each
    other, and for a family, activation, rope type or bias that this package does not have: no model
    runs as something else.
    """
    whole = Values(hf)
    named = whole.text("model_type", None)
    if named in _TEXT and whole.mapping("text_config") is not None:
        outer = {k: v for k, v in hf.items() if k != "text_config"}
        hf = outer | {"model_type": _TEXT[named]} | hf["text_config"]
        named = Values(hf).text("model_type", None)
    if named not in FAMILIES:
        raise ConfigError(f"model_type is {short(named)}; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[named]
    values = Values({**family.defaults, **hf})
    needed = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    )
    if missing := [name for name in needed if name not in values]:
        raise ConfigError(f"config.json lacks {', '.join(missing)}")
    more = family.fields(values)
    activation = _activation(values)
    if more.get("activation", "silu") != activation:
        values.refuse("hidden_act", f"{more.get('activation', 'silu')}; {named} has no other here")
    for bias, field in (("attention_bias", "qkv_bias"), ("mlp_bias", "mlp_bias")):
        if values.flag(bias) and not more.get(field):
            values.refuse(bias, f"false; {named} models have no such biases here")
    if not values.flag("is_causal", True):
        values.refuse("is_causal", "true; models that look ahead are not supported")
    if values.flag("use_bidirectional_attention"):
        values.refuse("use_bidirectional_attention", "false; the model would look ahead")
    d_model = values.integer("hidden_size", 1, SIZES["d_model"])
    heads = values.integer("num_attention_heads", 1, SIZES["heads"])
    kv_heads = values.integer("num_key_value_heads", 1, SIZES["kv_heads"], None)
    head_dim = values.integer("head_dim", 1, SIZES["head_dim"], None) or d_model // heads
    theta, scaling, part = _rope(values, family.rope_theta)
    length = values.integer("max_position_embeddings", 1, SIZES["max_length"], 2048)
    if isinstance(scaling, LongRope):
        length = min(length, _long_length(values))
    common = dict(
        layers=values.integer("num_hidden_layers", 1, SIZES["layers"]),
        d_model=d_model,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        d_ff=values.integer("intermediate_size", 1, SIZES["d_ff"]),
        vocab=values.integer("vocab_size", 1, SIZES["vocab"]),
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=None if part == 1 else int(head_dim * part),
        norm_eps=values.number("rms_norm_eps", *EPS, 1e-6),
        tied=values.flag("tie_word_embeddings"),
        max_length=length,
        dtype=dtype or _dtype(values),
        family=named,
    )
    return Config(**common | more)


def _activation(values: Values) -> str:
    """Of the MLP; `hidden_activation` is Gemma's name, and wins there as in transformers."""
    name = "hidden_activation" if "hidden_activation" in values else "hidden_act"
    found = values.text(name, "silu")
    if found not in _ACTIVATIONS:
        values.refuse(name, f"one of {', '.join(_ACTIVATIONS)}; no other activation is supported")
    return _ACTIVATIONS[found]


def _dtype(values: Values) -> str:
    """The dtype of the file: `torch_dtype` in older ones, `dtype` in newer ones."""
    new, old = values.text("dtype", None), values.text("torch_dtype", None)
    if new and old and new != old:
        values.refuse("dtype", f"what torch_dtype says, {short(old)}; remove the wrong one")
    return new or old or "bfloat16"


def _rope(values: Values, usual: float) -> tuple[float, RopeScaling | None, float]:
    """Theta, scaling and the rotated part of a head: `rope_scaling` in older files, all of it in
    `rope_parameters` in newer.

    transformers lets `rope_scaling` win and forgets the other's theta, so both must say the same.
    """
    found, parts = {}, {values.number("partial_rotary_factor", 0, 1, None)}
    for name in ("rope_parameters", "rope_scaling"):
        if (rope := values.mapping(name)) is not None:
            rope = rope.mapping("full_attention") or rope  # by kind of layer
            found[name] = read_rope(values, rope, usual)
            parts.add(rope.number("partial_rotary_factor", 0, 1, None))
    if len(set(found.values())) > 1:
        raise ConfigError(
            "rope_parameters and rope_scaling say different things; keep the one that is meant"
        )
    if len(parts - {None}) > 1:
        values.refuse("partial_rotary_factor", "what rope_parameters says; keep one of them")
    part = next(iter(parts - {None}), 1.0)
    if part == 0:
        values.refuse("partial_rotary_factor", "more than 0")
    plain = read_rope(values, Values({}), usual)
    return *next(iter(found.values()), plain), part


def _long_length(values: Values) -> int:
    """The length for which longrope's first list of divisors was made."""
    for name in ("rope_parameters", "rope_scaling"):
        if (rope := values.mapping(name)) is not None:
            return original_length(values, rope)
    return original_length(values, Values({}))
