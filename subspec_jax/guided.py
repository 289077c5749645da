"""Rounds in which some texts have a grammar: what may follow each node of their trees.

The host walks through each grammar as the tree grows, and sends a mask for each new node before
the draft's next step. So the draft proposes nothing that the target may not draw, and what a
grammar forces is always accepted. The masks of the tree are then the target's too.

Letters: B texts of a round, G those with a grammar, E places of a tree, w nodes added per step, W
words of a mask.
"""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llm_jax.cards import ALIKE, CACHES
from llm_jax.grammar import GrammarError, Walk
from llm_jax.stream import to_device
from subspec_jax.batch_programs import (
    Allowed,
    Growing,
    Grown,
    Seats,
    forward_step,
    last_level,
    unfinished,
    where,
)
from subspec_jax.prefix_cache import Text
from subspec_jax.program import donated, program
from subspec_jax.tree import Tree, TreeSpec, add_candidates, commit, seedling

SECONDS = 2.0
"""Time of the processor for the masks of a text's tree. Usual ones take some thousandths; a grammar
that can be read in many ways would hold up everybody."""


def checked(text: Text, vocab: int) -> None:
    """Raises GrammarError for a grammar that the text cannot follow."""
    if text.grammar is None:
        return
    if text.grammar.vocab != vocab:
        raise GrammarError(
            f"the grammar is of {text.grammar.vocab} tokens, and the model has {vocab}"
        )
    if text.replay is not None:
        raise GrammarError("a replayed text accepts tokens right or wrong, and has no grammar")


def follow(text: Text, tokens: list[int]) -> list[int]:
    """The tokens up to the end of the text's grammar, to which the text goes on."""
    kept = []
    for token in tokens:
        if text.walk.over:
            break
        if not text.walk.take(token):
            text.failed = f"the grammar fails: {text.walk.error or f'token {token} is not allowed'}"
            break
        kept.append(token)
    return kept


class Branches:
    """The nodes of one text's tree: where in the grammar each of them is, and its mask.

    Below a token that the grammar forbids, and below the end of the text, anything may follow: the
    target never comes there.
    """

    def __init__(self, walk: Walk, places: int):
        self._walks: list[Walk | None] = [walk]
        self._seconds = 0.0
        self.dead: dict[int, str] = {}
        """Places behind which there is no way on, as where limits are passed, and why."""
        root = walk.mask()
        self.mask_EW = np.full((places, len(root)), 2**32 - 1, np.uint32)
        self._put(0, root)

    def extend(self, token_E: np.ndarray, parent_E: np.ndarray, size: int) -> None:
        """Walks to the nodes that are new since the last call."""
        began = time.thread_time() - self._seconds
        for place in range(len(self._walks), min(size, len(self.mask_EW))):
            before = self._walks[parent_E[place]] if parent_E[place] >= 0 else None
            walk = None if before is None else before.fork()
            if walk is not None and not walk.take(int(token_E[place])):
                walk = None
            self._walks.append(walk)
            if self._seconds > SECONDS and walk is not None:
                self.dead[place] = f"its masks take longer than {SECONDS:g} s a round"
            elif walk is not None and not walk.over:
                self._put(place, walk.mask())
            self._seconds = time.thread_time() - began

    def _put(self, place: int, mask_W: np.ndarray) -> None:
        if mask_W.any():
            self.mask_EW[place] = mask_W
        else:
            self.dead[place] = self._walks[place].error or "no token of the model may follow"


