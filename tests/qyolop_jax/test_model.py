"""The network's nodes against NumPy in float64, its shapes, and what batch norm remembers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qyolop_jax.config import ModelConfig
from qyolop_jax.graph import GraphError, Node, activate, build_graph, max_pool, upsample
from qyolop_jax.model import EPSILON, MOMENTUM, BatchNorm, Conv, Panoptic, initial, logit_bias

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = ModelConfig(width=0.125, size=(64, 96))


def conv64(x, kernel, stride):
    """A convolution with zero padding by the definition, in float64."""
    k = kernel.shape[0]
    x = np.pad(np.float64(x), ((0, 0), (k // 2,) * 2, (k // 2,) * 2, (0, 0)))
    H, W = (x.shape[1] - k) // stride + 1, (x.shape[2] - k) // stride + 1
    out = np.zeros((x.shape[0], H, W, kernel.shape[3]))
    for i in range(k):
        for j in range(k):
            part = x[:, i : i + H * stride : stride, j : j + W * stride : stride]
            out += np.einsum("bhwi,io->bhwo", part, np.float64(kernel[i, j]))
    return out


def normed64(y, p, s):
    scale = np.float64(p["scale"]) / np.sqrt(np.float64(s["var"]) + EPSILON)
    return (y - np.float64(s["mean"])) * scale + np.float64(p["bias"])


ACTS = {
    "none": lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "silu": lambda y: y / (1 + np.exp(-y)),
    "hardswish": lambda y: y * np.clip(y + 3, 0, 6) / 6,
}


def shaken(variables, seed=1):
    """The variables with every number moved, so that nothing is 0 or 1 by its initial value."""
    rng = np.random.default_rng(seed)
    move = lambda a: jnp.asarray(a + rng.uniform(0.02, 0.3, a.shape), jnp.float32)
    return jax.tree.map(move, variables)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_convolution(act, kernel, stride):
    node = Node("n", "conv", ("x",), 8, kernel, stride, act)
    x = jax.random.normal(jax.random.key(0), (2, 8, 10, 4))
    layer = Conv(node, jnp.float32)
    variables = shaken(layer.init(jax.random.key(1), x, False))
    p, s = variables["params"], variables["batch_stats"]
    want = ACTS[act](normed64(conv64(x, p["kernel"], stride), p["norm"], s["norm"]))
    np.testing.assert_allclose(layer.apply(variables, x, False), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("channels", [4, 8])
def test_repconv(channels):
    node = Node("n", "conv", ("x",), channels, 3, act="silu", rep=True)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    layer = Conv(node, jnp.float32)
    variables = shaken(layer.init(jax.random.key(1), x, False))
    p, s = variables["params"], variables["batch_stats"]
    want = normed64(conv64(x, p["kernel"], 1), p["norm"], s["norm"])
    want += normed64(conv64(x, p["kernel1"], 1), p["norm1"], s["norm1"])
    assert ("norm0" in p) == (channels == 4)
    if channels == 4:
        want += normed64(np.float64(x), p["norm0"], s["norm0"])
    want = ACTS["silu"](want)
    np.testing.assert_allclose(layer.apply(variables, x, False), want, rtol=2e-5, atol=2e-5)


def test_implicit():
    node = Node("n", "conv", ("x",), 6, norm=False, implicit=True)
    x = jax.random.normal(jax.random.key(0), (1, 3, 3, 4))
    layer = Conv(node, jnp.float32)
    variables = shaken(layer.init(jax.random.key(1), x, False))
    p = {k: np.float64(v) for k, v in variables["params"].items()}
    want = (conv64(np.float64(x) + p["add"], p["kernel"], 1) + p["bias"]) * p["multiply"]
    np.testing.assert_allclose(layer.apply(variables, x, False), want, rtol=2e-5, atol=2e-5)


def test_batch_norm_learns_its_statistics():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (4, 5, 6, 3))
    layer = BatchNorm()
    variables = layer.init(jax.random.key(1), x, True)
    y, changed = layer.apply(variables, x, True, mutable=["batch_stats"])
    wide = np.float64(x)
    np.testing.assert_allclose(np.mean(y, (0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(y, (0, 1, 2)), 1, atol=1e-3)
    found = changed["batch_stats"]
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    np.testing.assert_allclose(found["mean"], (1 - MOMENTUM) * mean, rtol=1e-5)
    np.testing.assert_allclose(found["var"], MOMENTUM + (1 - MOMENTUM) * var, rtol=1e-5)


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (5, 1), (9, 1)])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_pooling_and_upsampling(kernel, stride, dtype):
    x = np.random.default_rng(0).integers(-99, 99, (1, 6, 8, 2)).astype(dtype)
    node = Node("n", "maxpool", ("x",), 2, kernel, stride)
    p = node.padding
    wide = np.full((1, 6 + 2 * p, 8 + 2 * p, 2), -128, dtype)
    wide[:, p : p + 6, p : p + 8] = x
    H, W = (wide.shape[1] - kernel) // stride + 1, (wide.shape[2] - kernel) // stride + 1
    want = np.array(
        [
            wide[0, i * stride : i * stride + kernel, j * stride : j * stride + kernel].max((0, 1))
            for i in range(H)
            for j in range(W)
        ]
    ).reshape(1, H, W, 2)
    assert (np.asarray(max_pool(jnp.asarray(x), node)) == want).all()
    if dtype == "float32":  # a gradient of one for every window, under jit too
        grad = jax.jit(jax.grad(lambda x: max_pool(x, node).sum()))(jnp.asarray(x))
        assert float(grad.sum()) == want.size
    assert (np.asarray(upsample(jnp.asarray(x))) == x.repeat(2, 1).repeat(2, 2)).all()


def test_activations():
    x = np.linspace(-5, 5, 41)
    for name, want in ACTS.items():
        np.testing.assert_allclose(activate(jnp.float32(x), name), want(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 96), (32, 64)])
def test_shapes(size):
    model = Panoptic(CFG)
    images = jnp.zeros((2, *size, 3), jnp.uint8)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    raw = jax.eval_shape(lambda v: model.apply(v, images, train=False), variables)
    H, W = size
    assert {name: x.shape for name, x in raw.items()} == {
        **{f"detect.{s}": (2, H // s, W // s, 27) for s in (8, 16, 32)},
        "area": (2, H, W, 3),
        "lane": (2, H, W, 4),
    }
    assert all(x.dtype == jnp.float32 for x in raw.values())


@pytest.mark.slow
def test_initial_variables_are_those_of_init():
    """The same tree, and convolutions of the same mean and spread as linen's own `init`."""
    found = initial(CFG, 3)
    images = jnp.zeros((1, 64, 96, 3), jnp.uint8)
    want = jax.eval_shape(
        lambda key: Panoptic(CFG).init(key, images, train=False), jax.random.key(0)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(found, want)
    assert not np.array_equal(*(initial(CFG, s)["params"]["stem.2"]["kernel"] for s in (3, 4)))
    for name in ("stem.4", "head.16", "detect.16", "lane"):
        node = build_graph(CFG).node(name)
        x = jnp.zeros((1, 4, 4, build_graph(CFG).in_channels(node)))
        bias = lambda key, shape, name=name: jnp.asarray(logit_bias(CFG, name, shape))
        own = Conv(node, jnp.float32, bias).init(jax.random.key(0), x, False)["params"]
        for leaf, b in own.items():
            if not isinstance(b, dict):
                a, b = np.asarray(found["params"][name][leaf]), np.asarray(b)
                assert np.mean(a) == pytest.approx(
                    np.mean(b), abs=float(5 * np.std(b) / b.size**0.5) + 1e-6
                )
                assert np.std(a) == pytest.approx(np.std(b), rel=0.5)


@pytest.mark.slow
def test_the_first_guess_and_one_trace():
    model = Panoptic(CFG)
    images = jax.random.randint(jax.random.key(2), (1, 64, 96, 3), 0, 256).astype(jnp.uint8)
    variables = initial(CFG)
    run = jax.jit(chex.assert_max_traces(lambda v, x: model.apply(v, x, train=False), 1))
    raw = run(variables, images)
    run(variables, images)
    assert all(np.isfinite(x).all() for x in raw.values())
    detect = np.asarray(raw["detect.8"]).reshape(-1, 9)
    assert 1 / (1 + np.exp(-detect[:, 4].mean())) < 0.1  # few objects to begin with
    assert (np.asarray(raw["area"]).argmax(-1) == 0).mean() > 0.8


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    images = jax.random.randint(jax.random.key(2), (1, 64, 96, 3), 0, 256).astype(jnp.uint8)
    variables = initial(CFG)
    run = lambda dtype: jax.jit(lambda v, x: Panoptic(CFG, dtype).apply(v, x, train=False))
    full, half = run(jnp.float32)(variables, images), run(jnp.bfloat16)(variables, images)
    for name, x in full.items():
        assert half[name].dtype == jnp.float32
        assert np.abs(half[name] - x).max() < 0.05 * max(1, np.abs(x).max())


@pytest.mark.parametrize("shape", [(1, 100, 96, 3), (64, 96, 3), (1, 64, 96, 1)])
def test_an_image_that_does_not_fit(shape):
    with pytest.raises(GraphError, match="multiples of 32"):
        Panoptic(CFG).init(jax.random.key(0), jnp.zeros(shape, jnp.uint8), train=False)
