"""Stored conversions: bit-equal when read, refused where they do not belong."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from llm_jax.formats import open_checkpoint
from llm_jax.params import abstract
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from palu_jax import store
from palu_jax.convert import Recipe, to_palu
from palu_jax.format import LatentFormat

RANKS = (((8, 6), (12, 4)), ((16, 16), (5, 7)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, recipe, params, converted, cfg)."""
    cfg = tiny_config("qwen2")
    params = tiny_params(cfg)
    recipe = Recipe((1, 1), RANKS, "plain", LatentFormat(4, 2, sinks=3, clip=(1.0, 0.8)))
    palu = to_palu(params, cfg, recipe)
    folder = tmp_path_factory.mktemp("store") / "palu"
    store.save(folder, palu, cfg, recipe, "tiny")
    return folder, recipe, params, palu, cfg


def test_round_trip(made):
    folder, recipe, params, palu, cfg = made
    back = store.restore(folder, params, cfg)
    assert jax.tree.structure(back) == jax.tree.structure(palu)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(palu), strict=True):
        np.testing.assert_array_equal(a, b)
    stored = store.describe(folder)
    assert (stored.recipe, stored.cfg, stored.source) == (recipe, cfg, "tiny")


@pytest.mark.parametrize("fused", [False, True])
def test_abstract_layers_have_the_real_shapes(tiny, fused):
    """On which plans are made before anything is read."""
    cfg = tiny.cfg
    recipe = Recipe((3,), (((8,), (12,)),) * 2, "whitened", mean_split=not fused, fuse_values=fused)
    palu = to_palu(tiny.params, cfg, recipe, tiny.statistics)
    stored = store.StoredModel(None, "tiny", cfg, recipe, [])
    found = store.abstract_layers(stored, abstract(cfg), cfg)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, palu)


def test_a_checkpoint_seen_through_it_loads_converted(made, tmp_path):
    folder, _, params, palu, cfg = made
    write_safetensors(tmp_path / "model", params, cfg)
    checkpoint = store.PaluCheckpoint(open_checkpoint(tmp_path / "model"), store.describe(folder))
    checkpoint.check(cfg)
    chex.assert_trees_all_close(checkpoint.load(cfg), palu, atol=1e-6)
    low = dataclasses.replace(cfg, dtype="bfloat16")
    assert checkpoint.load(low).layers[0].attn.k.down_DR.dtype == "bfloat16"
    write_safetensors(tmp_path / "other", tiny_params(cfg, 5), cfg)
    other = store.PaluCheckpoint(open_checkpoint(tmp_path / "other"), store.describe(folder))
    with pytest.raises(store.StoreError, match="other weights"):
        other.load(cfg)


def test_refusals(made, tmp_path):
    folder, recipe, params, palu, cfg = made
    with pytest.raises(store.StoreError, match="exists"):
        store.save(folder, palu, cfg, recipe, "tiny")
    with pytest.raises(store.StoreError, match="other weights"):
        store.restore(folder, tiny_params(cfg, 5), cfg)
    with pytest.raises(store.StoreError, match="d_ff is 96"):
        store.restore(folder, params, dataclasses.replace(cfg, d_ff=128))
    with pytest.raises(store.StoreError, match=r"no palu\.json"):
        store.describe(tmp_path)
    with pytest.raises(store.StoreError, match="only converted"):
        store.save(tmp_path / "plain", params, cfg, recipe, "tiny")
    assert not list(tmp_path.iterdir())  # nothing half-written stays
    (tmp_path / store.NAME).write_text("{")
    with pytest.raises(store.StoreError, match="damaged"):
        store.describe(tmp_path)
    old = json.loads((folder / store.NAME).read_text()) | dict(version=1)
    (tmp_path / store.NAME).write_text(json.dumps(old))
    with pytest.raises(store.StoreError, match=r"format 1; .* reads 2: convert the model again"):
        store.describe(tmp_path)


def test_replacing_is_asked_for(made, tmp_path):
    _, recipe, params, palu, cfg = made
    store.save(tmp_path / "x", palu, cfg, recipe, "tiny")
    other = dataclasses.replace(recipe, format=LatentFormat(8, 8))
    store.save(tmp_path / "x", to_palu(params, cfg, other), cfg, other, "tiny", replace=True)
    assert store.describe(tmp_path / "x").recipe == other


