"""Which draft nodes the target accepts: pure functions over small arrays.

Exact acceptance is one rule for greedy decoding and for sampling. At each node the target draws its
own token. The walk goes to the child that has this token. If no child has it, the token is emitted
and the walk ends. Every emitted token is the target's own draw, so the output has the target's
distribution, whatever the draft proposed.

Letters: E nodes, P = deepest level + 1 places in a path.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass


@dataclasses.dataclass(frozen=True)
class Gate:
    """Opt-in lossy acceptance (FLy, arXiv 2511.22972): a mismatch passes if later tokens match.

    The walk also goes to a child that is not the target's draw if two things hold. A chain of at
    least `window` exact matches starts below the child, and the gate is open. Kind "entropy": open
    if the target's entropy at the parent, divided by log V, is below `threshold`. Kind
    "probability": open if the target gives the child a probability of at least `threshold`.
    The output is then no longer the target's.
    """

    kind: str = "entropy"
    threshold: float = 0.3
    window: int = 6

    def __post_init__(self):
        if self.kind not in ("entropy", "probability"):
            raise ValueError(f"gate {self.kind!r} is not one of entropy, probability")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"the gate's threshold is {self.threshold}; expected 0 to 1")
        if not 1 <= self.window <= 1000:
            raise ValueError(f"the gate's window is {self.window}; expected 1 to 1000")


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Judged:
    """The target's results for each node."""

    draw_E: jax.Array
    """The token that the target draws after the node."""
    entropy_E: jax.Array | None = None
    """Only with a gate: entropy of the target's distribution after the node, divided by log V."""
    probability_E: jax.Array | None = None
    """Only with a gate: the target's probability of the node's token, given the node's parent."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Path:
    """An accepted path: the root, the nodes below it, and the token drawn at its end."""

    node_P: jax.Array
    """Places of the nodes. After the end of the path, the last node is repeated."""
    length: jax.Array
    """[] number of nodes in the path, with the root. It is also the number of emitted tokens."""
    emitted_P: jax.Array
    """The emitted tokens: those of the nodes below the root, then the bonus. The rest is -1."""
    bonus: jax.Array
    """[] the token that the target draws after the last node."""

    @property
    def last(self) -> jax.Array:
        """[] the place of the path's last node."""
        return self.node_P[-1]


def _path(next_E, token_E, draw_E, places: int) -> Path:
    """The path from the root along `next_E`, the next node of each node; -1 ends the path."""

    def body(i, carry):
        node_P, length, here = carry
        following = next_E[here]
        goes_on = following >= 0
        here = jnp.where(goes_on, following, here)
        return node_P.at[i].set(here), length + goes_on.astype(jnp.int32), here

    start = (jnp.zeros(places, jnp.int32), jnp.int32(1), jnp.int32(0))
    node_P, length, last = jax.lax.fori_loop(1, places, body, start)
    place_P = jnp.arange(places)
    inner_P = token_E[jnp.roll(node_P, -1)]
    emitted_P = jnp.where(place_P < length - 1, inner_P, -1).at[length - 1].set(draw_E[last])
    return Path(node_P, length, emitted_P, draw_E[last])


def _matching_child(token_E, parent_E, draw_E):
    """[E] for each node, the child whose token is the node's draw; -1 if there is none."""
    child_EE = (parent_E[None] == jnp.arange(len(parent_E))[:, None]) & (
        token_E[None] == draw_E[:, None]
    )
    return jnp.where(child_EE.any(1), jnp.argmax(child_EE, axis=1), -1).astype(jnp.int32)


def exact(token_E: jax.Array, parent_E: jax.Array, judged: Judged, places: int) -> Path:
    """The path of the target's own draws, in arrays of `places` nodes."""
    following_E = _matching_child(token_E, parent_E, judged.draw_E)
    return _path(following_E, token_E, judged.draw_E, places)


def gated(token_E: jax.Array, parent_E: jax.Array, judged: Judged, places: int, gate: Gate) -> Path:
    """The longest path on which every step is a match or passes the gate.

    If two continuations have the same length, a match wins, then the likelier child, then the
    first one.
    """
    E = len(parent_E)
    up_E = jnp.maximum(parent_E, 0)
    real_E = parent_E >= 0
    match_E = real_E & (token_E == judged.draw_E[up_E])
    if gate.kind == "entropy":
        open_E = judged.entropy_E[up_E] < gate.threshold
    else:
        open_E = judged.probability_E >= gate.threshold
    # Children come after their parents, so one sweep from the end sees children first.
    run_E = jax.lax.fori_loop(
        0,
        E,
        lambda i, run: run.at[up_E[E - 1 - i]].max(
            jnp.where(match_E[E - 1 - i], run[E - 1 - i] + 1, 0)
        ),
        jnp.zeros(E, jnp.int32),
    )
    admitted_E = match_E | (real_E & open_E & (run_E >= gate.window))

    def sweep(i, carry):
        reach, rank, following = carry
        c = E - 1 - i
        u = up_E[c]
        length = reach[c] + 1
        # A match wins, then the likelier child, then the first one (the sweep starts at the end).
        order = jnp.where(match_E[c], 2.0, 0.0) + judged.probability_E[c]
        better = (length > reach[u]) | ((length == reach[u]) & (order >= rank[u]))
        take = admitted_E[c] & better
        reach = reach.at[u].set(jnp.where(take, length, reach[u]))
        rank = rank.at[u].set(jnp.where(take, order, rank[u]))
        following = following.at[u].set(jnp.where(take, c, following[u]))
        return reach, rank, following

    start = (jnp.zeros(E, jnp.int32), jnp.full(E, -1.0), jnp.full(E, -1, jnp.int32))
    _, _, following_E = jax.lax.fori_loop(0, E, sweep, start)
    return _path(following_E, token_E, judged.draw_E, places)


def replayed(
    token_E: jax.Array,
    parent_E: jax.Array,
    depth_E: jax.Array,
    ancestor_EE: jax.Array,
    judged: Judged,
    places: int,
    accepted: jax.Array,
) -> Path:
    """A path of `accepted` nodes below the root, right or wrong: for timing with a recorded trace.

    It ends at the first node of that depth. If the tree is less deep, it ends at the first node of
    the deepest level.
    """
    real_E = (parent_E >= 0) | (jnp.arange(len(parent_E)) == 0)
    wanted = jnp.minimum(accepted, jnp.max(jnp.where(real_E, depth_E, 0)))
    end = jnp.argmax(real_E & (depth_E == wanted))
    chosen_E = ancestor_EE[end] & real_E
    following_E = jnp.full(len(parent_E), -1, jnp.int32)
    child_E = jnp.arange(len(parent_E), dtype=jnp.int32)
    up_E = jnp.where(chosen_E & (parent_E >= 0), parent_E, len(parent_E))
    following_E = following_E.at[up_E].set(child_E, mode="drop")
    return _path(following_E, token_E, judged.draw_E, places)
