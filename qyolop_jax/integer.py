"""The quantized network in integers: 8-bit tensors, 32-bit sums, one float factor per channel.

    model = to_integer(graph, params, scales)
    raw = jax.jit(run_integer)(model, images)  # the same bits as run_numpy(model, images)

A convolution is s8 x s8 -> s32 (`sums`). Its sums are multiplied by a float32 factor per channel,
rounded half to even, shifted by the zero point and cut to s8; that is the next tensor. silu and
hardswish are tables of 256 values. Padding is the zero point.
Letters: B H W C, I channels in, O out.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open

from qyolop_jax import QyolopError
from qyolop_jax.arrays import not_finite, read_arrays, write_arrays
from qyolop_jax.config import ModelConfig, ModelConfigError
from qyolop_jax.graph import Graph, GraphError, Node, activate, check_size, convolve, run_graph
from qyolop_jax.scales import (
    DEFAULT,
    PRE,
    Scales,
    Settings,
    factor,
    fixed,
    has_table,
    is_unread,
    steps_of,
    weight_scale,
)


class IntegerError(QyolopError):
    """A file that is not an integer model; the message says what is wrong."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntegerModel:
    """Arrays by node, as a pytree.

    A convolution has kernel s8 [k, k, I, O], bias s32 [O] (with the part that the input's zero
    point adds), factor f32 [O], zero_in and zero s8 (zero points of the input and of the result),
    low s8 (where relu cuts), and table s8 [256] for silu or hardswish. One that stays in float has
    kernel and bias f32, step_in f32, zero_in s8, and step f32 and zero s8 if its result has 8 bits.
    """

    layers: dict[str, dict[str, jax.Array]]
    outputs: dict[str, dict[str, jax.Array]]
    """step f32 [C] or [1] and zero s8, for the outputs that are s8."""
    graph: Graph = dataclasses.field(metadata=dict(static=True))
    config: ModelConfig | None = dataclasses.field(default=None, metadata=dict(static=True))
    """What the outputs mean."""

    @property
    def bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in jax.tree.leaves((self.layers, self.outputs)))


def to_integer(
    graph: Graph,
    params: Any,
    scales: Scales,
    settings: Settings = DEFAULT,
    config: ModelConfig | None = None,
) -> IntegerModel:
    """The `IntegerModel` of a folded graph; `settings` are those of the calibration.

    QuantizeError where graph, scales and settings do not fit.
    """
    return dataclasses.replace(_to_integer(graph, params, scales, settings), config=config)


@functools.partial(jax.jit, static_argnums=(0, 3))  # one program for all arrays
def _to_integer(graph, params, scales, settings):
    steps = steps_of(graph, scales, settings)
    layers, floating = {}, set()
    for node in graph.convs:
        kernel, bias = (jnp.asarray(params[node.name][k]) for k in ("kernel", "bias"))
        (step_in, zero_in), (step, zero) = steps(node.inputs[0]), steps(node.name)
        if node.name in settings.keep:
            layer = dict(kernel=kernel, bias=bias, step_in=step_in.reshape(()))
            if is_unread(graph, node):
                floating.add(node.name)
            else:
                layer |= dict(step=step.reshape(()), zero=_s8(zero[:1]))
            layers[node.name] = layer | dict(zero_in=_s8(zero_in))
            continue
        by = weight_scale(kernel, bias, step_in, settings.per_channel)
        unit = fixed(step_in.reshape(()) * by)
        q = jnp.clip(jnp.round(kernel / by.reshape(1, 1, 1, -1)), -127, 127).astype(jnp.int8)
        shift = jnp.round(bias / unit).astype(jnp.int32)
        drift = _s8(zero_in).astype(jnp.int32) * q.astype(jnp.int32).sum((0, 1, 2))
        layer = dict(kernel=q, bias=shift - drift, zero_in=_s8(zero_in))
        if has_table(node):
            step_pre, zero_pre = steps(node.name + PRE)
            layer["table"] = activation_table(node.act, step_pre, zero_pre, step, zero)
            step, zero = step_pre, zero_pre
        low = zero[:1] if node.act == "relu" else jnp.full(1, -128, jnp.float32)
        layers[node.name] = layer | dict(
            factor=factor(step_in, by, step), zero=_s8(zero[:1]), low=_s8(low)
        )
    outputs = {}
    for name in graph.outputs:
        if name not in floating:
            step, zero = steps(name)
            outputs[name] = dict(step=step, zero=_s8(zero[:1]))
    return IntegerModel(layers, outputs, graph)


