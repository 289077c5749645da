"""What a draft is made of: low-bit substitutes of a target's layers, and what it shares with it.

The substitutes need no training and no data. Everything here takes a target as arrays or as shapes
(`jax.ShapeDtypeStruct`), so the planner counts the same draft that is loaded later. A substitute
has four matrices in place of seven: q, k and v are one, gate and up are one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Container

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.cards import PARTS, on_each, own_rows
from llm_jax.config import Config
from llm_jax.disk import loaded
from llm_jax.int8 import int8
from llm_jax.mxfp4 import Mxfp4, dense
from llm_jax.packed import packed
from llm_jax.params import (
    Attention,
    Experts,
    Layer,
    Params,
    SeparateExperts,
    joined,
    joined_mlp,
)
from llm_jax.quantize import QuantizedTable, quantize
from llm_jax.stream import to_device
from subspec_jax.offload import separate_experts
from subspec_jax.residual.split import has_split, is_split


@dataclasses.dataclass(frozen=True)
class Draft:
    """How tokens are drafted.

    `bits` and `group` describe substitutes (bits None: there are none); `model` is another, smaller
    model in place of them.
    """

    bits: int | None = 4
    group: int = 64
    """Weights that share a step and an offset. 0, with 8 bits: one scale for each output and every
    layer, resident or not, and the head in this form (`llm_jax.int8`), in which a CPU multiplies
    fastest."""
    head_bits: int | None = None
    """Bits of an output head of the draft's own; None shares the target's."""
    experts: int | None = None
    """Experts that the draft routes a token to; None: as many as the target."""
    share_resident: bool = True
    """Resident layers serve the draft as they are; otherwise it has substitutes of them too."""
    own_cache: bool = False
    model: Config | None = None

    @property
    def int8(self) -> bool:
        """Whether substitutes are `llm_jax.int8` matrices."""
        return self.bits == 8 and self.group == 0


INT8 = Draft(8, 0)
NO_DRAFT = Draft(bits=None)


def drafted_layers(layers: tuple, draft: Draft, resident: int) -> range:
    """The numbers of the layers that have substitutes: all but the first `resident` ones.

    Where layers are `Split`, every one has its substitute already, resident or not. On a CPU an
    int8 copy of a resident layer is quicker than the layer.
    """
    shares = draft.share_resident and not draft.int8 and not has_split(layers)
    return range(resident if shares else 0, len(layers))


def make_draft(
    target: Params,
    draft: Draft,
    resident: int = 0,
    iterations: int = 20,
    progress: Callable[[int], None] | None = None,
    table_on_host: bool | None = None,
    cards: int = 1,
) -> Params:
    """The draft of a target whose first `resident` layers are on the device. Given shapes, shapes.

    All that is not quantized is shared: the same buffers, not copies. `table_on_host`: the target's
    embedding table is in host memory, so the draft has a low-bit copy; None: it is if it is a NumPy
    array. `cards` share the target. Raises ValueError for a draft without substitutes.
    """
    if draft.bits is None:
        raise ValueError("this draft has no substitutes")
    chosen = drafted_layers(target.layers, draft, resident)
    options = draft.bits, draft.group, iterations, chosen, progress, draft.head_bits
    return substitute(target, *options, table_on_host, cards)


def substitute(
    params: Params,
    bits: int = 4,
    group: int = 64,
    iterations: int = 20,
    layers: Container[int] | None = None,
    progress: Callable[[int], None] | None = None,
    head_bits: int | None = None,
    table_on_host: bool | None = None,
    cards: int = 1,
) -> Params:
    """`params` with its `layers` (all if None) quantized and everything else shared.

    `bits` a weight, in groups of `group` inputs; `iterations` of HQQ (0: round to nearest). An
    embedding table in host memory is quantized too (along the model dimension), because the draft
    looks tokens up on the device. `head_bits` gives the draft a low-bit head of its own; a `Split`
    head has one already. `progress` hears how many layers are done.
    """
    drafted = []
    for i, layer in enumerate(params.layers):
        chosen = layers is None or i in layers
        how = bits, group, iterations, cards
        drafted.append(substitute_layer(layer, *how) if chosen else layer)
        if progress:
            progress(i + 1)
    table, head = params.embed_VD, params.head_DV
    if is_split(head):
        head = substitutes(head)
    elif head_bits is not None or not group:
        head = substitute_head(params, head_bits, group, cards)
    if isinstance(table, np.ndarray) if table_on_host is None else table_on_host:
        table = substitute_table(table, bits, group)
        table = table if _are_shapes(jax.tree.leaves(table)) else to_device(table, cards)
    return dataclasses.replace(params, embed_VD=table, layers=tuple(drafted), head_DV=head)


def _low(bits: int, group: int, iterations: int, *matrices: jax.Array):
    """The matrices [D, F], [D, F'] … as one low-bit matrix."""
    if not group:
        return int8(jnp.concatenate(matrices, axis=1))
    return packed(*(quantize(w, bits, group, iterations) for w in matrices))


def substitute_layer(
    layer: Layer, bits: int = 4, group: int = 64, iterations: int = 20, cards: int = 1
) -> Layer:
    """The layer with every matrix quantized, on the device; norms are the same buffers.

    Matrices in host memory are brought over one at a time, those on disk are read; of several
    `cards` all at once, and each quantizes its part. Of shapes, shapes.
    """
    if has_split(layer):
        return substitutes(layer)
    layer = loaded(layer)
    if isinstance(layer.mlp, Experts):
        return _low_experts(layer, bits, group, iterations)
    leaves, structure = jax.tree.flatten(layer)
    if _are_shapes(leaves):
        alike = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves)
        return _layer_shapes(structure, alike, bits, group)

    if cards > 1:
        return jax.block_until_ready(_low_parts(to_device(layer), bits, group, iterations, cards))

    def low(*matrices):
        if not group:
            return jax.block_until_ready(_low(bits, group, 0, *map(to_device, matrices)))
        some = [
            jax.block_until_ready(quantize(to_device(w), bits, group, iterations)) for w in matrices
        ]
        return jax.block_until_ready(packed(*some))

    return _replaced(layer, low)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _low_parts(layer: Layer, bits: int, group: int, iterations: int, cards: int) -> Layer:
    low = functools.partial(_low, bits, group, iterations)
    return on_each(lambda part: _replaced(part, low, keep=lambda w: w), cards, PARTS)(layer)


