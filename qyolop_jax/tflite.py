"""Networks as .tflite files for LiteRT, in integers or in float; written without TensorFlow.

    Path("q.tflite").write_bytes(integer_tflite(model, (384, 640)))

As in `export`, the input is uint8 images [batch, H, W, 3], the outputs are float32 NHWC by name,
and steps of 8-bit tensors are 1 except the weights', which hold our factor. XNNPACK, which LiteRT
uses by default, then multiplies and rounds sums as ours does; LiteRT's own kernels round otherwise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from llm_jax.extras import need
from qyolop_jax.export import ExportError, check_folded, layer_of, walked, whole_bias
from qyolop_jax.forms import zero_points
from qyolop_jax.graph import Graph, Node, check_size
from qyolop_jax.integer import IntegerModel
from qyolop_jax.scales import INPUT_SCALE

ALIGNED = 16
"""Bytes whose multiples the constants begin at, as LiteRT's own converter does it."""
DTYPES = dict(FLOAT32=np.float32, INT32=np.int32, INT8=np.int8)
SAME, VALID = 0, 1
NO_ACTIVATION, RELU = 0, 1


class Tensor(NamedTuple):
    """A tensor of the file: its number, its shape [batch, H, W, C], its zero point if 8 bits."""

    at: int
    shape: tuple[int, ...]
    zero: int | None = None


