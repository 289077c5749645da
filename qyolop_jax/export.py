"""Networks for other programs: StableHLO by `jax.export`, and ONNX, in integers or in float.

    data = serialize(lambda x: run_integer(model, x), (384, 640))    # or any other forward function
    raw = deserialize(data)(images)

    onnx.save(integer_onnx(model, (384, 640)), "q.onnx")

All take uint8 images [batch, H, W, 3] of any batch and give the raw outputs, float32 NHWC, by name.
In ONNX, 8-bit tensors are uint8 (our s8 plus 128): the image goes in unchanged, and onnxruntime is
fastest so. All scales of a convolution are 1 except the weights', which hold our factor, so that it
rounds as ours does. Nothing here needs torch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from llm_jax.extras import need
from qyolop_jax import QyolopError
from qyolop_jax.graph import Graph, GraphError, Node, check_size
from qyolop_jax.integer import IntegerModel
from qyolop_jax.scales import INPUT_SCALE

OPSET, IR = 17, 8
PLATFORMS = ("cpu", "cuda", "tpu")


class ExportError(QyolopError):
    """What cannot be exported or read back; the message says why."""


def serialize(
    forward: Callable, size: tuple[int, int], platforms: Sequence[str] = PLATFORMS
) -> bytes:
    """The program images -> outputs with its weights, as bytes; height and width are fixed."""
    need("flatbuffers", "vision", "exporting StableHLO")
    from jax import export

    check_size((1, *size, 3))
    batch = export.symbolic_shape("batch")[0]
    images = jax.ShapeDtypeStruct((batch, *size, 3), jnp.uint8)
    return bytes(export.export(jax.jit(forward), platforms=tuple(platforms))(images).serialize())


def deserialize(data: bytes) -> Callable:
    """The function images -> outputs in the bytes of `serialize`. ExportError for other bytes."""
    need("flatbuffers", "vision", "reading StableHLO")
    from jax import export

    try:
        return jax.jit(export.deserialize(bytearray(data)).call)
    except Exception as error:
        raise ExportError(f"{len(data)} bytes are not an exported program ({error})") from error


class Writer:
    """Collects ONNX nodes and constants; each method returns the name of the tensor it adds."""

    def __init__(self, graph: Graph, size: tuple[int, int]):
        check_size((1, *size, 3))
        self.onnx = need("onnx", "vision", "writing ONNX")
        self.numpy_helper = need("onnx.numpy_helper", "vision", "writing ONNX")
        self.graph, self.size = graph, size
        self.nodes, self.constants = [], []

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The output of a new node."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, value: ArrayLike, dtype: DTypeLike) -> str:
        """A constant of this type."""
        name = f"constant_{len(self.constants)}"
        array = np.ascontiguousarray(value, dtype)
        if np.ndim(value) == 0:
            array = array.reshape(())
        self.constants.append(self.numpy_helper.from_array(array, name))
        return name

    def kernel(self, kernel_HWIO: ArrayLike, dtype: DTypeLike) -> str:
        """A kernel as a constant, in the order OIHW of ONNX."""
        return self.constant(np.transpose(kernel_HWIO, (3, 2, 0, 1)), dtype)

    def moved(self, node: Node, inputs: Sequence[str]) -> str:
        """The output of a node that treats 8 bits and floats alike."""
        if node.op == "concat":
            return self.op("Concat", *inputs, axis=1)
        if node.op == "maxpool":
            return self.op("MaxPool", inputs[0], **window(node))
        if node.op == "upsample":
            twice = self.constant([1, 1, 2, 2], np.float32)
            return self.op(
                "Resize", inputs[0], "", twice, mode="nearest", nearest_mode="floor",
                coordinate_transformation_mode="asymmetric",
            )  # fmt: skip
        raise GraphError(f"{node.name}: unknown operation {node.op!r}")

    def activated(self, x: str, act: str) -> str:
        """The activation of a float tensor."""
        if act == "none":
            return x
        if act == "silu":
            return self.op("Mul", x, self.op("Sigmoid", x))
        return self.op({"relu": "Relu", "hardswish": "HardSwish"}[act], x)

    def model(self, outputs: dict[str, str]) -> Any:
        """The ModelProto, checked; `outputs` are float NCHW tensors by the name they get."""
        onnx, (H, W) = self.onnx, self.size
        info = onnx.helper.make_tensor_value_info
        images = info("images", onnx.TensorProto.UINT8, ["batch", H, W, 3])
        ends = []
        for name, x in outputs.items():
            moved = onnx.helper.make_node("Transpose", [x], [name], perm=[0, 2, 3, 1])
            self.nodes.append(moved)
            shape = ["batch", None, None, self.graph.node(name).channels]
            ends.append(info(name, onnx.TensorProto.FLOAT, shape))
        graph = onnx.helper.make_graph(self.nodes, "qyolop", [images], ends, self.constants)
        made = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR
        )
        onnx.checker.check_model(made, full_check=True)
        return made


def window(node: Node) -> dict:
    """The attributes of a node that has a window."""
    k, s, p = node.kernel, node.stride, node.padding
    return dict(kernel_shape=[k, k], strides=[s, s], pads=[p, p, p, p])


def float_onnx(graph: Graph, params: Any, size: tuple[int, int]) -> Any:
    """The ONNX model (ModelProto) of a folded graph in float32."""
    if any(n.op == "conv" and (n.norm or n.rep or n.implicit) for n in graph.nodes):
        raise GraphError("the graph is not folded; export what fold.fold returns")
    w, values = Writer(graph, size), {}
    for node in graph.nodes:
        inputs = [values[name] for name in node.inputs]
        if node.op == "input":
            x = w.op("Transpose", "images", perm=[0, 3, 1, 2])
            x = w.op("Cast", x, to=w.onnx.TensorProto.FLOAT)
            x = w.op("Sub", x, w.constant(128, np.float32))
            values[node.name] = w.op("Mul", x, w.constant(INPUT_SCALE, np.float32))
        elif node.op == "conv":
            p = params[node.name]
            kernel, bias = w.kernel(p["kernel"], np.float32), w.constant(p["bias"], np.float32)
            y = w.op("Conv", inputs[0], kernel, bias, **window(node))
            values[node.name] = w.activated(y, node.act)
        else:
            values[node.name] = w.moved(node, inputs)
    return w.model({name: values[name] for name in graph.outputs})


def integer_onnx(model: IntegerModel, size: tuple[int, int]) -> Any:
    """The ONNX model (ModelProto) of an integer model: QLinearConv, and Gather for tables."""
    w, values = Writer(model.graph, size), {}
    for node in model.graph.nodes:
        inputs = [values[name] for name in node.inputs]
        if node.op == "input":
            values[node.name] = w.op("Transpose", "images", perm=[0, 3, 1, 2])
        elif node.op == "conv":
            p = {key: np.asarray(a) for key, a in model.layers[node.name].items()}
            make = _integer_conv if "factor" in p else _float_conv
            values[node.name] = make(w, node, p, inputs[0])
        else:
            values[node.name] = w.moved(node, inputs)
    outputs = {}
    for name in model.graph.outputs:
        outputs[name] = values[name]
        if name in model.outputs:
            step, zero = (np.asarray(model.outputs[name][key]) for key in ("step", "zero"))
            outputs[name] = _dequantized(w, values[name], step, zero)
    return w.model(outputs)


def _u8(s8) -> np.ndarray:
    return (np.asarray(s8, np.int16) + 128).astype(np.uint8)


def _dequantized(w: Writer, x: str, step, zero) -> str:
    if step.size == 1:
        step = step.reshape(())
    zeros = w.constant(np.broadcast_to(_u8(zero), step.shape), np.uint8)
    return w.op("DequantizeLinear", x, w.constant(step, np.float32), zeros, axis=1)


def _integer_conv(w: Writer, node: Node, p: dict, x: str) -> str:
    kernel = p["kernel"]
    drift = p["zero_in"].astype(np.int32) * kernel.astype(np.int32).sum((0, 1, 2))
    one = w.constant(1, np.float32)
    y = w.op(
        "QLinearConv",
        x, one, w.constant(_u8(p["zero_in"]), np.uint8),
        w.kernel(kernel, np.int8), w.constant(p["factor"], np.float32),
        w.constant(np.zeros(node.channels), np.int8),
        one, w.constant(_u8(p["zero"]), np.uint8),
        w.constant(p["bias"] + drift, np.int32),
        **window(node),
    )  # fmt: skip
    if "table" in p:
        index = w.op("Cast", y, to=w.onnx.TensorProto.INT32)
        return w.op("Gather", w.constant(_u8(p["table"]), np.uint8), index)
    if p["low"] > -128:
        return w.op("Clip", y, w.constant(_u8(p["low"]), np.uint8))
    return y


def _float_conv(w: Writer, node: Node, p: dict, x: str) -> str:
    x = _dequantized(w, x, p["step_in"], p["zero_in"])
    kernel, bias = w.kernel(p["kernel"], np.float32), w.constant(p["bias"], np.float32)
    y = w.activated(w.op("Conv", x, kernel, bias, **window(node)), node.act)
    if "step" not in p:
        return y
    step, zero = w.constant(p["step"], np.float32), w.constant(_u8(p["zero"]), np.uint8)
    return w.op("QuantizeLinear", y, step, zero)
