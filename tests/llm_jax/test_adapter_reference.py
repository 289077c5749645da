"""LoRA adapters against peft: the merged weights, bit for bit where sums have one order."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import saved

from llm_jax.attention import caches_for, causal_step
from llm_jax.model import forward
from llm_jax.registry import open_model
from llm_jax.testing import tiny_config, tiny_params, write_safetensors

torch = pytest.importorskip("torch", reason="peft runs on torch")
peft = pytest.importorskip("peft", reason="it merges the adapters under test")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

CFG = tiny_config("qwen2", layers=2)
LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
CASES = {
    "plain": dict(target_modules=LINEAR),
    "rslora": dict(target_modules=LINEAR, use_rslora=True),
    "patterns": dict(
        target_modules=LINEAR,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 6},
        alpha_pattern={"v_proj": 3, "layers.1.self_attn.q_proj": 5},
    ),
    "fan in, fan out": dict(target_modules=LINEAR, fan_in_fan_out=True),
    "dora": dict(target_modules=LINEAR, use_dora=True),
    "table and head": dict(target_modules=["embed_tokens", "lm_head"]),
    "saved modules": dict(target_modules=["k_proj"], modules_to_save=["lm_head", "norm"]),
    "one layer": dict(target_modules=LINEAR, layers_to_transform=[1], bias="none"),
    "tied": dict(target_modules=["q_proj"]),
    "tied table": dict(target_modules=["embed_tokens"]),
    "tied, saved head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.quick_cases("plain-float32-bfloat16", "dora-bfloat16-float32", "tied-float32-float32")
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("stored", ("float32", "bfloat16"))
@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_merge_and_unload(tmp_path, case, stored, dtype):
    cfg = tiny_config("qwen2", layers=2, tied=case.startswith("tied"))
    base = write_safetensors(tmp_path / "base", tiny_params(cfg), cfg, tokenizer=False)
    kind = getattr(torch, dtype)
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(base, dtype=kind)
    torch.manual_seed(0)
    settings = dict(r=4, lora_alpha=6, init_lora_weights=False) | CASES[case]
    made = peft.get_peft_model(load(), peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:  # as after training: all that is saved has changed
                parameter += torch.randn_like(parameter) / 8
    made.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    if stored == "bfloat16":
        named = safetensors.load_file(file)
        safetensors.save_file({name: t.bfloat16() for name, t in named.items()}, file)
    merged = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter").merge_and_unload()
    want = {name: p.float().numpy() for name, p in merged.state_dict().items()}

    found = open_model(base, tmp_path / "adapter")
    cfg = found.config(dtype)
    assert cfg.tied == (case in ("tied", "tied table"))
    got = found.load(cfg)
    compare(got.embed_VD, want["model.embed_tokens.weight"], case)
    compare(got.norm, want["model.norm.weight"], case)
    compare(got.embed_VD if cfg.tied else got.head_DV.T, want["lm_head.weight"], case)
    for i, layer in enumerate(got.layers):
        for part in "qkvo":
            name = f"model.layers.{i}.self_attn.{part}_proj.weight"
            compare(getattr(layer.attn, part).T, want[name], case)
        for part in ("gate", "up", "down"):
            name = f"model.layers.{i}.mlp.{part}_proj.weight"
            compare(getattr(layer.mlp, part).T, want[name], case)
    plain = open_model(base).load(open_model(base).config(dtype))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), got.layers[1], plain.layers[1])
    assert jax.tree.all(same) == (case in ("tied table", "table and head"))


def compare(got, want, case):
    """Equal bits; with DoRA units of the last place, because the sum of squares has no order."""
    last = float(jax.numpy.finfo(got.dtype).eps)
    got, want = np.asarray(got).astype(np.float32), want.astype(np.float32)
    np.testing.assert_allclose(got, want, rtol=4 * last if case == "dora" else 0)


FAMILIES = {
    "phi3": ["qkv_proj", "gate_up_proj", "o_proj"],  # the file's matrices are several of ours
    "gemma3": ["q_proj", "k_proj", "down_proj"],
    "qwen3-moe": ["q_proj", "o_proj"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_other_families(tmp_path, family):
    base, model = saved(family, tmp_path / "base")
    torch.manual_seed(0)
    settings = dict(r=4, lora_alpha=6, init_lora_weights=False, target_modules=FAMILIES[family])
    made = peft.get_peft_model(model, peft.LoraConfig(**settings))
    made.save_pretrained(tmp_path / "adapter")
    checkpoint = open_model(base, tmp_path / "adapter")
    cfg = checkpoint.config("float32")
    tokens = np.random.default_rng(1).integers(3, 96, (1, 30))
    want = made.merge_and_unload()(torch.from_numpy(tokens)).logits.detach().numpy()
    logits = []
    for found in (checkpoint, checkpoint.base):
        params = found.load(cfg)
        caches = caches_for(params, cfg, 1, 30)
        got, _ = forward(params, jnp.asarray(tokens), caches, causal_step(0, 30, 30), cfg)
        logits.append(np.asarray(got))
    np.testing.assert_allclose(logits[0], want, rtol=0, atol=1e-4)
    assert np.abs(logits[1] - want).max() > 0.01


def test_every_setting_that_peft_writes_is_known(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        write_safetensors(tmp_path / "base", tiny_params(CFG), CFG, tokenizer=False)
    )
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    made.save_pretrained(tmp_path / "adapter")
    found = open_model(tmp_path / "adapter")  # it says where its base is
    assert found.adapter.settings == json.loads(
        (tmp_path / "adapter" / "adapter_config.json").read_text()
    )
    found.check(CFG)
