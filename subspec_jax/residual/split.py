"""Exact matrices in two parts: the draft's substitute and the residual that completes it."""

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
from pallas_kernels.quantized_matmul import Packed
from pallas_kernels.quantized_matmul.packing import fields_of
from pallas_kernels.residual_decode import Residual, residual_decode
from pallas_kernels.residual_decode.api import parts_here
from pallas_kernels.residual_decode.code import COLUMNS, LANES, MAX_WEIGHTS, tiles


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
    fits = cfg.d_model % group == 0 and math.prod(shape) < MAX_WEIGHTS
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
    words, parts = w.residual.words, parts_here(w.residual, w.substitute)
    for part in range(parts):
        # A barrier ties the words to x, and to the part before: otherwise a compiler may decode
        # all matrices of a layer before it uses the first.
        words, x, state = jax.lax.optimization_barrier((words, x, state))
        residual = dataclasses.replace(w.residual, words=words)
        found = linear(residual_decode(residual, w.substitute, None, part, parts), x, dtype)
        state = fold(state, found, part * found.shape[-1])
    return state


def decode_layer(layer: Layer) -> Layer:
    """The layer with every `Split` put together and all else as it is."""
    whole = lambda w: residual_decode(w.residual, w.substitute) if is_split(w) else w
    return jax.tree.map(whole, layer, is_leaf=is_split)