def _s8(one):
    return one.reshape(()).astype(jnp.int8)


def activation_table(
    act: str, step_pre: jax.Array, zero_pre: jax.Array, step: jax.Array, zero: jax.Array
) -> jax.Array:
    """s8 [256]: the activation of each s8 value from -128 on."""
    x = (jnp.arange(-128, 128, dtype=jnp.float32) - zero_pre) * step_pre
    near = jnp.round(activate(x, act) / step)
    return (jnp.clip(near, -128 - zero, 127 - zero) + zero).astype(jnp.int8)


def sums(x_BHWI: jax.Array, kernel_HWIO: jax.Array, node: Node) -> jax.Array:
    """s32 [B, H', W', O], the convolution of s8 operands; x is padded already.

    Each platform has its own fast way. XLA's s8 convolution is fast on TPUs, and on CPUs except for
    3x3 between few channels (10 times slower than patches, measured with 8 to 16 channels). GPUs
    have no s8 convolution, but a fast s8 dot.
    """
    k, _, I, O = kernel_HWIO.shape
    patches = lambda x, w: _patches_dot(x, w, node.stride)
    whole = lambda x, w: convolve(x, w, _Unpadded(node.stride), preferred_element_type=jnp.int32)
    few = k > 1 and I <= 16 and 8 <= O <= 16
    return jax.lax.platform_dependent(
        x_BHWI, kernel_HWIO, cuda=patches, cpu=patches if few else whole, default=whole
    )


@dataclasses.dataclass(frozen=True)
class _Unpadded:
    stride: int
    padding: int = 0


def _patches_dot(x_BHWI, kernel_HWIO, stride: int):
    """The same as a product with a matrix of patches; padded to sizes that tensor cores take."""
    k, _, I, O = kernel_HWIO.shape
    B, H, W, _ = x_BHWI.shape
    h, w = (H - k) // stride + 1, (W - k) // stride + 1
    end = lambda i, n: i + stride * (n - 1) + 1
    slices = [
        x_BHWI[:, i : end(i, h) : stride, j : end(j, w) : stride]
        for i in range(k)
        for j in range(k)
    ]
    rows = jnp.concatenate(slices, axis=-1).reshape(B * h * w, k * k * I)
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % 16)))
    columns = kernel_HWIO.reshape(k * k * I, O)
    columns = jnp.pad(columns, ((0, -columns.shape[0] % 16), (0, -O % 16)))
    y = jax.lax.dot(rows, columns, preferred_element_type=jnp.int32)
    return y[:, :O].reshape(B, h, w, O)


