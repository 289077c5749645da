"""The target's side: streamed passes, its draw after every node, and the update of the cache.

Letters: E nodes, T tokens of a pass, D model, V vocabulary, P places in a path.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llm_jax.attention import Step, causal_step
from llm_jax.cache import move
from llm_jax.cards import ALIKE, AXIS, CACHES, on_each
from llm_jax.config import Config
from llm_jax.disk_ring import DiskRing
from llm_jax.generation import chunks
from llm_jax.model import block, embed, final_logits, rms_norm, scaled, unembed
from llm_jax.params import Layer, Params
from llm_jax.sample import Sampler
from llm_jax.stream import Stream, StreamedLayer, ring_for, route, to_device
from subspec_jax.accept import Gate, Judged, exact, gated, replayed
from subspec_jax.experts import ExpertCache, routed_block, without_experts
from subspec_jax.offload import rows_of
from subspec_jax.program import donated, program, static
from subspec_jax.residual.split import is_split, over_parts
from subspec_jax.tree import Tree, TreeSpec, node_mask, node_positions, replant

LOGIT_ROWS = 64
"""Rows of logits computed at a time: 64 x 152,064 float32 are 39 MB, all 289 would be 176 MB."""

SPLIT_ROWS = 160
"""The same for a head in two parts, if a draw needs whole rows. Such a head is decoded for each
group of rows: twice for 289 nodes. All rows at once, with a part of the head, took 374 MiB in one
piece. An H200 with a limit of 8 GB did not have this much free."""


GREEDY_ROWS = 640
"""The same for greedy draws of several texts; of one text all nodes are drawn together."""

QUEUED = 2
"""Most blocks that run or wait. Each one has its work space from the time it is queued."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The exact model: some layers on the device, some in pinned host memory, some on disk.

    `params.embed_VD` may be a NumPy array. Then the table stays on the host, and its rows are read
    there. (An untied head must be on the device; a table is only used for lookup.)
    """

    params: Params
    cfg: Config
    ahead: int = 1
    experts: ExpertCache | None = None
    """The experts of which a pass brings those it needs; None: layers are streamed whole."""
    stored: tuple[Layer, ...] = ()
    """Where all layers lie on disk (`tiers.where`); or none."""

    @property
    def top(self) -> Params:
        """The parameters that the head needs, without arrays on the host."""
        table = None if isinstance(self.params.embed_VD, np.ndarray) else self.params.embed_VD
        return dataclasses.replace(self.params, embed_VD=table, layers=())

    @functools.cached_property
    def route(self) -> tuple[StreamedLayer, ...]:
        """The layers in the order in which a stream brings them."""
        layers = self.params.layers
        return route(layers if self.experts is None else map(without_experts, layers))

    def stream(self) -> Stream:
        """A stream for the next pass; its first copies start now."""
        return Stream(self.route, self.ahead, self.ring)

    @functools.cached_property
    def ring(self) -> DiskRing | None:
        """Reads the layers that are on disk; None where none are."""
        return ring_for(self.route, self.ahead)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames=("x", "cache"))
def jit_block(
    layer: Layer, x: jax.Array, cache: Any, step: Step, cfg: Config
) -> tuple[jax.Array, Any, jax.Array]:
    """(x, the cache, one number of x): `block` as one small program for every layer.

    x and cache are donated. The number is never donated: it is ready when the block is done.
    """
    run = on_each(lambda *args: block(*args, cfg), cfg.cards, (ALIKE, CACHES))
    x, cache = run(layer, x, cache, step)
    return x, cache, x[0, 0, 0]


jit_embed = jax.jit(embed, static_argnames="cfg")


def embedded(target: Target, tokens_1T: jax.Array) -> jax.Array:
    """x_1TD before the first layer."""
    if isinstance(target.params.embed_VD, np.ndarray):
        rows = rows_of(target.params.embed_VD, tokens_1T).astype(target.cfg.dtype)
        return scaled(to_device(rows, target.cfg.cards), target.cfg.embed_scale)
    return jit_embed(target.top, tokens_1T, target.cfg)


def next_block(
    target: Target, stream: Stream, index: int, x: jax.Array, cache: Any, step: Step, real: Any
) -> tuple[jax.Array, Any, jax.Array]:
    """(x, the cache, one number of x) of the stream's next layer, whose number is `index`."""
    if target.experts is not None and target.cfg.has_experts(index):
        given = x, cache, step, real, target.experts, target.cfg
        return routed_block(next(stream), index, *given)
    return jit_block(next(stream), x, cache, step, target.cfg)


