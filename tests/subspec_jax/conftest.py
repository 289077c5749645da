"""One tiny model for all tests of speculative decoding, and quick compilation."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from proposers import STEPS

from llm_jax.attention import causal_step
from llm_jax.cache import empty_caches
from llm_jax.config import Config
from llm_jax.generation import generate
from llm_jax.model import forward
from llm_jax.testing import tiny_params
from subspec_jax.draft_model import substitute
from subspec_jax.offload import place
from subspec_jax.verify import Target


@pytest.fixture(scope="package", autouse=True)
def quick_compilation():
    """Most of the time here is XLA's; the programs are the same without its optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tiny():
    """A model of two layers: `params` on the device, `placed` on the host, and drafts by bits."""
    cfg = Config(
        layers=2,
        d_model=32,
        heads=4,
        kv_heads=2,
        head_dim=8,
        d_ff=64,
        vocab=97,
        dtype="float32",
        qkv_bias=True,
    )
    params = tiny_params(cfg)
    placed = dataclasses.replace(params, layers=place(params.layers, 0))
    draft = functools.cache(lambda bits: substitute(placed, bits, 16))
    return SimpleNamespace(cfg=cfg, params=params, placed=placed, draft=draft)


@pytest.fixture(scope="module")
def target(tiny):
    return Target(tiny.placed, tiny.cfg)


@pytest.fixture(scope="module")
def plain(tiny):
    """f(prompt, sampler, seed): what plain decoding of the unstreamed model emits."""

    @functools.cache
    def tokens(prompt, sampler, seed):
        return generate(tiny.params, prompt, tiny.cfg, STEPS, sampler, seed)

    return lambda prompt, sampler, seed=0: tokens(tuple(prompt), sampler, seed)


@pytest.fixture(scope="session")
def looping(tiny):
    """A model like `tiny`, whose layers hardly speak: a token follows from the one before, so that
    its text goes in circles: 10 16 87 66 10 16 87 66 …"""

    def hushed(layer):
        attn = dataclasses.replace(layer.attn, o=layer.attn.o * 0.03)
        mlp = dataclasses.replace(layer.mlp, down=layer.mlp.down * 0.03)
        return dataclasses.replace(layer, attn=attn, mlp=mlp)

    params = dataclasses.replace(tiny.params, layers=tuple(map(hushed, tiny.params.layers)))
    placed = dataclasses.replace(params, layers=place(params.layers, 0))
    draft = functools.cache(lambda bits: substitute(placed, bits, 16))
    return SimpleNamespace(cfg=tiny.cfg, params=params, placed=placed, draft=draft)


LONGEST = 64


@functools.partial(jax.jit, static_argnames="cfg")
def _logits(params, tokens_1T, last, cfg):
    caches, step = empty_caches(cfg, 1, LONGEST), causal_step(0, LONGEST, LONGEST)
    return forward(params, tokens_1T, caches, step, cfg)[0][0, last]


@pytest.fixture(scope="session")
def logits_behind():
    """f(params, tokens, cfg): logits [V] behind a text, by one causal pass and without a cache."""

    def logits(params, tokens, cfg):
        padded = np.pad(np.asarray(tokens, np.int32), (0, LONGEST - len(tokens)))
        return np.asarray(_logits(params, padded[None], jnp.int32(len(tokens) - 1), cfg))

    return logits
