"""Which families Palu's attention can replace: the same function at full rank, or a refusal."""

import dataclasses

import chex
import numpy as np
import pytest
from feeding import one_by_one, text, whole

import palu_jax
from llm_jax.config import Config, Experts
from llm_jax.rope import YarnRope
from llm_jax.testing import tiny_config, tiny_params
from palu_jax.attention import why_not
from palu_jax.calibration import calibrate
from palu_jax.convert import ConvertError, Recipe, to_palu
from palu_jax.format import FormatError, LatentFormat
from palu_jax.rank import group_sizes, uniform_ranks
from palu_jax.rival import KVFormat, to_quantized_cache
from palu_jax.saved_sums import CalibrationError


def recipe(cfg, group, keep, objective="plain", **changes):
    groups = group_sizes(cfg.kv_heads, group)
    ranks = uniform_ranks(cfg.layers, groups, cfg.head_dim, keep)
    return Recipe(groups, ranks, objective, **changes)


KINDS = ("sliding", "full", "sliding")
ACCEPTED = {
    "two bases": dict(layer_kinds=KINDS, window=6, sliding_theta=50.0, query_scale=0.3),
    "unrotated": dict(layer_kinds=("unrotated", "full", "unrotated"), qk_norm=True),
    "around": dict(norms="around", wide_gains=True, embed_scale=8.0, logit_softcap=3.0,
                   activation="gelu_tanh", residual_scale=0.5, logit_scale=0.3),
    "after": dict(norms="after", o_bias=True, qkv_bias=True, mlp_bias=True),
    "experts": dict(experts=Experts(count=4, chosen=2, d_ff=32)),
    "yarn": dict(rope_scaling=YarnRope(4.0, 8, 1.14, truncate=True)),
}  # fmt: skip


@pytest.mark.quick_cases("two bases", "yarn")
@pytest.mark.parametrize("name", ACCEPTED)
def test_full_rank_equals_dense_in_other_families(name):
    """At once, where keys are rebuilt, and in chunks of a few tokens, where one kernel reads
    latents; both behind the window. With every kind of recipe: values fused or exact tokens."""
    cfg = tiny_config("llama", layers=3, **ACCEPTED[name])
    params = tiny_params(cfg)
    tokens = text(cfg)
    want = whole(params, cfg, tokens)[0]
    exact = LatentFormat(sinks=1, window=3)
    for changes in (dict(), dict(fuse_values=True), dict(format=exact)):
        full = to_palu(params, cfg, recipe(cfg, 1, 1.0, **changes))
        chex.assert_trees_all_close(whole(full, cfg, tokens)[0], want, atol=1e-4)
        chex.assert_trees_all_close(one_by_one(full, cfg, tokens, chunk=5)[0], want, atol=1e-4)
    chex.assert_trees_all_close(one_by_one(full, cfg, tokens)[0], want, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCEPTED)
def test_the_rival_and_statistics_of_other_families(name):
    """A cache of 16 bits is the dense one; and calibrated factors of full rank lose nothing."""
    cfg = tiny_config("llama", layers=3, **ACCEPTED[name])
    params = tiny_params(cfg)
    tokens = text(cfg)
    want = whole(params, cfg, tokens)[0]
    for format in (KVFormat(16), KVFormat(16, window=4)):
        other = to_quantized_cache(params, cfg, format)
        chex.assert_trees_all_close(one_by_one(other, cfg, tokens, chunk=5)[0], want, atol=1e-4)
    batches = [np.random.default_rng(i).integers(0, cfg.vocab, (2, 40)) for i in range(2)]
    statistics = calibrate(params, batches, cfg)
    full = to_palu(params, cfg, recipe(cfg, 1, 1.0, "aware"), statistics)
    chex.assert_trees_all_close(whole(full, cfg, tokens)[0], want, atol=1e-3)


REFUSED = {
    "sinks": (dict(sinks=True), "sinks in its softmax"),
    "cap": (dict(attn_softcap=50.0), "a cap of its scores"),
    "part": (dict(rotary_dim=8), "heads that rotate in part"),
    "cards": (dict(cards=2), "heads on several cards"),
    "whole": (dict(qk_norm=True, qk_norm_whole=True), "norms over all queries and keys together"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_palu_has_not_is_refused(name):
    changes, words = REFUSED[name]
    cfg = tiny_config("llama", layers=1, **changes)
    params = tiny_params(cfg)
    assert why_not(cfg) == f"llama models have {words}"
    with pytest.raises(ConvertError, match=f"llama models have {words}, which Palu's attention"):
        to_palu(params, cfg, recipe(cfg, 1, 1.0))
    with pytest.raises(ConvertError, match=words):
        palu_jax.Compressor(params, cfg)
    with pytest.raises(CalibrationError, match=words):
        calibrate(params, [np.zeros((1, 4), int)], cfg)
    with pytest.raises(FormatError, match=words):
        to_quantized_cache(params, cfg, KVFormat(16))


def test_every_field_of_a_config_is_known():
    """A field that is new is accepted here or refused, on purpose."""
    right = "layers d_model heads kv_heads head_dim d_ff vocab rope_theta rope_scaling norm_eps"
    right += (
        " qkv_bias qk_norm tied max_length dtype family layer_kinds window sliding_theta o_bias"
    )
    right += " mlp_bias norms wide_gains activation embed_scale residual_scale logit_scale"
    right += " query_scale logit_softcap experts"
    refused = {field for changes, _ in REFUSED.values() for field in changes} - {"qk_norm"}
    assert {f.name for f in dataclasses.fields(Config)} == {*right.split(), *refused}
