"""A tiny model with random statistics, for all tests of Palu."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llm_jax.testing import tiny_config, tiny_params
from palu_jax.calibration import LayerStatistics, Statistics


@pytest.fixture(scope="package", autouse=True)
def quick_compilation():
    """Most of the time here is XLA's; the programs are the same without its optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def moment(rng, size, tokens=400):
    """The second moment of correlated vectors with a mean: (E x x^T, E x)."""
    x = rng.normal(size=(tokens, size)) @ rng.normal(size=(size, size)) * 0.3 + rng.normal(
        size=size
    )
    return (x.T @ x / tokens).astype(np.float32), x.mean(0).astype(np.float32)


def random_statistics(cfg, seed=0) -> Statistics:
    rng, layers = np.random.default_rng(seed), []
    width = cfg.kv_heads * cfg.head_dim
    for _ in range(cfg.layers):
        gram, mean = moment(rng, cfg.d_model)
        query = np.stack([moment(rng, cfg.head_dim)[0] for _ in range(cfg.kv_heads)])
        grads = [moment(rng, width)[0] for _ in "kv"]
        fisher = [rng.random((cfg.d_model, width)).astype(np.float32) for _ in "kv"]
        layers.append(LayerStatistics(gram, mean, query, *grads, *fisher))
    return Statistics(tuple(layers), 400, 4)


@pytest.fixture(scope="package")
def tiny():
    """kv heads enough for every granularity: `cfg`, `params`, `statistics`."""
    cfg = tiny_config("qwen2", heads=6, kv_heads=3, d_model=48, vocab=96, d_ff=64)
    return SimpleNamespace(cfg=cfg, params=tiny_params(cfg), statistics=random_statistics(cfg))