def test_another_dtype_and_layers_in_host_memory(made, tmp_path):
    folder, recipe, params, palu, cfg = made
    low = dataclasses.replace(cfg, dtype="bfloat16")
    half = jax.tree.map(lambda a: a.astype("bfloat16"), params)
    back = store.restore(folder, half, low)
    chex.assert_trees_all_equal(back, jax.tree.map(lambda a: a.astype("bfloat16"), palu))
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    away = dataclasses.replace(palu, layers=jax.device_put(palu.layers, host))
    store.save(tmp_path / "x", away, cfg, recipe, "tiny")
    chex.assert_trees_all_equal(store.restore(tmp_path / "x", params, cfg), palu)


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_what_was_there(made, tmp_path, monkeypatch, exists):
    _, recipe, params, palu, cfg = made
    if exists:
        store.save(tmp_path / "x", palu, cfg, recipe, "first")

    def fail(*_, **__):
        raise OSError("no space left")

    failure = pytest.raises(store.StoreError, match=r"x cannot be written .*no space left")
    with monkeypatch.context() as patched, failure:
        patched.setattr(store, "write_description", fail)  # behind the arrays
        store.save(tmp_path / "x", palu, cfg, recipe, "second", replace=exists)
    assert [p.name for p in tmp_path.iterdir()] == (["x"] if exists else [])
    if exists:
        assert store.describe(tmp_path / "x").source == "first"
        chex.assert_trees_all_equal(store.restore(tmp_path / "x", params, cfg), palu)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'{"version": 2}',
        b'{"version": 2, "config": 3}',
        b"1e999",
        b'{"version": NaN}',
        b'{"version": true}',
        b'{"version": "2"}',
        b"[" * 100_000,
        b"9" * 5000,
    ],
)
def test_damaged_descriptions(tmp_path, content):
    (tmp_path / store.NAME).write_bytes(content)
    with pytest.raises(store.StoreError, match=r"is damaged .* convert the model again"):
        store.describe(tmp_path)


def test_missing_factors_are_named(made, tmp_path):
    folder, _, params, _, cfg = made
    (tmp_path / store.NAME).write_text((folder / store.NAME).read_text())
    for verify in (True, False):
        with pytest.raises(store.StoreError, match=r"factors.* is missing or damaged"):
            store.restore(tmp_path, params, cfg, verify=verify)


@pytest.mark.parametrize("changes", [dict(mean_split=True), dict(fuse_values=True)], ids=str)
def test_every_kind_of_conversion_round_trips(tiny, tmp_path, changes):
    cfg = tiny.cfg
    recipe = Recipe((1, 1, 1), (((8, 6, 4), (12,) * 3),) * 2, "whitened", **changes)
    palu = to_palu(tiny.params, cfg, recipe, tiny.statistics)
    store.save(tmp_path / "x", palu, cfg, recipe, "tiny")
    back = store.restore(tmp_path / "x", tiny.params, cfg)
    chex.assert_trees_all_equal(back, palu)
    assert jax.tree.structure(back) == jax.tree.structure(palu)


@pytest.mark.parametrize("fused", [False, True])
def test_output_biases_and_kinds_of_attention_are_kept(tmp_path, fused):
    """An output's bias is the base model's, or in the stored one where values are fused."""
    kinds = dict(layer_kinds=("sliding", "full"), window=5)
    cfg = tiny_config("llama", qkv_bias=True, o_bias=True, **kinds)
    params = tiny_params(cfg)
    recipe = Recipe((2,), (((8,), (12,)),) * 2, "plain", fuse_values=fused)
    palu = to_palu(params, cfg, recipe)
    store.save(tmp_path / "palu", palu, cfg, recipe, "tiny")
    back = store.restore(tmp_path / "palu", params, cfg)
    assert [layer.attn.kind for layer in back.layers] == ["sliding", "full"]
    chex.assert_trees_all_equal(back, palu)
    first = params.layers[0]
    attn = dataclasses.replace(first.attn, o_bias=first.attn.o_bias * 2)
    other = (dataclasses.replace(first, attn=attn), *params.layers[1:])
    if not fused:
        with pytest.raises(store.StoreError, match="o_bias"):
            store.restore(tmp_path / "palu", dataclasses.replace(params, layers=other), cfg)
