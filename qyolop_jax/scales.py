"""Which tensors of a folded graph have 8 bits, which of them share a scale, and their steps.

Weights are s8 in [-127, 127], symmetric, with a scale for every output channel. Activations are s8
with a step and a zero point per tensor: real = (q - zero) * step. Tensors that a concatenation
joins share them, and so do both sides of pooling and upsampling; these then only move bytes. The
input of silu and of hardswish is an s8 tensor too. Letters: C channels, O output channels, P parts
of the channels, each with its own range.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qyolop_jax import QyolopError
from qyolop_jax.graph import Graph, GraphError, Node
from qyolop_jax.observe import ObserverKind, check_percentile, observer

Scales = dict[str, jax.Array]
"""float32 [P, 2], lowest and highest value, by the tensor's name. That is the name of the first
convolution that shares it; with `PRE` appended: the input of that convolution's activation."""
PRE = ":pre"
INPUT_SCALE = 1 / 64
"""The step of the image; its zero point is 0."""
TINY = 1e-12


class QuantizeError(QyolopError):
    """Settings, scales or a graph that do not fit; the message says which and what to do."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to quantize. `DEFAULT` is good, `NAIVE` is for comparison."""

    observer: ObserverKind = "percentile"
    percentile: float = 99.99
    per_channel: bool = True
    """A scale for each output channel of a kernel, otherwise one for the kernel."""
    per_field: bool = True
    """Separate scales for xy, wh, objectness and classes of a detection output."""
    symmetric: bool = False
    """All zero points are 0."""
    keep: tuple[str, ...] = ()
    """Names of convolutions that stay in float: only their output has 8 bits."""

    def __post_init__(self):
        check_percentile(self.percentile)
        observer(self.observer)


DEFAULT = Settings()
NAIVE = Settings("absmax", per_channel=False, per_field=False, symmetric=True)


@dataclasses.dataclass(frozen=True)
class QuantizationPlan:
    """Which tensors share a range, and which channels of a tensor have their own range."""

    groups: dict[str, str]
    """Node -> the tensor's name in `Scales`, which lacks only `image`."""
    parts: dict[str, np.ndarray]
    """Name in `Scales` -> part of each channel, int [C]; shape [1] if there is one part."""

    def names(self, graph: Graph) -> tuple[str, ...]:
        """The keys of `Scales`."""
        pre = [n.name + PRE for n in graph.convs if has_table(n)]
        return tuple(dict.fromkeys([self.groups[n.name] for n in graph.convs] + pre))


def has_table(node: Node) -> bool:
    """Whether the activation becomes a table of 256 values."""
    return node.act in ("silu", "hardswish")


def plan_quantization(graph: Graph, settings: Settings) -> QuantizationPlan:
    """The plan for a graph. GraphError if it is not folded, QuantizeError for unknown names."""
    root = {}

    def find(name):
        while root[name] != name:
            name = root[name]
        return name

    for node in graph.nodes:
        if (node.op == "conv" and node.norm) or node.rep or node.implicit:
            raise GraphError(f"{node.name} is not folded; quantize what fold.fold returns")
        root[node.name] = node.name
        if node.op in ("concat", "maxpool", "upsample"):
            for other in node.inputs:
                root[find(node.name)] = find(other)
    sets: dict[str, list[Node]] = {}
    for node in graph.nodes:
        sets.setdefault(find(node.name), []).append(node)
    groups, parts = {}, {}
    for members in sets.values():
        convs = [n for n in members if n.op == "conv"]
        image = [n for n in members if n.op == "input"]
        if image and convs:
            raise GraphError(
                f"{convs[0].name} shares its scale with the image, whose scale is fixed; put a "
                "convolution behind the image"
            )
        name = (convs or image)[0].name
        groups |= {n.name: name for n in members}
        if convs:
            parts[name] = np.zeros(1, int)
            if settings.per_field and len(members) == 1 and is_detection(graph, members[0]):
                parts[name] = fields(members[0].channels)
    parts |= {n.name + PRE: np.zeros(1, int) for n in graph.convs if has_table(n)}
    known = {n.name for n in graph.convs}
    for name in settings.keep:
        if name not in known:
            raise QuantizeError(f"no convolution {name!r} to keep in float")
    return QuantizationPlan(groups, parts)


