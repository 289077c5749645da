"""The network in Flax linen, one submodule per convolution, from the nodes of `build_graph`.

    model, variables = Panoptic(cfg), initial(cfg)  # {"params", "batch_stats"}
    raw, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])

Images are uint8 RGB [B, H, W, 3]. `raw` has detect.8, detect.16 and detect.32 [B, H/s, W/s,
3 (5 + classes)] (anchor by anchor: x, y, w, h, objectness, classes) and the logits area and lane
[B, H, W, classes], float32. Parameters and batch statistics are float32 whatever the dtype.
"""

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.extras import need
from qyolop_jax.config import ModelConfig
from qyolop_jax.graph import (
    Node,
    activate,
    build_graph,
    check_size,
    convolve,
    normalized,
    run_graph,
)

if TYPE_CHECKING:
    import flax.linen as nn
else:
    nn = need("flax.linen", "vision", "the Q-YOLOP network")

EPSILON, MOMENTUM = 1e-3, 0.97
"""Of batch norm, as in YOLOv7; MOMENTUM is the share of the old running value."""
BACKGROUND = 2.0
"""First bias of background; that of every other class of a mask is 0."""


class BatchNorm(nn.Module):
    """Normalizes over batch and pixels; scale and bias; running statistics in "batch_stats"."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        C = x_BHWC.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (C,))
        var = self.variable("batch_stats", "var", jnp.ones, (C,))
        if train:
            wide = x_BHWC.astype(jnp.float32)
            now = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
            if not self.is_initializing():
                mean.value = MOMENTUM * mean.value + (1 - MOMENTUM) * now[0]
                var.value = MOMENTUM * var.value + (1 - MOMENTUM) * now[1]
        else:
            now = mean.value, var.value
        factor = scale * jax.lax.rsqrt(now[1] + EPSILON)
        shift = bias - now[0] * factor
        wide = lambda a: a.astype(x_BHWC.dtype)[None, None, None]
        return x_BHWC * wide(factor) + wide(shift)


class Conv(nn.Module):
    """The trained form of one convolution node."""

    node: Node
    dtype: jnp.dtype
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        node, inner = self.node, x.shape[-1]
        x = x.astype(self.dtype)
        if node.implicit:
            add = self.param("add", nn.initializers.normal(0.02), (inner,))
            x = x + add.astype(self.dtype)[None, None, None]
        y = self.kernel("kernel", node, x)
        if node.norm:
            y = BatchNorm(name="norm")(y, train)
        else:
            bias = self.param("bias", self.bias_init, (node.channels,))
            y = y + bias.astype(self.dtype)[None, None, None]
        if node.rep:
            small = Node(node.name, "conv", node.inputs, node.channels, 1, node.stride)
            y += BatchNorm(name="norm1")(self.kernel("kernel1", small, x), train)
            if inner == node.channels and node.stride == 1:
                y += BatchNorm(name="norm0")(x, train)
        if node.implicit:
            by = self.param(
                "multiply", lambda *a: 1 + nn.initializers.normal(0.02)(*a), (node.channels,)
            )
            y = y * by.astype(self.dtype)[None, None, None]
        return activate(y, node.act)

    def kernel(self, name: str, node: Node, x: jax.Array) -> jax.Array:
        """The convolution of x with a new parameter of this name."""
        he = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        shape = (node.kernel, node.kernel, x.shape[-1], node.channels)
        return convolve(x, self.param(name, he, shape).astype(self.dtype), node)


class Panoptic(nn.Module):
    """The whole network."""

    cfg: ModelConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_u8: jax.Array, train: bool) -> dict[str, jax.Array]:
        check_size(images_u8.shape)
        cfg, graph = self.cfg, build_graph(self.cfg)

        def conv(node: Node, x):
            bias = lambda key, shape: jnp.asarray(logit_bias(cfg, node.name, shape))
            return Conv(node, self.dtype, bias, name=node.name)(x, train)

        raw = run_graph(graph, normalized(images_u8).astype(self.dtype), conv)
        return {name: x.astype(jnp.float32) for name, x in raw.items()}


def initial(cfg: ModelConfig, seed: int = 0) -> dict:
    """Random variables with the distributions of `Panoptic.init`, but drawn by NumPy.

    That takes no time instead of half a minute: JAX compiles a program for every shape.
    """
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    abstract = lambda key, x: Panoptic(cfg).init(key, x, train=False)
    shapes = jax.eval_shape(abstract, jax.random.key(0), images)
    rng = np.random.default_rng(seed)

    def draw(path, like):
        node, name = path[1].key, path[-1].key
        if name in ("kernel", "kernel1"):
            found = rng.normal(size=like.shape) * math.sqrt(2 / math.prod(like.shape[:3]))
        elif name in ("add", "multiply"):
            found = (name == "multiply") + 0.02 * rng.normal(size=like.shape)
        elif name in ("scale", "var"):
            found = np.ones(like.shape)
        elif len(path) == 3 and name == "bias":  # of a convolution whose output is logits
            found = logit_bias(cfg, node, like.shape)
        else:
            found = np.zeros(like.shape)
        return jnp.asarray(found, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def logit_bias(cfg: ModelConfig, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """First biases of logits: few objects, as in YOLOv7, and mostly background in masks."""
    bias = np.zeros(shape, np.float32)
    if name in ("area", "lane"):
        bias[0] = BACKGROUND
    elif name.startswith("detect."):  # eight objects in an image, classes equally likely
        cells, classes = (cfg.size[1] / int(name.split(".")[1])) ** 2, len(cfg.detection)
        one = [0.0] * 4 + [math.log(8 / cells)] + [math.log(0.6 / (classes - 0.99))] * classes
        bias[:] = np.tile(one, shape[0] // len(one))
    return bias