class TfliteWriter:
    """Collects operators, tensors and constants of a file."""

    def __init__(self, graph: Graph, size: tuple[int, int], batch: int):
        check_size((1, *size, 3))
        self.schema = s = need("ai_edge_litert.schema_py_generated", "litert", "writing .tflite")
        self.flatbuffers = need("flatbuffers", "litert", "writing .tflite")
        self.graph, self.size, self.batch = graph, size, batch
        self.part, self.file = s.SubGraphT(), s.ModelT()
        self.part.name, self.part.tensors, self.part.operators = "main", [], []
        self.file.version, self.file.description, self.file.subgraphs = 3, "qyolop", [self.part]
        self.file.buffers, self.file.operatorCodes = [s.BufferT()], []
        self.codes: dict[tuple[int, int], int] = {}
        self.aligned = _aligned_buffer(s)

    def tensor(
        self,
        kind: str,
        shape: tuple[int, ...],
        zero: int | None = None,
        scale: ArrayLike = 1.0,
        data: ArrayLike | None = None,
        name: str | None = None,
    ) -> int:
        """The number of a new tensor; several scales are those of its first axis."""
        t = self.schema.TensorT()
        t.name, t.shape = name or f"t{len(self.part.tensors)}", list(shape)
        t.type, t.buffer = getattr(self.schema.TensorType, kind), 0
        if zero is not None:
            t.quantization = q = self.schema.QuantizationParametersT()
            q.scale = np.asarray(scale, np.float32).reshape(-1)
            q.zeroPoint, q.quantizedDimension = np.full(q.scale.shape, zero, np.int64), 0
        if data is not None:
            buffer, array = self.aligned(), np.ascontiguousarray(data, DTYPES[kind])
            buffer.data = np.frombuffer(array.tobytes(), np.uint8)
            t.buffer = len(self.file.buffers)
            self.file.buffers.append(buffer)
        self.part.tensors.append(t)
        return len(self.part.tensors) - 1

    def constant(self, value: ArrayLike, kind: str = "FLOAT32") -> int:
        """The number of a tensor that holds this value."""
        return self.tensor(kind, np.shape(value), data=value)

    def op(
        self,
        kind: str,
        inputs: list[int],
        output: int,
        options: str | None = None,
        version: int = 1,
        **fields: Any,
    ) -> None:
        """Adds an operator that writes the tensor `output`; `fields` are those of its options."""
        code, operator = getattr(self.schema.BuiltinOperator, kind), self.schema.OperatorT()
        if (code, version) not in self.codes:
            self.codes[code, version] = len(self.file.operatorCodes)
            entry = self.schema.OperatorCodeT()
            entry.builtinCode, entry.deprecatedBuiltinCode = code, min(code, 127)
            entry.version = version
            self.file.operatorCodes.append(entry)
        operator.opcodeIndex, operator.inputs = self.codes[code, version], inputs
        operator.outputs = [output]
        if options is not None:
            operator.builtinOptions = getattr(self.schema, options + "T")()
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, options)
            for name, value in fields.items():
                setattr(operator.builtinOptions, name, value)
        self.part.operators.append(operator)

    def like(self, x: Tensor, channels: int | None = None, by: float = 1) -> Tensor:
        """A new tensor of x's kind, with other channels, and height and width times `by`."""
        B, H, W, C = x.shape
        shape = (B, int(H * by), int(W * by), channels or C)
        kind = "FLOAT32" if x.zero is None else "INT8"
        return Tensor(self.tensor(kind, shape, x.zero), shape, x.zero)

    def single(self, kind: str, x: Tensor, zero: int | None = None) -> Tensor:
        """The result of an operator with one input: 8 bits with this zero point, or float."""
        name = "FLOAT32" if zero is None else "INT8"
        y = Tensor(self.tensor(name, x.shape, zero), x.shape, zero)
        self.op(kind, [x.at], y.at, version=2 if kind in ("DEQUANTIZE", "QUANTIZE") else 1)
        return y

    def times(self, x: Tensor, by: ArrayLike) -> Tensor:
        """A float tensor times a constant, one or one a channel."""
        y = self.like(x)
        self.op("MUL", [x.at, self.constant(by)], y.at, "MulOptions")
        return y

    def convolved(self, node: Node, x: Tensor, kernel: int, bias: int, zero: int | None) -> Tensor:
        """A convolution; relu is part of it, other activations are not. Padding is x's zero."""
        k, s, p = node.kernel, node.stride, node.padding
        same = s == 1 and k % 2 == 1
        if p and not same:
            B, H, W, C = x.shape
            ring = self.constant([[0, 0], [p, p], [p, p], [0, 0]], "INT32")
            shape, kind = (B, H + 2 * p, W + 2 * p, C), "FLOAT32" if x.zero is None else "INT8"
            padded = Tensor(self.tensor(kind, shape, x.zero), shape, x.zero)
            self.op("PAD", [x.at, ring], padded.at, "PadOptions", 2)
            x = padded
        B, H, W, _ = x.shape
        h, w = (H, W) if same else ((H - k) // s + 1, (W - k) // s + 1)
        shape = (B, h, w, node.channels)
        y = Tensor(self.tensor("FLOAT32" if zero is None else "INT8", shape, zero), shape, zero)
        act = RELU if node.act == "relu" else NO_ACTIVATION
        self.op(
            "CONV_2D", [x.at, kernel, bias], y.at, "Conv2DOptions", 1 if zero is None else 3,
            padding=SAME if same else VALID, strideH=s, strideW=s, dilationHFactor=1,
            dilationWFactor=1, fusedActivationFunction=act,
        )  # fmt: skip
        return y

    def real_conv(self, node: Node, x: Tensor, kernel_HWIO: ArrayLike, bias: ArrayLike) -> Tensor:
        """A convolution of floats, and its activation."""
        kernel = self.constant(np.transpose(kernel_HWIO, (3, 0, 1, 2)))
        y = self.convolved(node, x, kernel, self.constant(bias), None)
        if node.act == "hardswish":
            return self.single("HARD_SWISH", y)
        if node.act == "silu":
            gate, z = self.single("LOGISTIC", y), self.like(y)
            self.op("MUL", [y.at, gate.at], z.at, "MulOptions")
            return z
        return y

    def moved(self, node: Node, inputs: list[Tensor]) -> Tensor:
        """The output of a node that treats 8 bits and floats alike. ExportError, which names it,
        for pooling with a padding that is not that of equal sizes."""
        x, k, s = inputs[0], node.kernel, node.stride
        ats = [i.at for i in inputs]
        if node.op == "concat":
            y = self.like(x, node.channels)
            self.op("CONCATENATION", ats, y.at, "ConcatenationOptions", 2, axis=3)
        elif node.op == "upsample":
            y = self.like(x, by=2)
            size = self.constant(y.shape[1:3], "INT32")
            options = "ResizeNearestNeighborOptions"
            self.op("RESIZE_NEAREST_NEIGHBOR", [x.at, size], y.at, options, 2)
        else:
            if node.padding and (s != 1 or k % 2 == 0):
                raise ExportError(f"{node.name}: pooling {k}x{k} by {s} has no form in .tflite")
            y = self.like(x, by=1 if node.padding else 1 / s)
            self.op(
                "MAX_POOL_2D", ats, y.at, "Pool2DOptions", 2,
                padding=SAME if node.padding else VALID, strideH=s, strideW=s, filterHeight=k,
                filterWidth=k,
            )  # fmt: skip
        return y

    def images(self, scale: float) -> Tensor:
        """The input, uint8 with zero point 128."""
        shape = (self.batch, *self.size, 3)
        x = Tensor(self.tensor("UINT8", shape, 128, scale, name="images"), shape, 128)
        self.part.inputs = [x.at]
        return x

    def finish(self, outputs: dict[str, Tensor]) -> bytes:
        """The file; `outputs` are float tensors by the name that they get in it."""
        self.part.outputs = [x.at for x in outputs.values()]
        for name, x in outputs.items():
            self.part.tensors[x.at].name = name
        signature = self.schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs = [self._named("images", self.part.inputs[0])]
        signature.outputs = [self._named(name, x.at) for name, x in outputs.items()]
        self.file.signatureDefs = [signature]
        builder = self.flatbuffers.Builder(1 << 20)
        builder.Finish(self.file.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def _named(self, name: str, at: int) -> Any:
        entry = self.schema.TensorMapT()
        entry.name, entry.tensorIndex = name, at
        return entry


def _aligned_buffer(schema: Any) -> Callable[[], Any]:
    """The schema's BufferT, whose bytes begin at a multiple of `ALIGNED`."""

    class Aligned(schema.BufferT):
        def Pack(self, builder):
            builder.StartVector(1, len(self.data), ALIGNED)
            builder.head -= len(self.data)
            builder.Bytes[builder.head : builder.head + len(self.data)] = self.data.tobytes()
            data = builder.EndVector()
            schema.BufferStart(builder)
            schema.BufferAddData(builder, data)
            return schema.BufferEnd(builder)

    return Aligned


def float_tflite(graph: Graph, params: Any, size: tuple[int, int], batch: int = 1) -> bytes:
    """The .tflite file of a folded graph in float32.

    Needs ai-edge-litert; LiteRT can resize the input to another batch. GraphError for a graph that
    is not folded, ExportError for an operation that has no form there.
    """
    check_folded(graph)
    w = TfliteWriter(graph, size, batch)
    image = lambda: w.single("DEQUANTIZE", w.images(INPUT_SCALE))
    arrays = lambda node: (params[node.name][key] for key in ("kernel", "bias"))
    conv = lambda node, x: w.real_conv(node, x, *arrays(node))
    return w.finish(walked(graph, image, conv, w.moved))


def integer_tflite(model: IntegerModel, size: tuple[int, int], batch: int = 1) -> bytes:
    """The .tflite file of an integer model; under XNNPACK it gives the bits of `run_integer`.

    Needs ai-edge-litert; LiteRT can resize the input to another batch. A table is a GATHER, which
    is slow; layers that stay in float do so there. ExportError, which names the layer, for what
    has no form there.
    """
    w, zeros = TfliteWriter(model.graph, size, batch), zero_points(model)

    def conv(node: Node, x: Tensor) -> Tensor:
        p, zero = layer_of(model, node), zeros[node.name]
        if "factor" not in p:
            real = w.single("DEQUANTIZE", x)
            y = w.real_conv(node, real, p["kernel"] * p["step_in"], p["bias"])
            if zero is None:
                return y
            return w.single("QUANTIZE", w.times(y, 1 / p["step"]), zero)
        kernel = np.transpose(p["kernel"], (3, 0, 1, 2))
        weights = w.tensor("INT8", kernel.shape, 0, p["factor"], kernel)
        bias = w.tensor("INT32", (node.channels,), 0, p["factor"], whole_bias(p))
        y = w.convolved(node, x, weights, bias, int(p["zero"]))
        return looked_up(y, p["table"], zero) if "table" in p else y

    def looked_up(x: Tensor, table: np.ndarray, zero: int | None) -> Tensor:
        whole, index = (w.tensor("INT32", x.shape) for _ in range(2))
        w.op("CAST", [x.at], whole, "CastOptions")
        w.op("ADD", [whole, w.constant(128, "INT32")], index, "AddOptions")
        values = w.tensor("INT8", (256,), zero, data=table)
        y = Tensor(w.tensor("INT8", x.shape, zero), x.shape, zero)
        w.op("GATHER", [values, index], y.at, "GatherOptions", 2, axis=0)
        return y

    outputs = {}
    image = lambda: w.single("QUANTIZE", w.images(1.0), 0)
    for name, x in walked(model.graph, image, conv, w.moved).items():
        step = model.outputs[name]["step"] if name in model.outputs else None
        outputs[name] = x if step is None else w.times(w.single("DEQUANTIZE", x), step)
    return w.finish(outputs)
