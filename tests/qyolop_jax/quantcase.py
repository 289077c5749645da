"""Small folded graphs with every operation, for the tests of quantization, integers and export."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qyolop_jax.graph import Graph, Node
from qyolop_jax.integer import IntegerModel, to_integer
from qyolop_jax.scales import DEFAULT, PRE, Settings, plan_quantization

COUNT = 3 * (5 + 2)


def conv(name, x, channels, kernel=1, stride=1, act="none"):
    return Node(name, "conv", (x,), channels, kernel, stride, act, norm=False)


def small_graph(act: str) -> Graph:
    """Strides, concatenations of concatenations, three pools, upsampling, odd channel counts."""
    nodes = (
        Node("image", "input", (), 3),
        conv("stem", "image", 7, 3, 2, act),
        conv("a", "stem", 5, 3, 2, act),
        Node("pool", "maxpool", ("stem",), 7, 2, 2),
        conv("b", "pool", 4, 1, 1, act),
        Node("ab", "concat", ("a", "b"), 9),
        conv("down", "ab", 6, 3, 2, act),
        conv("point", "down", 6, 1, 2, act),
        Node("up0", "upsample", ("point",), 6),
        Node("pool5", "maxpool", ("up0",), 6, 5, 1),
        Node("pool9", "maxpool", ("up0",), 6, 9, 1),
        Node("pools", "concat", ("up0", "pool5", "pool9"), 18),
        conv("mid", "pools", 8, 3, 1, act),
        Node("up", "upsample", ("mid",), 8),
        Node("cat", "concat", ("up", "ab"), 17),
        conv("last", "cat", 5, 3, 1, act),
        conv("detect.8", "mid", COUNT),
        conv("area", "last", 3, 3),
    )
    return Graph(nodes, ("detect.8", "area"))


def random_params(graph: Graph, seed=0):
    rng = np.random.default_rng(seed)
    params = {}
    for node in graph.convs:
        shape = (node.kernel, node.kernel, graph.in_channels(node), node.channels)
        kernel = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:3]))
        kernel *= rng.uniform(0.2, 3, node.channels)  # channels differ
        params[node.name] = dict(
            kernel=jnp.asarray(kernel, jnp.float32),
            bias=jnp.asarray(rng.normal(size=node.channels) * 0.3, jnp.float32),
        )
    return params


def images(seed=0, shape=(2, 64, 96, 3)):
    rng = np.random.default_rng(seed)
    B, H, W, C = shape
    coarse = rng.uniform(0, 255, (B, H // 8, W // 8, C)).repeat(8, 1).repeat(8, 2)
    return jnp.asarray(np.clip(coarse + rng.normal(size=shape) * 20, 0, 255), jnp.uint8)


SHIPPED = Path(__file__).parents[2] / "experiments/checkpoints/roads-int8.safetensors"


@functools.cache
def small_model(act: str, settings: Settings = DEFAULT) -> IntegerModel:
    """Integers of `small_graph` with ranges that were not calibrated, which is quicker."""
    graph = small_graph(act)
    scales = {}
    for name, parts in plan_quantization(graph, settings).parts.items():
        ends = [0.0 if graph.node(name.removesuffix(PRE)).act == "relu" else -3.0, 5.0]
        scales[name] = jnp.asarray([ends] * (int(parts.max()) + 1), jnp.float32)
    return to_integer(graph, random_params(graph), scales, settings)


def off_by(model: IntegerModel, found: dict, want: dict) -> dict[str, np.ndarray]:
    """How many steps each value is off, by output; both have the same outputs and shapes."""
    assert set(found) == set(want)
    for name, a in want.items():
        assert found[name].shape == a.shape and len(np.unique(a)) > 10, name  # something flows
    step = lambda name: np.asarray(model.outputs[name]["step"])
    return {n: np.abs(np.asarray(found[n]) - a) / step(n) for n, a in want.items()}
