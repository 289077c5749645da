"""Every family against `transformers`: tiny random checkpoints that transformers itself saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, T, saved

from llm_jax.attention import caches_for, causal_step
from llm_jax.formats import open_checkpoint
from llm_jax.generation import generate
from llm_jax.model import forward
from llm_jax.rope import LinearRope, YarnRope

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    folder, model = saved(request.param, tmp_path_factory.mktemp(request.param))
    checkpoint = open_checkpoint(folder)
    cfg = checkpoint.config("float32")
    return checkpoint.load(cfg), cfg, model


@pytest.mark.quick_cases("gemma3", "olmo2", "qwen2-moe", "gpt-oss", "phi4-mini")
def test_logits(pair):
    import torch

    params, cfg, model = pair
    tokens = np.random.default_rng(1).integers(3, 96, (2, T))
    want = model(torch.from_numpy(tokens)).logits.detach().numpy()
    got, _ = forward(
        params, jnp.asarray(tokens), caches_for(params, cfg, 2, T), causal_step(0, T, T), cfg
    )
    assert np.std(want) > 0.05
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=1e-4)


@pytest.mark.quick_cases("gemma3")
def test_greedy_tokens(pair):
    import torch

    params, cfg, model = pair
    prompt = np.random.default_rng(2).integers(3, 96, T)
    options = dict(max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    want = model.generate(torch.from_numpy(prompt[None]), **options)[0, T:].tolist()
    got = generate(params, prompt.tolist(), cfg, steps=64)
    assert list(np.asarray(got)) == want


def test_configs_say_what_was_asked(tmp_path):
    cfg = open_checkpoint(saved("llama-linear", tmp_path)[0]).config("float32")
    assert cfg.rope_scaling == LinearRope(4.0)
    cfg = open_checkpoint(saved("llama-yarn", tmp_path / "yarn")[0]).config("float32")
    assert isinstance(cfg.rope_scaling, YarnRope) and cfg.rope_scaling.factor == 4
    assert jax.tree.leaves(cfg) == [cfg]
