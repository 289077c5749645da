"""The caches of a draft that has its own, where several texts are decoded together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from llm_jax.attention import Step, caches_for, causal_steps
from llm_jax.cache import move_each
from llm_jax.cards import CACHES, empty, on_each
from llm_jax.config import Config
from llm_jax.model import hidden
from llm_jax.params import Params
from subspec_jax.batch_programs import Ended, Seats, clear_row, copy_row
from subspec_jax.program import donated, program, static


class OwnCaches:
    """A row for each text, as the target has; a row holds the same tokens in both.

    So a prompt that goes on from another row does so in both, and the draft reads only the rest.
    """

    def __init__(
        self, params: Params, cfg: Config, rows: int, slots: int, places: int, cards: int = 1
    ):
        self.params, self.cfg, self._rows = params, cfg, rows
        make = functools.partial(caches_for, params, cfg, rows, slots, places)
        self.caches = empty(make, cards, cfg.cards > 1)

    @property
    def rewinds(self) -> bool:
        """As `llm_jax.cache.KV.rewinds`, of all of them."""
        return all(cache.rewinds for cache in self.caches)

    def copy(self, source: jax.Array, to: jax.Array) -> None:
        """Copies a row to another."""
        self.caches = copy_row(self.caches, source, to)

    def clear(self, row: jax.Array) -> None:
        """Fills a row with zeros."""
        self.caches = clear_row(self.caches, row)

    def read(self, tokens_BT: jax.Array, step: Step) -> None:
        """Forwards pieces of prompts, in the step of the target's pass over them."""
        self.caches = _read(self.params, tokens_BT, self.caches, step, self.cfg)

    def follow(self, ended: Ended, seats: Seats, forwarded_B: jax.Array, slots: int) -> None:
        """Moves the accepted nodes of a round to their slots, as the target has done.

        `forwarded_B` places of each tree are in the caches; a deeper last node is forwarded now.
        """
        how = dict(cfg=self.cfg, slots=slots, rows=self._rows)
        path = ended.node_BP, ended.emitted_BP, ended.length_B
        given = Following(self.params, self.caches, seats, *path, forwarded_B, **how)
        self.caches = _follow(given)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Following:
    """The accepted paths of a round, and caches of the draft that hold their trees."""

    params: Params
    caches: tuple = donated()
    seats: Seats
    node_BP: jax.Array
    emitted_BP: jax.Array
    length_B: jax.Array
    forwarded_B: jax.Array
    cfg: Config = static()
    slots: int = static()
    rows: int = static()


@jax.jit
def _last(emitted_BP: jax.Array, length_B: jax.Array) -> jax.Array:
    """[B, 1] the token of each path's last node, which the one drawn there follows."""
    return jnp.take_along_axis(emitted_BP, jnp.maximum(length_B - 2, 0)[:, None], axis=1)


@program(CACHES)
def _follow(f: Following) -> tuple:
    at_B, row_B = f.seats.at_B, f.seats.row_B
    caches = move_each(f.caches, at_B[:, None] + f.node_BP, at_B, row_B)
    behind_B = f.node_BP[:, -1] >= f.forwarded_B

    def forward(caches):
        there_B = jnp.where(behind_B, row_B, f.rows)  # writes to a row that is not there are lost
        tokens_B1 = jnp.maximum(_last(f.emitted_BP, f.length_B), 0)
        ones_B = jnp.ones_like(at_B)
        step = causal_steps(at_B + f.length_B - 1, 1, f.slots, there_B, ones_B)
        return hidden(f.params, tokens_B1, caches, step, f.cfg)[1]

    return jax.lax.cond(behind_B.any(), forward, lambda caches: caches, caches)


def _read_tokens(params, tokens_BT, caches, step, cfg):
    read = on_each(lambda *args: hidden(*args, cfg)[1], cfg.cards, CACHES)
    return read(params, tokens_BT, caches, step)


_read = jax.jit(_read_tokens, static_argnames="cfg", donate_argnames="caches")
