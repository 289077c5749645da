"""What a pass over a model with experts takes: which experts it needs, which of them are there.

Routing is drawn: every token chooses its experts alone, with chances that were counted or assumed.
Then copies and programs follow each other as `subspec_jax.experts.ExpertCache` runs them.

Neglected: that tokens of one text are routed alike (so rather too many experts are predicted than
too few), experts that the ring still holds from the last pass, experts that were foreseen and not
needed, and that a group of experts can run before those of its layer that are foreseen are there.

Letters: E experts of a layer, L layers, P passes, c experts of a token.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.attention import Step
from llm_jax.config import Config
from llm_jax.params import Layer
from llm_jax.stream import to_device
from subspec_jax.experts import apart, routed_block, sizes, without_experts

DRAWS = 4096
"""Tokens that the popularity of random routers is counted with."""
PASSES = 16
"""Passes whose routing is drawn; their mean is predicted."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """How tokens are routed."""

    chance_LE: np.ndarray
    """P(a token is routed to the expert): each layer's sum is the number of experts of a token."""
    foreseen: float | None = None
    """The part of the experts to fetch that are on their way before their layer begins, if it was
    counted; None: those of all tokens that the draft forwards, as if it routed like the target."""

    @classmethod
    def uniform(cls, layers: int, count: int, chosen: int) -> "Routing":
        """All experts are as likely."""
        return cls(np.full((layers, count), chosen / count))

    @classmethod
    def random(cls, layers: int, count: int, chosen: int, zipf: float) -> "Routing":
        """Routers with random weights and a law of Zipf (`Options.zipf`), counted by drawing
        tokens: their logits are normal, with a bias of -zipf * log(rank)."""
        if not zipf:
            return cls.uniform(layers, count, chosen)
        noise = np.random.default_rng(0).standard_normal((DRAWS, count), np.float32)
        logits = noise - zipf * np.log(np.arange(1.0, count + 1))
        top = np.argsort(-logits, axis=1)[:, :chosen]
        chance_E = np.bincount(top.reshape(-1), minlength=count) / DRAWS
        return cls(np.broadcast_to(chance_E, (layers, count)))

    @classmethod
    def counted(
        cls, tokens_LE: np.ndarray, chosen: int, foreseen: float | None = None
    ) -> "Routing":
        """From the tokens of each expert (`ExpertCache.score_LE`), of which each has `chosen`."""
        total_L1 = np.maximum(tokens_LE.sum(1, keepdims=True), 1e-9)
        return cls(np.clip(tokens_LE / total_L1 * chosen, 0, 1), foreseen)

    def experts(self, tokens: int) -> float:
        """Experts of all layers that a pass over so many tokens is expected to need."""
        return float(needed_chance(self.chance_LE, tokens).sum())

    def kept(self, capacity: int) -> np.ndarray:
        """bool [L, E]: the `capacity` most popular experts of all layers."""
        kept_LE = np.zeros(self.chance_LE.shape, bool)
        best = np.argsort(-self.chance_LE, axis=None, kind="stable")[:capacity]
        kept_LE.reshape(-1)[best] = True
        return kept_LE

    def draw(
        self,
        tokens: int,
        forwarded: int,
        capacity: int,
        share: float = 1.0,
        passes: int = PASSES,
        seed: int = 0,
    ) -> np.ndarray:
        """int [P, 3, L]: experts of passes over `tokens` tokens that are on the device, that are
        on their way before, and that are fetched late.

        The draft forwards the first `forwarded` tokens, and is routed to a `share` of the experts
        that the target is routed to.
        """
        rng, kept_LE = np.random.default_rng(seed), self.kept(capacity)
        found = np.zeros((passes, 3, len(kept_LE)), int)
        for counts_3L in found:
            needed_LE, known_LE = np.zeros_like(kept_LE), np.zeros_like(kept_LE)
            for token, own_LE in enumerate(_chosen(self.chance_LE, tokens, rng)):
                needed_LE |= own_LE
                if token < forwarded:
                    known_LE |= (
                        own_LE if share >= 1 else own_LE & (rng.random(own_LE.shape) < share)
                    )
            away_LE = needed_LE & ~kept_LE
            if self.foreseen is not None and forwarded:
                known_LE = rng.random(kept_LE.shape) < self.foreseen
            counts_3L[0] = (needed_LE & kept_LE).sum(1)
            counts_3L[1] = (away_LE & known_LE).sum(1)
            counts_3L[2] = (away_LE & ~known_LE).sum(1)
        return found


def needed_chance(chance_LE: np.ndarray, tokens: int) -> np.ndarray:
    """P(one of so many tokens is routed to the expert), if each is routed alone."""
    return 1 - (1 - chance_LE) ** tokens


