"""The network as a list of nodes: the model, folding, quantization, integers and export follow it.

ELAN backbone, SPPCSPC, FPN and PAN with ELAN-H blocks and RepConv heads as in YOLOv7 (arXiv
2207.02696); two decoders for masks as in YOLOP (arXiv 2108.11250): the one for the drivable area
reads the backbone before the FPN, the one for lanes the end of the FPN. At 384x640, 4 classes:

    width    parameters    multiply-adds    of backbone / area / lane
    1.00     37.4 M        38.6 G           19.8 / 4.7 / 3.0
    0.50      9.4 M         9.7 G            5.0 / 1.2 / 0.8
    0.25      2.4 M         2.6 G            1.3 / 0.3 / 0.2
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qyolop_jax import QyolopError
from qyolop_jax.config import ModelConfig

ACTS = ("silu", "relu", "hardswish", "none")


class GraphError(QyolopError):
    """An inconsistent graph, or images that do not fit it."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation. Convolutions pad with zeros; pooling ignores its padding. Upsampling doubles
    height and width, by nearest neighbour."""

    name: str
    op: Literal["input", "conv", "maxpool", "upsample", "concat"]
    inputs: tuple[str, ...]
    channels: int
    """Channels of its output."""
    kernel: int = 1
    stride: int = 1
    act: Literal["silu", "relu", "hardswish", "none"] = "none"
    norm: bool = True
    """Batch norm after the convolution; without it the convolution has a bias."""
    rep: bool = False
    """RepConv: a 3x3 and a 1x1, each with batch norm, and a batch norm alone where shapes allow."""
    implicit: bool = False
    """A learned vector is added to the input, another multiplies the output (YOLOR)."""

    @property
    def padding(self) -> int:
        """Pixels on every side: kernel // 2, or 0 where stride and kernel are equal."""
        return 0 if self.kernel == self.stride else self.kernel // 2


@dataclasses.dataclass(frozen=True)
class Graph:
    """A network: nodes in the order of computation, and the names of its outputs."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    def node(self, name: str) -> Node:
        """The node of this name. GraphError where there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise GraphError(f"no node {name!r}")

    def consumers(self, name: str) -> tuple[Node, ...]:
        """The nodes that read this node."""
        return tuple(n for n in self.nodes if name in n.inputs)

    @property
    def convs(self) -> tuple[Node, ...]:
        """The convolutions."""
        return tuple(n for n in self.nodes if n.op == "conv")

    def in_channels(self, node: Node) -> int:
        """Channels of the node's first input."""
        return self.node(node.inputs[0]).channels

    def to_json(self) -> tuple[str, str]:
        """The nodes and the outputs as JSON."""
        nodes = [dataclasses.asdict(n) for n in self.nodes]
        return json.dumps(nodes), json.dumps(self.outputs)

    @classmethod
    def from_json(cls, nodes: str, outputs: str) -> "Graph":
        """The graph that `to_json` wrote. GraphError for anything else."""
        try:
            found = [Node(**(n | dict(inputs=tuple(n["inputs"])))) for n in json.loads(nodes)]
            names = tuple(json.loads(outputs))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise GraphError(f"the description of the graph is damaged: {error}") from error
        before: dict[str, Node] = {}
        for n in found:
            _check_node(n, before)
            before[n.name] = n
        if not names or not all(isinstance(n, str) and n in before for n in names):
            raise GraphError(f"outputs {names}; expected names of nodes")
        return cls(tuple(found), names)


def _check_node(n: Node, before: dict[str, Node]) -> None:
    """GraphError unless this is a node that can follow the nodes `before`."""
    whole = lambda v, most: isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= most
    good = isinstance(n.name, str) and n.name not in before and len(n.name.split("/")[0]) > 0
    good = good and "/" not in n.name and whole(n.channels, 10**5)
    good = good and whole(n.kernel, 99) and whole(n.stride, 99) and n.act in ACTS
    good = good and all(isinstance(v, bool) for v in (n.norm, n.rep, n.implicit))
    good = good and all(isinstance(i, str) and i in before for i in n.inputs)
    if good:
        read = [before[i].channels for i in n.inputs]
        good = {
            "input": not read and n.channels == 3 and not before,
            "conv": len(read) == 1,
            "maxpool": read == [n.channels],
            "upsample": read == [n.channels],
            "concat": sum(read) == n.channels,
        }.get(n.op if isinstance(n.op, str) else "", False)
    if not good:
        raise GraphError(f"node {str(n.name)[:40]!r} is damaged, or does not fit those before it")


