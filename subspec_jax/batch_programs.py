"""Programs of a round that several sequences share: their trees grow and are verified together.

Every sequence has its own row of the caches, its own length and its own sampler. Its tree is that
of `subspec_jax.tree`, with a leading axis; the model's products see the rows of all trees at once.

Letters: B sequences, E places for nodes, w nodes added per step, T tokens, D model, V vocabulary, P
places in a path, X nodes of all sequences.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llm_jax.attention import Step
from llm_jax.cache import move_each, one_row, put_row
from llm_jax.cards import ALIKE, CACHES, on_each
from llm_jax.config import Config
from llm_jax.generation import chunk_sizes
from llm_jax.grammar import only
from llm_jax.mlp import recorded_routing
from llm_jax.model import forward, unembed
from llm_jax.params import Params
from llm_jax.sample import Samplers
from pallas_kernels import device
from subspec_jax.accept import Gate, Judged, exact, gated, replayed
from subspec_jax.program import donated, program, static
from subspec_jax.residual.split import is_split
from subspec_jax.tree import (
    Tree,
    TreeSpec,
    add_candidates,
    commit,
    gain,
    live_sizes,
    node_mask,
    node_positions,
    pass_nodes,
    seedling,
)
from subspec_jax.verify import (
    GREEDY_ROWS,
    LOGIT_ROWS,
    SPLIT_ROWS,
    likeliest,
    normal_entropy,
    some_at_a_time,
)


def slot_sizes(slots: int, plain: bool) -> list[int]:
    """The numbers of slots that programs look at. Where a kernel reads only what each text has,
    one program does for all."""
    return live_sizes(slots) if plain and not device.on_gpu() else [slots]


def prefill_sizes(chunk: int, spec: TreeSpec, texts: int, most_texts: int) -> list[int]:
    """The numbers of tokens of each of `texts` texts that a pass reads, ascending: altogether no
    more than the largest pass has anyway."""
    most = max(chunk, pass_nodes(spec, most_texts)) // texts
    return [n for n in chunk_sizes(chunk) if n <= most] or [max(most, 1)]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Seats:
    """Who takes part in a round."""

    root_B: jax.Array
    """The newest token of each sequence, which is in no cache yet."""
    at_B: jax.Array
    """Committed tokens."""
    row_B: jax.Array
    """The row of the caches; one that does not exist fills a place of the program's shape."""
    samplers: Samplers


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Allowed:
    """The tokens that may follow, for G texts with a grammar; others are free."""

    mask_GTW: jax.Array
    """As of `grammar.Walk.mask`, of T nodes of each."""
    which_B: jax.Array
    """Of each sequence, which of the G it is; -1: it has no grammar."""

    def only(self, logits_XV: jax.Array, of_X: jax.Array, node_X: jax.Array) -> jax.Array:
        """The logits, -inf for what may not follow; X rows are nodes of the sequences `of_X`."""
        which_X = self.which_B[of_X]
        masked_XV = only(logits_XV, self.mask_GTW[jnp.maximum(which_X, 0), node_X])
        return jnp.where((which_X < 0)[:, None], logits_XV, masked_XV)


def steps_of(
    trees: Tree, rows_BT: jax.Array, seats: Seats, places: int, slots: int, alone: bool = False
) -> Step:
    """The `Step` of the nodes `rows_BT`, consecutive in each tree, over the first `slots` slots.

    `alone`: every tree is only its root.
    """
    at_B = seats.at_B
    mask_BTS = jax.vmap(functools.partial(node_mask, slots=slots))(trees, rows_BT, at_B)[:, 0]
    depth_BT = jnp.take_along_axis(trees.depth_E, jnp.minimum(rows_BT, places - 1), axis=1)
    positions = None
    if not alone:
        positions = jax.vmap(functools.partial(node_positions, slots=slots))(trees, at_B)[:, 0]
    return Step(
        at_B + rows_BT[:, 0],
        at_B[:, None] + depth_BT,
        mask_BTS,
        positions,
        causal=alone,
        row_B=seats.row_B,
        live_B=jnp.minimum(at_B + places, slots),
    )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Growing:
    """All that a batch of trees grows from."""

    params: Params
    """The draft model."""
    caches: tuple = donated()
    seats: Seats
    least_L: jax.Array
    """As in `draft.Drafting`."""
    cfg: Config = static()
    spec: TreeSpec = static()
    slots: int = static()
    """Attention looks at these first slots."""
    rows: int = static()
    """Rows of the caches."""
    experts: tuple[int, int] | None = static(default=None)
    """(layers with experts, experts) whose routing is recorded."""