def run_pass(
    target: Target,
    stream: Stream,
    tokens_1T: jax.Array,
    caches: list[Any],
    step: Step,
    between: Callable[[int], None] | None = None,
    real: jax.Array | None = None,
) -> jax.Array:
    """x_1TD after the last layer; `caches` is updated in place, layer by layer.

    `real` [] is the number of tokens that count, or says of all which do; None: all. Experts are
    fetched for those alone.
    `between(i)` is called when layer i has been dispatched, while other layers are copied.
    """
    x = embedded(target, tokens_1T)
    queued = collections.deque()
    if real is None and target.experts is not None:
        real = to_device(jnp.int32(tokens_1T.size), target.cfg.cards)
    for i in range(target.cfg.layers):
        if len(queued) == QUEUED:
            jax.block_until_ready(queued.popleft())
        # One expression: a variable for the layer would keep its buffers while the next arrives.
        x, caches[i], done = next_block(target, stream, i, x, caches[i], step, real)
        stream.used(done)
        queued.append(done)
        if between is not None:
            between(i)
    return x


@jax.jit
def row(x_1TD: jax.Array, i: jax.Array) -> jax.Array:
    """x_11D of token i."""
    return jax.lax.dynamic_slice_in_dim(x_1TD, i, 1, axis=1)


@functools.partial(jax.jit, static_argnames="cfg")
def last_logits(top: Params, x_11D: jax.Array, cfg: Config) -> jax.Array:
    """Logits [1, V] after one token. The program does not depend on the length of a chunk."""
    return on_each(lambda *args: unembed(*args, cfg), cfg.cards)(top, x_11D)[:, 0]


def streamed_prefill(
    target: Target,
    prompt: Sequence[int],
    caches: list[Any],
    chunk: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[jax.Array, int]:
    """(logits_1V after the prompt, bytes streamed), with one streamed pass per chunk of tokens.

    `caches` is updated in place. `progress` is called with the number of tokens in the cache.
    """
    slots, streamed = caches[0].slots, 0
    for tokens, at, real in chunks(prompt, slots, chunk):
        stream = target.stream()
        step = causal_step(at, tokens.shape[1], slots, real)
        if target.experts is not None:
            target.experts.begin()
        x = run_pass(target, stream, jnp.asarray(tokens), caches, step, real=step.real)
        jax.block_until_ready(x)
        streamed += stream.bytes + (target.experts.bytes if target.experts else 0)
        if progress:
            progress(at + real)
    return last_logits(target.top, row(x, jnp.int32(real - 1)), target.cfg), streamed


def nodes_of(tree: Tree, spec: TreeSpec) -> Tree:
    """The tree's places that the target verifies."""
    n = spec.nodes
    return dataclasses.replace(
        tree,
        token_E=tree.token_E[:n],
        parent_E=tree.parent_E[:n],
        depth_E=tree.depth_E[:n],
        score_E=tree.score_E[:n],
        ancestor_EE=tree.ancestor_EE[:n, :n],
    )


@functools.partial(jax.jit, static_argnames=("spec", "slots"))
def lay_out(tree: Tree, at: jax.Array, spec: TreeSpec, slots: int) -> tuple[Tree, jax.Array, Step]:
    """(the places to verify as a `Tree`, their tokens [1, E], the `Step` of the pass).

    The step looks at the first `slots` slots.
    """
    n, cut = spec.nodes, nodes_of(tree, spec)
    mask = node_mask(cut, jnp.arange(n), at, slots)
    alone = n == 1  # plain decoding: the tree is only the root
    positions = None if alone else node_positions(cut, at, slots)
    step = Step(at, (at + cut.depth_E)[None], mask, positions, causal=alone)
    return cut, cut.token_E[None], step


def rows_at_a_time(nodes: int, split_head: bool) -> int:
    """The number of nodes whose logits `judge` computes at a time."""
    if not split_head:
        return min(LOGIT_ROWS, nodes)
    return math.ceil(nodes / math.ceil(nodes / SPLIT_ROWS))


def some_at_a_time(f: Callable, rows: int, *arrays: jax.Array) -> Any:
    """`f` of a tuple of arrays [X, …], applied to `rows` of the X entries at a time."""
    X = len(arrays[0])
    fold = lambda a: jnp.pad(a, [(0, -X % rows)] + [(0, 0)] * (a.ndim - 1)).reshape(
        -1, rows, *a.shape[1:]
    )
    found = jax.lax.map(f, tuple(map(fold, arrays)))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:X], found)


