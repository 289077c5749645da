"""Growing a token tree with a draft model: the whole tree in one compiled program.

The draft reads and writes a KV cache at the tree's own slots n … n+E-1. With a shared cache these
are the target's slots, which its pass then overwrites with exact keys and values: the draft needs
no prefill and no cache of its own (SubSpec, arXiv 2509.18344).
"""

import functools

import jax
import jax.numpy as jnp

from llm_jax.attention import Step
from llm_jax.config import Config
from llm_jax.model import forward
from llm_jax.sample import Sampler
from subspec_jax import chain
from subspec_jax.lookup import continuation, recent
from subspec_jax.tree import (
    Tree,
    TreeSpec,
    add_candidates,
    commit,
    gain,
    node_mask,
    node_positions,
)


def forward_nodes(draft, tree: Tree, rows_r, caches, at, key, cfg, spec, sampler, live=None):
    """(scores [r, V] behind the nodes in consecutive places `rows_r`, caches with them in).

    `at` [] counts the committed tokens; node i stands in slot at + i, at position at + depth. Only
    the first `live` slots are looked at, all if None.
    """
    position_r = at + tree.depth_E[rows_r]
    slots = live or caches[0].slots
    mask, positions = node_mask(tree, rows_r, at, slots), node_positions(tree, at, slots)
    step = Step(at + rows_r[0], position_r[None], mask, positions)
    logits, caches = forward(draft, tree.token_E[rows_r][None], caches, step, cfg)
    if spec.coupled:
        return sampler.perturbed(logits[0], key, position_r + 1), caches
    return sampler.scores(logits[0]), caches


def extend(
    draft, tree: Tree, caches, at, key, cfg: Config, spec: TreeSpec, sampler: Sampler, live=None
):
    """(tree, caches) one step further: the best candidates become nodes and are forwarded."""
    first = tree.size
    tree = commit(tree, spec)
    rows_w = first + jnp.arange(spec.width)
    scores, caches = forward_nodes(draft, tree, rows_w, caches, at, key, cfg, spec, sampler, live)
    return add_candidates(tree, first, scores, spec), caches


extend_once = jax.jit(
    extend,
    static_argnames=("cfg", "spec", "sampler", "live"),
    donate_argnames=("tree", "caches"),
)


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "spec", "sampler", "live"),
    donate_argnames=("tree", "caches"),
)
def grow(
    draft,
    tree: Tree,
    caches,
    at,
    key,
    least_L,
    cfg: Config,
    spec: TreeSpec,
    sampler: Sampler,
    live: int | None = None,
):
    """(tree, caches) with the tree grown by `spec.steps` steps, or until it stops paying.

    Step l is not forwarded if its gain is at most least_L[l-1] (-inf: it always is). Nodes of the
    last step are not forwarded, their children being of no use, and so cost nothing; unless the
    draft goes on below them during verification (`spec.extra`). Caches and tree are donated.
    """
    last = 0 if spec.extra else spec.width
    pays = lambda tree: gain(tree, spec) > least_L[(tree.size - 1) // spec.width]

    def unfinished(carry):
        tree, _ = carry
        return (tree.size == 0) | ((tree.size + spec.width + last <= spec.nodes) & pays(tree))

    body = lambda carry: extend(draft, *carry, at, key, cfg, spec, sampler, live)
    tree, caches = jax.lax.while_loop(unfinished, body, (tree, caches))
    return (tree if spec.extra else _last_level(tree, spec)), caches


def _last_level(tree, spec):
    more = (tree.size + spec.width <= spec.nodes) & jnp.isfinite(gain(tree, spec))
    return jax.tree.map(lambda a, b: jnp.where(more, a, b), commit(tree, spec), tree)


def extend_along(draft, tree: Tree, caches, at, key, text_S, longest, cfg, spec, sampler, live):
    """(tree, caches, levels spared) one step further, as in `extend`, with what followed the best
    node's last tokens in the text forwarded below it."""
    first = tree.size
    tree = commit(tree, spec)
    found_M = continuation(text_S, at, recent(tree, first, text_S, at, longest), spec.lookup)
    rows_r = first + jnp.arange(spec.width + spec.lookup)
    trial = chain.hang(tree, first, found_M)
    scores, caches = forward_nodes(draft, trial, rows_r, caches, at, key, cfg, spec, sampler, live)
    tree, spared = chain.keep(tree, first, found_M, scores, spec)
    return tree, caches, spared


@functools.partial(
    jax.jit,
    static_argnames=("longest", "cfg", "spec", "sampler", "live"),
    donate_argnames=("tree", "caches"),
)
def grow_along(
    draft,
    tree: Tree,
    caches,
    at,
    key,
    least_L,
    text_S,
    longest: int,
    cfg: Config,
    spec: TreeSpec,
    sampler: Sampler,
    live: int | None = None,
):
    """(tree, caches, [steps, looked-up tokens kept, levels spared]): `grow` with a text to copy.

    `text_S` are the committed tokens and the root, text_S[at]. The tree gets as deep as without
    the text, in fewer steps where the draft agrees with what it reads there.
    """
    pays = lambda tree: gain(tree, spec) > least_L[(tree.size - 1) // spec.width]

    def unfinished(carry):
        tree, _, _, kept, spared = carry
        return (tree.size == 0) | (pays(tree) & ~chain.tree_is_deep(tree, kept, spared, spec))

    def body(carry):
        tree, caches, steps, kept, spared = carry
        added = jnp.where(tree.size == 0, 1, spec.width)
        before = tree.size + added
        tree, caches, more = extend_along(
            draft, tree, caches, at, key, text_S, longest, cfg, spec, sampler, live
        )
        return tree, caches, steps + 1, kept + tree.size - before, spared + more

    start = (tree, caches, jnp.int32(0), jnp.int32(0), jnp.float32(0))
    tree, caches, steps, kept, spared = jax.lax.while_loop(unfinished, body, start)
    counts = jnp.stack([steps, kept, spared.astype(jnp.int32)])
    return _last_level(tree, spec), caches, counts