def _low_experts(layer: Layer, bits: int, group: int, iterations: int) -> Layer:
    """The layer with its experts quantized; all else, which is on the device, is shared."""
    plain = lambda w: dense(w, layer.mlp.router.dtype) if isinstance(w, Mxfp4) else w
    low = lambda w: packed(quantize(plain(w), bits, group, iterations))
    m = layer.mlp
    if _are_shapes([m.router]):
        stacks = m.expert_gate_up, m.expert_down
        if isinstance(stacks[0], SeparateExperts):
            room = lambda shape: jax.ShapeDtypeStruct((m.router.shape[1], *shape), m.router.dtype)
            stacks = map(room, stacks[0].shapes)
        stacks = [jax.eval_shape(jax.vmap(low), w) for w in stacks]
    else:
        experts, stacks = separate_experts(layer).mlp.expert_gate_up, None
        for e, flat in enumerate(experts.each):
            one = tuple(map(low, experts.matrices(to_device(flat))))
            if stacks is None:  # filled in place: no second copy, and no holes in memory
                room = lambda a: jnp.zeros((len(experts.each), *a.shape), a.dtype)
                stacks = to_device(jax.tree.map(room, one))
            stacks = jax.block_until_ready(_put(stacks, one, e))
    mlp = dataclasses.replace(m, expert_gate_up=stacks[0], expert_down=stacks[1])
    return dataclasses.replace(layer, mlp=mlp)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacks, one, e):
    return jax.tree.map(lambda a, b: a.at[e].set(b), stacks, one)


@functools.cache
def _layer_shapes(structure, leaves: tuple, bits: int, group: int) -> Layer:
    low = functools.partial(_low, bits, group, 0)
    layer = jax.tree.unflatten(structure, leaves)
    return jax.eval_shape(lambda l: _replaced(l, low, keep=lambda w: w), layer)


def _replaced(layer: Layer, low: Callable, keep: Callable = to_device) -> Layer:
    """The layer with `low(*matrices)` in place of the matrices that are joined to one.

    Matrices of other attention than the plain one are not joined, and its arrays of more axes, such
    as a low-rank layer's small factors, are kept.
    """
    if type(layer.attn) is Attention:
        return joined(layer, low)
    attn = jax.tree.map(lambda w: low(w) if w.ndim == 2 else keep(w), layer.attn)
    return dataclasses.replace(layer, attn=attn, mlp=joined_mlp(layer.mlp, low))


def substitutes(tree):
    """The substitutes that a layer of `Split` matrices, or one such matrix, holds: the same
    buffers."""
    if isinstance(tree, Layer) and isinstance(tree.mlp, Experts):
        w = tree.mlp.expert_gate_up
        mlp = dataclasses.replace(tree.mlp, expert_gate_up=w.gate_up, expert_down=w.down)
        return dataclasses.replace(tree, mlp=mlp)
    part = lambda w: w.substitute if is_split(w) else w
    return jax.tree.map(part, tree, is_leaf=is_split)


def substitute_head(params: Params, bits: int = 4, group: int = 64, cards: int = 1):
    """A low-bit output head [D, V]; of the embedding table if the head is tied to it. Of several
    `cards`, each has its part; of shapes, those of one card."""
    low = functools.partial(_low, bits, group, 0)
    turn = lambda table: low(table.T)
    tied = params.head_DV is None
    whole = params.embed_VD if tied else params.head_DV
    if _are_shapes([whole]):
        rows = -(-whole.shape[0] // cards)
        own = jax.ShapeDtypeStruct((rows, whole.shape[1]), whole.dtype)
        return jax.eval_shape(turn, own) if tied else jax.eval_shape(low, whole)
    if cards > 1:
        part = lambda p: turn(own_rows(p.embed_VD, cards)) if tied else low(p.head_DV)
        top = dataclasses.replace(params, embed_VD=whole if tied else None, layers=())
        return jax.block_until_ready(jax.jit(on_each(part, cards, PARTS))(top))
    return jax.block_until_ready(low(whole.T if tied else whole))


def substitute_table(table_VD, bits: int = 4, group: int = 64) -> QuantizedTable:
    """A low-bit embedding table on the device, made in blocks of rows to need little memory."""
    group = group or math.gcd(64, table_VD.shape[1])
    if _are_shapes([table_VD]):
        return jax.eval_shape(lambda t: QuantizedTable(quantize(t.T, bits, group, 0)), table_VD)
    blocks = (table_VD[i : i + 8192].T for i in range(0, table_VD.shape[0], 8192))
    parts = [quantize(to_device(np.ascontiguousarray(b)), bits, group, 0) for b in blocks]
    join = lambda *a: jnp.concatenate(a, axis=-1)
    return QuantizedTable(jax.tree.map(join, *parts))


def _are_shapes(leaves: list) -> bool:
    return any(isinstance(a, jax.ShapeDtypeStruct) for a in leaves)
