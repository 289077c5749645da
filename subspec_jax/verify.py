"""The target's side: streamed passes, its draws behind every node, and what becomes of the cache.

Letters: E nodes, T tokens of a pass, D model, V vocabulary, P places in a path.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llm_jax.attention import Step, causal_step
from llm_jax.cache import move
from llm_jax.config import Config
from llm_jax.generation import chunks
from llm_jax.model import block, embed, rms_norm, unembed
from llm_jax.params import Params
from llm_jax.sample import Sampler
from subspec_jax.accept import Gate, Judged, exact, gated, replayed
from subspec_jax.offload import Stream, StreamedLayer, route, rows_of, to_device
from subspec_jax.program import Program, donated, static
from subspec_jax.residual.split import is_split, over_parts
from subspec_jax.tree import Tree, TreeSpec, node_mask, node_positions, replant

LOGIT_ROWS = 64
"""Rows of logits made at a time: 64 x 152,064 float32 are 39 MB, all 289 would be 176 MB."""

SPLIT_ROWS = 160
"""And with a head in two parts, which is put together each time, where a draw needs whole rows:
twice for 289 nodes. At once they and a part of that head took 374 MiB in one piece, which an H200
held at 8 GB no longer had."""


QUEUED = 2
"""Blocks that run or wait to: each has its work space from when it is queued."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The exact model: some layers on the device, some in pinned host memory.

    `params.embed_VD` may be a NumPy array: then the table stays on the host and rows are gathered
    there (an untied head is needed on the device, a table is only looked up).
    """

    params: Params
    cfg: Config
    ahead: int = 1

    @property
    def top(self) -> Params:
        """What the head needs, and nothing that is on the host."""
        table = None if isinstance(self.params.embed_VD, np.ndarray) else self.params.embed_VD
        return dataclasses.replace(self.params, embed_VD=table, layers=())

    @functools.cached_property
    def route(self) -> tuple[StreamedLayer, ...]:
        return route(self.params.layers)

    def stream(self) -> Stream:
        """Starts the first copies of the next pass."""
        return Stream(self.route, self.ahead)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames=("x", "cache"))
def jit_block(layer, x, cache, step, cfg):
    """`block`, one small program for every layer; x and cache are donated.

    The third output is a number that is never donated: it is ready when the block is done.
    """
    x, cache = block(layer, x, cache, step, cfg)
    return x, cache, x[0, 0, 0]


jit_embed = jax.jit(embed, static_argnames="cfg")


def run_pass(target: Target, stream: Stream, tokens_1T, caches: list, step: Step, between=None):
    """x_1TD behind the last layer; `caches` is updated in place, layer by layer.

    `between(i)` is called when layer i has been dispatched, while others are on their way.
    """
    if isinstance(target.params.embed_VD, np.ndarray):
        x = to_device(rows_of(target.params.embed_VD, tokens_1T).astype(target.cfg.dtype))
    else:
        x = jit_embed(target.top, tokens_1T, target.cfg)
    queued = collections.deque()
    for i in range(target.cfg.layers):
        if len(queued) == QUEUED:
            jax.block_until_ready(queued.popleft())
        # One expression: a name for the layer would keep its buffers while the next is fetched.
        x, caches[i], done = jit_block(next(stream), x, caches[i], step, target.cfg)
        stream.used(done)
        queued.append(done)
        if between is not None:
            between(i)
    return x


@jax.jit
def row(x_1TD, i):
    """x_11D of token i."""
    return jax.lax.dynamic_slice_in_dim(x_1TD, i, 1, axis=1)


@functools.partial(jax.jit, static_argnames="cfg")
def last_logits(top, x_11D, cfg):
    """Logits [1, V] behind one token: one program, however long the prompt's last piece is."""
    return unembed(top, x_11D, cfg)[:, 0]


