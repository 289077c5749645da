"""The token tree that a draft proposes: arrays of fixed size, filled step by step.

When n tokens are committed, node i of the tree is in cache slot n + i. Node 0, the root, is the
newest token; its keys and values are in no cache yet. Nodes are in the order in which they were
added, so a parent comes before its children. An empty place, or a place filled with an invalid
candidate (score -inf), has parent -1 and is never matched.

Letters: E places for nodes, w nodes added per step, C candidates in the pool.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

Kind = Literal["beam", "best-first", "chain"]


MOST_PLACES = 2**14
"""The most nodes of a tree, whose ancestors are a square matrix; the published trees have 289."""


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """The shape of a draft tree and how it grows.

    `beam`: every step adds the `width` best children of the last `width` nodes (SubSpec, with
    `width` nodes on each of `depth` levels). `best-first`: all candidates found so far compete, up
    to `budget` nodes (SpecExec). `chain`: a beam of width 1.
    """

    kind: Kind = "beam"
    depth: int = 48
    width: int = 6
    budget: int | None = None
    """Nodes below the root, only for best-first; depth * width if None."""
    sharpen: float = 0.2
    """Temperature of the draft's probabilities when nodes are scored. It changes only proposals."""
    extra: int = 0
    """Most further steps that the draft makes below the tree while the tree is verified."""
    lookup: int = 0
    """Most tokens from earlier text that a step forwards below its best node."""
    coupled: bool = True
    """In sampling, the draft adds the target's noise to its logits, so it guesses the draw."""

    def __post_init__(self):
        if self.kind not in ("beam", "best-first", "chain"):
            raise ValueError(f"tree kind {self.kind!r} is not one of beam, best-first, chain")
        if self.kind == "chain" and self.width != 1:
            object.__setattr__(self, "width", 1)
        for name, least in (("depth", 0), ("width", 1), ("extra", 0), ("lookup", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"tree {name} is {getattr(self, name)}; it must be at least {least}"
                )
        if not 0 < self.sharpen <= 100:
            raise ValueError(
                f"sharpen is {self.sharpen}; it must be above 0 and at most 100 (1 leaves the "
                "draft as is)"
            )
        if self.lookup and self.extra:
            raise ValueError(
                "steps drafted during verification do not look up text; set lookup or extra to 0"
            )
        if self.budget is not None and self.kind != "best-first":
            raise ValueError(
                f"a node budget is for best-first trees; a {self.kind} has depth x width"
            )
        if self.budget is not None and self.budget < self.width:
            raise ValueError(f"budget {self.budget} is less than one step of {self.width} nodes")
        if max(self.places, self.depth, self.width) > MOST_PLACES:
            raise ValueError(f"a tree of {self.places} nodes; at most {MOST_PLACES} are possible")

    @property
    def steps(self) -> int:
        """Number of steps; each adds `width` nodes."""
        return self.depth if self.budget is None else self.budget // self.width

    @property
    def nodes(self) -> int:
        """Places that the target verifies: the root and `width` nodes for each step."""
        return 1 + self.steps * self.width

    @property
    def places(self) -> int:
        """All places: also those for nodes drafted during verification, and for looked-up tokens
        while they are forwarded."""
        return self.nodes + self.extra * self.width + self.lookup

    @property
    def deepest(self) -> int:
        """Most levels of a tree, with those drafted during the previous verification."""
        return self.depth + self.extra

    @property
    def offers(self) -> int:
        """Children of a node that become candidates.

        In a beam no more than `width` can be chosen. Best-first may choose a node's later children
        in a later step, so it keeps at least 16, as SpecExec does.
        """
        return max(self.width, 16) if self.kind == "best-first" else self.width

    @property
    def pool(self) -> int:
        """Number of candidates kept between steps."""
        children = self.width * self.width
        return children if self.kind != "best-first" else max(children, self.places)


PASS_NODES = 1200
"""Most nodes that a pass verifies for several texts together: four whole trees of 48 x 6. On an
H100, eight texts of Qwen2.5-7B in 8 GB make 536 tokens/s with 24 levels and 490 with 48."""


def shared_spec(spec: TreeSpec, texts: int, most: int = PASS_NODES) -> TreeSpec:
    """The tree of each of several texts: with fewer levels where `most` nodes do not hold all.

    A pass over many nodes takes the time of its products, not that of its copies; then deeper
    trees, whose last levels are seldom accepted, cost more than they bring.
    """
    if texts == 1 or spec.nodes == 1 or texts * spec.nodes <= most:
        return spec
    steps = max(1, (most // texts - 1) // spec.width)
    if spec.budget is not None:
        return dataclasses.replace(spec, budget=steps * spec.width)
    return dataclasses.replace(spec, depth=steps)


def ladder(texts: int) -> tuple[int, ...]:
    """The numbers of texts that programs are made for: 1, 2, 4, 8 … and `texts`."""
    return (*(2**n for n in range(texts.bit_length()) if 2**n < texts), texts)


def pass_nodes(spec: TreeSpec, texts: int) -> int:
    """Most nodes of a pass over up to this many texts."""
    return max(n * shared_spec(spec, n).nodes for n in ladder(texts))


@dataclasses.dataclass(frozen=True)
class PassShape:
    """What all methods' passes have in common, where they are to be one program (`bitwise`)."""

    rows: int
    """Tokens of a pass; those behind a tree's nodes fill it."""
    places: int
    """Cache slots behind the text."""
    levels: int
    """Most levels of a tree, with the root."""


def cache_slots(max_length: int, spec: TreeSpec, shape: PassShape | None = None) -> int:
    """Cache slots for `max_length` tokens and a tree after them, rounded up to 64.

    On an H200, attention of 289 queries takes 0.40 ms over 2,337 slots and 0.23 ms over 2,368.
    """
    return -(-(max_length + (spec if shape is None else shape).places) // 64) * 64


SHORTEST = 512
"""The smallest number of slots that attention is compiled for."""


def live_sizes(slots: int) -> list[int]:
    """The numbers of slots that attention is compiled for: 512, 1024, 2048 … and `slots`; on a CPU,
    where each slot takes time, 256 too."""
    sizes, shortest = [], SHORTEST // 2 if jax.default_backend() == "cpu" else SHORTEST
    while shortest << len(sizes) < slots:
        sizes.append(shortest << len(sizes))
    return [*sizes, slots]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
    """The nodes, and the pool of candidates from which the next nodes come."""

    token_E: jax.Array
    parent_E: jax.Array
    depth_E: jax.Array
    score_E: jax.Array
    """Sum of sharpened log-probabilities from the root, float32."""
    ancestor_EE: jax.Array
    """[i, j]: node j is an ancestor of node i, or i itself."""
    size: jax.Array
    """[] number of filled places."""
    forwarded: jax.Array
    """[] number of places whose keys and values are in the draft's cache."""
    pool_score_C: jax.Array
    pool_parent_C: jax.Array
    pool_token_C: jax.Array
    routed_LE: jax.Array | None = None
    """The experts of each layer to which the draft's nodes were routed, bool; None: there are
    none."""


def seedling(token: jax.Array, spec: TreeSpec, experts: tuple[int, int] | None = None) -> Tree:
    """An empty tree whose only candidate is the root, with this token: int32 [].

    `experts`: (layers with experts, experts of a layer) of a draft whose routing is recorded.
    """
    E, C = spec.places, spec.pool
    first = jnp.arange(C) == 0
    return Tree(
        token_E=jnp.zeros(E, jnp.int32),
        parent_E=jnp.full(E, -1, jnp.int32),
        depth_E=jnp.zeros(E, jnp.int32),
        score_E=jnp.full(E, -jnp.inf, jnp.float32),
        ancestor_EE=jnp.eye(E, dtype=bool),
        size=jnp.int32(0),
        forwarded=jnp.int32(0),
        pool_score_C=jnp.where(first, 0.0, -jnp.inf).astype(jnp.float32),
        pool_parent_C=jnp.full(C, -1, jnp.int32),
        pool_token_C=jnp.where(first, jnp.asarray(token, jnp.int32), 0),
        routed_LE=None if experts is None else jnp.zeros(experts, bool),
    )


def best(tree: Tree, spec: TreeSpec) -> tuple[jax.Array, jax.Array]:
    """(scores [w], pool indices [w]) of the best candidates; ties go to the lower index.

    Candidates below the deepest level are not chosen until `replant` moves them up.
    """
    above_C = jnp.where(tree.pool_parent_C < 0, -1, tree.depth_E[tree.pool_parent_C])
    score_C = jnp.where(above_C < spec.deepest, tree.pool_score_C, -jnp.inf)
    return jax.lax.top_k(score_C, spec.width)


def gain(tree: Tree, spec: TreeSpec) -> jax.Array:
    """[] log of the sum of the next step's sharpened path probabilities; -inf: no candidate.

    At most one of a step's nodes is accepted. If the probabilities were right, this would be the
    log of the chance of that. `subspec_jax.stop` learns the real chance.
    """
    return jax.nn.logsumexp(best(tree, spec)[0])


def commit(tree: Tree, spec: TreeSpec) -> Tree:
    """The tree with the best candidates added: one (the root) to an empty tree, else `width`.

    They are written from place `size` on. The root's step also writes the places after the root;
    the next step overwrites them. Nodes without a free place are dropped.
    """
    score_w, chosen_w = best(tree, spec)
    rows_w = tree.size + jnp.arange(spec.width)
    options = dict(mode="drop", unique_indices=True, indices_are_sorted=True)
    put = lambda a, new: a.at[rows_w].set(new, **options)
    parent_w = tree.pool_parent_C[chosen_w]
    known_w = jnp.maximum(parent_w, 0)  # the root's -1 must not index from the end
    rooted_w1 = (parent_w >= 0)[:, None]
    self_wE = jnp.arange(spec.places)[None] == rows_w[:, None]
    taken_w = jnp.where(jnp.isfinite(score_w), chosen_w, spec.pool)
    pool_score_C = tree.pool_score_C.at[taken_w].set(-jnp.inf, mode="drop")
    if spec.kind != "best-first":
        pool_score_C = jnp.full_like(pool_score_C, -jnp.inf)
    return dataclasses.replace(
        tree,
        token_E=put(tree.token_E, tree.pool_token_C[chosen_w]),
        parent_E=put(tree.parent_E, jnp.where(jnp.isfinite(score_w), parent_w, -1)),
        depth_E=put(tree.depth_E, jnp.where(parent_w >= 0, tree.depth_E[known_w] + 1, 0)),
        score_E=put(tree.score_E, score_w),
        ancestor_EE=put(tree.ancestor_EE, (tree.ancestor_EE[known_w] & rooted_w1) | self_wE),
        size=jnp.minimum(tree.size + jnp.where(tree.size == 0, 1, spec.width), spec.places),
        pool_score_C=pool_score_C,
    )


def sharpened(logits_XV: jax.Array, spec: TreeSpec) -> jax.Array:
    """[X, V] the log-probabilities that give nodes their scores, float32."""
    return jax.nn.log_softmax(logits_XV.astype(jnp.float32) / spec.sharpen, axis=-1)


def largest(z_XV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(values [X, count], indices [X, count]): the same as `lax.top_k`, also for ties.

    Long rows take two stages, because on a GPU `top_k` uses one block of threads per row (152,064
    logits: 140 us on an H200).
    """
    X, V = z_XV.shape
    parts = min(64, V // 2048)
    if parts < 2 or count > 64:
        return jax.lax.top_k(z_XV, count)
    size = -(-V // parts)
    padded = jnp.pad(z_XV, ((0, 0), (0, parts * size - V)), constant_values=-jnp.inf)
    some, inside = jax.lax.top_k(padded.reshape(X, parts, size), count)
    value, at = jax.lax.top_k(some.reshape(X, -1), count)
    index = (inside + size * jnp.arange(parts, dtype=inside.dtype)[None, :, None]).reshape(X, -1)
    return value, jnp.take_along_axis(index, at, axis=-1)


def add_candidates(
    tree: Tree,
    first: jax.Array,
    logits_wV: jax.Array,
    spec: TreeSpec,
    taken_w: jax.Array | None = None,
) -> Tree:
    """The tree with the best children of nodes first … first+w-1 in its pool.

    `logits_wV` are the draft's, in sampling with noise. They are sharpened and normalized here, in
    float32. Scores are sums of logs, which do not underflow. Each node offers its best tokens. In a
    beam it offers `width`, so the best `width` of all [w, V] scores are among the offers. A node
    does not offer its token in `taken_w` (-1: none), which is already its child; with `taken_w`,
    w may be any number.
    """
    ids_w = first + jnp.arange(logits_wV.shape[0])
    score_w = jnp.where(ids_w < tree.size, tree.score_E[ids_w], -jnp.inf)
    if not spec.extra:  # with extra steps, a lower node may become the root
        score_w = jnp.where(tree.depth_E[ids_w] < spec.deepest, score_w, -jnp.inf)
    z_wV = logits_wV.astype(jnp.float32)
    offered_wV = z_wV
    if taken_w is not None:
        other_wV = jnp.arange(z_wV.shape[1])[None] != taken_w[:, None]
        offered_wV = jnp.where(other_wV, z_wV, -jnp.inf)
    # Normalizing does not change which are the largest, so it needs only one sum per row.
    z_wb, token_wb = largest(offered_wV, min(spec.offers, z_wV.shape[-1]))
    top_w1 = z_wV.max(-1, keepdims=True) if taken_w is not None else z_wb[:, :1]
    total_w1 = jnp.exp((z_wV - top_w1) / spec.sharpen).sum(-1, keepdims=True)
    logp_wb = (z_wb - top_w1) / spec.sharpen - jnp.log(total_w1)
    score = (score_w[:, None] + logp_wb).reshape(-1)
    parent = jnp.broadcast_to(ids_w[:, None], token_wb.shape).reshape(-1)
    token = token_wb.astype(jnp.int32).reshape(-1)
    if spec.kind == "best-first" or taken_w is not None:
        score, kept = jax.lax.top_k(jnp.concatenate([tree.pool_score_C, score]), spec.pool)
        parent = jnp.concatenate([tree.pool_parent_C, parent])[kept]
        token = jnp.concatenate([tree.pool_token_C, token])[kept]
    return dataclasses.replace(
        tree,
        forwarded=tree.size,
        pool_score_C=score,
        pool_parent_C=parent.astype(jnp.int32),
        pool_token_C=token,
    )


def node_mask(tree: Tree, rows: jax.Array, at: jax.Array, slots: int) -> jax.Array:
    """[1, rows, slots]: whether each of the nodes `rows` sees a slot.

    A node sees all slots before `at`, its ancestors and itself.
    """
    slot = jnp.arange(slots, dtype=jnp.int32)
    place = jnp.clip(slot - at, 0, tree.ancestor_EE.shape[0] - 1)
    inside = (slot >= at) & (slot < at + tree.ancestor_EE.shape[0])
    of_tree = tree.ancestor_EE[rows][:, place] & inside[None]
    return (of_tree | (slot < at)[None])[None]


def node_positions(tree: Tree, at: jax.Array, slots: int) -> jax.Array:
    """[1, slots]: the rotary position of every slot. Node i is in slot at + i.

    Its position is at + its depth.
    """
    slot = jnp.arange(slots, dtype=jnp.int32)
    inside = (slot >= at) & (slot < at + tree.depth_E.shape[0])
    place = jnp.clip(slot - at, 0, tree.depth_E.shape[0] - 1)
    return jnp.where(inside, at + tree.depth_E[place], slot)[None]


def replant(
    tree: Tree, verified: jax.Array, last: jax.Array, token: jax.Array, spec: TreeSpec
) -> tuple[Tree, jax.Array]:
    """(the next round's tree, the old place of each of its nodes [extra * w]).

    The draft may have added a child of node `last` with this token after the first `verified`
    places. Then the child's subtree becomes the new tree, with scores and depths relative to the
    child. Otherwise the new tree is a seedling with `token` as its root candidate, and the places
    are -1.
    """
    E, X = spec.places, spec.extra * spec.width
    fresh = seedling(token, spec, None if tree.routed_LE is None else tree.routed_LE.shape)
    if not X:
        return fresh, jnp.zeros(0, jnp.int32)
    child_E = (tree.parent_E == last) & (tree.token_E == token) & jnp.isfinite(tree.score_E)
    child_E &= (jnp.arange(E) >= verified) & (jnp.arange(E) < tree.forwarded)
    hit, root = child_E.any(), jnp.argmax(child_E)
    member_E = tree.ancestor_EE[:, root] & (jnp.arange(E) < tree.size)
    old_X = jnp.nonzero(member_E, size=X, fill_value=0)[0].astype(jnp.int32)
    count = member_E.sum().astype(jnp.int32)
    new_E = jnp.cumsum(member_E).astype(jnp.int32) - 1  # old place -> new place
    live_X = jnp.arange(X) < count
    put = lambda fresh_E, value_X: fresh_E.at[:X].set(jnp.where(live_X, value_X, fresh_E[:X]))
    up_X = tree.parent_E[old_X]
    parent_X = jnp.where(live_X & (up_X >= 0) & (jnp.arange(X) > 0), new_E[up_X], -1)
    pooled_C = member_E[jnp.maximum(tree.pool_parent_C, 0)] & (tree.pool_parent_C >= 0)
    both_XX = live_X[:, None] & live_X[None]
    sub_XX = jnp.where(both_XX, tree.ancestor_EE[old_X][:, old_X], jnp.eye(X, dtype=bool))
    kept = Tree(
        token_E=put(fresh.token_E, tree.token_E[old_X]),
        parent_E=put(fresh.parent_E, parent_X),
        depth_E=put(fresh.depth_E, tree.depth_E[old_X] - tree.depth_E[root]),
        score_E=put(fresh.score_E, tree.score_E[old_X] - tree.score_E[root]),
        ancestor_EE=fresh.ancestor_EE.at[:X, :X].set(sub_XX),
        size=count,
        forwarded=count,
        pool_score_C=jnp.where(pooled_C, tree.pool_score_C - tree.score_E[root], -jnp.inf),
        pool_parent_C=jnp.where(pooled_C, new_E[jnp.maximum(tree.pool_parent_C, 0)], -1),
        pool_token_C=tree.pool_token_C,
        routed_LE=tree.routed_LE,
    )
    chosen = jax.tree.map(lambda a, b: jnp.where(hit, a, b), kept, fresh)
    return chosen, jnp.where(hit, old_X, -1)


def path_to(last: int, parent_E: np.ndarray) -> tuple[int, ...]:
    """The places on the path from the root to node `last`, without the root; NumPy, on the host."""
    path = []
    while last > 0:
        path.append(int(last))
        last = parent_E[last]
    return tuple(path[::-1])


def step_gains(score_E: np.ndarray, width: int) -> tuple[float, ...]:
    """The value of `gain` before each of the tree's steps; NumPy, on the host.

    `score_E` are the scores of the filled places. Steps are whole groups of `width`, counted from
    the end. The rest at the front is the root and the nodes that an earlier round drafted. The
    result ends before a step without candidates.
    """
    steps = (len(score_E) - 1) // width
    score_LW = np.asarray(score_E, np.float64)[len(score_E) - steps * width :].reshape(steps, width)
    gain_L = np.logaddexp.reduce(score_LW, axis=1)
    return tuple(np.round(gain_L[np.cumprod(np.isfinite(gain_L)) > 0], 6).tolist())
