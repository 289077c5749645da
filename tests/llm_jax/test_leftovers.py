"""Tensors that are no part of a text model are left out and said; prefixes are understood."""

import json
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax import CheckpointError
from llm_jax.folder import INDEX, WHOLE, SafetensorsFolder
from llm_jax.formats import open_checkpoint
from llm_jax.gguf import GGUF
from llm_jax.leftovers import leftover, plain_name
from llm_jax.testing import (
    TINY_FAMILIES,
    tensors,
    tiny_config,
    tiny_params,
    write_safetensors,
)

CFG = tiny_config("qwen2", layers=2)
ONE = np.ones(1, np.float32)


@pytest.fixture
def folder(tmp_path):
    return write_safetensors(tmp_path / "model", tiny_params(CFG), CFG, tokenizer=False)


def add(folder, *names):
    save_file(load_file(folder / WHOLE) | dict.fromkeys(names, ONE), folder / WHOLE)


@pytest.mark.parametrize(
    ("name", "kind"),
    (
        ("v_head.summary.weight", "a value or classification head"),
        ("score.weight", "a value or classification head"),
        ("model.layers.1.self_attn.k_scale", "scales of 8-bit caches and activations"),
        ("model.layers.1.self_attn.k_proj.k_scale", "scales of 8-bit caches and activations"),
        ("model.layers.0.mlp.up_proj.input_scale", "scales of 8-bit caches and activations"),
        ("model.layers.2.eh_proj.weight", "layers behind the 2 of this model"),
        ("model.layers.5.mlp.up_proj.weight", "layers behind the 2 of this model"),
        ("mtp.layers.0.mlp.up_proj.weight", "layers that predict several tokens"),
        ("visual.blocks.0.norm1.weight", "parts for pictures and sound"),
        ("model.vision_tower.x.weight", "parts for pictures and sound"),
    ),
)
def test_what_may_be_left_out_is_said(folder, name, kind):
    add(folder, name)
    found = open_checkpoint(folder)
    found.check(CFG)
    assert found.left_out(CFG) == {name: kind}
    (line,) = found.notices(CFG)
    assert line == f"left out, because no text comes from them: {kind} ({name})"


def test_one_line_says_all(folder):
    scales = [f"model.layers.{i}.self_attn.{kv}_scale" for i in range(2) for kv in "kv"]
    add(folder, "v_head.summary.bias", *scales)
    (line,) = open_checkpoint(folder).notices(CFG)
    assert "scales of 8-bit caches and activations (model.layers.0.self_attn.k_scale, " in line
    assert line.endswith(" and 1 more); a value or classification head (v_head.summary.bias)")


@pytest.mark.parametrize(
    "name",
    (
        "model.layers.6.mlp.up_proj.weight",  # so many layers more are another model
        "model.layers.1.mlp.experts.0.up_proj.weight",
        "model.layers.1.self_attn.q_proj.lora_A.weight",
        "model.layers.1.mlp.up_proj.bias",
        "model.scores.weight",
        "model.embed_positions.weight",
    ),
)
def test_what_may_be_needed_is_refused(folder, name):
    add(folder, name)
    with pytest.raises(CheckpointError, match=f"{name} is not part of this model"):
        open_checkpoint(folder).check(CFG)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_name_of_the_model_is_never_left_out(family):
    cfg = tiny_config(family, layers=12)
    for names in (SafetensorsFolder.names, GGUF.names):
        needed = tensors(tiny_params(cfg), cfg, names)
        assert [name for name in needed if leftover(name, 12) or plain_name(name) != name] == []


@pytest.mark.parametrize(
    "form",
    (
        "base_model.model.{}",  # a model inside of peft
        "_orig_mod.{}",  # a compiled model
        "module.{}",  # a distributed one
        "base_model.model._orig_mod.{}",
        "language_model.{}",  # of LLaVA and others
    ),
)
def test_prefixes_are_understood(folder, form):
    found = open_checkpoint(folder)
    want = found.load(CFG)
    named = load_file(folder / WHOLE)
    save_file({form.format(name): array for name, array in named.items()}, folder / WHOLE)
    again = open_checkpoint(folder)
    again.check(CFG)
    np.testing.assert_array_equal(again.load(CFG).layers[1].mlp.down, want.layers[1].mlp.down)
    assert not again.notices(CFG)


@pytest.mark.parametrize(
    ("name", "plain"),
    (
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("language_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.layers.0._orig_mod.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("visual.language_model.x", "visual.language_model.x"),
    ),
)
def test_plain_names(name, plain):
    assert plain_name(name) == plain


def test_two_names_for_one_tensor(folder):
    add(folder, "_orig_mod.model.norm.weight")
    with pytest.raises(CheckpointError, match=r"norm.weight is also in model.safetensors"):
        open_checkpoint(folder).check(CFG)


def test_shards_with_prefixes(tmp_path):
    folder = write_safetensors(tmp_path, tiny_params(CFG), CFG, shards=2, tokenizer=False)
    index = json.loads((folder / INDEX).read_text())
    for file in {*index["weight_map"].values()}:
        named = load_file(folder / file)
        save_file({f"_orig_mod.{name}": array for name, array in named.items()}, folder / file)
    index["weight_map"] = {f"_orig_mod.{n}": file for n, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    open_checkpoint(folder).check(CFG)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder).check(CFG)
    _, line = str(caught.value).splitlines()
    assert line.strip().startswith("model-00002-of-00002.safetensors is missing, though")


def test_the_text_part_of_a_model_that_also_sees(folder):
    """config.json then has a description of each model, and the outer one has few values."""
    described = json.loads((folder / "config.json").read_text())
    outer = dict(model_type="llava", text_config=described, vision_config={}, torch_dtype="float16")
    del described["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(outer))
    assert open_checkpoint(folder).config("float32") == CFG
    assert open_checkpoint(folder).config().dtype == "float16"


@pytest.mark.parametrize("place", ("plain", "it's $HOME"))
def test_a_pickle_is_refused_with_the_line_that_converts_it(tmp_path, place):
    tmp_path = tmp_path / place
    tmp_path.mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    text = str(caught.value)
    assert "pytorch_model.bin, a kind of file that can run any code when it is read" in text
    command = shlex.split(text.partition(" with torch: ")[2])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "the command", "exec")
    assert f"M.from_pretrained({str(tmp_path)!r}, dtype='auto')" in command[2]


@pytest.mark.slow
@pytest.mark.reference
def test_that_line_converts_it(tmp_path):
    torch = pytest.importorskip("torch", reason="it writes the pickle")
    write_safetensors(tmp_path, tiny_params(CFG), CFG)
    want = open_checkpoint(tmp_path).load(CFG)
    named = {k: torch.from_numpy(v) for k, v in load_file(tmp_path / WHOLE).items()}
    torch.save(named, tmp_path / "pytorch_model.bin")
    (tmp_path / WHOLE).unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    _, option, code = shlex.split(str(caught.value).partition(" with torch: ")[2])
    subprocess.run([sys.executable, option, code], check=True, capture_output=True)
    got = open_checkpoint(tmp_path).load(CFG)
    jax.tree.map(np.testing.assert_array_equal, got, want)
