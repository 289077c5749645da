"""The snippets of docs/your-own-model.md run as they stand, and are compared with float64."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from bonsai_qwen3 import CFG, in_float64, plain, tiny
from flax import nnx

from llm_jax.attention import causal_step
from llm_jax.cache import empty_caches
from llm_jax.generation import generate
from llm_jax.lowbit_array import LowBitArray
from llm_jax.model import forward
from llm_jax.testing import write_safetensors

PAGE = Path(__file__).parents[1] / "docs" / "your-own-model.md"
SECTIONS = {
    section.split("\n")[0]: re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    for section in re.split(r"^###? ", PAGE.read_text(), flags=re.M)
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Most of the time here is XLA's; the programs are the same without its optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


PROMPT = [5, 17, 3, 60, 2]


def run(title, **given):
    """What the snippet of a section leaves behind."""
    (snippet,) = SECTIONS[title]
    exec(compile(snippet, f"{PAGE.name}, {title}", "exec"), given)
    return given


def widened(tree):
    """The tree in float64, low-bit arrays dequantized."""
    return jax.tree.map(
        lambda a: np.asarray(a, np.float64), tree, is_leaf=lambda a: isinstance(a, LowBitArray)
    )


def silu(x):
    return x / (1 + np.exp(-x))


def close(found, expected, tolerance=5e-6):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def moved(found, whole):
    """How far the low-bit model is from the model itself."""
    return np.linalg.norm(found - whole) / np.linalg.norm(whole)


def test_every_snippet_is_run():
    assert sum(map(len, SECTIONS.values())) == 10


def test_a_dict():
    made = run("A dict of arrays")
    w, x = widened(made["low"]), np.asarray(made["x"], np.float64)
    for layer in w["layers"]:
        x = x + silu(x @ layer["up"]) @ layer["down"]
    close(made["y"], x @ w["head"])
    assert 0.001 < moved(made["y"], made["apply"](made["params"], made["x"])) < 0.2


def test_nnx():
    made = run("Flax NNX")
    w, x = widened(nnx.to_pure_dict(nnx.state(made["low"]))), np.asarray(made["x"], np.float64)
    for layer in w["layers"].values():
        hidden = silu(x @ layer["up"]["kernel"])
        x = x + hidden @ layer["down"]["kernel"] + layer["down"]["bias"]
    close(made["y"], x)
    assert 0.001 < moved(made["y"], made["model"](made["x"])) < 0.2
    last = nnx.to_pure_dict(made["gradient"])["layers"][2]
    np.testing.assert_array_equal(last["down"]["bias"], np.full(64, 4.0))
    assert "kernel" not in last["down"]


def test_linen():
    made = run("Flax Linen")
    w, x = widened(made["low"])["params"], np.asarray(made["x"], np.float64)
    hidden = silu(x @ w["up"]["kernel"] + w["up"]["bias"])
    close(made["y"], (hidden @ w["down"]["kernel"] + w["down"]["bias"]) @ w["mix"])
    whole = made["model"].apply(made["variables"], made["x"])
    assert 0.001 < moved(made["y"], whole) < 0.2


def test_qwix():
    pytest.importorskip("qwix", reason="qwix is not installed")
    made = run("Arrays of qwix")
    scale = np.asarray(made["theirs"].scale, np.float64)
    expected = np.asarray(made["theirs"].qvalue, np.float64) * scale.repeat(16, 0)
    for low in (made["low"], made["tree"]["w"]):
        np.testing.assert_array_equal(np.asarray(low, np.float32), expected.astype("bfloat16"))
    close(made["y"], np.asarray(made["x"], np.float64) @ widened(made["ours"]))
    assert 0.001 < moved(np.asarray(made["ours"]), made["w"]) < 0.2


def test_a_hugging_face_folder(tmp_path):
    _, params = tiny()
    folder = write_safetensors(tmp_path, params, CFG, tokenizer=False)
    made = run("A Hugging Face folder, or arrays under those names", folder=folder)
    logits(made["params"], made["cfg"], params)
    jax.tree.map(np.testing.assert_array_equal, made["same"], made["params"])
    assert made["back"].keys() == made["arrays"].keys()
    for name, array in made["arrays"].items():
        np.testing.assert_array_equal(made["back"][name], array)


def logits(found, cfg, params):
    """Compares logits of `found` with those of `params` in float64."""
    tokens, T = np.arange(3, 19), 16
    step, caches = causal_step(0, T, T), empty_caches(cfg, 1, T)
    y = jax.jit(forward, static_argnums=4)(found, tokens[None], caches, step, cfg)[0]
    close(y[0], in_float64(params, tokens))


def test_layouts():
    qwen3, params = tiny()
    before = nnx.to_pure_dict(nnx.state(qwen3))
    made = run("Models of bonsai, tunix, gemma and MaxText", qwen3=qwen3, cfg=CFG)
    logits(made["params"], CFG, params)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(qwen3)), before)


@pytest.mark.slow
def test_speculation():
    qwen3, params = tiny()
    made = run("Speculative decoding of your own model", qwen3=qwen3, prompt=PROMPT)
    assert made["tokens"] == plain(qwen3, PROMPT, 24)
    text = PROMPT + made["tokens"]
    expected = in_float64(params, np.array(text[:-1]))[len(PROMPT) - 1 :]
    assert made["tokens"] == expected.argmax(-1).tolist()


@pytest.mark.slow
def test_palu():
    qwen3, params = tiny()
    given = dict(qwen3=qwen3, params=params, cfg=CFG, prompt=PROMPT)
    made = run("Palu as an attention swap", **given)
    assert made["tokens"] == generate(made["palu"], PROMPT, CFG, 24)


@pytest.mark.slow
def test_calibration():
    qwen3, params = tiny()
    batches = [np.random.default_rng(0).integers(0, CFG.vocab, (2, 9))]
    given = dict(qwen3=qwen3, params=params, cfg=CFG, batches=batches)
    made = run("Calibration through your own forward", **given)
    h = np.asarray(params.embed_VD, np.float64)[batches[0]].reshape(18, -1)
    h = h / np.sqrt((h**2).mean(-1, keepdims=True) + CFG.norm_eps)
    h = h * np.asarray(params.layers[0].attn_norm, np.float64)
    close(made["statistics"].layers[0].gram_DD, h.T @ h / 18)
    pairs = zip(params.layers, made["layers"], strict=True)
    layers = tuple(dataclasses.replace(layer, attn=new["latent"]) for layer, new in pairs)
    swapped = dataclasses.replace(params, layers=layers)
    assert generate(swapped, PROMPT, CFG, 8) == generate(made["palu"], PROMPT, CFG, 8)


@pytest.mark.slow
def test_qat():
    made = run("Quantization-aware training of an NNX model")
    head, x = made["layers"]["head"], np.asarray(made["images"], np.float64)
    assert made["layers"].keys() == {"conv", "head"}
    assert np.abs(head.codes).max() == 7 and np.abs(made["layers"]["conv"].codes).max() == 127
    assert made["layers"]["conv"].step_in == pytest.approx((x.max() - x.min()) / 255, rel=0.02)