def streamed_prefill(
    target: Target, prompt, caches: list, chunk: int, progress: Callable | None = None
):
    """(logits_1V behind the prompt, bytes streamed): one streamed pass a chunk."""
    slots, streamed = caches[0].slots, 0
    for tokens, at, real in chunks(prompt, slots, chunk):
        stream = target.stream()
        step = causal_step(at, tokens.shape[1], slots, real)
        x = jax.block_until_ready(run_pass(target, stream, jnp.asarray(tokens), caches, step))
        streamed += stream.bytes
        if progress:
            progress(at + real)
    return last_logits(target.top, row(x, jnp.int32(real - 1)), target.cfg), streamed


@functools.partial(jax.jit, static_argnames=("spec", "slots"))
def lay_out(tree: Tree, at, spec: TreeSpec, slots: int):
    """(the places to verify as a `Tree`, their tokens [1, E], the `Step` of the pass).

    The step looks at the first `slots` slots.
    """
    n = spec.nodes
    cut = dataclasses.replace(
        tree,
        token_E=tree.token_E[:n],
        parent_E=tree.parent_E[:n],
        depth_E=tree.depth_E[:n],
        score_E=tree.score_E[:n],
        ancestor_EE=tree.ancestor_EE[:n, :n],
    )
    mask = node_mask(cut, jnp.arange(n), at, slots)
    alone = n == 1  # plain decoding: a tree of the root
    positions = None if alone else node_positions(cut, at, slots)
    step = Step(at, (at + cut.depth_E)[None], mask, positions, causal=alone)
    return cut, cut.token_E[None], step


def rows_at_a_time(nodes: int, split_head: bool) -> int:
    """Of how many nodes `judge` makes logits at a time."""
    if not split_head:
        return min(LOGIT_ROWS, nodes)
    return math.ceil(nodes / math.ceil(nodes / SPLIT_ROWS))


def likeliest(top, x_ED, cfg: Config):
    """The token of the largest logit behind every node, int32 [E], with an output head in two
    parts: it is put together once, some columns at a time, and logits are never there as a whole.
    """

    def better(best, logits_EV, first):
        most_E, token_E = best
        column_V = first + jnp.arange(logits_EV.shape[1], dtype=jnp.int32)
        logits_EV = jnp.where(column_V[None] < cfg.vocab, logits_EV, -jnp.inf)  # it may be padded
        own_E = jnp.max(logits_EV, axis=-1)
        more_E = (own_E > most_E) | (jnp.isnan(own_E) & ~jnp.isnan(most_E))
        own_token_E = first + jnp.argmax(logits_EV, axis=-1).astype(jnp.int32)
        return jnp.where(more_E, own_E, most_E), jnp.where(more_E, own_token_E, token_E)

    E = len(x_ED)
    start = jnp.full(E, -jnp.inf, jnp.float32), jnp.zeros(E, jnp.int32)
    with jax.named_scope("head"):
        h_ED = rms_norm(x_ED, top.norm, cfg.norm_eps)
        return over_parts(top.head_DV, h_ED, better, start, jnp.float32)[1]


