"""Residuals on the device: the same decoder as one jittable function of XLA's own operations."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llm_jax.config import Config
from llm_jax.linear import linear
from llm_jax.packed import packed
from llm_jax.params import Layer, abstract, joined
from llm_jax.quantize import quantize
from pallas_kernels.device import on_gpu
from pallas_kernels.quantized_matmul import Packed, restore
from pallas_kernels.quantized_matmul.packing import fields_of
from pallas_kernels.residual_decode import triton as residual_triton
from pallas_kernels.residual_decode.code import (
    BIAS,
    COLUMNS,
    FIRST_PATCH,
    LANES,
    LEVELS,
    MOST,
    OCTAVES,
    Residual,
    check_pair,
    complete,
    predict,
    tiles,
)

SLAB = 2**23
"""Weights decoded at a time: some 20 bytes of work space each."""
PART = 40_000_000
"""The kernel decodes a larger matrix in parts, so that 80 MB hold what a product reads."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
    """An exact matrix [D, F] in two parts: what the draft computes with, and what that lacks.

    The substitute is on the device at all times; the residual may be in host memory.
    """

    substitute: Packed
    residual: Residual

    @property
    def shape(self) -> tuple[int, int]:
        return self.residual.shape

    @property
    def ndim(self) -> int:
        return 2


def is_split(w) -> bool:
    return isinstance(w, Split)


def has_split(tree) -> bool:
    return any(map(is_split, jax.tree.leaves(tree, is_leaf=is_split)))


def split_shapes(
    cfg: Config, bits: int, group: int, room: dict[str, tuple[int, int]], code: str = "levels"
) -> Layer:
    """A layer of `Split` matrices as shapes; `room` gives (rows of words, patches) of each."""
    names = iter(cfg.joined_matrices)
    split = lambda *matrices: _split(matrices, bits, group, room[next(names)], code)
    plain = abstract(dataclasses.replace(cfg, layers=1)).layers[0]
    return jax.eval_shape(lambda layer: joined(layer, split), plain)


def _split(matrices, bits, group, room, code) -> Split:
    substitute = packed(*(quantize(w, bits, group, 0) for w in matrices))
    rows, patches = room
    low = jnp.zeros(substitute.shape, jnp.uint8) if code == "planes" else None
    words = jnp.zeros((rows, LANES), jnp.uint32)
    dtype = matrices[0].dtype.name
    return Split(substitute, Residual(words, low, substitute.shape, dtype, patches))


