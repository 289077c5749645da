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
from subspec_jax.tree import (
    Tree,
    TreeSpec,
    add_candidates,
    commit,
    expected_gain,
    node_mask,
    node_positions,
)


def extend(
    draft, tree: Tree, caches, at, key, cfg: Config, spec: TreeSpec, sampler: Sampler, live=None
):
    """(tree, caches) one step further: the best candidates become nodes and are forwarded.

    `at` [] counts the committed tokens; node i stands in slot at + i, at position at + depth. Only
    the first `live` slots are looked at, all if None.
    """
    first = tree.size
    tree = commit(tree, spec)
    rows_w = first + jnp.arange(spec.width)
    position_w = at + tree.depth_E[rows_w]
    slots = live or caches[0].slots
    mask, positions = node_mask(tree, rows_w, at, slots), node_positions(tree, at, slots)
    step = Step(at + first, position_w[None], mask, positions)
    logits, caches = forward(draft, tree.token_E[rows_w][None], caches, step, cfg)
    if spec.coupled:
        scores = sampler.perturbed(logits[0], key, position_w + 1)
    else:
        scores = sampler.scores(logits[0])
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
    log_gain,
    cfg: Config,
    spec: TreeSpec,
    sampler: Sampler,
    live: int | None = None,
):
    """(tree, caches) with the tree grown to `spec.nodes` places, or until it stops paying.

    Growing stops where the next step is expected to add no more than exp(log_gain) accepted tokens
    (-inf: never). Nodes of the last step are not forwarded, their children being of no use, unless
    the draft goes on below them during verification (`spec.extra`). Caches and tree are donated.
    """
    last = 0 if spec.extra else spec.width
    pays = lambda tree: expected_gain(tree, spec) > log_gain

    def unfinished(carry):
        tree, _ = carry
        return (tree.size == 0) | ((tree.size + spec.width + last <= spec.nodes) & pays(tree))

    body = lambda carry: extend(draft, *carry, at, key, cfg, spec, sampler, live)
    tree, caches = jax.lax.while_loop(unfinished, body, (tree, caches))
    if not spec.extra:
        more = (tree.size + spec.width <= spec.nodes) & pays(tree)
        tree = jax.tree.map(lambda a, b: jnp.where(more, a, b), commit(tree, spec), tree)
    return tree, caches
