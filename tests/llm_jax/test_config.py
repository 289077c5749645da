"""config.json: every value has its type and range, and two that contradict each other are named."""

import dataclasses

import pytest

from llm_jax.config import SIZES, Config, ConfigError
from llm_jax.families import FAMILIES
from llm_jax.hf_config import from_hf
from llm_jax.rope import Llama3Rope
from llm_jax.testing import TINY_FAMILIES, hf_config, tiny_config

LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def read(family="qwen2", **changes) -> Config:
    return from_hf(hf_config(tiny_config(family)) | changes)


def refusal(family="qwen2", **changes) -> str:
    with pytest.raises(ConfigError) as caught:
        read(family, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_what_is_described_is_what_is_read(family):
    assert read(family) == tiny_config(family)


SIZE = {
    "num_hidden_layers": 10_000,
    "hidden_size": 2**20,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "intermediate_size": 2**22,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31 - 1,
    "sliding_window": 2**31 - 1,
}


@pytest.mark.parametrize("name", SIZE)
@pytest.mark.parametrize("value", ("2", 2.0, True, 0, -1, [2], {}, float("nan"), 10**30))
def test_sizes_are_whole_numbers_in_their_range(name, value):
    expected = f"{name} is .*; expected a whole number from 1 to {SIZE[name]:,}"
    with pytest.raises(ConfigError, match=expected):
        read(**{name: value})


@pytest.mark.parametrize("name", SIZE)
def test_one_more_than_the_largest_size(name):
    assert f"from 1 to {SIZE[name]:,}" in refusal(**{name: SIZE[name] + 1})


NUMBERS = {"rms_norm_eps": "1e-15 to 0.1", "rope_theta": "1 to 1e+15"}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", ("1", True, [1], {}, 0, -1e-6, 1e30, 10**400, float("nan"), float("inf"))
)
def test_numbers_are_finite_and_in_their_range(name, value):
    assert f"expected a number from {NUMBERS[name]}" in refusal(**{name: value})


@pytest.mark.parametrize("name", ("rms_norm_eps", "max_position_embeddings"))
def test_null_is_no_number(name):
    assert f"{name} is None; expected a" in refusal(**{name: None})


@pytest.mark.parametrize("name", ("tie_word_embeddings", "attention_bias", "mlp_bias"))
@pytest.mark.parametrize("value", ("false", "true", 0, 1, []))
def test_flags_are_true_or_false(name, value):
    assert f"{name} is {value!r}; expected true or false, without" in refusal(**{name: value})


@pytest.mark.parametrize("value", ([1], "x", 3, True))
@pytest.mark.parametrize("name", ("rope_scaling", "rope_parameters"))
def test_rope_is_an_object(name, value):
    assert f"{name} is {value!r}; expected an object" in refusal(**{name: value})


@pytest.mark.parametrize(
    ("changes", "expected"),
    (
        (dict(factor="8"), "factor is '8'; expected a number"),
        (dict(factor=0.5), "factor is 0.5; expected a number from 1 to"),
        (dict(low_freq_factor=None), "low_freq_factor is None; expected a number"),
        (dict(low_freq_factor=0), "low_freq_factor is 0; expected a number from"),
        (dict(low_freq_factor=4.0), "high_freq_factor is 4.0; expected more than low_freq_factor"),
        (dict(original_max_position_embeddings=8192.0), "is 8192.0; expected a whole number"),
        (dict(rope_type=["llama3"]), "rope_type is ['llama3']; expected a string"),
        (dict(type="linear"), "rope_scaling.type is 'linear'; expected what rope_type says"),
        (dict(rope_theta=10_000.0), "rope_scaling.rope_theta is 10000.0; expected what rope_theta"),
        (dict(partial_rotary_factor=0), "partial_rotary_factor is None; expected more than 0"),
    ),
)
def test_values_of_the_rope_scaling(changes, expected):
    assert expected in refusal("llama", rope_theta=5e5, rope_scaling=LLAMA3 | changes)