def head_shape(cfg: Config, bits: int, group: int) -> tuple[int, int] | None:
    """The output head [D, V], with columns added until the kernel decodes it; None where it is no
    `Split`: it is tied to the embedding, or larger than a residual counts to."""
    whole = COLUMNS * fields_of(bits)
    shape = cfg.d_model, -(-cfg.vocab // whole) * whole
    fits = cfg.d_model % group == 0 and math.prod(shape) < MOST
    return None if cfg.tied or not fits else shape


def split_head_shapes(
    cfg: Config, bits: int, group: int, room: tuple[int, int], code: str = "levels"
) -> Split:
    """The output head as a `Split`, as shapes."""
    whole = jax.ShapeDtypeStruct(head_shape(cfg, bits, group), cfg.dtype)
    return jax.eval_shape(lambda w: _split((w,), bits, group, room, code), whole)


def gaussian_room(cfg: Config, bits: int, group: int) -> dict[str, tuple[int, int]]:
    """Room that residuals of normally distributed weights fit into, coded by "levels"; that of the
    output head, where it can be in two parts, is under "head"."""
    head = head_shape(cfg, bits, group)
    shapes = cfg.joined_matrices | ({} if head is None else {"head": head})
    room = {}
    for name, (D, F) in shapes.items():
        Q, T = tiles((D, F), group)
        stream, patched = GAUSSIAN[bits]
        words = D * F * stream / 32 + 2 * Q * T
        room[name] = 8 + math.ceil(words / LANES), 1024 + math.ceil(D * F * patched)
    return room


GAUSSIAN = {2: (9.95, 0.012), 3: (8.6, 0.008), 4: (7.53, 0.0085), 8: (3.83, 0.0125)}
"""By bits of the substitute: bits a weight, patches included, and patches a weight. Both depend on
where in an octave the weights' deviation lies (4 bits: 7.37 to 7.49, 0.2% to 0.7%); these are
enough everywhere."""


@linear.register
def _(w: Split, x, out_dtype=None):
    # Filled part by part: parts to be joined in the end would need room for both.
    y = jnp.zeros((*x.shape[:-1], w.shape[1]), out_dtype or x.dtype)
    fill = lambda y, found, at: jax.lax.dynamic_update_slice_in_dim(y, found, at, axis=-1)
    return over_parts(w, x, fill, y, y.dtype)


def over_parts(w: Split, x, fold, state, dtype):
    """`state` after state = fold(state, x @ part, the part's first column), over equal parts of the
    columns of w, from the first to the last; products are of `dtype`."""
    words, parts = w.residual.words, 1
    if on_gpu() and residual_triton.why_not(w.residual, w.substitute) is None:
        parts = parts_of(w.shape, w.substitute.fields)
    for part in range(parts):
        # A barrier ties the words to x, and to the part before: otherwise a compiler may decode
        # all matrices of a layer before it uses the first.
        words, x, state = jax.lax.optimization_barrier((words, x, state))
        residual = dataclasses.replace(w.residual, words=words)
        found = linear(decode(residual, w.substitute, None, part, parts), x, dtype)
        state = fold(state, found, part * found.shape[-1])
    return state


def parts_of(shape: tuple[int, int], fields: int) -> int:
    """Into how many parts of its columns the kernel decodes a matrix that a product waits for."""
    parts = 1
    while math.prod(shape) > parts * PART and fields % (2 * parts) == 0:
        parts *= 2
    return parts


def decode_layer(layer: Layer) -> Layer:
    """The layer with every `Split` put together and all else as it is."""
    whole = lambda w: decode(w.residual, w.substitute) if is_split(w) else w
    return jax.tree.map(whole, layer, is_leaf=is_split)


def decode(
    residual: Residual,
    substitute: Packed,
    implementation: str | None = None,
    part: int = 0,
    parts: int = 1,
) -> jax.Array:
    """The matrix [D, F], bit by bit what was encoded; or one of equal parts of its columns.

    Shapes depend on the shapes of the arguments and on `residual.patches` alone, so one compiled
    program serves every layer whose residuals were padded alike. `implementation` None takes the
    Triton kernel on a GPU where `residual_triton.why_not` gives no reason, else XLA, which decodes
    slabs of groups one after another; "triton" raises NotImplementedError with the reason.
    """
    if implementation not in (None, "xla", "triton"):
        raise ValueError(f"implementation is {implementation!r}; one of 'xla', 'triton' or None")
    check_pair("the residual", substitute, residual.shape, residual.dtype)
    reason = residual_triton.why_not(residual, substitute)
    if implementation == "triton" and reason:
        raise NotImplementedError(reason)
    with jax.named_scope("residual_decode"):
        if implementation == "triton" or (implementation is None and on_gpu() and not reason):
            pattern = residual_triton.decode_triton(residual, substitute, part, parts)
        else:
            pattern = jnp.split(_decode_xla(residual, substitute), parts, axis=1)[part]
        return jax.lax.bitcast_convert_type(pattern, residual.dtype)


def _decode_xla(residual: Residual, substitute: Packed) -> jax.Array:
    """The bit patterns [D, F], uint16."""
    (_, F), group = substitute.shape, substitute.group
    Q, T = tiles(substitute.shape, group)
    fitting = max(1, SLAB // (group * F))
    count = max(c for c in range(1, min(Q, fitting) + 1) if Q % c == 0)
    offsets = residual.words.reshape(-1)[LANES : LANES + Q * T].reshape(Q, T)
    low = residual.low_DF
    if low is not None:
        low = low.reshape(Q, group, F)
    offsets = offsets.astype(jnp.int32)
    turns = Q // count

    def cut(a, n, axis):
        size = a.shape[axis] // turns
        return jax.lax.dynamic_slice_in_dim(a, n * size, size, axis)

    def one(n):  # cut out when its turn comes: nothing is copied as a whole
        own = jax.tree.map(lambda a: cut(a, n, 1), substitute)
        return _slab(residual, own, cut(offsets, n, 0), None if low is None else cut(low, n, 0))

    pattern = jax.lax.map(one, jnp.arange(turns))
    return _patched(pattern.reshape(Q, group, F), residual).reshape(residual.shape)


def _slab(residual: Residual, substitute: Packed, offset_QT, low_QgF) -> jax.Array:
    """Bit patterns [Q, g, F], uint16, of some groups, without patches."""
    words = residual.words.reshape(-1)
    take = lambda index: words.at[index].get(mode="promise_in_bounds")
    octaves = words[OCTAVES].astype(jnp.int32)
    p = predict(*restore(substitute), octaves, residual.dtype, jnp)
    entry = words[:LEVELS].astype(jnp.int32).at[p.level].get(mode="promise_in_bounds")
    length, first = entry & 255, (entry >> 8) - BIAS
    start = jnp.repeat(offset_QT, COLUMNS, axis=1)[:, None, : length.shape[-1]]
    if low_QgF is None:
        at = _before(length)
        word, shift = start + (at >> 5), (at & 31).astype(jnp.uint32)
        two = take(word) >> shift | take(word + 1) << 1 << (31 - shift)
        x = two.astype(jnp.int32) & ((1 << length) - 1)
    else:
        more = length >> 4
        at = start + _before(more)
        high = take(at >> 2) >> (8 * (at & 3)).astype(jnp.uint32)
        x = low_QgF.astype(jnp.int32) | ((high.astype(jnp.int32) & 255) * more) << 8
    return complete(p, x + first, jnp).astype(jnp.uint16)


def _before(length_QgF) -> jax.Array:
    """The sum of all lengths that come earlier in a weight's tile, int32.

    Along a row of the tile it is a product with a triangle of ones: exact, because sums stay below
    2^24, and a matrix unit does it in one pass where a scan takes six.
    """
    Q, g, F = length_QgF.shape
    T = -(-F // COLUMNS)
    tile = jnp.pad(length_QgF, ((0, 0), (0, 0), (0, T * COLUMNS - F))).reshape(Q, g, T, COLUMNS)
    earlier = jnp.triu(jnp.ones((COLUMNS, COLUMNS), jnp.bfloat16), 1)
    along = jnp.dot(tile.astype(jnp.bfloat16), earlier, preferred_element_type=jnp.float32)
    row = tile.sum(-1)
    whole = along.astype(jnp.int32) + (jnp.cumsum(row, axis=1) - row)[..., None]
    return whole.reshape(Q, g, T * COLUMNS)[..., :F]


def _patched(pattern_QgF, residual: Residual) -> jax.Array:
    """The patterns with the listed places overwritten."""
    if not residual.patches:
        return pattern_QgF
    Q, T = tiles(residual.shape, pattern_QgF.shape[1])
    count = Q * T
    words = residual.words.reshape(-1)
    before = words[LANES + count : LANES + 2 * count + 1].astype(jnp.int32)
    entry = jnp.arange(residual.patches)
    patch = words.at[words[FIRST_PATCH].astype(jnp.int32) + entry].get(mode="clip")
    tile = jnp.searchsorted(before, entry, side="right").astype(jnp.int32) - 1
    place = (patch >> 16).astype(jnp.int32)
    row, column = place // COLUMNS, tile % T * COLUMNS + place % COLUMNS
    group = jnp.where(entry < before[-1], tile // T, Q)
    return pattern_QgF.at[group, row, column].set(patch.astype(jnp.uint16), mode="drop")