class Builder:
    """Collects nodes; each method returns the name of the last node that it adds."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        self.nodes: list[Node] = [Node("image", "input", (), 3)]

    def scaled(self, channels: int) -> int:
        """The number of channels at this width: a multiple of 4, at least 4."""
        return max(4, round(channels * self.cfg.width / 4) * 4)

    def add(self, node: Node) -> str:
        """Adds a node."""
        self.nodes.append(node)
        return node.name

    def channels(self, name: str) -> int:
        """Channels of the output of a node."""
        return next(n.channels for n in self.nodes if n.name == name)

    def conv(
        self, name: str, x: str, channels: int, kernel: int = 1, stride: int = 1, **rest: Any
    ) -> str:
        """A convolution with batch norm and activation; `rest` are other fields of `Node`."""
        rest = dict(act=self.cfg.activation) | rest
        return self.add(Node(name, "conv", (x,), self.scaled(channels), kernel, stride, **rest))

    def logits(
        self, name: str, x: str, channels: int, implicit: bool = False, kernel: int = 1
    ) -> str:
        """A convolution with bias and without activation, not scaled by the width."""
        return self.add(Node(name, "conv", (x,), channels, kernel, norm=False, implicit=implicit))

    def concat(self, name: str, *inputs: str) -> str:
        """The inputs side by side, by channels."""
        return self.add(Node(name, "concat", inputs, sum(map(self.channels, inputs))))

    def pool(self, name: str, x: str, kernel: int, stride: int) -> str:
        """Max pooling."""
        return self.add(Node(name, "maxpool", (x,), self.channels(x), kernel, stride))

    def up(self, name: str, x: str) -> str:
        """Twice the height and width."""
        return self.add(Node(name, "upsample", (x,), self.channels(x)))

    def elan(self, name: str, x: str, inner: int, outer: int) -> str:
        """Two 1x1 paths, one followed by four 3x3; both, its middle and its end are joined."""
        a = self.conv(f"{name}.a", x, inner)
        b = self.conv(f"{name}.b", x, inner)
        c = self.conv(f"{name}.c1", b, inner, 3)
        c = self.conv(f"{name}.c2", c, inner, 3)
        d = self.conv(f"{name}.d1", c, inner, 3)
        d = self.conv(f"{name}.d2", d, inner, 3)
        return self.conv(f"{name}.out", self.concat(f"{name}.cat", d, c, b, a), outer)

    def elan_h(self, name: str, x: str, inner: int, outer: int) -> str:
        """Like `elan` with four 3x3 of half the channels, all of them joined."""
        a = self.conv(f"{name}.a", x, inner)
        b = self.conv(f"{name}.b", x, inner)
        chain = [b]
        for i in range(4):
            chain.append(self.conv(f"{name}.c{i + 1}", chain[-1], inner // 2, 3))
        joined = self.concat(f"{name}.cat", *chain[:0:-1], b, a)
        return self.conv(f"{name}.out", joined, outer)

    def down(self, name: str, x: str, channels: int, *others: str) -> str:
        """Half the size: a strided 3x3 and max pooling, `channels` each, joined with `others`."""
        a = self.conv(f"{name}.a1", x, channels)
        a = self.conv(f"{name}.a2", a, channels, 3, 2)
        b = self.conv(f"{name}.b", self.pool(f"{name}.pool", x, 2, 2), channels)
        return self.concat(f"{name}.cat", a, b, *others)

    def spp(self, name: str, x: str, channels: int) -> str:
        """SPPCSPC: max pooling of 5, 9 and 13 on one of two paths."""
        y = self.conv(f"{name}.1", x, channels)
        y = self.conv(f"{name}.3", y, channels, 3)
        y = self.conv(f"{name}.4", y, channels)
        pools = [self.pool(f"{name}.pool{k}", y, k, 1) for k in (5, 9, 13)]
        y = self.conv(f"{name}.5", self.concat(f"{name}.pools", y, *pools), channels)
        y = self.conv(f"{name}.6", y, channels, 3)
        shortcut = self.conv(f"{name}.2", x, channels)
        return self.conv(f"{name}.7", self.concat(f"{name}.cat", y, shortcut), channels)

    def decoder(self, name: str, x: str, classes: int) -> str:
        """Logits at full size, from features at an eighth of it."""
        x = self.conv(f"{name}.8", x, 128, 3)
        x = self.elan(f"{name}.4", self.up(f"{name}.up4", x), 32, 80)
        x = self.conv(f"{name}.4.last", x, 32, 3)
        x = self.conv(f"{name}.2.a", self.up(f"{name}.up2", x), 32, 3)
        x = self.conv(f"{name}.2.b", x, 16, 3)
        x = self.conv(f"{name}.1", self.up(f"{name}.up1", x), 8, 3)
        return self.logits(name, x, classes, kernel=3)


def build_graph(cfg: ModelConfig) -> Graph:
    """The network's `Graph`; outputs detect.8, detect.16, detect.32, area and lane."""
    b = Builder(cfg)
    x = b.conv("stem.1", "image", 32, 3)
    x = b.conv("stem.2", x, 64, 3, 2)
    x = b.conv("stem.3", x, 64, 3)
    x = b.conv("stem.4", x, 128, 3, 2)
    x = b.elan("backbone.4", x, 64, 256)
    c3 = x = b.elan("backbone.8", b.down("backbone.down8", x, 128), 128, 512)
    c4 = x = b.elan("backbone.16", b.down("backbone.down16", x, 256), 256, 1024)
    x = b.elan("backbone.32", b.down("backbone.down32", x, 512), 256, 1024)

    p5 = b.spp("neck.spp", x, 512)
    x = b.up("neck.up16", b.conv("neck.up16.in", p5, 256))
    side = b.conv("neck.side16", c4, 256)
    p4 = b.elan_h("neck.16", b.concat("neck.cat16", side, x), 256, 256)
    x = b.up("neck.up8", b.conv("neck.up8.in", p4, 128))
    side = b.conv("neck.side8", c3, 128)
    p3 = b.elan_h("neck.8", b.concat("neck.cat8", side, x), 128, 128)
    n4 = b.elan_h("neck.n16", b.down("neck.down16", p3, 128, p4), 256, 256)
    n5 = b.elan_h("neck.n32", b.down("neck.down32", n4, 256, p5), 512, 512)

    count = 3 * (5 + len(cfg.detection))
    for stride, level, channels in zip(cfg.strides, (p3, n4, n5), (256, 512, 1024), strict=True):
        x = b.conv(f"head.{stride}", level, channels, 3, rep=True)
        b.logits(f"detect.{stride}", x, count, implicit=True)
    b.decoder("area", c3, len(cfg.area))
    b.decoder("lane", p3, len(cfg.lane))
    return Graph(tuple(b.nodes), (*(f"detect.{s}" for s in cfg.strides), "area", "lane"))


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters and multiply-adds of every convolution, for one image size."""

    parameters: dict[str, int]
    macs: dict[str, int]

    def total(self, start: str = "") -> tuple[int, int]:
        """(parameters, multiply-adds) of the nodes whose names begin with `start`."""
        pick = lambda table: sum(n for name, n in table.items() if name.startswith(start))
        return pick(self.parameters), pick(self.macs)


def count(graph: Graph, size: tuple[int, int], fused: bool = True) -> Counts:
    """The `Counts` as deployed (`fused`: one kernel and one bias each) or as trained."""
    scales, parameters, macs = {}, {}, {}
    for node in graph.nodes:
        before = scales[node.inputs[0]] if node.inputs else 1
        scales[node.name] = before / 2 if node.op == "upsample" else before * node.stride
        if node.op != "conv":
            continue
        inner, kernels = graph.in_channels(node), [node.kernel]
        if node.rep and not fused:
            kernels.append(1)
        weights = sum(k * k for k in kernels) * inner * node.channels
        pixels = size[0] * size[1] / scales[node.name] ** 2
        macs[node.name] = round(weights * pixels)
        extra = node.channels
        if not fused:
            extra = node.channels * (2 * len(kernels) if node.norm else 1)
            if node.rep and inner == node.channels and node.stride == 1:
                extra += 2 * node.channels
            if node.implicit:
                extra += inner + node.channels
        parameters[node.name] = weights + extra
    return Counts(parameters, macs)


def check_size(shape: Sequence[int]) -> None:
    """GraphError unless the shape is [B, H, W, 3] with H and W multiples of 32."""
    if len(shape) != 4 or shape[3] != 3 or any(n < 32 or n % 32 for n in shape[1:3]):
        raise GraphError(
            f"images of shape {tuple(shape)}; expected [B, H, W, 3] with H and W multiples of 32"
        )


def normalized(images_u8: jax.Array) -> jax.Array:
    """float32 (x - 128) / 64: exact in eight bits, and padding with zeros is mid-grey."""
    return (images_u8.astype(jnp.float32) - 128) / 64


def run_graph(graph: Graph, x: jax.Array, conv: Callable) -> dict[str, jax.Array]:
    """The outputs by name; `conv(node, x)` computes the convolutions, all else is done here."""
    values: dict[str, jax.Array] = {}
    for node in graph.nodes:
        inputs = [values[name] for name in node.inputs]
        if node.op == "input":
            values[node.name] = x
        elif node.op == "conv":
            with jax.named_scope(node.name):
                values[node.name] = conv(node, inputs[0])
        elif node.op == "concat":
            values[node.name] = jnp.concatenate(inputs, axis=-1)
        elif node.op == "maxpool":
            values[node.name] = max_pool(inputs[0], node)
        elif node.op == "upsample":
            values[node.name] = upsample(inputs[0])
        else:
            raise GraphError(f"{node.name}: unknown operation {node.op!r}")
    return {name: values[name] for name in graph.outputs}


def max_pool(x_BHWC: jax.Array, node: Node) -> jax.Array:
    """Max pooling [B, h, w, C] with the node's kernel, stride and padding."""
    dtype = x_BHWC.dtype
    low = -np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min
    k, s, p = node.kernel, node.stride, node.padding
    padding = ((0, 0), (p, p), (p, p), (0, 0))
    start = np.asarray(low, dtype)  # a constant; otherwise there is no gradient
    return jax.lax.reduce_window(x_BHWC, start, jax.lax.max, (1, k, k, 1), (1, s, s, 1), padding)


def upsample(x_BHWC: jax.Array) -> jax.Array:
    """[B, 2H, 2W, C], every pixel four times."""
    B, H, W, C = x_BHWC.shape
    wide = jnp.broadcast_to(x_BHWC[:, :, None, :, None, :], (B, H, 2, W, 2, C))
    return wide.reshape(B, 2 * H, 2 * W, C)


def convolve(x_BHWC: jax.Array, kernel_HWIO: jax.Array, node: Node, **rest: Any) -> jax.Array:
    """`lax.conv_general_dilated` with the node's stride and padding."""
    pad = (node.padding, node.padding)
    return jax.lax.conv_general_dilated(
        x_BHWC, kernel_HWIO, (node.stride, node.stride), (pad, pad),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), **rest,
    )  # fmt: skip


def activate(x: jax.Array, kind: str) -> jax.Array:
    """silu, relu, hardswish or none, elementwise."""
    if kind == "none":
        return x
    if kind == "relu":
        return jnp.maximum(x, jnp.zeros((), x.dtype))
    return {"silu": jax.nn.silu, "hardswish": jax.nn.hard_swish}[kind](x)
