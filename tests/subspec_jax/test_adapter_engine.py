"""An engine on an adapter: its text is that of the merged model, raw and from residuals."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import subspec_jax
from experiments import convert
from llm_jax.adapter import CONFIG, WEIGHTS
from llm_jax.generation import generate
from llm_jax.progress import Reporter
from llm_jax.registry import open_model
from llm_jax.testing import tiny_config, tiny_params, write_gguf, write_safetensors
from subspec_jax.methods import MethodError
from subspec_jax.residual import __main__ as residual
from subspec_jax.residual.files import Converted
from subspec_jax.residual.split import decode_layer

CFG = tiny_config("qwen2", layers=3, d_model=128, d_ff=128)
PROMPT = [5, 9, 200, 31, 7]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(the base model's folder, the adapter's)."""
    where, rng = tmp_path_factory.mktemp("adapter"), np.random.default_rng(0)
    base = write_safetensors(where / "base", tiny_params(CFG), CFG)
    adapter = where / "tuned"
    adapter.mkdir()
    settings = dict(peft_type="LORA", r=4, lora_alpha=8, base_model_name_or_path=str(base))
    (adapter / CONFIG).write_text(json.dumps(settings))
    named = {}
    for layer in range(3):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            stem = f"base_model.model.model.layers.{layer}.{name}.lora_"
            inputs = 64 if "o_proj" in name else 128
            named[f"{stem}A.weight"] = rng.normal(0, 0.3, (4, inputs)).astype(np.float32)
            named[f"{stem}B.weight"] = rng.normal(0, 0.3, (128, 4)).astype(np.float32)
    save_file(named, adapter / WEIGHTS)
    return base, adapter


def merged(folders, dtype):
    found = open_model(*folders)
    cfg = found.config(dtype)
    return generate(found.load(cfg), PROMPT, cfg, steps=12)


def test_the_text_is_that_of_the_merged_model(folders):
    base, adapter = folders
    want = merged(folders, "float32")
    assert want != generate(open_model(base).load(CFG), PROMPT, CFG, steps=12)
    with subspec_jax.open(base, memory="1GB", adapter=adapter, dtype="float32") as model:
        assert model.source.name == "base+tuned"
        assert model.generate(PROMPT, 12, eos=()) == want
        identity = model.identity()
    with subspec_jax.open(adapter, memory="1GB", dtype="float32") as model:
        assert model.generate(PROMPT, 12, eos=()) == want
        assert model.identity() == identity
    with subspec_jax.open(base, memory="1GB", dtype="float32") as model:
        assert model.identity() != identity


@pytest.mark.parametrize("command", ("engine", "process of its own", "experiments.convert"))
def test_a_conversion_is_of_the_merged_model(folders, tmp_path, command):
    base, adapter = folders
    out = tmp_path / "out"
    if command == "engine":
        options = dict(dtype="bfloat16", stream="residual", converted=out)
        subspec_jax.open(base, memory="1GB", adapter=adapter, **options).close()
    elif command == "process of its own":
        given = [str(base), str(adapter), "bfloat16", 1, str(out), 4, 64, 0]
        assert residual.main([json.dumps(given)]) == 0
    else:
        words = ["--checkpoint", str(base), "--adapter", str(adapter), "--to", str(out)]
        assert convert.cli([*words, "--quantizer", "nearest"]) == 0
    found = Converted(out)
    want = open_model(base, adapter)
    assert found.manifest["source"] == want.digest()
    got = jax.jit(decode_layer)(jax.tree.map(np.asarray, found.layer(1)))
    layer = want.layer(1, want.config("bfloat16"))
    np.testing.assert_array_equal(got.attn.o, layer.attn.o)
    np.testing.assert_array_equal(got.mlp.down, layer.mlp.down)


class Said(Reporter):
    """Keeps what would be shown."""

    def __init__(self):
        self.lines = []

    def say(self, message, warning=False):
        self.lines.append(message)


def test_what_a_user_should_know_is_said_at_the_start(folders, tmp_path, capsys):
    _, adapter = folders
    path = write_gguf(tmp_path / "m.gguf", tiny_params(CFG), CFG, "Q8_0")
    said = Said()
    subspec_jax.open(path, memory="1GB", adapter=adapter, dtype="float32", reporter=said).close()
    assert said.lines == [
        "stored as Q8_0, 8.50 bits a weight (23 matrices): the target is the model that they "
        "dequantize to, in float32",
        "merged with the adapter tuned (LoRA of rank 4 on 6 matrices)",
    ]
    words = ["--checkpoint", str(adapter), "--to", str(tmp_path / "out")]
    assert convert.cli([*words, "--quantizer", "nearest"]) == 0
    assert said.lines[1] in capsys.readouterr().out


def test_random_weights_have_no_adapter(folders):
    with pytest.raises(MethodError, match="an adapter changes a checkpoint's weights"):
        subspec_jax.open("smollm2-135m", weights="random", adapter=folders[1])
