"""A model on disk comes back as it was, and a file that is something else is named."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from qyolop_jax import weights
from qyolop_jax.config import ModelConfig
from qyolop_jax.model import initial
from qyolop_jax.weights import WeightsError

CFG = ModelConfig(0.125, "relu", detection=("car", "bus"), size=(64, 96))


def test_round_trip(tmp_path):
    variables = initial(CFG, 1)
    weights.save_weights(tmp_path / "a/model.safetensors", CFG, variables)
    cfg, found = weights.load_weights(tmp_path / "a/model.safetensors")
    assert cfg == CFG
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["model.safetensors"]


def test_what_is_something_else_is_named(tmp_path):
    with pytest.raises(WeightsError, match="there is no file"):
        weights.load_weights(tmp_path / "none")
    save_file({"a": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(WeightsError, match="holds no Q-YOLOP model"):
        weights.load_weights(tmp_path / "other")
    weights.save_weights(tmp_path / "m", CFG, initial(CFG))
    (tmp_path / "cut").write_bytes((tmp_path / "m").read_bytes()[:5000])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        weights.load_weights(tmp_path / "cut")
    variables = initial(CFG)
    del variables["params"]["stem.1"]["kernel"]
    weights.save_weights(tmp_path / "lacking", CFG, variables)
    with pytest.raises(WeightsError, match=r"1 arrays do not fit this version.*stem\.1/kernel"):
        weights.load_weights(tmp_path / "lacking")
