"""Parameters by Hugging Face's names: there and back, and against transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, saved

import llm_jax
from llm_jax import LLMError
from llm_jax.checkpoint import CheckpointError
from llm_jax.hf_config import from_hf
from llm_jax.testing import TINY_FAMILIES, tiny_config, tiny_params
from subspec_jax.draft_model import substitute


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(family, tied):
    cfg = tiny_config(family, tied=tied)
    params = tiny_params(cfg)
    named = llm_jax.params_to_hf(params, cfg)
    q = params.layers[1].attn.q
    np.testing.assert_array_equal(named["model.layers.1.self_attn.q_proj.weight"], q.T)
    assert ("lm_head.weight" in named) != tied
    again = llm_jax.params_from_hf({f"module.{k}": v for k, v in named.items()}, cfg)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
@pytest.mark.quick_cases("gemma3", "phi3", "mixtral", "gpt-oss")
def test_every_family_of_transformers(name, tmp_path):
    """The names, shapes and numbers of `save_pretrained`, of which it writes files."""
    from safetensors.numpy import load_file

    folder, _ = saved(name, tmp_path)
    cfg = from_hf(json.loads((folder / "config.json").read_text()), "float32")
    arrays = load_file(folder / "model.safetensors")
    params = llm_jax.params_from_hf(arrays, cfg)
    read = llm_jax.open_checkpoint(folder).load(cfg)
    jax.tree.map(np.testing.assert_array_equal, params, read)
    again = llm_jax.params_to_hf(params, cfg)
    if cfg.tied:
        arrays.pop("lm_head.weight", None)
    assert again.keys() == arrays.keys()
    for key, expected in arrays.items():
        # gains less one are rounded to float32 once more
        np.testing.assert_allclose(again[key], expected, atol=1.2e-7 * ("norm" in key), rtol=0)


def test_other_dtypes():
    cfg = tiny_config("qwen3", dtype="bfloat16")
    params = tiny_params(cfg)
    named = llm_jax.params_to_hf(params, cfg)
    assert {a.dtype for a in named.values()} == {jnp.dtype("bfloat16")}
    wide = llm_jax.params_from_hf(named, dataclasses.replace(cfg, dtype="float32"))
    np.testing.assert_array_equal(wide.embed_VD, params.embed_VD.astype(jnp.float32))


def test_what_does_not_fit_is_listed():
    cfg = tiny_config("qwen3")
    named = llm_jax.params_to_hf(tiny_params(cfg), cfg)
    del named["model.norm.weight"]
    named["more"] = np.zeros(3, np.float32)
    named["lm_head.weight"] = named["lm_head.weight"].T
    named["model.embed_tokens.weight"] = named["model.embed_tokens.weight"].astype(np.int8)
    with pytest.raises(CheckpointError) as error:
        llm_jax.params_from_hf(named, cfg)
    for words in ("model.norm.weight is missing", "more is not part", "has shape", "int8"):
        assert words in str(error.value)


def test_low_bit_parameters_have_no_names():
    cfg = tiny_config("qwen3")
    with pytest.raises(LLMError, match=r"layers.0.*q_proj.*only a model of plain arrays"):
        llm_jax.params_to_hf(substitute(tiny_params(cfg), 4, 16, 0), cfg)
