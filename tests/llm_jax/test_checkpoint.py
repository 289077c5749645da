"""Checkpoint folders: a round trip for every family, and a clear message for every broken one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax import CheckpointError, testing
from llm_jax.folder import INDEX
from llm_jax.formats import open_checkpoint
from llm_jax.testing import tiny_config, tiny_params, write_safetensors


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture
def cfg():
    return tiny_config("qwen2", layers=2)


@pytest.fixture
def folder(tmp_path, cfg):
    return write_safetensors(tmp_path / "model", tiny_params(cfg), cfg, tokenizer=False)


def rewrite(folder, change):
    """Applies `change` to the dictionary of tensors in model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def message(folder, cfg) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder).check(cfg)
    return str(caught.value)


@pytest.mark.parametrize("family", testing.TINY_FAMILIES)
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("shards", (1, 3))
def test_what_is_written_is_what_is_loaded(tmp_path, family, tied, shards):
    cfg = tiny_config(family, tied=tied)
    params = tiny_params(cfg)
    folder = write_safetensors(tmp_path, params, cfg, shards=shards, tokenizer=False)
    assert len(list(folder.glob("*.safetensors"))) == shards
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config() == cfg
    assert_same(checkpoint.load(cfg), params)


def test_matrices_in_the_file_are_the_other_way_round(folder, cfg):
    raw = load_file(folder / "model.safetensors")
    params = open_checkpoint(folder).load(cfg)
    name = "model.layers.1.mlp.down_proj.weight"
    assert raw[name].shape == (cfg.d_model, cfg.d_ff)
    np.testing.assert_array_equal(params.layers[1].mlp.down, raw[name].T)
    np.testing.assert_array_equal(params.head_DV, raw["lm_head.weight"].T)
    np.testing.assert_array_equal(params.embed_VD, raw["model.embed_tokens.weight"])


def test_more_rows_than_a_block(tmp_path):
    cfg = tiny_config("llama", layers=1, vocab=1300)  # two blocks of 512 rows and a rest
    params = tiny_params(cfg)
    folder = write_safetensors(tmp_path, params, cfg, tokenizer=False)
    assert_same(open_checkpoint(folder).load(cfg), params)


@pytest.mark.parametrize("stored", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("wanted", ("float32", "float16", "bfloat16"))
def test_dtypes_are_cast(tmp_path, stored, wanted):
    cfg = tiny_config("qwen3", layers=1, dtype=stored)
    params = tiny_params(cfg)
    checkpoint = open_checkpoint(write_safetensors(tmp_path, params, cfg, tokenizer=False))
    assert checkpoint.config().dtype == stored
    loaded = checkpoint.load(checkpoint.config(wanted))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(wanted)}
    assert_same(loaded, jax.tree.map(lambda leaf: leaf.astype(wanted), params))


def test_placing_is_in_order_and_gets_fresh_contiguous_numpy(tmp_path):
    cfg = tiny_config("qwen2", layers=3, dtype="bfloat16")
    checkpoint = open_checkpoint(
        write_safetensors(tmp_path, tiny_params(cfg), cfg, tokenizer=False)
    )
    calls, seen = [], []

    def place(name, array):
        calls.append(name)
        seen.append(array)
        return name

    def place_layer(index, layer):
        calls.append(index)
        seen.extend(jax.tree.leaves(layer))
        return index

    done = []
    params = checkpoint.load(cfg, place_layer, place, lambda *progress: done.append(progress))
    assert calls == ["embed_VD", "norm", "head_DV", 0, 1, 2]
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert params.layers == (0, 1, 2)
    assert params.head_DV == "head_DV"
    for array in seen:
        assert type(array) is np.ndarray
        assert array.dtype == ml_dtypes.bfloat16
        assert array.flags.c_contiguous and array.flags.owndata


def test_only_one_layer_is_held_at_a_time(folder, cfg):
    held = []

    def place_layer(index, layer):
        import weakref

        assert all(ref() is None for ref in held)
        held.append(weakref.ref(layer.mlp.up))

    open_checkpoint(folder).load(cfg, place_layer)
    assert len(held) == cfg.layers


def test_harmless_extras_are_ignored(folder, cfg):
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda t: t.update({extra: np.ones(8, np.float32)}))
    open_checkpoint(folder).load(cfg)


