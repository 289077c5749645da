"""Layouts of other projects: each entry written out, and every tree there and back."""

import dataclasses

import jax
import numpy as np
import pytest

import llm_jax
from llm_jax import layouts
from llm_jax.layout import LayoutError
from llm_jax.testing import tiny_config, tiny_params

L, D, N, K, H, F, V = 3, 64, 4, 2, 16, 96, 288
QWEN3 = tiny_config("qwen3", layers=L, head_dim=H)
LLAMA = tiny_config("llama", layers=L)
GEMMA = dataclasses.replace(
    tiny_config("qwen3", layers=L, head_dim=H, tied=True),
    family="gemma3_text",
    norms="around",
    wide_gains=True,
)
CASES = {
    "bonsai": (layouts.BONSAI_QWEN3, QWEN3),
    "bonsai, kernels": (layouts.BONSAI_QWEN3_KERNELS, QWEN3),
    "bonsai, tied": (layouts.BONSAI_QWEN3, tiny_config("qwen3", layers=L, head_dim=H, tied=True)),
    "tunix": (layouts.TUNIX_GEMMA3, GEMMA),
    "gemma": (layouts.GEMMA3, GEMMA),
    "llama": (layouts.MAXTEXT_LLAMA, LLAMA),
    "llama, scanned": (layouts.MAXTEXT_LLAMA_SCANNED, LLAMA),
    "qwen3": (layouts.MAXTEXT_QWEN3, QWEN3),
    "qwen3, scanned": (layouts.MAXTEXT_QWEN3_SCANNED, QWEN3),
    "qwen3, tied": (layouts.MAXTEXT_QWEN3, tiny_config("qwen3", layers=L, head_dim=H, tied=True)),
}
every_case = pytest.mark.parametrize("layout, cfg", CASES.values(), ids=CASES)


def hf(cfg):
    return llm_jax.params_to_hf(tiny_params(cfg), cfg)


@every_case
def test_there_and_back(layout, cfg):
    params = tiny_params(cfg)
    named = llm_jax.params_to_hf(params, cfg)
    tree = layout.from_hf(named, cfg)
    again = layout.to_hf(tree, cfg)
    assert again.keys() == named.keys()
    for name, expected in named.items():  # sqrt(16) and halves are exact
        np.testing.assert_array_equal(again[name], expected, name)
    found = llm_jax.params_from_hf(again, cfg)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1.2e-7, rtol=0), found, params)


def names(i):
    at = f"model.layers.{i}."
    return {k: f"{at}self_attn.{k}_proj.weight" for k in "qkvo"} | {
        k: f"{at}mlp.{k}_proj.weight" for k in ("gate", "up", "down")
    }


def test_bonsai():
    a = hf(QWEN3)
    tree = layouts.BONSAI_QWEN3.from_hf(a, QWEN3)
    for i in range(L):
        n, layer = names(i), tree["layers"][i]
        equal = np.testing.assert_array_equal
        equal(layer["attn"]["q_proj"]["w"], a[n["q"]].T.reshape(D, N, H))
        equal(layer["attn"]["k_proj"]["w"], a[n["k"]].T.reshape(D, K, H))
        equal(layer["attn"]["v_proj"]["w"], a[n["v"]].T.reshape(D, K, H))
        equal(layer["attn"]["o_proj"]["w"], a[n["o"]].T.reshape(N, H, D))
        equal(layer["mlp"]["down_proj"]["kernel"], a[n["down"]].T)
        equal(layer["input_layernorm"]["w"], a[f"model.layers.{i}.input_layernorm.weight"])
        equal(layer["attn"]["q_norm"]["w"], a[f"model.layers.{i}.self_attn.q_norm.weight"])
    equal(tree["lm_head"]["w"], a["lm_head.weight"].T)


