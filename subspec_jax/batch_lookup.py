"""Trees of several texts that copy from earlier in each text: `draft.grow_along`, all together.

Letters: B sequences, S places of a text; the others as in `subspec_jax.chain`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llm_jax.cards import ALIKE, CACHES
from subspec_jax import chain
from subspec_jax.batch_programs import Growing, Grown, forward_step, last_level, pays, where
from subspec_jax.lookup import Payoff, continuation, padded, recent
from subspec_jax.prefix_cache import Text
from subspec_jax.program import program, static
from subspec_jax.tree import Tree, commit, seedling


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowingAlong(Growing):
    """All that trees grow from, with texts to copy."""

    text_BS: jax.Array
    """Of each sequence the committed tokens, then the root, then -1."""
    longest: int = static()
    """The longest n-gram that is looked up."""


def along(g: Growing, text_BS: jax.Array, longest: int) -> GrowingAlong:
    """The same, with texts to copy."""
    own = {f.name: getattr(g, f.name) for f in dataclasses.fields(g)}
    return GrowingAlong(**own, text_BS=text_BS, longest=longest)


class GrownAlong(NamedTuple):
    """The trees, and of each [steps, looked-up tokens kept, levels spared]."""

    grown: Grown
    counts_B3: jax.Array


class Lookup:
    """Looks up in all texts of a round or in none: seldom, where it saved few steps lately."""

    def __init__(self, longest: int, slots: int):
        self._longest, self._slots, self._payoff = longest, slots, Payoff()

    def texts(self, texts: list[Text], size: int) -> np.ndarray | None:
        """int32 [size, S] of these texts; None where this round does not look up."""
        if not self._payoff.due():
            return None
        rows = [padded(t.tokens, self._slots) for t in texts]
        return np.stack(rows + [np.full(self._slots, -1, np.int32)] * (size - len(texts)))

    def grow(self, g: Growing, text_BS: jax.Array) -> GrownAlong:
        """The trees of `grow_each_along`."""
        return grow_each_along(along(g, text_BS, self._longest))

    def learn(self, counts_B3: np.ndarray) -> None:
        """Adds what the texts of a round have spared for each of their steps."""
        self._payoff.learn(float(np.mean(counts_B3[:, 2] / np.maximum(counts_B3[:, 0], 1))))


@program(GrownAlong(Grown(ALIKE, CACHES, ALIKE), ALIKE))
def grow_each_along(g: GrowingAlong) -> GrownAlong:
    """A tree that is done waits for the others."""
    spec, B = g.spec, len(g.seats.root_B)
    of_each = lambda f: jax.vmap(functools.partial(f, spec=spec))
    find = functools.partial(recent, longest=g.longest)
    follow = functools.partial(continuation, most=spec.lookup)
    deep = functools.partial(chain.tree_is_deep, spec=spec)

    def unfinished(trees: Tree, kept_B, spared_B):
        deep_B = jax.vmap(deep)(trees, kept_B, spared_B)
        return (trees.size == 0) | (pays(g, trees) & ~deep_B)

    def body(carry):
        trees, caches, routed_LE, steps_B, kept_B, spared_B = carry
        goes_on_B, first_B = unfinished(trees, kept_B, spared_B), trees.size
        before_B = first_B + jnp.where(first_B == 0, 1, spec.width)
        larger = of_each(commit)(trees)
        newest_Bn = jax.vmap(find)(larger, first_B, g.text_BS, g.seats.at_B)
        found_BM = jax.vmap(follow)(g.text_BS, g.seats.at_B, newest_Bn)
        trial = jax.vmap(chain.hang)(larger, first_B, found_BM)
        rows = spec.width + spec.lookup
        scores, caches, routed_LE = forward_step(g, trial, caches, routed_LE, first_B, rows=rows)
        larger, more_B = jax.vmap(functools.partial(chain.keep, spec=spec))(
            larger, first_B, found_BM, scores
        )
        some = lambda new_B: jnp.where(goes_on_B, new_B, jnp.zeros_like(new_B))
        steps_B = steps_B + some(jnp.ones_like(steps_B))
        kept_B = kept_B + some(larger.size - before_B)
        return (
            where(goes_on_B, larger, trees), caches, routed_LE, steps_B, kept_B,
            spared_B + some(more_B),
        )  # fmt: skip

    trees = of_each(seedling)(g.seats.root_B)
    routed_LE = None if g.experts is None else jnp.zeros(g.experts, bool)
    none_B = jnp.zeros(B, jnp.int32)
    start = trees, g.caches, routed_LE, none_B, none_B, jnp.zeros(B, jnp.float32)
    going = lambda carry: unfinished(carry[0], *carry[4:]).any()
    trees, caches, routed_LE, *counts = jax.lax.while_loop(going, body, start)
    trees = last_level(of_each(commit)(trees), trees, spec)
    counts_B3 = jnp.stack([a.astype(jnp.int32) for a in counts], axis=1)
    return GrownAlong(Grown(trees, caches, routed_LE), counts_B3)