def likeliest(top: Params, x_ED: jax.Array, cfg: Config) -> jax.Array:
    """The token of the largest logit after every node, int32 [E], for an output head in two parts.

    The head is decoded once, some columns at a time. So the full logits are never in memory.
    """

    def better(best, logits_EV, first):
        most_E, token_E = best
        logits_EV = final_logits(logits_EV, cfg)
        column_V = first + jnp.arange(logits_EV.shape[1], dtype=jnp.int32)
        here_V = (column_V < cfg.head_columns) & (before + column_V < cfg.vocab)
        logits_EV = jnp.where(here_V[None], logits_EV, -jnp.inf)  # it may be padded
        own_token_E = before + first + jnp.argmax(logits_EV, axis=-1).astype(jnp.int32)
        return larger((most_E, token_E), (jnp.max(logits_EV, axis=-1), own_token_E))

    def larger(best, other):
        (most_E, token_E), (own_E, own_token_E) = best, other
        more_E = (own_E > most_E) | (jnp.isnan(own_E) & ~jnp.isnan(most_E))
        return jnp.where(more_E, own_E, most_E), jnp.where(more_E, own_token_E, token_E)

    E = len(x_ED)
    before = 0 if cfg.cards == 1 else jax.lax.axis_index(AXIS) * cfg.head_columns
    start = jnp.full(E, -jnp.inf, jnp.float32), jnp.zeros(E, jnp.int32)
    with jax.named_scope("head"):
        h_ED = rms_norm(x_ED, top.norm, cfg.norm_eps)
        best = over_parts(top.head_DV, h_ED, better, start, jnp.float32)
        if cfg.cards > 1:
            every = jax.lax.all_gather(best, AXIS)
            best = functools.reduce(larger, zip(*every, strict=True))
        return best[1]


def normal_entropy(logp_rV: jax.Array, vocab: int) -> jax.Array:
    """[r] entropy of each row's distribution, divided by log `vocab`."""
    p_rV = jnp.exp(logp_rV)
    terms_rV = jnp.where(p_rV > 0, p_rV * logp_rV, 0.0)
    return (-jnp.sum(terms_rV, -1) / np.log(vocab)).astype(jnp.float32)


def drawn(
    top: Params,
    x_1ED: jax.Array,
    position_E: jax.Array,
    key: jax.Array,
    cfg: Config,
    sampler: Sampler,
) -> jax.Array:
    """The target's draws, int32 [E], for the positions behind some nodes.

    Logits are computed for some nodes at a time (`rows_at_a_time`). For a greedy draw and a head in
    two parts, they are computed for some tokens at a time (`likeliest`).
    """
    if sampler.greedy and is_split(top.head_DV):
        return likeliest(top, x_1ED[0], cfg)

    def some(args):
        x_rD, position_r = args
        return sampler.draw(unembed(top, x_rD[None], cfg)[0], key, position_r)

    rows = rows_at_a_time(x_1ED.shape[1], is_split(top.head_DV))
    return some_at_a_time(some, rows, x_1ED[0], position_E)