class Grown(NamedTuple):
    """Trees, caches that hold their nodes, and the experts [L, E] that any node was routed to."""

    trees: Tree
    caches: tuple
    routed_LE: jax.Array | None


def forward_step(g: Growing, trees: Tree, caches, routed_LE, first_B, allowed=None, rows=None):
    """(scores [B, w, V], caches, routed_LE) of the nodes in the w places from `first_B` on, of
    which `allowed` says what may follow; None: anything. `rows` are others than a step's w."""
    w, E = rows or g.spec.width, g.spec.places
    rows_Bw = first_B[:, None] + jnp.arange(w)[None]
    step = steps_of(trees, rows_Bw, g.seats, E, g.slots)
    tokens_Bw = jnp.take_along_axis(trees.token_E, jnp.minimum(rows_Bw, E - 1), axis=1)
    with recorded_routing() as experts:
        logits_BwV, caches = forward(g.params, tokens_Bw, caches, step, g.cfg)
    if routed_LE is not None:
        there_B1 = (g.seats.row_B < g.rows)[:, None]
        node_X1 = ((rows_Bw < trees.size[:, None]) & there_B1).reshape(-1, 1)
        for layer, expert_Xc in enumerate(experts):
            marked = jnp.where(node_X1, expert_Xc, routed_LE.shape[1])
            routed_LE = routed_LE.at[layer, marked].set(True, mode="drop")
    B, _, V = logits_BwV.shape
    of_X = jnp.repeat(jnp.arange(B), w)
    logits_XV, samplers = logits_BwV.reshape(-1, V), g.seats.samplers
    if allowed is not None:
        logits_XV = allowed.only(logits_XV, of_X, jnp.tile(jnp.arange(w), B))
    if g.spec.coupled:
        z_XV = samplers.perturbed(logits_XV, of_X, step.position_BT.reshape(-1) + 1)
    else:
        z_XV = samplers.scores(logits_XV, of_X)
    return z_XV.reshape(B, w, V), caches, routed_LE


