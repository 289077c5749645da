"""Folding changes nothing but rounding, and names what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qyolop_jax.config import ModelConfig
from qyolop_jax.fold import fold, run_folded
from qyolop_jax.graph import GraphError
from qyolop_jax.model import Panoptic, initial

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def images():
    return jax.random.randint(jax.random.key(2), (2, 64, 96, 3), 0, 256).astype(jnp.uint8)


SLOW = [pytest.param(a, marks=pytest.mark.slow) for a in ("silu", "hardswish")]


@pytest.mark.parametrize("activation", ["relu", *SLOW])
def test_folded_is_the_same(activation, images):
    cfg = ModelConfig(0.125, activation, size=(64, 96))
    model = Panoptic(cfg)
    variables = initial(cfg)
    rng = np.random.default_rng(0)
    moved = lambda a: jnp.asarray(a * rng.uniform(0.8, 1.2, a.shape), jnp.float32)
    variables = jax.tree.map(moved, variables)
    stats = jax.tree.map(
        lambda a: a + jnp.asarray(rng.uniform(0, 0.1, a.shape), jnp.float32),
        variables["batch_stats"],
    )
    variables = dict(variables, batch_stats=stats)
    want = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    graph, params = fold(cfg, variables)
    assert not any(n.norm or n.rep or n.implicit for n in graph.convs)
    found = jax.jit(lambda p, x: run_folded(graph, p, x))(params, images)
    assert set(found) == set(want)
    for name, x in want.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-4 * np.abs(x).max())


def test_variables_of_another_model_are_named():
    small, large = (ModelConfig(w, size=(64, 96)) for w in (0.125, 0.25))
    variables = initial(small)
    with pytest.raises(GraphError, match="another width"):
        fold(large, variables)
    lacking = {k: v for k, v in variables["params"].items() if k != "stem.2"}
    with pytest.raises(GraphError, match=r"lack stem\.2"):
        fold(small, dict(variables, params=lacking))