def run_integer(model: IntegerModel, images_u8: jax.Array) -> dict:
    """Raw outputs, float32, for uint8 images [B, H, W, 3]; made for jit."""
    check_size(images_u8.shape)
    wide = lambda a: a.reshape(1, 1, 1, -1)

    def conv(node: Node, x):
        p = model.layers[node.name]
        if "factor" not in p:
            real = (x.astype(jnp.float32) - p["zero_in"].astype(jnp.float32)) * p["step_in"]
            y = activate(convolve(real, p["kernel"], node) + wide(p["bias"]), node.act)
            if "step" not in p:
                return y
            return _to_s8(jnp.round(y / p["step"]), p["zero"])
        q = node.padding
        ring = ((0, 0, 0), (q, q, 0), (q, q, 0), (0, 0, 0))
        x = jax.lax.pad(x, p["zero_in"], ring) if q else x
        y = sums(x, p["kernel"], node) + wide(p["bias"])
        y = _to_s8(jnp.round(y.astype(jnp.float32) * wide(p["factor"])), p["zero"])
        if "table" in p:
            return p["table"][y.astype(jnp.int32) + 128]
        return jnp.maximum(y, p["low"])

    raw = run_graph(model.graph, (images_u8.astype(jnp.int16) - 128).astype(jnp.int8), conv)
    for name, p in model.outputs.items():
        steps = raw[name].astype(jnp.float32) - p["zero"].astype(jnp.float32)
        raw[name] = steps * wide(p["step"])
    return raw


def _to_s8(near, zero):
    return jnp.clip(near + zero.astype(jnp.float32), -128, 127).astype(jnp.int8)


def run_numpy(model: IntegerModel, images_u8: ArrayLike) -> dict:
    """What `run_integer` computes, in plain NumPy integers: the reference for all other executors.

    IntegerError for convolutions kept in float, because the order of their sums is not defined.
    """
    images = np.asarray(images_u8)
    check_size(images.shape)
    values: dict[str, np.ndarray] = {}
    for node in model.graph.nodes:
        inputs = [values[name] for name in node.inputs]
        if node.op == "input":
            y = (images.astype(np.int16) - 128).astype(np.int8)
        elif node.op == "concat":
            y = np.concatenate(inputs, -1)
        elif node.op == "upsample":
            y = inputs[0].repeat(2, 1).repeat(2, 2)
        elif node.op == "maxpool":
            y = _windows(inputs[0], node, np.int8(-128)).max((-2, -1))
        else:
            y = _conv_numpy(node, jax.tree.map(np.asarray, model.layers[node.name]), inputs[0])
        values[node.name] = y
    raw = {}
    for name in model.graph.outputs:
        step, zero = (np.asarray(model.outputs[name][k]) for k in ("step", "zero"))
        raw[name] = (values[name].astype(np.float32) - np.float32(zero)) * step
    return raw


def _windows(x_BHWC, node: Node, fill):
    """[B, h, w, C, k, k]."""
    q, k, s = node.padding, node.kernel, node.stride
    x = np.pad(x_BHWC, ((0, 0), (q, q), (q, q), (0, 0)), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, (k, k), (1, 2))[:, ::s, ::s]


def _conv_numpy(node, p, x):
    if "factor" not in p:
        raise IntegerError(f"{node.name} is kept in float; the reference is for integers alone")
    windows = _windows(x, node, p["zero_in"]).astype(np.int32)
    y = np.tensordot(windows, p["kernel"].astype(np.int32), ([4, 5, 3], [0, 1, 2])) + p["bias"]
    near = np.rint(y.astype(np.float32) * p["factor"])
    q = np.clip(near + np.float32(p["zero"]), -128, 127).astype(np.int8)
    if "table" in p:
        return p["table"][q.astype(np.int32) + 128]
    return np.maximum(q, p["low"])


FORMAT, FORMAT_KEY, CONFIG = "qyolop integer model 1", "format", "config"


def save_integer_model(model: IntegerModel, path: str | Path) -> None:
    """Writes a safetensors file, whole or not at all; about one byte per weight.

    IntegerError for NaN.
    """
    flat = {
        f"{kind}/{name}/{key}": np.asarray(a, order="C")  # scalars stay scalars
        for kind in ("layers", "outputs")
        for name, entry in getattr(model, kind).items()
        for key, a in entry.items()
    }
    if (name := not_finite(flat)) is not None:
        raise IntegerError(f"{name} holds NaN or infinity, so {path} is not written; train again")
    nodes, outputs = model.graph.to_json()
    about = {FORMAT_KEY: FORMAT, "nodes": nodes, "outputs": outputs}
    if model.config:
        about[CONFIG] = model.config.to_json()
    write_arrays(path, flat, about)


