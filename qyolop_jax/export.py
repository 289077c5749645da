"""Networks for other programs: StableHLO by `jax.export`, and ONNX, in integers or in float.

    data = serialize(lambda x: run_integer(model, x), (384, 640))    # or any other forward function
    raw = deserialize(data)(images)

    onnx.save(integer_onnx(model, (384, 640)), "q.onnx")

`qdq` and `tflite` write other forms by the same walk over the graph.

All take uint8 images [batch, H, W, 3] of any batch and give the raw outputs, float32 NHWC, by name.
In ONNX, 8-bit tensors are uint8 (our s8 plus 128): the image goes in unchanged, and onnxruntime is
fastest so. All scales of a convolution are 1 except the weights', which hold our factor, so that it
rounds as ours does. Nothing here needs torch.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from llm_jax.extras import need
from qyolop_jax import QyolopError
from qyolop_jax.graph import Graph, GraphError, Node, check_size
from qyolop_jax.integer import IntegerModel
from qyolop_jax.scales import INPUT_SCALE

OPSET, OPSETS = 17, (13, 27)
"""The opset of ONNX that is written, and the first and the last that may be asked for. Scales by
channel begin with 13; onnxruntime 1.32 runs no newer one than 27."""
HARDSWISH_OPSET = 14
PLATFORMS = ("cpu", "cuda", "tpu")
T = TypeVar("T")


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


def walked(
    graph: Graph,
    image: Callable[[], T],
    conv: Callable[[Node, T], T],
    moved: Callable[[Node, list[T]], T],
) -> dict[str, T]:
    """What each function wrote for the outputs, by name: `image` for the input, `moved` for nodes
    that treat 8 bits and floats alike (concat, maxpool, upsample)."""
    values: dict[str, T] = {}
    for node in graph.nodes:
        inputs = [values[name] for name in node.inputs]
        if node.op == "input":
            values[node.name] = image()
        elif node.op == "conv":
            values[node.name] = conv(node, inputs[0])
        else:
            values[node.name] = moved(node, inputs)
    return {name: values[name] for name in graph.outputs}


def layer_of(model: IntegerModel, node: Node) -> dict[str, np.ndarray]:
    """The arrays of a convolution. ExportError for other weights than 8 bits or float32."""
    layer = {key: np.asarray(a) for key, a in model.layers[node.name].items()}
    want = np.dtype(np.int8 if "factor" in layer else np.float32)
    if (kind := layer["kernel"].dtype) != want:
        raise ExportError(f"{node.name} has weights in {kind}; only int8 and float32 are exported")
    return layer


def check_folded(graph: Graph) -> None:
    """GraphError for a graph with norms or branches."""
    if any(n.op == "conv" and (n.norm or n.rep or n.implicit) for n in graph.nodes):
        raise GraphError("the graph is not folded; export what fold.fold returns")


class Writer:
    """Collects ONNX nodes and constants; each method returns the name of the tensor it adds.

    `batch` is the number of images, None for any. ExportError for an opset outside `OPSETS`.
    """

    def __init__(
        self, graph: Graph, size: tuple[int, int], opset: int = OPSET, batch: int | None = None
    ):
        check_size((1, *size, 3))
        self.onnx = need("onnx", "vision", "writing ONNX")
        newest = min(OPSETS[1], self.onnx.defs.onnx_opset_version())
        if not OPSETS[0] <= opset <= newest:
            raise ExportError(f"opset {opset}; expected {OPSETS[0]} to {newest}")
        self.numpy_helper = need("onnx.numpy_helper", "vision", "writing ONNX")
        self.graph, self.size, self.opset, self.batch = graph, size, opset, batch or "batch"
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
        if act == "hardswish" and self.opset < HARDSWISH_OPSET:
            return self.op("Mul", x, self.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))
        return self.op({"relu": "Relu", "hardswish": "HardSwish"}[act], x)

    def model(self, outputs: dict[str, str]) -> Any:
        """The ModelProto, checked; `outputs` are float NCHW tensors by the name they get."""
        onnx, (H, W) = self.onnx, self.size
        info = onnx.helper.make_tensor_value_info
        images = info("images", onnx.TensorProto.UINT8, [self.batch, H, W, 3])
        ends = []
        for name, x in outputs.items():
            moved = onnx.helper.make_node("Transpose", [x], [name], perm=[0, 2, 3, 1])
            self.nodes.append(moved)
            shape = [self.batch, None, None, self.graph.node(name).channels]
            ends.append(info(name, onnx.TensorProto.FLOAT, shape))
        graph = onnx.helper.make_graph(self.nodes, "qyolop", [images], ends, self.constants)
        opsets = [onnx.helper.make_opsetid("", self.opset)]
        version = onnx.helper.find_min_ir_version_for(opsets)
        made = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=version)
        onnx.checker.check_model(made, full_check=True)
        return made


def window(node: Node) -> dict:
    """The attributes of a node that has a window."""
    k, s, p = node.kernel, node.stride, node.padding
    return dict(kernel_shape=[k, k], strides=[s, s], pads=[p, p, p, p])


def float_onnx(
    graph: Graph,
    params: Any,
    size: tuple[int, int],
    opset: int = OPSET,
    batch: int | None = None,
) -> Any:
    """The ONNX model (ModelProto) of a folded graph in float32, for any batch or for this one."""
    check_folded(graph)
    w = Writer(graph, size, opset, batch)

    def image():
        x = w.op("Transpose", "images", perm=[0, 3, 1, 2])
        x = w.op("Cast", x, to=w.onnx.TensorProto.FLOAT)
        x = w.op("Sub", x, w.constant(128, np.float32))
        return w.op("Mul", x, w.constant(INPUT_SCALE, np.float32))

    def conv(node: Node, x: str):
        p = params[node.name]
        kernel, bias = w.kernel(p["kernel"], np.float32), w.constant(p["bias"], np.float32)
        return w.activated(w.op("Conv", x, kernel, bias, **window(node)), node.act)

    return w.model(walked(graph, image, conv, w.moved))


def integer_onnx(
    model: IntegerModel, size: tuple[int, int], opset: int = OPSET, batch: int | None = None
) -> Any:
    """The ONNX model (ModelProto) of an integer model: QLinearConv, and Gather for tables.

    ExportError where a layer has weights of another kind than 8 bits or float32.
    """
    w = Writer(model.graph, size, opset, batch)

    def conv(node: Node, x: str):
        p = layer_of(model, node)
        return (_integer_conv if "factor" in p else _float_conv)(w, node, p, x)

    image = lambda: w.op("Transpose", "images", perm=[0, 3, 1, 2])
    outputs = walked(model.graph, image, conv, w.moved)
    for name, p in model.outputs.items():
        step, zero = np.asarray(p["step"]), np.asarray(p["zero"])
        outputs[name] = _dequantized(w, outputs[name], step, zero)
    return w.model(outputs)


def u8(s8: ArrayLike) -> np.ndarray:
    """s8 as uint8: plus 128."""
    return (np.asarray(s8, np.int16) + 128).astype(np.uint8)


def _dequantized(w: Writer, x: str, step, zero) -> str:
    if step.size == 1:
        step = step.reshape(())
    zeros = w.constant(np.broadcast_to(u8(zero), step.shape), np.uint8)
    return w.op("DequantizeLinear", x, w.constant(step, np.float32), zeros, axis=1)


def whole_bias(p: dict[str, np.ndarray]) -> np.ndarray:
    """s32 [O], the bias of a layer without the part that the input's zero point adds."""
    drift = p["zero_in"].astype(np.int32) * p["kernel"].astype(np.int32).sum((0, 1, 2))
    return (p["bias"] + drift).astype(np.int32)


