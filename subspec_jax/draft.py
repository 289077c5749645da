"""Growing a token tree with a draft model: the whole tree in one compiled program.

The draft reads and writes a KV cache at the tree's own slots n … n+E-1. With a shared cache these
are the target's slots, which its pass then overwrites with exact keys and values: the draft needs
no prefill and no cache of its own (SubSpec, arXiv 2509.18344).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llm_jax.attention import Step
from llm_jax.cards import ALIKE, CACHES
from llm_jax.config import Config
from llm_jax.mlp import recorded_routing
from llm_jax.model import forward
from llm_jax.params import Params
from llm_jax.sample import Sampler
from subspec_jax import chain
from subspec_jax.lookup import continuation, recent
from subspec_jax.program import Program, donated, program, static
from subspec_jax.tree import (
    Tree,
    TreeSpec,
    add_candidates,
    commit,
    gain,
    node_mask,
    node_positions,
)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafting:
    """All that a step of the draft reads and changes. Tree and caches are donated."""

    params: Params
    """The draft model."""
    tree: Tree = donated()
    caches: tuple = donated()
    """The caches that the draft reads and writes, one a layer."""
    at: jax.Array
    """[] committed tokens: node i stands in slot at + i, at position at + its depth."""
    key: jax.Array
    """Of the noise that sampling adds."""
    cfg: Config = static()
    spec: TreeSpec = static()
    sampler: Sampler = static()
    live: int | None = static(default=None)
    """Attention looks at the first `live` slots; None: at all."""
    least_L: jax.Array | None = None
    """[steps] step l is not forwarded if its gain is at most least_L[l-1]; -inf: it always is."""
    text_S: jax.Array | None = None
    """For `grow_along`: the committed tokens, then the root at text_S[at], then -1."""
    longest: int = static(default=3)
    """The longest n-gram that is looked up in the text."""


def forward_nodes(d: Drafting, rows_r: jax.Array) -> tuple[jax.Array, tuple, jax.Array | None]:
    """(scores [r, V] of what follows the nodes in consecutive places `rows_r`, caches that hold
    these nodes, the tree's `routed_LE` with their experts)."""
    position_r = d.at + d.tree.depth_E[rows_r]
    slots = d.live or d.caches[0].slots
    mask, positions = node_mask(d.tree, rows_r, d.at, slots), node_positions(d.tree, d.at, slots)
    step = Step(d.at + rows_r[0], position_r[None], mask, positions)
    with recorded_routing() as experts:
        logits, caches = forward(d.params, d.tree.token_E[rows_r][None], d.caches, step, d.cfg)
    routed_LE = d.tree.routed_LE
    if routed_LE is not None:
        node_r1 = (rows_r < d.tree.size)[:, None]
        nowhere = routed_LE.shape[1]
        for layer, expert_rc in enumerate(experts):
            marked = jnp.where(node_r1, expert_rc, nowhere)
            routed_LE = routed_LE.at[layer, marked].set(True, mode="drop")
    if d.spec.coupled:
        return d.sampler.perturbed(logits[0], d.key, position_r + 1), caches, routed_LE
    return d.sampler.scores(logits[0]), caches, routed_LE


def extend(d: Drafting) -> tuple[Tree, tuple]:
    """(tree, caches) one step further: the best candidates become nodes and are forwarded."""
    first = d.tree.size
    tree = commit(d.tree, d.spec)
    rows_w = first + jnp.arange(d.spec.width)
    scores, caches, routed = forward_nodes(dataclasses.replace(d, tree=tree), rows_w)
    tree = dataclasses.replace(tree, routed_LE=routed)
    return add_candidates(tree, first, scores, d.spec), caches


extend_once = Program(extend, (ALIKE, CACHES))


@program((ALIKE, CACHES))
def grow(d: Drafting) -> tuple[Tree, tuple]:
    """(tree, caches) with the tree grown by `spec.steps` steps, or until a step does not pay.

    Nodes of the last step are not forwarded, because nobody needs their children, so they cost
    nothing; unless the draft continues below them during verification (`spec.extra`).
    """
    spec = d.spec
    last = 0 if spec.extra else spec.width

    def unfinished(carry):
        tree, _ = carry
        room = tree.size + spec.width + last <= spec.nodes
        return (tree.size == 0) | (room & _pays(tree, d))

    def body(carry):
        tree, caches = carry
        return extend(dataclasses.replace(d, tree=tree, caches=caches))

    tree, caches = jax.lax.while_loop(unfinished, body, (d.tree, d.caches))
    return (tree if spec.extra else _last_level(tree, spec)), caches


def _pays(tree: Tree, d: Drafting) -> jax.Array:
    """Whether the gain of the tree's next step is above the least that step may have."""
    return gain(tree, d.spec) > d.least_L[(tree.size - 1) // d.spec.width]


def _last_level(tree: Tree, spec: TreeSpec) -> Tree:
    more = (tree.size + spec.width <= spec.nodes) & jnp.isfinite(gain(tree, spec))
    return jax.tree.map(lambda a, b: jnp.where(more, a, b), commit(tree, spec), tree)


def _extend_along(d: Drafting):
    """(tree, caches, levels spared) one step further, as in `extend`. Tokens that followed the best
    node's last tokens earlier in the text are forwarded too, below that node."""
    first = d.tree.size
    tree = commit(d.tree, d.spec)
    newest_n = recent(tree, first, d.text_S, d.at, d.longest)
    found_M = continuation(d.text_S, d.at, newest_n, d.spec.lookup)
    rows_r = first + jnp.arange(d.spec.width + d.spec.lookup)
    trial = chain.hang(tree, first, found_M)
    scores, caches, routed = forward_nodes(dataclasses.replace(d, tree=trial), rows_r)
    tree = dataclasses.replace(tree, routed_LE=routed)
    tree, spared = chain.keep(tree, first, found_M, scores, d.spec)
    return tree, caches, spared


@program((ALIKE, CACHES, ALIKE))
def grow_along(d: Drafting) -> tuple[Tree, tuple, jax.Array]:
    """(tree, caches, [steps, looked-up tokens kept, levels spared]): `grow` with a text to copy.

    The tree gets as deep as without the text, in fewer steps where the draft agrees with the
    text.
    """
    spec = d.spec

    def unfinished(carry):
        tree, _, _, kept, spared = carry
        deep = chain.tree_is_deep(tree, kept, spared, spec)
        return (tree.size == 0) | (_pays(tree, d) & ~deep)

    def body(carry):
        tree, caches, steps, kept, spared = carry
        added = jnp.where(tree.size == 0, 1, spec.width)
        before = tree.size + added
        tree, caches, more = _extend_along(dataclasses.replace(d, tree=tree, caches=caches))
        return tree, caches, steps + 1, kept + tree.size - before, spared + more

    start = (d.tree, d.caches, jnp.int32(0), jnp.int32(0), jnp.float32(0))
    tree, caches, steps, kept, spared = jax.lax.while_loop(unfinished, body, start)
    counts = jnp.stack([steps, kept, spared.astype(jnp.int32)])
    return _last_level(tree, spec), caches, counts