def load_integer_model(path: str | Path, check: bool = True) -> IntegerModel:
    """The model in a file of `save_integer_model`. IntegerError for any other file.

    Every array is compared with its checksum, unless `check` is false.
    """
    about, flat = read_arrays(path, FORMAT_KEY, IntegerError, check)
    if about[FORMAT_KEY] != FORMAT:
        raise IntegerError(f"{path} has format {about[FORMAT_KEY]!r}; expected {FORMAT!r}")
    try:
        graph = Graph.from_json(about["nodes"], about["outputs"])
        config = ModelConfig.from_json(about[CONFIG]) if CONFIG in about else None
        _check_outputs(graph, config)
    except KeyError as error:
        raise IntegerError(f"{path} lacks {error} in its header; make it again") from error
    except (GraphError, ModelConfigError) as error:
        raise IntegerError(f"{path}: {error}") from error
    want = _arrays_of(graph, flat)
    fits = lambda n: n in flat and n in want and (flat[n].dtype, flat[n].shape) in want[n]
    if wrong := sorted(n for n in want.keys() | flat.keys() if not fits(n)):
        raise IntegerError(
            f"{path}: {len(wrong)} arrays do not fit its graph, such as {wrong[0]}; make it again"
        )
    parts = dict(layers={}, outputs={})
    for key, a in flat.items():
        kind, name, leaf = key.split("/")
        parts[kind].setdefault(name, {})[leaf] = jnp.asarray(a)
    return IntegerModel(**parts, graph=graph, config=config)


def _check_outputs(graph: Graph, config: ModelConfig | None) -> None:
    """GraphError where the outputs are not those that the settings describe."""
    if config is None:
        return
    want = {f"detect.{s}": 3 * (5 + len(config.detection)) for s in config.strides}
    want |= dict(area=len(config.area), lane=len(config.lane))
    found = {name: graph.node(name).channels for name in graph.outputs}
    if found != want:
        raise GraphError(f"the outputs are {found}; these classes expect {want}")


def _arrays_of(graph: Graph, flat: dict[str, np.ndarray]) -> dict[str, list[tuple]]:
    """The arrays that a graph needs: by name, the (dtype, shape) that each may have.

    What is in `flat` tells only which convolutions stay in float.
    """
    real, small, whole = (np.dtype(t) for t in (np.float32, np.int8, np.int32))
    found = {}
    for node in graph.convs:
        at = lambda key, node=node: f"layers/{node.name}/{key}"
        k, I, O = node.kernel, graph.in_channels(node), node.channels
        if at("factor") in flat:
            layer = dict(kernel=(small, (k, k, I, O)), bias=(whole, (O,)), factor=(real, (O,)))
            layer |= {key: (small, ()) for key in ("zero_in", "zero", "low")}
            if has_table(node):
                layer["table"] = small, (256,)
        else:
            layer = dict(kernel=(real, (k, k, I, O)), bias=(real, (O,)))
            layer |= dict(step_in=(real, ()), zero_in=(small, ()))
            if not is_unread(graph, node):
                layer |= dict(step=(real, ()), zero=(small, ()))
        found |= {at(key): [kind] for key, kind in layer.items()}
    for name in graph.outputs:
        if f"layers/{name}/factor" in flat or f"layers/{name}/step" in flat:
            channels = graph.node(name).channels
            found[f"outputs/{name}/step"] = [(real, (channels,)), (real, (1,))]
            found[f"outputs/{name}/zero"] = [(small, ())]
    return found


def is_integer(path: str | Path) -> bool:
    """Whether `save_integer_model` wrote this file."""
    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get(FORMAT_KEY) == FORMAT
    except (OSError, SafetensorError):
        return False