def _chosen(chance_LE: np.ndarray, tokens: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """bool [L, E]: the experts of one token after another, as many as the chances add up to.

    Chances lie end to end in a random order, and a comb with teeth 1 apart falls on them: an expert
    is hit with its own chance, none twice (systematic sampling).
    """
    numbers_LE = np.tile(np.arange(chance_LE.shape[1]), (len(chance_LE), 1))
    order_LE = rng.permuted(numbers_LE, axis=1)
    ends_LE = np.cumsum(np.take_along_axis(chance_LE, order_LE, 1), axis=1)
    for _ in range(tokens):
        start_L1 = rng.random((len(chance_LE), 1))
        teeth_LE = np.floor(ends_LE + start_L1 + 1e-9)  # a sum of 7.9999 would lose one
        chosen_LE = np.zeros(chance_LE.shape, bool)
        np.put_along_axis(chosen_LE, order_LE, np.diff(teeth_LE, axis=1, prepend=0) > 0, axis=1)
        yield chosen_LE


def expected_experts(tokens_LE: np.ndarray, tokens: int, chosen: int, kept: int) -> float:
    """Experts that a pass over `tokens` tokens is expected to fetch, if they are routed alone by
    how popular experts are.

    `tokens_LE` counts the tokens of each expert, of which each has `chosen`; the `kept` most
    popular of all layers are on the device.
    """
    routing = Routing.counted(tokens_LE, chosen)
    return float(needed_chance(routing.chance_LE, tokens)[~routing.kept(kept)].sum())


def routed_pass_seconds(
    counts_3L: np.ndarray,
    layer: float,
    groups: dict[int, float],
    copy: float,
    send: float,
    ring: int,
) -> float:
    """Seconds of a pass in which each layer needs experts that are there, foreseen and missed.

    Seconds: `layer` of a layer without its experts, until the host knows their numbers; `groups` of
    a program, by the most experts that it applies; `copy` of an expert over the link; `send` for
    the host to start it. At most `ring` foreseen copies start before the pass, and as many at the
    end of each layer. Copies follow each other; a layer's late ones stand behind those for later
    layers that have started.
    """
    held_L, foreseen_L, missed_L = (row.tolist() for row in counts_3L)
    at_once = max(groups)
    program = lambda n: groups[min(size for size in groups if size >= n)]
    coming = collections.deque(l for l, n in enumerate(foreseen_L) for _ in range(n))
    host = device = link = 0.0
    early, arrival = collections.Counter(), collections.Counter()  # by layer

    def bring(index, wanted):
        nonlocal host, link
        for _ in range(wanted):
            host += send
            link = arrival[index] = max(link, host) + copy

    def ahead(index):
        while coming and coming[0] <= index:
            coming.popleft()
        for _ in range(min(len(coming), ring)):
            early[coming[0]] += 1
            bring(coming.popleft(), 1)

    ahead(-1)
    for index, held in enumerate(held_L):
        host = device = max(host, device) + layer
        here, rest = held + early[index], missed_L[index] + foreseen_L[index] - early[index]
        there = arrival[index]
        while here or rest:
            if not here:  # nothing to do meanwhile
                here, rest = min(at_once, rest), max(0, rest - at_once)
                bring(index, here)
                there = arrival[index]
            ready, some = there, min(here, at_once)
            here -= some
            if not here and rest:
                here, rest = min(at_once, rest), max(0, rest - at_once)
                bring(index, here)
                there = arrival[index]
            if not rest:
                ahead(index)
            device = max(device, host, ready) + program(some)
    return max(host, device)


def routed_block_seconds(
    exact: Layer,
    state: list[Any],
    step: Step,
    tokens: int,
    at_once: int,
    cfg: Config,
    seconds: Callable[[Callable], float],
) -> tuple[float, dict[int, float]]:
    """(seconds of a layer without its experts, of each group's program by its size).

    `exact` has experts of arrays of their own. `state` is [x, cache], which is replaced. `seconds`
    times a function. Measured are layers whose tokens need no group and two, all there.
    """
    some, rest = [to_device(a) for a in apart(exact).each[:at_once]], without_experts(exact)
    real = to_device(jnp.int32(tokens))

    def timed(*parts: int) -> float:
        there = _There(at_once, [list(enumerate(some[:n])) for n in parts])

        def block():
            state[0], state[1], done = routed_block(rest, 0, *state, step, real, there, cfg)
            return done

        return seconds(block)

    layer = timed()
    return layer, {n: max(0.0, (timed(n, n) - layer) / 2) for n in sizes(at_once)}


@dataclasses.dataclass
class _There:
    """An `ExpertCache` in which every layer needs the same experts, and all are on the device."""

    at_once: int
    parts: Sequence[list[tuple[int, jax.Array]]]

    def take(self, layer: int, tokens_E: np.ndarray) -> Sequence[list[tuple[int, jax.Array]]]:
        return self.parts