def judge(
    top, x_1ED, tree: Tree, at, key, cfg: Config, sampler: Sampler, gate: Gate | None
) -> Judged:
    """The target's draw behind every node, and with a gate its entropy and probabilities.

    Logits are made for some nodes at a time (`rows_at_a_time`) or, for a greedy draw and a head in
    two parts, for some tokens at a time (`likeliest`), and never leave the device.
    """
    if gate is None and sampler.greedy and is_split(top.head_DV):
        return Judged(likeliest(top, x_1ED[0], cfg))
    E = x_1ED.shape[1]
    rows = rows_at_a_time(E, is_split(top.head_DV))
    padding = -E % rows
    fold = lambda a: jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)).reshape(
        -1, rows, *a.shape[1:]
    )

    def some(args):
        x_rD, position_r = args
        logits_rV = unembed(top, x_rD[None], cfg)[0]
        draw_r = sampler.draw(logits_rV, key, position_r)
        if gate is None:
            return (draw_r,)
        logp_rV = jax.nn.log_softmax(sampler.scores(logits_rV), axis=-1)
        p_rV = jnp.exp(logp_rV)
        entropy_r = -jnp.sum(jnp.where(p_rV > 0, p_rV * logp_rV, 0.0), -1) / np.log(cfg.vocab)
        return draw_r, entropy_r.astype(jnp.float32), p_rV[:, tree.token_E]

    found = jax.lax.map(some, (fold(x_1ED[0]), fold(at + tree.depth_E + 1)))
    draw_E, *rest = (a.reshape(-1, *a.shape[2:])[:E] for a in found)
    if gate is None:
        return Judged(draw_E)
    entropy_E, p_EE = rest
    return Judged(draw_E, entropy_E, p_EE[jnp.maximum(tree.parent_E, 0), jnp.arange(E)])


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Verified:
    """A tree behind its verification: all that the end of a round reads and changes."""

    top: Params
    """`Target.top`: the last norm and the head."""
    x_1ED: jax.Array
    """The nodes behind the target's last layer."""
    tree: Tree
    """What was verified."""
    extended: Tree = donated()
    """The same tree, with what the draft added below it meanwhile."""
    caches: tuple = donated()
    at: jax.Array
    """[] committed tokens."""
    key: jax.Array
    accepted: jax.Array
    """[] nodes to accept, right or wrong, in a replayed round."""
    cfg: Config = static()
    spec: TreeSpec = static()
    sampler: Sampler = static()
    gate: Gate | None = static(default=None)
    replay: bool = static(default=False)


class Finished(NamedTuple):
    """What a round leaves."""

    emitted_P: jax.Array
    """The emitted tokens; -1 behind them."""
    length: jax.Array
    """[] how many they are."""
    last: jax.Array
    """[] the place of the accepted path's last node."""
    source_R: jax.Array
    """The cache rows that were moved to slots at …."""
    tree: Tree
    """The next round's tree."""
    at: jax.Array
    """[] committed tokens now."""
    caches: tuple


@Program
def finish_round(v: Verified) -> Finished:
    """One round's end, in one program: judge, walk, move accepted rows, plant the next tree.

    Rows that are not accepted stay where they are and are overwritten later.
    """
    spec, tree, at = v.spec, v.tree, v.at
    places = spec.deepest + 1
    judged = judge(v.top, v.x_1ED, tree, at, v.key, v.cfg, v.sampler, v.gate)
    nodes = (tree.token_E, tree.parent_E)
    if v.replay:
        path = replayed(*nodes, tree.depth_E, tree.ancestor_EE, judged, places, v.accepted)
    elif v.gate is not None:
        path = gated(*nodes, judged, places, v.gate)
    else:
        path = exact(*nodes, judged, places)
    verified = jnp.minimum(tree.size, spec.nodes)
    planted, old_X = replant(v.extended, verified, path.last, path.bonus, spec)
    # Rows to move: the path's nodes to slots at …, then, if the next tree was drafted already, its
    # nodes right behind them. Everywhere else source and destination are the same slot.
    place_R = jnp.arange(min(places + len(old_X), spec.places))
    of_path = at + path.node_P[jnp.minimum(place_R, places - 1)]
    source_R = jnp.where(place_R < path.length, of_path, at + place_R)
    if len(old_X):
        inside_R = place_R - path.length
        old_R = old_X[jnp.clip(inside_R, 0, len(old_X) - 1)]
        kept_R = (inside_R >= 0) & (inside_R < planted.size) & (old_R >= 0)
        source_R = jnp.where(kept_R, at + old_R, source_R)
    caches = move(v.caches, source_R, at)
    ends = path.emitted_P, path.length, path.last
    return Finished(*ends, source_R, planted, at + path.length, caches)
