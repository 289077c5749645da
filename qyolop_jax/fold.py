"""The form for deployment: every convolution is one kernel and one bias.

Batch norm, RepConv's branches and the implicit vectors are linear, so they become part of the
kernel. This is computed in float64, because quantization starts from the result.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from qyolop_jax.config import ModelConfig
from qyolop_jax.graph import (
    Graph,
    GraphError,
    activate,
    build_graph,
    check_size,
    convolve,
    normalized,
    run_graph,
)
from qyolop_jax.model import EPSILON

Folded = dict[str, dict[str, jnp.ndarray]]
"""By node name: kernel [k, k, in, out] and bias [out], float32."""


def fold(model: ModelConfig | Graph, variables: dict[str, Any]) -> tuple[Graph, Folded]:
    """The graph without norms, branches and implicit vectors, and its parameters.

    GraphError where the variables do not fit the graph.
    """
    graph = build_graph(model) if isinstance(model, ModelConfig) else model
    params, stats = variables["params"], variables.get("batch_stats", {})
    nodes, folded = [], {}
    for node in graph.nodes:
        if node.op != "conv":
            nodes.append(node)
            continue
        if node.name not in params:
            raise GraphError(f"the variables lack {node.name}; they are of another model")
        p, s = params[node.name], stats.get(node.name, {})
        get = lambda name, p=p: np.asarray(p[name], np.float64)
        kernel = get("kernel")
        if kernel.shape[2:] != (graph.in_channels(node), node.channels):
            raise GraphError(
                f"{node.name}: a kernel of shape {kernel.shape} for {graph.in_channels(node)} to "
                f"{node.channels} channels; the variables are of another width"
            )
        if node.norm:
            kernel, bias = _normed(kernel, p["norm"], s["norm"])
        else:
            bias = get("bias")
        if node.rep:
            pad = (node.kernel - 1) // 2
            ring = ((pad, pad), (pad, pad), (0, 0), (0, 0))
            small, extra = _normed(get("kernel1"), p["norm1"], s["norm1"])
            kernel, bias = kernel + np.pad(small, ring), bias + extra
            if "norm0" in p:
                same, extra = _normed(np.eye(node.channels)[None, None], p["norm0"], s["norm0"])
                kernel, bias = kernel + np.pad(same, ring), bias + extra
        if node.implicit:
            bias = (bias + np.einsum("hwio,i->o", kernel, get("add"))) * get("multiply")
            kernel = kernel * get("multiply")
        nodes.append(dataclasses.replace(node, norm=False, rep=False, implicit=False))
        folded[node.name] = dict(
            kernel=jnp.asarray(kernel, jnp.float32), bias=jnp.asarray(bias, jnp.float32)
        )
    return Graph(tuple(nodes), graph.outputs), folded


def _normed(kernel, norm, stats):
    """(kernel, bias) of a convolution followed by batch norm."""
    f64 = lambda a: np.asarray(a, np.float64)
    factor = f64(norm["scale"]) / np.sqrt(f64(stats["var"]) + EPSILON)
    return kernel * factor, f64(norm["bias"]) - f64(stats["mean"]) * factor


def run_folded(
    graph: Graph, params: Folded, images_u8: jax.Array, dtype: DTypeLike = jnp.float32
) -> dict:
    """Raw outputs of a folded graph, float32; equal to the model's except for rounding."""
    check_size(images_u8.shape)

    def conv(node, x):
        p = params[node.name]
        y = convolve(x, p["kernel"].astype(dtype), node) + p["bias"].astype(dtype)[None, None, None]
        return activate(y, node.act)

    raw = run_graph(graph, normalized(images_u8).astype(dtype), conv)
    return {name: x.astype(jnp.float32) for name, x in raw.items()}
