"""The model against `transformers` on torch, module by module, and a real one."""

import gzip
import json
import math
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import testing
from llm_jax.attention import attention, causal_step, rms_norm
from llm_jax.cache import KV, empty_caches
from llm_jax.folder import SafetensorsFolder
from llm_jax.formats import open_checkpoint
from llm_jax.generation import generate
from llm_jax.linear import linear
from llm_jax.model import block, embed, forward
from llm_jax.registry import WHEELS, cache_folder
from llm_jax.testing import hf_config, tensors, tiny_config, tiny_params, write_safetensors

TOLERANCE = dict(embedding=0, norm=2e-6, attention=1e-5, mlp=1e-5, block=2e-5, logits=5e-5)
"""Largest absolute difference in float32; activations are of order 1, logits of order 10."""

T = 13


def close(got, want, what):
    want = want.detach().numpy()
    assert np.std(want) > 0.05, "a comparison of zeros shows nothing"
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=TOLERANCE[what])


@pytest.fixture(scope="module",
                params=[(f, t) for f in testing.TINY_FAMILIES for t in (False, True)],
                ids=lambda p: p[0] + ("-tied" if p[1] else ""))  # fmt: skip
def pair(request, tmp_path_factory):
    """The same checkpoint loaded by us and by transformers: (params, cfg, model)."""
    pytest.importorskip("torch", reason="torch is the reference: pip install -e '.[reference]'")
    import torch
    from transformers import AutoModelForCausalLM

    family, tied = request.param
    # theta 500 and 40 positions of scaling: 13 tokens see every branch of Llama 3's frequencies
    changes = {}
    if family == "llama3":
        from llm_jax.rope import Llama3Rope

        changes = dict(rope_theta=500.0, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 40))
    cfg = tiny_config(family, tied=tied, **changes)
    folder = write_safetensors(tmp_path_factory.mktemp(family), tiny_params(cfg), cfg, shards=2)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(model).__name__.lower().startswith(cfg.family)
    checkpoint = open_checkpoint(folder)
    return checkpoint.load(checkpoint.config()), checkpoint.config(), model.eval()


@pytest.fixture
def tokens():
    return np.random.default_rng(5).integers(0, 280, (2, T))


@pytest.fixture
def x(pair):
    return np.random.default_rng(6).normal(size=(2, T, pair[1].d_model)).astype(np.float32)


def rotary(model, x):
    import torch

    return model.model.rotary_emb(torch.from_numpy(x), torch.arange(T)[None])


def causal_mask():
    import torch

    return torch.full((T, T), -torch.inf).triu(1)[None, None]


@pytest.mark.reference
def test_embedding(pair, tokens):
    import torch

    params, cfg, model = pair
    want = model.model.embed_tokens(torch.from_numpy(tokens))
    close(embed(params, jnp.asarray(tokens), cfg), want, "embedding")


@pytest.mark.reference
def test_rms_norm(pair, x):
    import torch

    params, cfg, model = pair
    for i in range(cfg.layers):
        want = model.model.layers[i].input_layernorm(torch.from_numpy(x))
        close(rms_norm(jnp.asarray(x), params.layers[i].attn_norm, cfg.norm_eps), want, "norm")


@pytest.mark.reference
def test_attention(pair, x):
    import torch

    params, cfg, model = pair
    want, _ = model.model.layers[1].self_attn(
        torch.from_numpy(x), position_embeddings=rotary(model, x), attention_mask=causal_mask()
    )
    step = causal_step(0, T, 16)
    got, _ = attention(params.layers[1].attn, jnp.asarray(x), KV.empty(cfg, 2, 16), step, cfg)
    close(got, want, "attention")


@pytest.mark.reference
def test_mlp(pair, x):
    import torch

    params, _, model = pair
    mlp, h = params.layers[0].mlp, jnp.asarray(x)
    got = linear(mlp.down, jax.nn.silu(linear(mlp.gate, h)) * linear(mlp.up, h))
    close(got, model.model.layers[0].mlp(torch.from_numpy(x)), "mlp")


@pytest.mark.reference
def test_decoder_layer(pair, x):
    import torch

    params, cfg, model = pair
    want = model.model.layers[0](
        torch.from_numpy(x), position_embeddings=rotary(model, x), attention_mask=causal_mask()
    )
    want = want[0] if isinstance(want, tuple) else want
    got, _ = block(params.layers[0], jnp.asarray(x), KV.empty(cfg, 2, T), causal_step(0, T, T), cfg)
    close(got, want, "block")


@pytest.mark.reference
def test_logits(pair, tokens):
    import torch

    params, cfg, model = pair
    want = model(torch.from_numpy(tokens)).logits
    got, _ = forward(
        params, jnp.asarray(tokens), empty_caches(cfg, 2, T), causal_step(0, T, T), cfg
    )
    close(got, want, "logits")