@pytest.mark.parametrize("layout, at", [("TUNIX_GEMMA3", "layers"), ("GEMMA3", "layer")])
def test_gemma3(layout, at):
    a, layout = hf(GEMMA), getattr(layouts, layout)
    tree = layout.from_hf(a, GEMMA)
    equal = np.testing.assert_array_equal
    for i in range(L):
        n, layer = names(i), tree["layers"][i] if at == "layers" else tree[f"layer_{i}"]
        equal(layer["attn"]["q_einsum"]["w"], a[n["q"]].reshape(N, H, D).transpose(0, 2, 1))
        for c, part in enumerate("kv"):
            kv = layer["attn"]["kv_einsum"]["w"][c]
            equal(kv, a[n[part]].reshape(K, H, D).transpose(0, 2, 1))
        equal(layer["attn"]["attn_vec_einsum"]["w"], a[n["o"]].T.reshape(N, H, D))
        if at == "layers":
            equal(layer["mlp"]["gate_proj"]["kernel"], a[n["gate"]].T)
        else:
            equal(layer["mlp"]["gating_einsum"], np.stack([a[n["gate"]], a[n["up"]]]))
            equal(layer["mlp"]["linear"], a[n["down"]].T)
        norm = f"model.layers.{i}.post_attention_layernorm.weight"
        equal(layer["post_attention_norm"]["scale"], a[norm])
        norm = f"model.layers.{i}.pre_feedforward_layernorm.weight"
        equal(layer["pre_ffw_norm"]["scale"], a[norm])


@pytest.mark.parametrize("scanned", [False, True])
def test_maxtext_llama(scanned):
    a = hf(LLAMA)
    layout = layouts.MAXTEXT_LLAMA_SCANNED if scanned else layouts.MAXTEXT_LLAMA
    tree = layout.from_hf(a, LLAMA)["decoder"]
    for i in range(L):
        layer = jax.tree.map(lambda w, i=i: w[:, i], tree["layers"]) if scanned else tree[
            f"layers_{i}"]  # fmt: skip
        q, k = (layer["self_attention"][name]["kernel"] for name in ("query", "key"))
        assert q.shape == (D, N, H) and k.shape == (D, K, H)
        for pair in range(H // 2):  # halves become neighbours, and 1 / sqrt(H) is in the query
            for own, stored in ((2 * pair, pair), (2 * pair + 1, pair + H // 2)):
                expected = a[names(i)["q"]].reshape(N, H, D)[:, stored] / 4
                np.testing.assert_array_equal(q[:, :, own].T, expected)
                expected = a[names(i)["k"]].reshape(K, H, D)[:, stored]
                np.testing.assert_array_equal(k[:, :, own].T, expected)
        wo = layer["mlp"]["wo"]["kernel"]
        np.testing.assert_array_equal(wo, a[names(i)["down"]].T)


def test_scanned_layers_are_along_the_second_axis():
    tree = layouts.MAXTEXT_QWEN3_SCANNED.from_hf(hf(QWEN3), QWEN3)
    apart = layouts.MAXTEXT_QWEN3.from_hf(hf(QWEN3), QWEN3)
    stack = tree["decoder"]["layers"]
    assert stack["self_attention"]["query"]["kernel"].shape == (D, L, N, H)
    for i in range(L):
        one = jax.tree.map(lambda w, i=i: w[:, i], stack)
        jax.tree.map(np.testing.assert_array_equal, one, apart["decoder"][f"layers_{i}"])


def test_what_does_not_fit_is_listed():
    tree = layouts.BONSAI_QWEN3.from_hf(hf(QWEN3), QWEN3)
    tree["rope"] = np.zeros(3)
    del tree["final_norm"]
    tree["lm_head"]["w"] = tree["lm_head"]["w"].T
    with pytest.raises(LayoutError) as error:
        layouts.BONSAI_QWEN3.to_hf(tree, QWEN3)
    for words in ("final_norm/w is missing", "rope has no place", "lm_head/w has shape"):
        assert words in str(error.value)
    named = hf(QWEN3)
    del named["model.norm.weight"]
    with pytest.raises(LayoutError, match=r"model.norm.weight is missing"):
        layouts.BONSAI_QWEN3.from_hf(named, QWEN3)