def judge(
    top: Params,
    x_1ED: jax.Array,
    tree: Tree,
    at: jax.Array,
    key: jax.Array,
    cfg: Config,
    sampler: Sampler,
    gate: Gate | None,
) -> Judged:
    """The target's draw after every node, and with a gate its entropy and probabilities.

    The logits never leave the device.
    """
    position_E = at + tree.depth_E + 1
    if gate is None:
        return Judged(drawn(top, x_1ED, position_E, key, cfg, sampler))
    E = x_1ED.shape[1]
    rows = rows_at_a_time(E, is_split(top.head_DV))

    def some(args):
        x_rD, position_r = args
        logits_rV = unembed(top, x_rD[None], cfg)[0]
        draw_r = sampler.draw(logits_rV, key, position_r)
        logp_rV = jax.nn.log_softmax(sampler.scores(logits_rV), axis=-1)
        return draw_r, normal_entropy(logp_rV, cfg.vocab), jnp.exp(logp_rV)[:, tree.token_E]

    draw_E, entropy_E, p_EE = some_at_a_time(some, rows, x_1ED[0], position_E)
    return Judged(draw_E, entropy_E, p_EE[jnp.maximum(tree.parent_E, 0), jnp.arange(E)])


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Verified:
    """A tree after the target's pass: everything that the end of a round reads and changes."""

    top: Params
    """`Target.top`: the last norm and the head."""
    x_1ED: jax.Array
    """The nodes after the target's last layer."""
    tree: Tree
    """The verified tree."""
    extended: Tree = donated()
    """The same tree, with the nodes that the draft added during the verification."""
    caches: tuple = donated()
    at: jax.Array
    """[] number of committed tokens."""
    key: jax.Array
    accepted: jax.Array
    """[] number of nodes to accept in a replayed round, right or wrong."""
    cfg: Config = static()
    spec: TreeSpec = static()
    sampler: Sampler = static()
    gate: Gate | None = static(default=None)
    replay: bool = static(default=False)
    draw_R: jax.Array | None = None
    """The target's draws, if they are known: of the nodes, and of rows that only fill the pass.
    Then there may be such rows in `x_1ED`, too."""


class Finished(NamedTuple):
    """The results of a round."""

    emitted_P: jax.Array
    """The emitted tokens; -1 after them."""
    length: jax.Array
    """[] the number of emitted tokens."""
    last: jax.Array
    """[] the place of the accepted path's last node."""
    finite: jax.Array
    """[] whether the target's numbers at all nodes of the path are finite."""
    source_R: jax.Array
    """The cache rows that were moved to slots at …."""
    tree: Tree
    """The next round's tree."""
    at: jax.Array
    """[] the new number of committed tokens."""
    caches: tuple


@program(Finished(*[ALIKE] * 7, CACHES))
def finish_round(v: Verified) -> Finished:
    """The results of a round, in one program: judge, walk, move accepted rows, plant the next tree.

    Cache rows that are not accepted stay where they are. Later rounds overwrite them.
    """
    spec, tree, at = v.spec, v.tree, v.at
    places = spec.deepest + 1
    if v.draw_R is None:
        judged = judge(v.top, v.x_1ED, tree, at, v.key, v.cfg, v.sampler, v.gate)
    else:
        judged = Judged(v.draw_R[: spec.nodes])
    nodes = (tree.token_E, tree.parent_E)
    if v.replay:
        path = replayed(*nodes, tree.depth_E, tree.ancestor_EE, judged, places, v.accepted)
    elif v.gate is not None:
        path = gated(*nodes, judged, places, v.gate)
    else:
        path = exact(*nodes, judged, places)
    verified = jnp.minimum(tree.size, spec.nodes)
    planted, old_X = replant(v.extended, verified, path.last, path.bonus, spec)
    # Rows to move: the path's nodes to slots at …. If the draft has begun the next tree, the rows
    # of its nodes follow them. Everywhere else source and destination are the same slot.
    place_R = jnp.arange(min(places + len(old_X), spec.places))
    of_path = at + path.node_P[jnp.minimum(place_R, places - 1)]
    source_R = jnp.where(place_R < path.length, of_path, at + place_R)
    if len(old_X):
        inside_R = place_R - path.length
        old_R = old_X[jnp.clip(inside_R, 0, len(old_X) - 1)]
        kept_R = (inside_R >= 0) & (inside_R < planted.size) & (old_R >= 0)
        source_R = jnp.where(kept_R, at + old_R, source_R)
    caches = move(v.caches, source_R, at)
    finite = jnp.isfinite(v.x_1ED[0, path.node_P]).all()
    ends = path.emitted_P, path.length, path.last, finite
    return Finished(*ends, source_R, planted, at + path.length, caches)