def _integer_conv(w: Writer, node: Node, p: dict, x: str) -> str:
    kernel = p["kernel"]
    one = w.constant(1, np.float32)
    y = w.op(
        "QLinearConv",
        x, one, w.constant(u8(p["zero_in"]), np.uint8),
        w.kernel(kernel, np.int8), w.constant(p["factor"], np.float32),
        w.constant(np.zeros(node.channels), np.int8),
        one, w.constant(u8(p["zero"]), np.uint8),
        w.constant(whole_bias(p), np.int32),
        **window(node),
    )  # fmt: skip
    if "table" in p:
        return looked_up(w, y, p["table"])
    if p["low"] > -128:
        return w.op("Clip", y, w.constant(u8(p["low"]), np.uint8))
    return y


def looked_up(w: Writer, x: str, table: np.ndarray) -> str:
    """uint8 values of a table s8 [256] for uint8 values."""
    index = w.op("Cast", x, to=w.onnx.TensorProto.INT32)
    return w.op("Gather", w.constant(u8(table), np.uint8), index)


def _float_conv(w: Writer, node: Node, p: dict, x: str) -> str:
    x = _dequantized(w, x, p["step_in"], p["zero_in"])
    kernel, bias = w.kernel(p["kernel"], np.float32), w.constant(p["bias"], np.float32)
    y = w.activated(w.op("Conv", x, kernel, bias, **window(node)), node.act)
    if "step" not in p:
        return y
    step, zero = w.constant(p["step"], np.float32), w.constant(u8(p["zero"]), np.uint8)
    return w.op("QuantizeLinear", y, step, zero)