def test_rope_parameters_and_rope_scaling_must_agree():
    """transformers takes rope_scaling, and the base from outside: neither is what was meant."""
    plain, same = dict(rope_type="default", rope_theta=5e5), LLAMA3 | dict(rope_theta=5e5)
    contradiction = "rope_parameters and rope_scaling say different things"
    assert contradiction in refusal(rope_theta=None, rope_parameters=plain, rope_scaling=LLAMA3)
    linear = dict(rope_type="linear", factor=4.0)
    assert contradiction in refusal(rope_theta=None, rope_parameters=plain, rope_scaling=linear)
    scaling = Llama3Rope(8.0, 1.0, 4.0, 8192)
    for both in (dict(rope_parameters=same, rope_scaling=same), dict(rope_parameters=same)):
        cfg = read(rope_theta=None, **both)
        assert (cfg.rope_theta, cfg.rope_scaling) == (5e5, scaling)
    for nothing in ({}, None):
        assert read(rope_parameters=nothing, rope_scaling=LLAMA3).rope_scaling == scaling
        assert read(rope_parameters=LLAMA3, rope_scaling=nothing).rope_scaling == scaling


def test_a_factor_needs_a_type():
    for name in ("rope_scaling", "rope_parameters"):
        assert f"{name}.rope_type is None; expected a type" in refusal(**{name: dict(factor=4.0)})
        default = dict(type="default", factor=4.0)
        assert f"{name}.factor is 4.0; expected 1" in refusal(**{name: default})


def test_two_dtypes_must_agree():
    assert "dtype is 'float16'; expected what torch_dtype says" in refusal(
        dtype="float16", torch_dtype="bfloat16"
    )
    assert read(dtype="float16", torch_dtype="float16").dtype == "float16"
    assert "dtype is 'float64'; expected one of bfloat16" in refusal(torch_dtype="float64")


def test_windows_are_those_of_transformers():
    def window(family, **changes):
        cfg = read(family, max_position_embeddings=9000, **changes)
        assert cfg.max_length == 9000  # the window shortens no text
        return cfg.window, cfg.layer_kinds

    both, second, none = ("sliding", "sliding"), ("full", "sliding"), (None, ())
    assert window("mistral") == (4096, both)  # without a name for it
    assert window("mistral", sliding_window=None) == none
    assert window("mistral", sliding_window=700) == (700, both)
    assert window("mistral", sliding_window=9000) == none  # no text is longer
    assert window("qwen2", sliding_window=700) == none
    on = dict(sliding_window=700, use_sliding_window=True)
    assert window("qwen2", **on, max_window_layers=0) == (700, both)
    assert window("qwen2", **on, max_window_layers=1) == (700, second)
    assert window("qwen2", **on) == none  # transformers begins with layer 28
    kinds = ["full_attention", "sliding_attention"]
    assert window("qwen3", sliding_window=700, layer_types=kinds) == (700, second)
    assert window("qwen3", sliding_window=700, layer_types=["full_attention"] * 2) == none
    moe = dict(model_type="qwen2_moe", num_experts=4, num_experts_per_tok=2)
    moe |= dict(moe_intermediate_size=32, shared_expert_intermediate_size=32)
    assert window("qwen2", **moe, sliding_window=0) == none  # as transformers saves it
    assert window("qwen2", **moe, **on) == (700, ("sliding", "full"))  # every other layer
    assert window("qwen2", **moe, **on, max_window_layers=0) == none
    assert window("qwen2", **moe, **on, layer_types=kinds) == (700, second)
    assert "expected 2 entries, one a layer" in refusal(layer_types=kinds[:1])
    assert "layer_types has 'linear_attention'" in refusal(layer_types=["linear_attention"])
    assert "layer_types is [1]; expected a list" in refusal(layer_types=[1])


def test_olmoe_with_clipped_heads():
    sizes = dict(model_type="olmoe", num_experts=4, num_experts_per_tok=2, qkv_bias=False)
    cfg = read(**sizes)
    assert (cfg.experts.d_ff, cfg.experts.normalize) == (cfg.d_ff, False) and cfg.qk_norm_whole
    assert "clip_qkv is 8.0; expected null" in refusal(**sizes, clip_qkv=8.0)


def test_a_model_that_looks_ahead():
    assert "is_causal is False; expected true" in refusal(is_causal=False)
    assert read(is_causal=True) == read()


def test_foreign_text_is_escaped_and_cut_in_messages():
    said = refusal(model_type="\x1b[31mred\n" + "x" * 500)
    assert "\x1b" not in said and len(said) < 100 + len(", ".join(FAMILIES))


@pytest.mark.parametrize("field", (*SIZES, "rope_theta", "norm_eps"))
@pytest.mark.parametrize("value", (0, -1, True, "8", None, float("nan"), 10**20))
def test_a_config_that_is_made_by_hand_is_checked_too(field, value):
    with pytest.raises(ConfigError, match=f"{field} is .*; expected"):
        dataclasses.replace(tiny_config(), **{field: value})
