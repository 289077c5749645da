"""Looked-up tokens in a tree: a chain below a step's best node, forwarded with the step's nodes.

The draft scores the chain like its own guesses. It keeps the first tokens, as far as it agrees. So
one step adds several levels where the text repeats. Tokens that are not kept cost rows in that step
only.

Letters: E places for nodes, w nodes added per step, M most tokens of a chain, r = w + M rows.
"""

import dataclasses

import jax
import jax.numpy as jnp

from subspec_jax.tree import Tree, TreeSpec, add_candidates, sharpened


def hang(
    tree: Tree, below: jax.Array, token_M: jax.Array, score_M: jax.Array | None = None
) -> Tree:
    """The tree with a chain in the places from `size` on. Its first token is a child of `below`.

    `token_M` is -1 after the chain's end. Without scores the chain is only forwarded: it has
    positions and sees its ancestors, but `size` does not count it.
    """
    length = jnp.sum(token_M >= 0).astype(jnp.int32)
    start, place_E = tree.size, jnp.arange(tree.token_E.shape[0], dtype=jnp.int32)
    link_E = place_E - start  # 0 for the chain's first token
    chain_E = (link_E >= 0) & (link_E < length)
    put = lambda old_E, new_E: jnp.where(chain_E, new_E, old_E)
    line_EE = tree.ancestor_EE[below][None] | (chain_E[None] & (place_E[None] <= place_E[:, None]))
    at_E = jnp.clip(link_E, 0, token_M.shape[0] - 1)
    scored = {}
    if score_M is not None:
        scored = dict(score_E=put(tree.score_E, score_M[at_E]), size=start + length)
    return dataclasses.replace(
        tree,
        token_E=put(tree.token_E, token_M[at_E]),
        parent_E=put(tree.parent_E, jnp.where(link_E == 0, below, place_E - 1)),
        depth_E=put(tree.depth_E, tree.depth_E[below] + 1 + link_E),
        ancestor_EE=jnp.where(chain_E[:, None], line_EE, tree.ancestor_EE),
        **scored,
    )


def keep(
    tree: Tree, first: jax.Array, token_M: jax.Array, logits_rV: jax.Array, spec: TreeSpec
) -> tuple[Tree, jax.Array]:
    """(the tree with the chain tokens that the draft agrees with, number of levels saved).

    Called after a step's forward pass. The step's rows are the places from `first` on. The chain
    is below `first`, in the places from `size` on. A token is kept if its probability is above one
    half and all tokens before it are kept. The pool gets the best other children of all rows that
    are nodes. The value of a level is the sum of its nodes' path probabilities: the number of
    tokens expected from it. Levels saved = value of the kept tokens / value of the step's nodes.
    """
    M, r = token_M.shape[0], logits_rV.shape[0]
    link_M = jnp.arange(M, dtype=jnp.int32)
    row_M = jnp.where(link_M == 0, 0, tree.size - first + link_M - 1)  # row of the token's parent
    logp_M = sharpened(logits_rV, spec)[row_M, jnp.maximum(token_M, 0)]
    room = jnp.minimum(spec.deepest - tree.depth_E[first], spec.nodes - tree.size)
    agreed_M = (token_M >= 0) & (logp_M > jnp.log(0.5)) & (link_M < room)
    kept_M = jnp.cumprod(agreed_M.astype(jnp.int32)).astype(bool)
    score_M = tree.score_E[first] + jnp.cumsum(logp_M)
    place_w = first + jnp.arange(spec.width)
    level = jax.nn.logsumexp(jnp.where(place_w < tree.size, tree.score_E[place_w], -jnp.inf))
    spared = jnp.sum(jnp.where(kept_M, jnp.exp(score_M - level), 0.0))
    tree = hang(tree, first, jnp.where(kept_M, token_M, -1), score_M)
    where_M = jnp.where(kept_M, row_M, r)
    taken_r = jnp.full(r, -1, jnp.int32).at[where_M].set(token_M, mode="drop")
    return add_candidates(tree, first, logits_rV, spec, taken_r), spared


def tree_is_deep(tree: Tree, kept: jax.Array, spared: jax.Array, spec: TreeSpec) -> jax.Array:
    """[] whether one more level makes the tree as deep as a tree without looked-up tokens.

    Each of the `kept` tokens takes a place. For each of the `spared` levels, the places of one step
    stay empty.
    """
    steps = spec.steps - jnp.floor(spared + 1e-3).astype(jnp.int32)
    return tree.size + 2 * spec.width > jnp.minimum(1 + kept + steps * spec.width, spec.nodes)