@pytest.mark.reference
def test_logits_one_token_at_a_time(pair, tokens):
    import torch

    params, cfg, model = pair
    want = model(torch.from_numpy(tokens)).logits
    caches, step = empty_caches(cfg, 2, 20), jax.jit(forward, static_argnames="cfg")
    for at in range(T):
        token = jnp.asarray(tokens[:, at : at + 1])
        logits, caches = step(params, token, caches, causal_step(at, 1, 20), cfg=cfg)
        close(logits[:, 0], want[:, at], "logits")


@pytest.mark.reference
def test_a_head_of_its_own_though_the_config_says_tied(tmp_path, tokens):
    """transformers warns and takes the head that is in the file."""
    pytest.importorskip("torch", reason="torch is the reference: pip install -e '.[reference]'")
    import torch
    from transformers import AutoModelForCausalLM

    cfg = tiny_config("llama")
    folder = write_safetensors(tmp_path, tiny_params(cfg), cfg)
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(description | dict(tie_word_embeddings=True)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    checkpoint = open_checkpoint(folder)
    params = checkpoint.load(checkpoint.config())
    step = causal_step(0, T, T)
    got, _ = forward(params, jnp.asarray(tokens), empty_caches(cfg, 2, T), step, cfg)
    close(got, model(torch.from_numpy(tokens)).logits, "logits")


def smollm2_path() -> Path:
    name = WHEELS["smollm2-135m"].member
    places = (cache_folder(), Path("~/models").expanduser())
    for path in (place / name for place in places):
        if path.exists():
            return path
    pytest.skip(f"{name} is in neither {places[0]} nor ~/models; llm_jax.registry.find fetches it")


@pytest.fixture(scope="module")
def smollm2():
    checkpoint = open_checkpoint(smollm2_path())
    cfg = checkpoint.config("float32")
    return checkpoint.load(cfg), cfg, checkpoint.tokenizer()


@pytest.mark.reference
@pytest.mark.slow
def test_smollm2_is_transformers_smollm2(smollm2):
    pytest.importorskip("torch", reason="torch is the reference: pip install -e '.[reference]'")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    params, cfg, tokenizer = smollm2
    description = {
        k: v for k, v in hf_config(cfg).items() if k not in ("rope_theta", "torch_dtype")
    }
    description["rope_parameters"] = dict(rope_type="default", rope_theta=cfg.rope_theta)
    model = LlamaForCausalLM(LlamaConfig(**description)).eval()
    weights = {
        k: torch.from_numpy(v.copy())
        for k, v in tensors(params, cfg, SafetensorsFolder.names).items()
    }
    left = model.load_state_dict(weights, strict=False)
    assert left.missing_keys == ["lm_head.weight"]  # tied
    assert left.unexpected_keys == []

    prompt = tokenizer.chat([dict(role="user", content="Name three rivers in Europe.")])
    with torch.no_grad():
        want = model(torch.tensor([prompt])).logits[0].numpy()
        text = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
            max_new_tokens=32, eos_token_id=None, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
    n = len(prompt)
    step = causal_step(0, n, n)
    got, _ = forward(params, jnp.asarray([prompt]), empty_caches(cfg, 1, n), step, cfg)
    difference = np.abs(np.asarray(got[0]) - want).max()
    print(
        f"largest difference of a logit {difference:.1e}, of logits up to {np.abs(want).max():.1f}"
    )
    assert difference < 1e-3
    assert generate(params, prompt, cfg, 32) == text
    print(tokenizer.decode(text))


@pytest.mark.slow
def test_smollm2_perplexity_on_wikitext2(smollm2, shared_data):
    """22.90 on the first three windows of 2,048 tokens; 19.92 on the first ten."""
    params, cfg, tokenizer = smollm2
    source = shared_data / "text" / "wikitext2" / "wiki.test.raw.gz"
    tokens = tokenizer.encode(gzip.decompress(source.read_bytes()).decode("utf-8"))
    assert len(tokens) == 303_415
    window, started = 2048, time.perf_counter()

    @jax.jit
    def loss(params, tokens_1T):
        """Negative log-likelihood of all but the first token, summed."""
        step = causal_step(0, window, window)
        logits, _ = forward(params, tokens_1T, empty_caches(cfg, 1, window), step, cfg)
        chosen = jnp.take_along_axis(logits[0, :-1], tokens_1T[0, 1:, None], axis=-1)[:, 0]
        return jnp.sum(jax.nn.logsumexp(logits[0, :-1], axis=-1) - chosen)

    windows = np.asarray(tokens[: 3 * window], np.int32).reshape(-1, 1, window)
    total = sum(float(loss(params, one)) for one in windows)
    perplexity = math.exp(total / (len(windows) * (window - 1)))
    took = time.perf_counter() - started
    print(f"perplexity {perplexity:.4f} in {took:.0f} s, {os.cpu_count()} cores")
    assert perplexity == pytest.approx(22.90, rel=0.005)
