"""The same tokens in 16 bits: every method's passes are one program, and bits do not tell nodes
from tokens.

A pass has a fixed number of rows, whatever tree is in it; plain decoding's tree is the root. So all
methods run the same compiled products, norms and head. Attention adds in the order of positions
(`llm_jax.ordered`). What a text's token gets is then a function of the tokens before it alone.

Letters: E nodes, R rows of a pass, L levels, W positions of a window.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.attention import Step
from llm_jax.config import Config
from llm_jax.ordered import window_start
from llm_jax.params import Attention, JoinedAttention, Params
from llm_jax.sample import Sampler
from subspec_jax import memory
from subspec_jax.methods import Method, MethodError
from subspec_jax.options import Options
from subspec_jax.sources import Source
from subspec_jax.tree import PassShape, Tree, TreeSpec
from subspec_jax.verify import drawn, lay_out, nodes_of

ROWS_ON_GPU, ROWS_ON_CPU = 320, 64
"""Rows of a pass: a tree of 48 x 6 nodes and its root are 289; on a CPU, one of 16 x 2 is 33."""
LEVELS = 64
"""Levels of trees come in multiples of these."""


def pass_shape(methods: Iterable[Method]) -> PassShape:
    """The pass that all of these methods share: the machine's usual one, so that engines for other
    methods have it too, or as large as their largest tree needs."""
    specs = [m.spec for m in methods]
    usual = ROWS_ON_CPU if memory.card_bytes() is None else ROWS_ON_GPU
    up = lambda n: -(-n // 64) * 64
    rows = up(max(usual, *(spec.nodes for spec in specs)))
    places = up(max(rows + 64, *(spec.places for spec in specs)))
    levels = -(-max(LEVELS, *(spec.deepest + 1 for spec in specs)) // LEVELS) * LEVELS
    return PassShape(rows, places, levels)


def shaped(options: Options, methods: Iterable[Method], source: Source) -> Options:
    """The options with the shape of passes that all of the methods share, if `exact` is bitwise.

    Raises MethodError for what cannot promise plain decoding's bits.
    """
    methods = list(methods)
    if options.exact == "float32":
        return options
    for method in methods:
        if reason := why_not(method, options, source):
            raise MethodError(f"{reason}; --exact bitwise does not go with it")
    return dataclasses.replace(options, shape=pass_shape(methods))


def why_not(method: Method, options: Options, source: Source) -> str | None:
    """Why a method cannot promise plain decoding's bits; None where it can."""
    if not method.lossless:
        return f"{method.name} accepts tokens that plain decoding does not write"
    if options.texts > 1 or options.ladder:
        return "texts that share a pass change its shape"
    if source.cfg.cards > 1:
        return f"{source.cfg.cards} devices add their parts of a product"
    if source.cfg.experts is not None:
        return "experts are applied to groups of a pass's tokens"
    layers = source.shapes(method.draft).layers
    if not all(isinstance(layer.attn, Attention | JoinedAttention) for layer in layers):
        return "low-rank caches (--palu) are read in the order of their slots"
    return None


def ancestor_slots(tree: Tree, at: jax.Array, position_E: jax.Array, levels: int) -> jax.Array:
    """[E, levels] the slots of the positions from `window_start` on, for each node.

    Those below `at` are in slots of their number, the others where the node's ancestors are.
    """
    level_L = jnp.arange(levels, dtype=jnp.int32)
    at_level_ELE = tree.ancestor_EE[:, None] & (tree.depth_E[None] == level_L[:, None])[None]
    place_EL = jnp.argmax(at_level_ELE, axis=-1).astype(jnp.int32)
    position_EW = window_start(position_E, levels)[:, None] + level_L[None]
    above_EW = jnp.clip(position_EW - at, 0, levels - 1)
    of_tree_EW = at + jnp.take_along_axis(place_EL, above_EW, axis=1)
    return jnp.where(position_EW < at, position_EW, of_tree_EW)


@functools.partial(jax.jit, static_argnames=("spec", "shape"))
def lay_out_in_order(
    tree: Tree, at: jax.Array, spec: TreeSpec, shape: PassShape
) -> tuple[Tree, jax.Array, Step]:
    """`verify.lay_out` for a pass of `shape`: tokens are [1, R], the root again behind the tree.

    The cache keeps what it has in the slots of those rows.
    """
    cut = nodes_of(tree, spec)
    position_E = at + cut.depth_E
    slot_EW = ancestor_slots(cut, at, position_E, shape.levels)
    fill = lambda a: jnp.concatenate(
        [a, jnp.broadcast_to(a[:1], (shape.rows - len(a), *a.shape[1:]))]
    )
    position_R, slot_RW = fill(position_E), fill(slot_EW)
    nothing = jnp.zeros((1, shape.rows, 0), bool)
    real = jnp.int32(spec.nodes)
    return (
        cut,
        fill(cut.token_E)[None],
        Step(at, position_R[None], nothing, real=real, slot_TW=slot_RW),
    )


def laid_out(
    tree: Tree, at: jax.Array, spec: TreeSpec, slots: int, shape: PassShape | None
) -> tuple[Tree, jax.Array, Step]:
    """(the places to verify as a `Tree`, their tokens, the `Step` of the pass); `slots` are those
    that a pass without a shape looks at."""
    if shape is None:
        return lay_out(tree, at, spec, slots)
    return lay_out_in_order(tree, at, spec, shape)


jit_drawn = jax.jit(drawn, static_argnames=("cfg", "sampler"))


def draws(
    top: Params,
    x_1RD: jax.Array,
    step: Step,
    key: jax.Array,
    cfg: Config,
    sampler: Sampler,
    shape: PassShape | None,
) -> Any:
    """The target's token after every row of a pass of a shape, int32 [R], by a program that does
    not depend on the method; None where the round's end draws them itself."""
    if shape is None:
        return None
    return jit_drawn(top, x_1RD, step.position_BT[0] + 1, key, cfg, sampler)