def is_detection(graph: Graph, node: Node) -> bool:
    """Whether the node is a detection output."""
    return node.name in graph.outputs and node.name.startswith("detect.")


def fields(channels: int) -> np.ndarray:
    """[C] 0 for xy, 1 for wh, 2 for objectness, 3 for classes; three anchors."""
    each = channels // 3
    if channels % 3 or each < 6:
        raise GraphError(f"a detection output of {channels} channels; expected 3 (5 + classes)")
    return np.tile([0, 0, 1, 1, 2] + [3] * (each - 5), 3)


def is_unread(graph: Graph, node: Node) -> bool:
    """Whether no node reads this one; then its output may stay in float."""
    return not graph.consumers(node.name)


def scale_and_zero(limits_P2: jax.Array, symmetric: bool) -> tuple[jax.Array, jax.Array]:
    """(step, zero point), float32 [P] each, of ranges; 0 is always a whole number of steps."""
    low = jnp.minimum(limits_P2[:, 0], 0.0)
    high = jnp.maximum(limits_P2[:, 1], 0.0)
    if symmetric or limits_P2.shape[0] > 1:  # in ONNX a convolution's output has one zero point
        return jnp.maximum(jnp.maximum(-low, high) / 127, TINY), jnp.zeros_like(low)
    step = jnp.maximum((high - low) / 255, TINY)
    return step, jnp.clip(jnp.round(-128 - low / step), -128, 127)


def steps_of(graph: Graph, scales: Scales, settings: Settings) -> Callable:
    """A function: name of a node, or with `PRE` appended -> (step, zero), float32 [C] or [1]."""
    made, cache = plan_quantization(graph, settings), {}

    def steps(name: str):
        key = made.groups.get(name, name)
        if key not in made.parts:  # the image
            return jnp.full(1, INPUT_SCALE, jnp.float32), jnp.zeros(1, jnp.float32)
        if key not in cache:
            count = int(made.parts[key].max()) + 1
            if key not in scales:
                raise QuantizeError(f"the scales lack {key}; calibrate with this graph")
            if np.shape(scales[key]) != (count, 2):
                raise QuantizeError(
                    f"the scales of {key} have shape {np.shape(scales[key])}; these settings "
                    f"expect {(count, 2)}"
                )
            pair = scale_and_zero(scales[key], settings.symmetric)
            cache[key] = tuple(fixed(a[made.parts[key]]) for a in pair)
        return cache[key]

    return steps


def fixed(a: jax.Array) -> jax.Array:
    """`a`, rounded to float32 here in every program.

    Otherwise the compiler turns x / (a / b) into x b / a in one program and not in another, and a
    weight at a tie is rounded differently.
    """
    return jax.lax.optimization_barrier(a)


def weight_scale(
    kernel_HWIO: jax.Array, bias_O: jax.Array, step_in: jax.Array, per_channel: bool
) -> jax.Array:
    """float32 [O]: the scales with which kernels fit in [-127, 127] and the bias in 23 bits."""
    step_in = step_in.reshape(())
    most = jnp.abs(kernel_HWIO).max((0, 1, 2)) / 127
    most = jnp.maximum(most, jnp.abs(bias_O) / (step_in * 2.0**22))
    if not per_channel:
        most = jnp.broadcast_to(most.max(), most.shape)
    return fixed(jax.lax.stop_gradient(jnp.maximum(most, TINY)))


def factor(step_in: jax.Array, by_O: jax.Array, step: jax.Array) -> jax.Array:
    """float32 [O]: the factors that turn sums into steps of the output."""
    return fixed(fixed(step_in.reshape(()) * by_O) / step.reshape(-1))