class Guided:
    """The trees of a round's texts, in a program for B of them."""

    def __init__(self, texts: Sequence[Text], size: int, spec: TreeSpec, cards: int):
        self._spec, self._cards = spec, cards
        self._of = {
            b: Branches(t.walk, spec.nodes) for b, t in enumerate(texts) if t.walk is not None
        }
        self._which_B = np.full(size, -1, np.int32)
        self._which_B[list(self._of)] = range(len(self._of))
        # One text with a grammar, or as many as there are: so few programs are compiled.
        self._room = 1 if len(self._of) == 1 else size
        self._work: concurrent.futures.Future | None = None

    @classmethod
    def of(
        cls, texts: Sequence[Text], size: int, spec: TreeSpec, cards: int = 1
    ) -> "Guided | None":
        """None where no text has a grammar."""
        return cls(texts, size, spec, cards) if any(t.walk is not None for t in texts) else None

    def grow(self, g: Growing) -> Grown:
        """The trees of `batch_programs.grow_each`, of tokens that the grammars allow."""
        spec, caches = g.spec, g.caches
        sprout = sprouted(g.seats, spec, g.experts)
        while True:
            larger, first_B = sprout.larger, sprout.trees.size
            nodes = larger.token_E, larger.parent_E, larger.size
            *nodes, first_B, goes_on_B = jax.device_get((*nodes, first_B, sprout.goes_on_B))
            if not goes_on_B.any():
                break
            self._extend(*nodes)
            sprout, caches = grow_step(
                GuidedGrowing(
                    **{f.name: getattr(g, f.name) for f in dataclasses.fields(g)}
                    | dict(caches=caches, sprout=sprout)
                    | dict(allowed=self._masks(first_B, spec.width))
                )
            )
        trees = last_nodes(sprout.trees, sprout.larger, spec)
        return Grown(trees, caches, sprout.routed_LE)

    def look(self, trees: Tree) -> None:
        """Begins to walk to all nodes that are to be verified, beside the target's pass."""
        nodes = jax.device_get((trees.token_E, trees.parent_E, trees.size))
        self._work = _beside.submit(self._extend, *nodes)

    def verified(self) -> Allowed:
        """What may follow each node."""
        self._work.result()
        return self._masks(np.zeros(len(self._which_B), np.int32), self._spec.nodes)

    def lost(self, b: int, path: Sequence[int] = ()) -> str | None:
        """Why text `b` cannot go on behind the root and these places; None: it can."""
        dead = self._of[b].dead if b in self._of else {}
        why = next((dead[place] for place in (0, *path) if place in dead), None)
        return why and f"the grammar fails: {why}"

    def first(self) -> Allowed:
        """What may follow each root."""
        return self._masks(np.zeros(len(self._which_B), np.int32), 1)

    def _extend(self, token_BE, parent_BE, size_B) -> None:
        for b, branches in self._of.items():
            branches.extend(token_BE[b], parent_BE[b], int(size_B[b]))

    def _masks(self, first_B: np.ndarray, count: int) -> Allowed:
        """Of `count` places of each text, from `first_B` on."""
        words = next(iter(self._of.values())).mask_EW.shape[1]
        mask_GTW = np.full((self._room, count, words), 2**32 - 1, np.uint32)
        for mask_TW, (b, branches) in zip(mask_GTW, self._of.items(), strict=False):
            found_TW = branches.mask_EW[first_B[b] : first_B[b] + count]
            mask_TW[: len(found_TW)] = found_TW
        return to_device(Allowed(mask_GTW, self._which_B), self._cards)


_beside = concurrent.futures.ThreadPoolExecutor(1, "grammars")
"""Walks while the engine's thread waits for layers."""


# ------------------------------------------------------------------ programs


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Sprout:
    """Trees between two steps of the draft."""

    trees: Tree
    larger: Tree
    """The same with the nodes of the next step, which are not forwarded yet."""
    goes_on_B: jax.Array
    """Whether that step is to be made."""
    routed_LE: jax.Array | None


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedGrowing(Growing):
    """A step of the draft, and what may follow its nodes."""

    sprout: Sprout = donated()
    allowed: Allowed


def _each(f, spec: TreeSpec):
    return jax.vmap(functools.partial(f, spec=spec))


@functools.partial(jax.jit, static_argnames=("spec", "experts"))
def sprouted(seats: Seats, spec: TreeSpec, experts: tuple[int, int] | None) -> Sprout:
    """Trees without nodes, of which the root is the next."""
    trees = _each(seedling, spec)(seats.root_B)
    routed_LE = None if experts is None else jnp.zeros(experts, bool)
    larger = _each(commit, spec)(trees)
    return Sprout(trees, larger, jnp.ones(len(seats.root_B), bool), routed_LE)


class Stepped(NamedTuple):
    """Trees after a step, and the caches that hold their nodes."""

    sprout: Sprout
    caches: tuple


@program(Stepped(ALIKE, CACHES))
def grow_step(g: GuidedGrowing) -> Stepped:
    """The body of the loop of `batch_programs.grow_each`."""
    spec, s = g.spec, g.sprout
    first_B = s.trees.size
    given = g, s.larger, g.caches, s.routed_LE, first_B, g.allowed
    scores, caches, routed_LE = forward_step(*given)
    larger = jax.vmap(functools.partial(add_candidates, spec=spec))(s.larger, first_B, scores)
    trees = where(s.goes_on_B, larger, s.trees)
    sprout = Sprout(trees, _each(commit, spec)(trees), unfinished(g, trees), routed_LE)
    return Stepped(sprout, caches)


last_nodes = jax.jit(
    lambda trees, larger, spec: last_level(larger, trees, spec), static_argnames="spec"
)
