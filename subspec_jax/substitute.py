"""Low-bit substitutes of a target's layers: the draft model that needs no training and no data.

A substitute has four matrices in place of seven: q, k and v are one, gate and up are one.
"""

import dataclasses
from collections.abc import Callable, Container

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.packed import packed
from llm_jax.params import Attention, JoinedMLP, Layer, Params, joined
from llm_jax.quantize import QuantizedTable, quantize
from subspec_jax.offload import to_device
from subspec_jax.residual.split import Split, has_split, is_split


def replaced(layer: Layer, low: Callable) -> Layer:
    """The layer with `low(*matrices)` in place of the matrices that are joined to one.

    Matrices of other attention than the plain one stay apart, and arrays of more axes, such as a
    low-rank layer's small factors, stay as they are.
    """
    if type(layer.attn) is Attention:
        return joined(layer, low)
    attn = jax.tree.map(lambda w: low(w) if w.ndim == 2 else to_device(w), layer.attn)
    mlp = JoinedMLP(low(layer.mlp.gate, layer.mlp.up), low(layer.mlp.down))
    return Layer(layer.attn_norm, attn, layer.mlp_norm, mlp)


def substitute_layer(layer: Layer, bits: int = 4, group: int = 64, iterations: int = 20) -> Layer:
    """The layer with every matrix quantized, on the device; norms are the same buffers.

    Matrices in host memory are brought over one at a time.
    """
    if has_split(layer):
        return substitutes(layer)

    def low(*matrices):
        some = [
            jax.block_until_ready(quantize(to_device(w), bits, group, iterations)) for w in matrices
        ]
        return jax.block_until_ready(packed(*some))

    return replaced(layer, low)


def substitutes(layer: Layer) -> Layer:
    """The substitutes that a layer of `Split` matrices, or a matrix, holds: the same buffers."""
    part = lambda w: w.substitute if isinstance(w, Split) else w
    return jax.tree.map(part, layer, is_leaf=is_split)


def substitute_shapes(layer: Layer, bits: int, group: int) -> Layer:
    """What `substitute_layer` makes of a layer, as shapes and dtypes."""
    if has_split(layer):
        return substitutes(layer)
    low = lambda *matrices: packed(*(quantize(w, bits, group, 0) for w in matrices))
    anywhere = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), layer)
    return jax.eval_shape(lambda l: replaced(l, low), anywhere)


def substitute(
    params: Params,
    bits: int = 4,
    group: int = 64,
    iterations: int = 20,
    layers: Container[int] | None = None,
    progress: Callable[[int], None] | None = None,
    head_bits: int | None = None,
) -> Params:
    """The draft: `params` with its `layers` (all if None) quantized and everything else shared.

    Shared means the same buffers, not copies. An embedding table kept on the host as a NumPy array
    is quantized too (along the model dimension), because the draft looks tokens up on the device.
    `head_bits` gives the draft a low-bit head of its own; a head in two parts has one already.
    """
    drafted = []
    for i, layer in enumerate(params.layers):
        chosen = layers is None or i in layers
        drafted.append(substitute_layer(layer, bits, group, iterations) if chosen else layer)
        if progress:
            progress(i + 1)
    table, head = params.embed_VD, params.head_DV
    if is_split(head):
        head = substitutes(head)
    elif head_bits is not None:
        head = substitute_head(params, head_bits, group)
    if isinstance(table, np.ndarray):
        table = substitute_table(table, bits, group)
    return dataclasses.replace(params, embed_VD=table, layers=tuple(drafted), head_DV=head)


def substitute_head(params: Params, bits: int = 4, group: int = 64):
    """A low-bit output head [D, V], of a tied table if there is no head."""
    head = params.embed_VD.T if params.head_DV is None else params.head_DV
    return jax.block_until_ready(packed(quantize(head, bits, group, 0)))


def substitute_table(table_VD, bits: int = 4, group: int = 64) -> QuantizedTable:
    """A low-bit embedding table on the device, made in blocks of rows to need little memory."""
    blocks = (table_VD[i : i + 8192].T for i in range(0, table_VD.shape[0], 8192))
    parts = [quantize(to_device(np.ascontiguousarray(b)), bits, group, 0) for b in blocks]
    join = lambda *a: jnp.concatenate(a, axis=-1)
    return QuantizedTable(jax.tree.map(join, *parts))
