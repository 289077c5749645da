"""Other forms of an integer network: with all zero points 0, and without rounding.

    run_integer(symmetric(model), images)
    run_folded(*unrounded(model), images)

TensorRT can hold the first; with the second the floats of engines are compared.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from qyolop_jax.export import ExportError, layer_of, whole_bias
from qyolop_jax.graph import Graph, Node
from qyolop_jax.integer import IntegerModel
from qyolop_jax.scales import INPUT_SCALE


def zero_points(model: IntegerModel) -> dict[str, int | None]:
    """The zero point (s8) of every node's output, None where it is float."""
    found: dict[str, int | None] = {}
    for node in reversed(model.graph.nodes):
        zero = None
        if node.name in model.outputs:
            zero = int(model.outputs[node.name]["zero"])
        for reader in model.graph.consumers(node.name):
            moved = reader.op != "conv"
            zero = found[reader.name] if moved else int(model.layers[reader.name]["zero_in"])
        found[node.name] = zero
    return found


def symmetric(model: IntegerModel) -> IntegerModel:
    """The same network with all zero points 0, in wider steps where they were not.

    A tensor from 0 to 255 steps has 127 then, so this costs up to one bit. ExportError for silu and
    hardswish, whose tables do not tell their steps.
    """
    layers: dict[str, dict[str, Any]] = {}
    for node in model.graph.convs:
        p = layer_of(model, node)
        if "table" in p:
            raise ExportError(
                f"{node.name} has a table for {node.act}, which has no form without zero points; "
                "`train --activation relu`"
            )
        wide_in, zero = _wider(p["zero_in"]), dict(zero_in=np.int8(0))
        if "zero" in p:
            zero["zero"] = np.int8(0)
        if "factor" in p:
            change = dict(
                bias=np.rint(whole_bias(p) / wide_in).astype(np.int32),
                factor=p["factor"] * np.float32(wide_in / _wider(p["zero"])),
                low=np.int8(0 if node.act == "relu" else -128),
            )
        else:
            change = dict(step_in=p["step_in"] * np.float32(wide_in))
            if "step" in p:
                change["step"] = p["step"] * np.float32(_wider(p["zero"]))
        layers[node.name] = {k: jnp.asarray(a) for k, a in (p | change | zero).items()}
    outputs = {
        name: dict(step=p["step"] * jnp.float32(_wider(p["zero"])), zero=jnp.int8(0))
        for name, p in model.outputs.items()
    }
    return dataclasses.replace(model, layers=layers, outputs=outputs)


def _wider(zero: Any) -> float:
    """How much wider steps get when this zero point becomes 0."""
    return max(127 - int(zero), 128 + int(zero)) / 127 if int(zero) else 1.0


def unrounded(model: IntegerModel) -> tuple[Graph, dict[str, dict[str, np.ndarray]]]:
    """A folded graph and its parameters in float32: the weights of the integers, as they are.

    Between the layers values are in steps, so relu stays what it was. ExportError for layers with
    silu or hardswish, and for outputs that another node reads.
    """
    params: dict[str, dict[str, np.ndarray]] = {}
    for node in model.graph.convs:
        p = layer_of(model, node)
        if node.act not in ("none", "relu"):
            raise ExportError(f"{node.name} has {node.act}, whose steps are not in the file")
        kernel, bias = p["kernel"].astype(np.float32), p["bias"]
        if "factor" in p:
            kernel, bias = kernel * p["factor"], whole_bias(p) * p["factor"]
        else:
            unit = p.get("step", np.float32(1))
            kernel, bias = kernel * (p["step_in"] / unit), bias / unit
        if _reads_image(model.graph, node):
            kernel = kernel / INPUT_SCALE  # its input is real, not in steps
        if node.name in model.outputs:
            if model.graph.consumers(node.name):
                raise ExportError(f"the output {node.name} is read inside the graph too")
            step = np.asarray(model.outputs[node.name]["step"])
            kernel, bias = kernel * step, bias * step
        params[node.name] = dict(kernel=kernel.astype(np.float32), bias=bias.astype(np.float32))
    return model.graph, params


def _reads_image(graph: Graph, node: Node) -> bool:
    """Whether the node's input is the image, or the image moved."""
    source = graph.node(node.inputs[0])
    return source.op == "input" or (source.op != "conv" and _reads_image(graph, source))