def where(chosen_B: jax.Array, new: Tree, old: Tree) -> Tree:
    """The new trees of the chosen sequences, the old ones of the others."""
    some = lambda a, b: jnp.where(chosen_B.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    return jax.tree.map(some, new, old)


def pays(g: Growing, trees: Tree) -> jax.Array:
    """[B] whether the gain of a tree's next step is above the least that step may have."""
    step_B = jnp.clip((trees.size - 1) // g.spec.width, 0, len(g.least_L) - 1)
    return jax.vmap(functools.partial(gain, spec=g.spec))(trees) > g.least_L[step_B]


def unfinished(g: Growing, trees: Tree) -> jax.Array:
    """[B] whether a tree grows by a step whose nodes are forwarded."""
    spec = g.spec
    room_B = trees.size + 2 * spec.width <= spec.nodes
    return (trees.size == 0) | (room_B & pays(g, trees))


def last_level(larger: Tree, trees: Tree, spec: TreeSpec) -> Tree:
    """The trees with the nodes of a last step, which `larger` has, where they have room."""
    gains_B = jax.vmap(functools.partial(gain, spec=spec))(trees)
    more_B = (trees.size + spec.width <= spec.nodes) & jnp.isfinite(gains_B)
    return where(more_B, larger, trees)


@program(Grown(ALIKE, CACHES, ALIKE))
def grow_each(g: Growing) -> Grown:
    """The trees of `draft.grow`, all grown together. One that is done waits for the others."""
    spec = g.spec
    of_each = lambda f: jax.vmap(functools.partial(f, spec=spec))
    trees = of_each(seedling)(g.seats.root_B)
    routed_LE = None if g.experts is None else jnp.zeros(g.experts, bool)

    def body(carry):
        trees, caches, routed_LE = carry
        goes_on_B, first_B = unfinished(g, trees), trees.size
        larger = of_each(commit)(trees)
        scores, caches, routed_LE = forward_step(g, larger, caches, routed_LE, first_B)
        larger = jax.vmap(functools.partial(add_candidates, spec=spec))(larger, first_B, scores)
        return where(goes_on_B, larger, trees), caches, routed_LE

    start = trees, g.caches, routed_LE
    going = lambda carry: unfinished(g, carry[0]).any()
    trees, caches, routed_LE = jax.lax.while_loop(going, body, start)
    return Grown(last_level(of_each(commit)(trees), trees, spec), caches, routed_LE)


@functools.partial(jax.jit, static_argnames="spec")
def only_roots(seats: Seats, spec: TreeSpec) -> Tree:
    """The trees of plain decoding."""
    of_each = lambda f: jax.vmap(functools.partial(f, spec=spec))
    return of_each(commit)(of_each(seedling)(seats.root_B))


@functools.partial(jax.jit, static_argnames=("spec", "slots", "rows"))
def lay_out_each(
    trees: Tree, seats: Seats, spec: TreeSpec, slots: int, rows: int
) -> tuple[Tree, jax.Array, Step, jax.Array]:
    """(the places to verify as trees, their tokens [B, E], the `Step` of the pass, which of the B E
    nodes count); caches have `rows` rows."""
    n = spec.nodes
    cut = dataclasses.replace(
        trees,
        token_E=trees.token_E[:, :n],
        parent_E=trees.parent_E[:, :n],
        depth_E=trees.depth_E[:, :n],
        score_E=trees.score_E[:, :n],
        ancestor_EE=trees.ancestor_EE[:, :n, :n],
    )
    rows_BE = jnp.broadcast_to(jnp.arange(n)[None], cut.token_E.shape)
    step = steps_of(cut, rows_BE, seats, n, slots, alone=n == 1)
    real_BE = (rows_BE < cut.size[:, None]) & (seats.row_B < rows)[:, None]
    return cut, cut.token_E, step, real_BE.reshape(-1)


def judge_each(v: "Verifying") -> Judged:
    """`verify.judge` of several trees, [B, E] each: logits of some nodes at a time."""
    (B, E, D), cfg, top, samplers = v.x_BED.shape, v.cfg, v.top, v.seats.samplers
    split, trees = is_split(top.head_DV), v.trees
    of_X, node_X = jnp.repeat(jnp.arange(B), E), jnp.tile(jnp.arange(E), B)
    x_XD = v.x_BED.reshape(-1, D)
    position_X = (v.seats.at_B[:, None] + trees.depth_E + 1).reshape(-1)

    def some(args):
        x_rD, of_r, position_r, node_r = args
        logits_rV = unembed(top, x_rD[None], cfg)[0]
        if v.allowed is not None:
            logits_rV = v.allowed.only(logits_rV, of_r, node_r)
        draw_r = samplers.draw(logits_rV, of_r, position_r)
        if v.gate is None:
            return (draw_r,)
        logp_rV = jax.nn.log_softmax(samplers.scores(logits_rV, of_r), axis=-1)
        entropy_r, p_rV = normal_entropy(logp_rV, cfg.vocab), jnp.exp(logp_rV)
        return draw_r, entropy_r, jnp.take_along_axis(p_rV, trees.token_E[of_r], axis=1)

    equal = lambda most: math.ceil(len(x_XD) / math.ceil(len(x_XD) / most))
    most = SPLIT_ROWS if split else LOGIT_ROWS
    whole = lambda: some_at_a_time(some, equal(most), x_XD, of_X, position_X, node_X)
    if split and v.allowed is None and v.gate is None:
        least = lambda args: (likeliest(top, args[0], cfg),)
        greedy = lambda: some_at_a_time(least, equal(GREEDY_ROWS), x_XD)
        draw_X, *rest = jax.lax.cond((samplers.temperature_B > 0).any(), whole, greedy)
    else:
        draw_X, *rest = whole()
    if v.gate is None:
        return Judged(draw_X.reshape(B, E))
    entropy_X, p_XE = rest
    own = lambda p_EE, parent_E: p_EE[jnp.maximum(parent_E, 0), jnp.arange(E)]
    p_BE = jax.vmap(own)(p_XE.reshape(B, E, E), trees.parent_E)
    return Judged(draw_X.reshape(B, E), entropy_X.reshape(B, E), p_BE)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Verifying:
    """Trees after the target's pass."""

    top: Params
    x_BED: jax.Array
    trees: Tree
    caches: tuple = donated()
    seats: Seats
    accepted_B: jax.Array
    """Nodes to accept in a replayed round, right or wrong."""
    cfg: Config = static()
    spec: TreeSpec = static()
    replay: bool = static(default=False)
    allowed: Allowed | None = None
    """What may follow each node; None: no text has a grammar."""
    gate: Gate | None = static(default=None)


class Ended(NamedTuple):
    """The results of a round: `verify.Finished` of each sequence."""

    emitted_BP: jax.Array
    length_B: jax.Array
    node_BP: jax.Array
    finite_B: jax.Array
    caches: tuple


@program(Ended(ALIKE, ALIKE, ALIKE, ALIKE, CACHES))
def finish_each(v: Verifying) -> Ended:
    """`verify.finish_round` of several sequences."""
    places, trees, at_B = v.spec.deepest + 1, v.trees, v.seats.at_B

    def path(tree, judged, accepted):
        nodes = tree.token_E, tree.parent_E
        if v.replay:
            given = judged, places, accepted
            return replayed(*nodes, tree.depth_E, tree.ancestor_EE, *given)
        if v.gate is not None:
            return gated(*nodes, judged, places, v.gate)
        return exact(*nodes, judged, places)

    paths = jax.vmap(path)(trees, judge_each(v), v.accepted_B)
    caches = move_each(v.caches, at_B[:, None] + paths.node_P, at_B, v.seats.row_B)
    finite_B = jax.vmap(lambda x, node: jnp.isfinite(x[node]).all())(v.x_BED, paths.node_P)
    return Ended(paths.emitted_P, paths.length, paths.node_P, finite_B, caches)


@functools.partial(jax.jit, static_argnames="cfg")
def first_draws(
    top: Params,
    x_BTD: jax.Array,
    seats: Seats,
    real_B: jax.Array,
    cfg: Config,
    allowed: Allowed | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(the token that follows each prompt, int32 [B]; whether its logits are finite, bool [B]).

    The last token of a prompt is the last of the `real_B` that the pass brought."""
    x_B1D = jnp.take_along_axis(x_BTD, (real_B - 1)[:, None, None], axis=1)
    head = on_each(functools.partial(unembed, cfg=cfg), cfg.cards)
    logits_BV, of_B = head(top, x_B1D)[:, 0], jnp.arange(len(real_B))
    finite_B = jnp.isfinite(logits_BV).all(1)
    if allowed is not None:
        logits_BV = allowed.only(logits_BV, of_B, jnp.zeros_like(of_B))
    return seats.samplers.draw(logits_BV, of_B, seats.at_B + real_B), finite_B


@functools.partial(jax.jit, donate_argnames="caches")
def copy_row(caches: tuple, source: jax.Array, to: jax.Array) -> tuple:
    """The caches with one row copied to another."""
    is_cache = lambda c: hasattr(c, "move")
    copy = lambda c: put_row(c, one_row(c, source), to)
    return jax.tree.map(copy, caches, is_leaf=is_cache)


@functools.partial(jax.jit, donate_argnames="caches")
def clear_row(caches: tuple, row: jax.Array) -> tuple:
    """The caches with zeros in one row. A NaN would spoil whoever has it next, seen or not."""
    return jax.tree.map(lambda a: a.at[row].set(jnp.zeros((), a.dtype)), caches)