def test_a_tied_model_may_carry_its_head(folder, cfg):
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    set_config(folder, tie_word_embeddings=True)
    tied = open_checkpoint(folder).config()
    assert tied == dataclasses.replace(cfg, tied=True)
    assert open_checkpoint(folder).load(tied).head_DV is None


def test_a_head_of_its_own_is_used_though_the_config_says_tied(folder, cfg):
    set_config(folder, tie_word_embeddings=True)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config() == cfg  # as transformers, see test_transformers.py
    np.testing.assert_array_equal(checkpoint.load(cfg).head_DV, tiny_params(cfg).head_DV)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from the embedding table"):
        checkpoint.check(dataclasses.replace(cfg, tied=True))


def test_second_copies_of_the_weights_are_ignored(folder, cfg):
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    open_checkpoint(folder).check(cfg)


def test_every_problem_is_listed_at_once(folder, cfg):
    def damage(t):
        del t["model.layers.0.mlp.up_proj.weight"]
        del t["model.norm.weight"]
        t["model.layers.1.self_attn.q_proj.bias"] = np.zeros(7, np.float32)
        t["model.layers.1.mlp.up_proj.weight"] = np.zeros((cfg.d_ff, cfg.d_model), np.int8)
        t["model.layers.1.pre_layernorm.weight"] = np.zeros(cfg.d_model, np.float32)

    rewrite(folder, damage)
    text = message(folder, cfg)
    assert text.splitlines()[0] == f"{folder} cannot be loaded, 5 problems:"
    assert "model: model.layers.0.mlp.up_proj.weight is missing" in text
    assert "model: model.norm.weight is missing" in text
    file = "model.safetensors: model.layers"
    assert f"{file}.1.self_attn.q_proj.bias has shape [7]; expected [64]" in text
    assert f"{file}.1.mlp.up_proj.weight is stored as I8; supported are BF16, F16, F32" in text
    assert f"{file}.1.pre_layernorm.weight is not part of this model" in text


def test_loading_checks_first(folder, cfg):
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    calls = []
    with pytest.raises(CheckpointError, match="1 problem:"):
        open_checkpoint(folder).load(cfg, place=lambda name, array: calls.append(name))
    assert not calls


def test_an_untied_model_needs_its_head(folder, cfg):
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    assert "lm_head.weight is missing" in message(folder, cfg)
    open_checkpoint(folder).check(dataclasses.replace(cfg, tied=True))


@pytest.mark.parametrize("stored", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("value", (np.nan, -np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("name", ("model.norm.weight", "model.layers.1.mlp.down_proj.weight"))
def test_numbers_that_are_not_finite_are_named(tmp_path, stored, value, name):
    cfg = tiny_config("qwen2", layers=2, dtype=stored)
    folder = write_safetensors(tmp_path, tiny_params(cfg), cfg, tokenizer=False)

    def damage(t):
        t[name][5:6] = t[name].dtype.type(value)

    rewrite(folder, damage)
    checkpoint = open_checkpoint(folder)
    where = f"{name} holds NaN or infinity, first in row 5"
    for dtype in ("float32", "float16", "bfloat16"):
        with pytest.raises(CheckpointError, match=where):
            checkpoint.load(checkpoint.config(dtype))


def test_numbers_that_the_dtype_cannot_hold_are_named(tmp_path):
    cfg = tiny_config("qwen2", layers=1, dtype="bfloat16")
    folder = write_safetensors(tmp_path, tiny_params(cfg), cfg, tokenizer=False)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda t: t[name].__setitem__((3, 4), -70_000))
    checkpoint = open_checkpoint(folder)
    checkpoint.load(checkpoint.config("float32"))
    with pytest.raises(CheckpointError, match=f"{name} has numbers beyond float16; load it in"):
        checkpoint.load(checkpoint.config("float16"))


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_the_largest_numbers_of_a_dtype_are_loaded(tmp_path, dtype):
    cfg = tiny_config("qwen2", layers=1, dtype=dtype)
    folder = write_safetensors(tmp_path, tiny_params(cfg), cfg, tokenizer=False)
    largest = ml_dtypes.finfo(dtype).max
    rewrite(folder, lambda t: t["model.norm.weight"].__setitem__(slice(2), (largest, -largest)))
    np.testing.assert_array_equal(open_checkpoint(folder).load(cfg).norm[:2], (largest, -largest))


@pytest.fixture
def sharded(tmp_path, cfg):
    return write_safetensors(tmp_path / "sharded", tiny_params(cfg), cfg, shards=2, tokenizer=False)


def test_a_tensor_in_two_shards(sharded, cfg):
    one, two = sorted(sharded.glob("*.safetensors"))
    name = "model.embed_tokens.weight"
    save_file(load_file(two) | {name: load_file(one)[name]}, two)
    assert message(sharded, cfg).splitlines()[1:] == [f"  {two.name}: {name} is also in {one.name}"]


def test_a_missing_shard_is_named_once(sharded, cfg):
    two = sorted(sharded.glob("*.safetensors"))[1]
    two.unlink()
    lines = message(sharded, cfg).splitlines()[1:]
    assert lines == [f"  {two.name} is missing, though {INDEX} names it; download it"]


def test_a_tensor_missing_from_its_shard_names_the_shard(sharded, cfg):
    one, two = sorted(sharded.glob("*.safetensors"))
    tensors = load_file(one)
    name = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != name}, one)
    two.write_bytes(b"")  # another broken shard must not hide it
    lines = message(sharded, cfg).splitlines()[1:]
    assert f"  {one.name}: {name} is missing" in lines
    assert len(lines) == 2


