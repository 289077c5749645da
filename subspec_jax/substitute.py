"""Low-bit substitutes of a target's layers: the draft model that needs no training and no data."""

import dataclasses
from collections.abc import Callable, Container

import jax
import numpy as np

from llm_jax.params import Layer, Params
from llm_jax.quantize import QuantizedTable, quantize
from subspec_jax.offload import fetch, settled


def substitute_layer(layer: Layer, bits: int = 4, group: int = 64, iterations: int = 20) -> Layer:
    """The layer with every matrix quantized, on the device; norms and biases are the same buffers.

    Matrices in host memory are brought over one at a time. Arrays of more axes, such as a low-rank
    layer's small factors, stay as they are.
    """

    def one(w):
        if w.ndim != 2:
            return fetch(w)
        return jax.block_until_ready(quantize(fetch(w), bits, group, iterations))

    return jax.tree.map(one, layer)


def substitute(
    params: Params,
    bits: int = 4,
    group: int = 64,
    iterations: int = 20,
    layers: Container[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Params:
    """The draft: `params` with its `layers` (all if None) quantized and everything else shared.

    Shared means the same buffers, not copies. An embedding table kept on the host as a NumPy array
    is quantized too (along the model dimension), because the draft looks tokens up on the device.
    """
    drafted = []
    for i, layer in enumerate(params.layers):
        chosen = layers is None or i in layers
        drafted.append(substitute_layer(layer, bits, group, iterations) if chosen else layer)
        if progress:
            progress(i + 1)
    table = params.embed_VD
    if isinstance(table, np.ndarray):
        table = substitute_table(table, bits, group)
    return dataclasses.replace(params, embed_VD=table, layers=tuple(drafted))


def substitute_table(table_VD, bits: int = 4, group: int = 64) -> QuantizedTable:
    """A low-bit embedding table on the device, made in blocks of rows to need little memory."""
    blocks = (table_VD[i : i + 8192].T for i in range(0, table_VD.shape[0], 8192))
    parts = [quantize(settled(np.ascontiguousarray(b)), bits, group, 0) for b in blocks]
    join = lambda *a: jax.numpy.concatenate(a, axis=-1)
    return QuantizedTable(jax.tree.map(join, *parts))
