"""LoRA adapters: merged as the formula says, and a name for everything that does not fit."""

import dataclasses
import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax import CheckpointError, checkpoint, registry
from llm_jax.adapter import CONFIG, WEIGHTS, is_adapter
from llm_jax.families import FAMILIES
from llm_jax.formats import open_checkpoint
from llm_jax.registry import open_model
from llm_jax.testing import (
    TINY_FAMILIES,
    tiny_config,
    tiny_params,
    write_gguf,
    write_safetensors,
)

CFG = tiny_config("llama", layers=2)
Q = "base_model.model.model.layers.1.self_attn.q_proj"
DOWN = "base_model.model.model.layers.0.mlp.down_proj"
EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    return write_safetensors(folder, tiny_params(CFG), CFG)


def lora(rng, out, inputs, rank=4, dtype=np.float32):
    """(A, B) of multiples of 1/64: all sums of their products are exact in float32."""
    draw = lambda *shape: (rng.integers(-64, 64, shape) / 64).astype(dtype)
    return draw(rank, inputs), draw(out, rank)


def write(folder, tensors, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    known = dict(peft_type="LORA", r=4, lora_alpha=8, base_model_name_or_path=None)
    (folder / CONFIG).write_text(json.dumps(known | settings))
    save_file(tensors, folder / WEIGHTS)
    return folder


def pairs(rng, dtype=np.float32, rank=4):
    a, b = lora(rng, 64, 64, rank, dtype)
    c, d = lora(rng, 64, 96, rank, dtype)
    names = [f"{name}.lora_{piece}.weight" for name in (Q, DOWN) for piece in "AB"]
    return dict(zip(names, (a, b, c, d), strict=True))


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_a_matrix_is_added_to(base, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(checkpoint, "_ROWS", 7)
    tensors = pairs(np.random.default_rng(0))
    folder = write(tmp_path / "adapter", tensors, lora_alpha=6)
    cfg = tiny_config("llama", layers=2, dtype=dtype)
    found, plain = open_model(base, folder), open_checkpoint(base).load(cfg)
    assert found.config(dtype) == cfg
    got = found.load(cfg)
    for name, layer, part in ((Q, 1, "q"), (DOWN, 0, "down")):
        at = lambda params, layer=layer, part=part: np.asarray(
            getattr(params.layers[layer].attn if part == "q" else params.layers[layer].mlp, part)
        )
        a, b = (np.float64(tensors[f"{name}.lora_{x}.weight"]) for x in "AB")
        want = (at(plain).T.astype(np.float64) + 1.5 * (b @ a)).astype(dtype)
        np.testing.assert_array_equal(at(got).T, want, strict=True)
        assert (want != at(plain).T).mean() > 0.9
    equal = jax.tree.map(lambda one, two: bool((one == two).all()), got, plain)
    named = [(jax.tree_util.keystr(at), same) for at, same in jax.tree.leaves_with_path(equal)]
    assert [at for at, same in named if not same] == [".layers[0].mlp.down", ".layers[1].attn.q"]


@pytest.mark.parametrize(
    ("settings", "scaling"),
    (
        (dict(lora_alpha=6, use_rslora=True), 6 / math.sqrt(4)),
        (dict(alpha_pattern={"down_proj": 2}), 2 / 4),
        (dict(alpha_pattern={"layers.0.mlp.down_proj": 1}), 1 / 4),
        (dict(alpha_pattern={"own_proj": 1}), 8 / 4),  # not a whole name
        (dict(alpha_pattern={"q_proj": 9, r"layers\.\d+\.mlp\..*": 1}), 1 / 4),
        (dict(rank_pattern={"proj": 5, "down_proj": 4}), 8 / 4),
        (dict(fan_in_fan_out=True), 8 / 4),  # peft ignores it for linear layers
    ),
)
def test_the_scaling(base, tmp_path, settings, scaling):
    tensors = pairs(np.random.default_rng(0))
    found = open_model(base, write(tmp_path / "adapter", tensors, **settings))
    delta = found.adapter.deltas["model.layers.0.mlp.down_proj.weight"]
    assert delta.scaling == pytest.approx(scaling)


def test_dora_sets_the_length_of_rows(base, tmp_path):
    rng = np.random.default_rng(0)
    tensors = pairs(rng)
    length = rng.uniform(1, 2, 64).astype(np.float32)
    tensors |= {f"{name}.lora_magnitude_vector": length for name in (Q, DOWN)}
    found = open_model(base, write(tmp_path / "adapter", tensors, use_dora=True))
    down = np.asarray(found.load(CFG).layers[0].mlp.down.T)
    np.testing.assert_allclose(np.linalg.norm(down, axis=1), length, rtol=1e-6)
    plain = open_checkpoint(base).load(CFG).layers[0].mlp.down.T
    a, b = tensors[f"{DOWN}.lora_A.weight"], tensors[f"{DOWN}.lora_B.weight"]
    sides = np.asarray(plain) + 2 * b @ a
    cosine = (down * sides).sum(1) / np.linalg.norm(down, axis=1) / np.linalg.norm(sides, axis=1)
    np.testing.assert_allclose(cosine, 1, rtol=1e-6)


def test_the_table_is_added_to(base, tmp_path):
    rng = np.random.default_rng(0)
    a, b = lora(rng, 64, 288)
    tensors = {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}
    got = open_model(base, write(tmp_path / "adapter", tensors)).load(CFG)
    plain = open_checkpoint(base).load(CFG)
    want = np.float64(plain.embed_VD) + 2 * (np.float64(b) @ np.float64(a)).T
    np.testing.assert_array_equal(got.embed_VD, want.astype(np.float32))
    np.testing.assert_array_equal(got.head_DV, plain.head_DV)


def test_modules_that_are_saved_take_the_place_of_the_models_own(base, tmp_path):
    rng = np.random.default_rng(0)
    head = rng.normal(size=(288, 64)).astype(np.float32)
    norm = rng.normal(size=64).astype(np.float32)
    tensors = pairs(rng) | {f"{HEAD}.weight": head, "base_model.model.model.norm.weight": norm}
    folder = write(tmp_path / "adapter", tensors, modules_to_save=["lm_head", "norm"])
    got = open_model(base, folder).load(CFG)
    np.testing.assert_array_equal(got.head_DV.T, head)
    np.testing.assert_array_equal(got.norm, norm)


def tied_base(folder, **changes):
    cfg = tiny_config("llama", layers=2, tied=True, **changes)
    return write_safetensors(folder, tiny_params(cfg), cfg, tokenizer=False), cfg


def test_a_saved_head_unties_a_tied_model(tmp_path):
    base, cfg = tied_base(tmp_path / "model")
    head = np.ones((288, 64), np.float32)
    tensors = pairs(np.random.default_rng(0)) | {f"{HEAD}.weight": head}
    found = open_model(base, write(tmp_path / "a", tensors, modules_to_save=["lm_head"]))
    assert not found.config("float32").tied
    np.testing.assert_array_equal(found.load(found.config("float32")).head_DV.T, head)
    # peft also saves a copy of the table as lm_head when the table is trained
    copy = dict(pairs(np.random.default_rng(0)))
    a, b = lora(np.random.default_rng(1), 64, 288)
    copy |= {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}
    copy |= {f"{HEAD}.weight": head, f"{EMBED}.base_layer.weight": head}
    found = open_model(base, write(tmp_path / "b", copy))
    assert found.config("float32") == cfg
    want = head + 2 * (np.float64(b) @ np.float64(a)).T
    np.testing.assert_array_equal(found.load(cfg).embed_VD, want.astype(np.float32))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_an_adapter_fits_a_gguf_file_too(tmp_path, family):
    cfg = tiny_config(family)
    rng = np.random.default_rng(0)
    tensors = {}
    heads, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    sizes = {"self_attn.q_proj": (heads, 64), "self_attn.k_proj": (kv, 64)}
    sizes |= {"self_attn.o_proj": (64, heads), "mlp.up_proj": (96, 64)}
    for name, (out, inputs) in sizes.items():
        module = f"base_model.model.model.layers.1.{name}"
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = lora(
            rng, out, inputs
        )
    adapter = write(tmp_path / "adapter", tensors)
    params = tiny_params(cfg)
    one = open_model(write_safetensors(tmp_path / "f", params, cfg, tokenizer=False), adapter)
    two = open_model(write_gguf(tmp_path / "m.gguf", params, cfg), adapter)
    jax.tree.map(np.testing.assert_array_equal, one.load(cfg), two.load(cfg))


@pytest.mark.parametrize("kind", ("folder", "GGUF"))
def test_gains_around_one(tmp_path, monkeypatch, kind):
    """Of Gemma's families: a safetensors file has gains less one, a GGUF file has them whole."""
    around = dataclasses.replace(FAMILIES["llama"], gain_offset=1.0)
    monkeypatch.setitem(FAMILIES, "llama", around)
    params, norm = tiny_params(CFG), np.full(64, 0.25, np.float32)
    tensors = pairs(np.random.default_rng(0)) | {"base_model.model.model.norm.weight": norm}
    adapter = write(tmp_path / "adapter", tensors, modules_to_save=["norm"])
    base = tmp_path / "model.gguf"
    if kind == "GGUF":
        write_gguf(base, params, CFG)
    else:
        write_safetensors(base, params, CFG, tokenizer=False)
    np.testing.assert_array_equal(open_model(base, adapter).load(CFG).norm, norm + 1)


def test_what_is_said_and_identified(base, tmp_path):
    one = open_model(base, write(tmp_path / "one", pairs(np.random.default_rng(0))))
    two = open_model(base, write(tmp_path / "two", pairs(np.random.default_rng(1))))
    louder = pairs(np.random.default_rng(0))
    three = open_model(base, write(tmp_path / "three", louder, lora_alpha=9))
    plain = open_checkpoint(base)
    assert one.notices(CFG) == ("merged with the adapter one (LoRA of rank 4 on 2 matrices)",)
    assert len({found.digest() for found in (one, two, three, plain)}) == 4
    assert len({found.identity() for found in (one, two, three, plain)}) == 4
    assert one.digest() == open_model(base, tmp_path / "one").digest()
    assert one.tokenizer().encode("the cat") == plain.tokenizer().encode("the cat")


def test_an_adapter_brings_its_base(base, tmp_path, monkeypatch):
    tensors = pairs(np.random.default_rng(0))
    folder = write(tmp_path / "one", tensors, base_model_name_or_path=str(base))
    assert is_adapter(folder) and not is_adapter(base)
    want = open_model(base, folder)
    assert open_model(folder).digest() == want.digest()
    assert registry.find_checkpoint("any", folder) == folder
    # a registered model, which is found as always
    repo = registry.MODELS["qwen2.5-0.5b"].repo
    write(tmp_path / "two", tensors, base_model_name_or_path=repo)
    known = {"qwen2.5-0.5b": base}
    monkeypatch.setattr(registry, "find_checkpoint", lambda name, progress: known[name])
    assert open_model(tmp_path / "two").base == open_checkpoint(base)


@pytest.mark.parametrize("name", (None, "somebody/else", "/nowhere", ""))
def test_a_base_that_nobody_knows(tmp_path, name):
    folder = write(tmp_path / "a", pairs(np.random.default_rng(0)), base_model_name_or_path=name)
    with pytest.raises(CheckpointError, match=r"is neither a local folder nor a registered model;"):
        open_model(folder)
    with pytest.raises(CheckpointError, match=r"is an adapter, not a model: pass its base model"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"are both adapters; merge one of them"):
        open_model(folder, folder)


@pytest.mark.parametrize(
    ("settings", "expected"),
    (
        (dict(peft_type="IA3"), "peft_type is 'IA3'; expected LORA; no other kind"),
        (dict(bias="all"), "bias is 'all'; expected none; adapters with biases"),
        (dict(bias="lora_only"), "bias is 'lora_only'; expected none"),
        (dict(lora_bias=True), "lora_bias is True; expected nothing; this setting is not"),
        (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa'; expected true, false"),
        (dict(use_qalora=True), "use_qalora is True; expected nothing"),
        (dict(layer_replication=[[0, 1]]), "layer_replication is [[0, 1]]; expected nothing"),
        (dict(target_parameters=["x"]), "target_parameters is ['x']; expected nothing"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices is [1]; expected nothing"),
        (dict(a_setting_of_tomorrow=1), "a_setting_of_tomorrow is 1; expected nothing"),
        (dict(r="4"), "r is '4'; expected a whole number"),
        (dict(lora_alpha=None), "lora_alpha is None; expected a number"),
        (dict(use_dora="yes"), "use_dora is 'yes'; expected true or false"),
        (dict(alpha_pattern={"(a+)+": 1}), "alpha_pattern has the pattern '(a+)+'; expected nam"),
        (dict(alpha_pattern={"(": 1}), "alpha_pattern has the pattern '(': "),
        (dict(alpha_pattern={"down_proj": "x"}), "alpha_pattern.down_proj is 'x'; expected a num"),
        (dict(rank_pattern={"down_proj": 5}), "expected [5, …] and […, 5], the rank of adapter_c"),
        (dict(r=8), "expected [8, …] and […, 8], the rank of adapter_config.json"),
        (dict(use_dora=True), "lora_magnitude_vector is missing"),
    ),
)
def test_settings_that_are_not_known_are_refused(base, tmp_path, settings, expected):
    folder = write(tmp_path / "adapter", pairs(np.random.default_rng(0)), **settings)
    with pytest.raises(CheckpointError) as caught:
        open_model(base, folder).check(CFG)
    assert str(caught.value).startswith(str(folder)) and expected in str(caught.value)


A = np.ones((4, 64), np.float32)


@pytest.mark.parametrize(
    ("changes", "expected"),
    (
        ({f"{Q}.lora_B.weight": None}, "q_proj has no lora_B; save the adapter again"),
        ({f"{Q}.lora_A.weight": np.ones((3, 64), np.float32)}, "of shape [3, 64] and lora_B"),
        ({f"{Q}.lora_A.weight": np.ones(4, np.float32)}, "has lora_A of shape [4] and lora_B"),
        ({f"{Q}.lora_A.weight": np.ones((4, 64), np.int8)}, "is stored as I8; expected F32"),
        ({f"{Q}.lora_A.weight": np.ones((4, 65), np.float32)}, "is changed by [64, 65] numbers;"),
        ({f"{Q}.lora_magnitude_vector": A[0]}, "is there, and use_dora is false"),
        ({f"{Q}x.lora_A.weight": A, f"{Q}x.lora_B.weight": A.T}, "q_projx.weight is not in model"),
        ({f"{Q}.lora_A.default.weight": A}, "lora_A.default.weight is not part of this model"),
        ({f"{HEAD}.weight": A}, "lm_head.weight has shape [4, 64]; expected [288, 64]"),
        ({f"{Q}.lora_A.weight": np.full((4, 64), np.nan, np.float32)}, "holds NaN or infinity"),
    ),
)
def test_tensors_that_do_not_fit_are_named(base, tmp_path, changes, expected):
    tensors = pairs(np.random.default_rng(0)) | changes
    folder = write(tmp_path / "adapter", {k: v for k, v in tensors.items() if v is not None})
    with pytest.raises(CheckpointError) as caught:
        open_model(base, folder).load(CFG)
    assert expected in str(caught.value)


def test_a_tied_head_is_not_changed_apart(tmp_path):
    base, cfg = tied_base(tmp_path / "model")
    a, b = lora(np.random.default_rng(0), 288, 64)
    folder = write(tmp_path / "a", {f"{HEAD}.lora_A.weight": a, f"{HEAD}.lora_B.weight": b})
    with pytest.raises(CheckpointError, match=r"this model's head is its embedding table"):
        open_model(base, folder).check(cfg)
    table = {f"{EMBED}.weight": np.ones((288, 64), np.float32)}
    folder = write(tmp_path / "b", table, modules_to_save=["embed_tokens"])
    with pytest.raises(CheckpointError, match=r"modules_to_save has the embedding table and not"):
        open_model(base, folder).check(cfg)


def test_folders_that_are_no_adapter(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"is no folder; expected one with adapter_config"):
        open_model(base, tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"is no adapter: it has no adapter_config.json"):
        open_model(base, tmp_path).check(CFG)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors; where there is"):
        open_model(base, tmp_path).check(CFG)
    (tmp_path / WEIGHTS).write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is truncated or corrupt"):
        open_model(base, tmp_path).check(CFG)


def test_adapters_in_bfloat16_are_added_in_float32(base, tmp_path):
    tensors = pairs(np.random.default_rng(0), ml_dtypes.bfloat16)
    wide = {name: array.astype(np.float32) for name, array in tensors.items()}
    one = open_model(base, write(tmp_path / "one", tensors)).load(CFG)
    two = open_model(base, write(tmp_path / "two", wide)).load(CFG)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert load_file(tmp_path / "one" / WEIGHTS)
