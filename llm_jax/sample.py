"""Sampling that depends on (seed, position, logits) alone.

A token is drawn as the argmax of logits + Gumbel noise, and the noise of a position comes from the
seed and the position. So the same logits give the same tokens, whether they are computed one token
at a time or for a whole tree at once. A draft model that adds the same noise to its own logits
guesses the draw and not only the distribution (the Gumbel-max coupling). The drawn tokens have the
distribution of the logits, whatever was guessed.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llm_jax import LLMError

LEAST_TEMPERATURE = 1e-5
"""Above 0. Far below it, logits become infinite, and the draw is not the largest."""

SORTED_ROWS = 16
"""Rows of logits that are sorted at a time, where several texts are sampled: sorting takes five
times the memory of its rows."""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is chosen. Temperature 0 is greedy; the filters apply in this order.

    top_k keeps the k largest logits, top_p the smallest set of probability p, min_p tokens at least
    min_p times as likely as the likeliest. 0, 1 and 0 switch them off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        for name, low, high in (("temperature", 0, 100), ("top_k", 0, 2**31), ("min_p", 0, 1)):
            if not low <= (value := getattr(self, name)) <= high:
                raise LLMError(f"{name} is {value}; expected {low} to {high}")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise LLMError(
                f"temperature is {self.temperature}; expected 0, which is greedy, or at least "
                f"{LEAST_TEMPERATURE}: less would make logits infinite"
            )
        if not 0 < self.top_p <= 1:
            raise LLMError(f"top_p is {self.top_p}; expected above 0 and at most 1 (1 is off)")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def scores(self, logits_XV: jax.Array) -> jax.Array:
        """Log-probabilities up to a constant, float32: tempered, -inf where filtered out."""
        z = logits_XV.astype(jnp.float32)
        if self.greedy:
            return z
        z = z / self.temperature
        drop = jnp.zeros(z.shape, bool)
        if 0 < self.top_k < z.shape[-1]:
            drop |= z < jax.lax.top_k(z, self.top_k)[0][..., -1:]
        z = jnp.where(drop, -jnp.inf, z)
        if self.top_p < 1:
            order = jnp.sort(z, axis=-1, descending=True)
            p = jax.nn.softmax(order, axis=-1)
            kept = jnp.cumsum(p, axis=-1) - p < self.top_p  # the first one always stays
            least = jnp.min(jnp.where(kept, order, jnp.inf), axis=-1, keepdims=True)
            z = jnp.where(z < least, -jnp.inf, z)
        if self.min_p > 0:
            floor = jnp.max(z, axis=-1, keepdims=True) + jnp.log(jnp.float32(self.min_p))
            z = jnp.where(z < floor, -jnp.inf, z)
        return z

    def perturbed(self, logits_XV: jax.Array, key: jax.Array, position_X: jax.Array) -> jax.Array:
        """Scores plus the noise of each row's position: the argmax is that position's draw."""
        z = self.scores(logits_XV)
        return z if self.greedy else z + noise(key, position_X, z.shape[-1])

    def draw(self, logits_XV: jax.Array, key: jax.Array, position_X: jax.Array) -> jax.Array:
        """The token drawn for each row, int32 [X]; `position_X` is the position of that token."""
        return jnp.argmax(self.perturbed(logits_XV, key, position_X), -1).astype(jnp.int32)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Samplers:
    """The `Sampler` and the seed of each of several sequences, as arrays [B].

    So one program serves all of them. The numbers are those of `Sampler`; X rows of logits belong
    to the sequences `of_X`.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    key_B: jax.Array
    """The noise of `jax.random.key(seed)`."""

    @classmethod
    def of(cls, samplers: Sequence[Sampler], seeds: Sequence[int]) -> "Samplers":
        column = lambda name, dtype: np.array([getattr(s, name) for s in samplers], dtype)
        floats = (column(name, np.float32) for name in ("temperature", "top_p", "min_p"))
        temperature, top_p, min_p = floats
        key_B = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
        return cls(temperature, column("top_k", np.int32), top_p, min_p, key_B)

    def scores(self, logits_XV: jax.Array, of_X: jax.Array) -> jax.Array:
        """`Sampler.scores`, with each row's own sampler."""
        temperature, top_k, top_p, min_p = (
            a[of_X][:, None] for a in (self.temperature_B, self.top_k_B, self.top_p_B, self.min_p_B)
        )
        z, V = logits_XV.astype(jnp.float32), logits_XV.shape[-1]
        greedy = temperature == 0
        z = jnp.where(greedy, z, z / jnp.where(greedy, 1.0, temperature))
        by_rank = ~greedy & (((top_k > 0) & (top_k < V)) | (top_p < 1))

        def among_the_first(row):
            z, top_k, top_p = row
            order = jnp.sort(z, descending=True)
            k = jnp.where((top_k > 0) & (top_k < V), top_k, V)
            of_k = order[k - 1]
            z, order = (jnp.where(a < of_k, -jnp.inf, a) for a in (z, order))
            p = jax.nn.softmax(order)
            kept = (jnp.cumsum(p) - p < top_p) | (top_p == 1)
            least = jnp.min(jnp.where(kept, order, jnp.inf))
            return jnp.where(z < least, -jnp.inf, z)

        def by_ranks(z):
            rows = z, top_k[:, 0], top_p[:, 0]
            return jax.lax.map(among_the_first, rows, batch_size=SORTED_ROWS)

        chosen = jax.lax.cond(by_rank.any(), by_ranks, lambda z: z, z)
        z = jnp.where(by_rank, chosen, z)
        floor = jnp.max(z, axis=-1, keepdims=True) + jnp.log(min_p)
        return jnp.where(~greedy & (min_p > 0) & (z < floor), -jnp.inf, z)

    def perturbed(self, logits_XV: jax.Array, of_X: jax.Array, position_X: jax.Array) -> jax.Array:
        """`Sampler.perturbed`, with each row's own sampler and seed."""
        z = self.scores(logits_XV, of_X)
        sampled = self.temperature_B[of_X] > 0
        noisy = lambda z: (
            z + jax.vmap(_noise_row, (0, 0, None))(self.key_B[of_X], position_X, z.shape[-1])
        )
        return jnp.where(sampled[:, None], jax.lax.cond(sampled.any(), noisy, lambda z: z, z), z)

    def draw(self, logits_XV: jax.Array, of_X: jax.Array, position_X: jax.Array) -> jax.Array:
        """`Sampler.draw`, with each row's own sampler and seed."""
        return jnp.argmax(self.perturbed(logits_XV, of_X, position_X), -1).astype(jnp.int32)


def _noise_row(key: jax.Array, position: jax.Array, vocab: int) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(key, position), (vocab,), jnp.float32)


def noise(key: jax.Array, position_X: jax.Array, vocab: int) -> jax.Array:
    """Standard Gumbel noise, float32 [X, V]: rows with the same position get the same noise."""
    return jax.vmap(lambda position: _noise_row(key, position, vocab))(position_X)
