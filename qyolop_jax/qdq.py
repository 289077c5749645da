"""The integer network in ONNX as QuantizeLinear and DequantizeLinear around float operations.

    onnx.save(qdq_onnx(model, (384, 640)), "q.onnx")                    # OpenVINO, onnxruntime
    onnx.save(qdq_onnx(model, (384, 640), symmetric=True), "q.onnx")    # TensorRT too

Engines fuse these pairs to 8 bits. As in `export`, steps are 1 except the weights', which hold our
factor: then a fused convolution multiplies its sums by what ours does. The symmetric form has s8
tensors with zero points 0, and biases in float.
"""

from typing import Any, NamedTuple

import numpy as np

from qyolop_jax.export import OPSET, Writer, layer_of, looked_up, u8, walked, whole_bias, window
from qyolop_jax.forms import symmetric as without_zero_points
from qyolop_jax.forms import zero_points
from qyolop_jax.graph import Node
from qyolop_jax.integer import IntegerModel


class Tensor(NamedTuple):
    """A tensor of the graph: its name, and its zero point (s8), None for float."""

    name: str
    zero: int | None


def qdq_onnx(
    model: IntegerModel,
    size: tuple[int, int],
    symmetric: bool = False,
    opset: int = OPSET,
    batch: int | None = None,
) -> Any:
    """The ONNX model (ModelProto) of an integer model, for any batch or for this one.

    Without `symmetric` 8-bit tensors are uint8. With it the network is that of `forms.symmetric`.
    ExportError, which names the layer, for a table in the symmetric form, and for weights of
    another kind than 8 bits or float32.
    """
    model = without_zero_points(model) if symmetric else model
    w, zeros = Writer(model.graph, size, opset, batch), zero_points(model)
    one, dtype = w.constant(1, np.float32), np.int8 if symmetric else np.uint8

    def point(zero) -> str:
        return w.constant(zero if symmetric else u8(zero), dtype)

    def real(x: Tensor) -> str:
        return w.op("DequantizeLinear", x.name, one, point(x.zero))

    def eight(x: str, zero: int) -> Tensor:
        return Tensor(w.op("QuantizeLinear", x, one, point(zero)), zero)

    def image() -> Tensor:
        x = w.op("Transpose", "images", perm=[0, 3, 1, 2])
        if not symmetric:
            return Tensor(x, 0)
        x = w.op("Cast", x, to=w.onnx.TensorProto.FLOAT)
        return eight(w.op("Sub", x, w.constant(128, np.float32)), 0)

    def conv(node: Node, x: Tensor) -> Tensor:
        p, zero = layer_of(model, node), zeros[node.name]
        if "factor" not in p:
            step = p.get("step", np.float32(1))
            scaled = p["kernel"] * p["step_in"]
            kernel, bias = w.kernel(scaled, np.float32), w.constant(p["bias"], np.float32)
            y = w.activated(w.op("Conv", real(x), kernel, bias, **window(node)), node.act)
            if zero is None:
                return Tensor(y, None)
            return eight(w.op("Div", y, w.constant(step, np.float32)), zero)
        by = w.constant(p["factor"], np.float32)
        none = lambda kind: w.constant(np.zeros(node.channels), kind)
        kernel = w.op("DequantizeLinear", w.kernel(p["kernel"], np.int8), by, none(np.int8), axis=0)
        bias = whole_bias(p)
        if symmetric:
            bias = w.constant(bias * p["factor"], np.float32)
        else:
            whole = w.constant(bias, np.int32)
            bias = w.op("DequantizeLinear", whole, by, none(np.int32), axis=0)
        y = w.op("Conv", real(x), kernel, bias, **window(node))
        if "table" in p:
            return Tensor(looked_up(w, eight(y, int(p["zero"])).name, p["table"]), zero)
        if p["low"] > -128:  # else the rounding cuts where relu does
            y = w.op("Relu", y)
        return eight(y, zero)

    def moved(node: Node, inputs: list[Tensor]) -> Tensor:
        y = w.moved(node, [real(x) for x in inputs])
        return eight(y, zeros[node.name])

    outputs = {}
    for name, x in walked(model.graph, image, conv, moved).items():
        outputs[name] = x.name
        if x.zero is not None:
            step = np.asarray(model.outputs[name]["step"]).reshape(1, -1, 1, 1)
            outputs[name] = w.op("Mul", real(x), w.constant(step, np.float32))
    return w.model(outputs)
