"""Text that repeats: the tokens that followed the same few tokens earlier, found on the device.

Letters: S places of the text, M most tokens looked up, n tokens to match.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from subspec_jax.tree import Tree


def check_longest(longest: int) -> None:
    """Raises ValueError if the longest n-gram is shorter than one token."""
    if longest < 1:
        raise ValueError(f"the longest n-gram is {longest}; it must be at least 1")


def padded(tokens: Sequence[int], slots: int) -> np.ndarray:
    """The text as int32 [slots], -1 after its end."""
    return np.pad(np.asarray(tokens, np.int32), (0, slots - len(tokens)), constant_values=-1)


def recent(
    tree: Tree, node: jax.Array, text_S: jax.Array, at: jax.Array, longest: int
) -> jax.Array:
    """[longest] the last tokens of the path to a node, the newest first; the root is text[at]."""
    found, here = [], node
    for back in range(longest):
        above = jnp.maximum(at - (back - tree.depth_E[node]), 0)  # earlier in the text
        inside = back <= tree.depth_E[node]
        found.append(jnp.where(inside, tree.token_E[jnp.maximum(here, 0)], text_S[above]))
        here = tree.parent_E[here]
    return jnp.stack(found)


def continuation(text_S: jax.Array, at: jax.Array, recent_n: jax.Array, most: int) -> jax.Array:
    """[most] the tokens that followed `recent_n` (newest first) earlier; -1 after their end.

    A match has at least one equal token and at least two tokens after it. The longest match wins.
    Among equally long ones, the newest match with `most` tokens after it wins. If there is none,
    the oldest match wins: it has the most tokens after it. Example: text 1 2 3 9 0 0 and recent 2 1
    give 3 9 0 …
    """
    S = text_S.shape[0]
    place_S = jnp.arange(S, dtype=jnp.int32)
    matched_S, run_S = jnp.zeros(S, jnp.int32), jnp.ones(S, bool)
    for back in range(recent_n.shape[0]):
        run_S &= (jnp.roll(text_S, back) == recent_n[back]) & (place_S >= back)
        matched_S += run_S.astype(jnp.int32)
    matched_S = jnp.where(place_S + 2 <= at, matched_S, 0)
    order_S = jnp.where(place_S + most <= at, S + place_S, S - 1 - place_S)
    best = jnp.argmax(jnp.where(matched_S > 0, matched_S * 2 * S + order_S, -1)).astype(jnp.int32)
    follow_M = best + 1 + jnp.arange(most, dtype=jnp.int32)
    there_M = (follow_M <= at) & (matched_S[best] > 0)
    return jnp.where(there_M, text_S[jnp.minimum(follow_M, S - 1)], -1)


@dataclasses.dataclass
class Payoff:
    """Whether lookup pays in this text: the decaying mean of levels it saved per draft step."""

    mean: float = 1.0
    """Levels saved per draft step."""
    waited: int = 0
    """Rounds since the last lookup."""

    LEAST, EVERY, DECAY = 0.25, 8, 0.7

    def due(self) -> bool:
        """Whether to look up in this round. Call it once per round.

        If a step saves fewer than LEAST levels, only every 8th round looks up.
        """
        self.waited += 1
        return self.mean >= self.LEAST or self.waited >= self.EVERY

    def learn(self, spared: float) -> None:
        """Adds a round with lookup that saved `spared` levels per draft step."""
        self.mean = self.DECAY * self.mean + (1 - self.DECAY) * spared
        self.waited = 0