@pytest.mark.parametrize(
    "damage",
    (
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:200],
        lambda data: data[:-1],
        lambda data: data + b"more",
        lambda data: b"<html>not found</html>" * 9,
    ),
    ids=("empty", "length", "header", "last byte", "longer", "html"),
)
def test_a_corrupt_file_is_named(folder, cfg, damage):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    (line,) = message(folder, cfg).splitlines()[1:]
    assert line.startswith("  model.safetensors is truncated or corrupt (")
    assert line.endswith("; download it again")


def test_a_folder_that_is_no_checkpoint_says_what_is_in_it(tmp_path):
    for name in ("notes.txt", "model.pt"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"holds model.pt, notes.txt; expected config"):
        open_checkpoint(tmp_path)


def test_an_empty_folder_and_a_crowded_one(tmp_path):
    with pytest.raises(CheckpointError, match="it holds nothing"):
        open_checkpoint(tmp_path)
    for i in range(10):
        (tmp_path / f"{i}.txt").touch()
    with pytest.raises(CheckpointError, match=r"7\.txt and 2 more"):
        open_checkpoint(tmp_path)


def test_paths_that_are_not_checkpoints(tmp_path, folder):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=f"pass its folder, {folder}"):
        open_checkpoint(folder / "model.safetensors")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(
        CheckpointError, match=r"several GGUF files; pass one of them: a.gguf, b.gguf"
    ):
        open_checkpoint(tmp_path)


def config_message(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder).config()
    return str(caught.value)


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert f"{folder} has no config.json" in config_message(folder)


def test_broken_json_names_the_file(folder, sharded, cfg):
    (folder / "config.json").write_text('{"model_type": ')
    assert f"{folder / 'config.json'} is not valid JSON" in config_message(folder)
    (folder / "config.json").write_text("[1]")
    assert "holds list, not an object" in config_message(folder)
    (sharded / INDEX).write_text("{")
    assert f"{sharded / INDEX} is not valid JSON" in message(sharded, cfg)


@pytest.mark.parametrize(
    ("change", "expected"),
    (
        (dict(model_type="mamba"), "model_type is 'mamba'; supported are llama"),
        (dict(hidden_size=None), "config.json lacks hidden_size"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(rope_scaling=dict(rope_type="ntk")), "rope type 'ntk' is not supported"),
        (dict(rope_scaling=dict(rope_type="llama3")), "factor"),
        (dict(num_hidden_layers="two"), "expected a whole number"),
        (
            dict(quantization_config=dict(quant_method="aqlm")),
            "quantization_config.quant_method is 'aqlm'; expected one of awq, bitsandbytes, comp",
        ),
    ),
)
def test_models_that_cannot_be_run_are_refused(folder, change, expected):
    set_config(folder, **change)
    text = config_message(folder)
    assert str(folder) in text
    assert expected in text
