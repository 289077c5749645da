"""Experts in host memory: a pass brings those that its tokens are routed to, and keeps hot ones.

A draft runs the same routers on nearly the same states. So before a pass begins, its routing tells
which experts most layers will need: they are on their way while earlier layers compute. What was
not foreseen is fetched when the layer's own router has spoken. The result never depends on the
guess.

Letters: M tokens of a pass, E experts of a layer, L layers, D model, c experts of a token.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.attention import Step
from llm_jax.config import Config
from llm_jax.mlp import expert_output, routing, shared_output
from llm_jax.model import added, attention_branch, normed_input
from llm_jax.params import Experts, Layer, SeparateExperts
from llm_jax.stream import to_device
from subspec_jax.residual.split import SplitExperts

AT_ONCE = 8
"""Most experts that one program applies."""
RING_BYTES = 2**28
"""Bytes of experts that may be on their way or in use, beside those that are kept; but room for two
programs' experts at least."""
FORGET = 0.98
"""What an expert's count of tokens is multiplied by after each pass."""


@dataclasses.dataclass
class ExpertCounts:
    """Experts of one pass, by layer: int [L]."""

    needed: np.ndarray
    """Experts that tokens are routed to."""
    held: np.ndarray
    """Of these, those that were on the device before the pass."""
    foreseen: np.ndarray
    """Of these, those that were on their way before their layer's router spoke."""
    fetched: np.ndarray
    """Experts that were copied, needed or not."""

    @classmethod
    def none(cls, layers: int) -> "ExpertCounts":
        return cls(*(np.zeros(layers, np.int64) for _ in range(4)))


class ExpertCache:
    """The experts of a model on the device: at most `capacity` kept ones and a ring.

    Kept are those with the highest counts of tokens, counted with forgetting.
    """

    def __init__(self, layers: Sequence[Layer], capacity: int, ring: int, at_once: int = AT_ONCE):
        experts = map(apart, layers)
        self.host: list[tuple[jax.Array, ...]] = [e.each if e is not None else () for e in experts]
        count = max(map(len, self.host), default=0)
        self.capacity, self.ring, self.at_once = capacity, ring, at_once
        self.score_LE = np.zeros((len(layers), count))
        """Tokens of each expert."""
        self.bytes = 0
        """Bytes copied in this pass."""
        self.counts = ExpertCounts.none(len(layers))
        self._arrays: dict[tuple[int, int], jax.Array] = {}
        self._held_LE = np.zeros((len(layers), count), bool)
        self._before_LE = self._held_LE.copy()
        self._busy_LE = self._held_LE.copy()
        self._coming: collections.deque[tuple[int, int]] = collections.deque()

    def begin(self, foreseen_LE: np.ndarray | None = None) -> None:
        """Starts a pass. `foreseen_LE`: the experts that a draft was routed to, whose copies start
        now, layer by layer."""
        self.bytes, self.counts = 0, ExpertCounts.none(len(self.host))
        self._before_LE = self._held_LE.copy()
        self._busy_LE[:] = False
        self.score_LE *= FORGET
        self._coming.clear()
        if foreseen_LE is not None:
            self._busy_LE |= foreseen_LE & self._held_LE  # they wait for their layer's turn
            self._coming.extend(map(tuple, np.argwhere(foreseen_LE & ~self._held_LE).tolist()))
        self._send_ahead(-1)

    def _bring(self, key: tuple[int, int]) -> None:
        """Starts the copies of an expert."""
        layer, expert = key
        array = self.host[layer][expert]
        self._arrays[key] = to_device(array)
        self._held_LE[key] = self._busy_LE[key] = True
        self.bytes += array.nbytes
        self.counts.fetched[layer] += 1

    def _room(self, wanted: int) -> int:
        """Lets the coldest experts go, so that there is room for `wanted`; the room there is."""
        missing = wanted - (self.capacity + self.ring - len(self._arrays))
        if missing > 0:  # one look at all experts for many of them
            idle = np.argwhere(self._held_LE & ~self._busy_LE)
            coldest = np.argsort(self.score_LE[tuple(idle.T)], kind="stable")[:missing]
            for key in map(tuple, idle[coldest].tolist()):
                self._arrays.pop(key).delete()
                self._held_LE[key] = False
        return self.capacity + self.ring - len(self._arrays)

    def _send_ahead(self, layer: int) -> None:
        """Starts the copies of what is foreseen behind `layer`, as far as there is room."""
        while self._coming and self._coming[0][0] <= layer:
            self._coming.popleft()
        for _ in range(min(len(self._coming), self._room(min(len(self._coming), self.ring)))):
            self._bring(self._coming.popleft())

    def take(self, layer: int, tokens_E: np.ndarray) -> Iterator[list[tuple[int, jax.Array]]]:
        """The experts with tokens, some at a time: (number, array on the device).

        Those that are here come first; copies of others start before they are waited for. Use a
        part before asking for the next: its experts may be let go then.
        """
        held_E, needed_E = self._held_LE[layer], tokens_E > 0
        self.counts.needed[layer] = needed_E.sum()
        self.counts.held[layer] = (needed_E & self._before_LE[layer] & held_E).sum()
        self.counts.foreseen[layer] = (needed_E & held_E).sum() - self.counts.held[layer]
        self.score_LE[layer] += tokens_E
        here = np.flatnonzero(needed_E & held_E).tolist()
        rest = np.flatnonzero(needed_E & ~held_E).tolist()
        self._busy_LE[layer] = needed_E & held_E  # what was foreseen wrongly may go
        while here or rest:
            if not here:
                here, rest = self._bring_some(layer, rest)
            some, here = here[: self.at_once], here[self.at_once :]
            if not here:  # the next ones come while these are in use
                here, rest = self._bring_some(layer, rest)
            if not rest:
                self._send_ahead(layer)
            yield [(e, self._arrays[layer, e]) for e in some]
            self._busy_LE[layer, some] = False
        self._room(0)

    def _bring_some(self, layer: int, experts: list[int]) -> tuple[list[int], list[int]]:
        """Starts the copies of the first experts: (those, the others)."""
        some, others = experts[: self.at_once], experts[self.at_once :]
        self._room(len(some))
        for e in some:
            self._bring((layer, e))
        return some, others


def room_for(cfg: Config, size: int) -> tuple[int, int]:
    """(experts of the ring, experts that one program applies) for experts of `size` bytes."""
    at_once = min(AT_ONCE, cfg.experts.chosen)
    return max(2 * at_once, RING_BYTES // size), at_once


def sizes(at_once: int) -> tuple[int, ...]:
    """The numbers of experts that programs are made for."""
    return tuple(sorted({min(2, at_once), at_once}))


def lowered(
    layer: Layer, x: Any, cache: Any, step: Step, real: Any, at_once: int, cfg: Config
) -> Iterator[jax.stages.Lowered]:
    """The programs of `routed_block`, for a layer and inputs that are shapes."""
    array = functools.partial(jax.ShapeDtypeStruct, sharding=x.sharding)
    rest, one = without_experts(layer), apart(layer).each[0]
    yield _attend_and_route.lower(rest, x, cache, step, real, cfg)
    M, c = x.shape[0] * x.shape[1], cfg.experts.chosen
    h_MD, expert_Mc = array((M, x.shape[2]), x.dtype), array((M, c), jnp.int32)
    y_McD = array((M, c, x.shape[2]), jnp.float32)
    stacks = dataclasses.replace(rest.mlp, shared=None, router=None, shared_scale=None)
    for size in sizes(at_once):
        number = jax.ShapeDtypeStruct((size,), jnp.int32)
        yield _put_experts.lower(stacks, (one,) * size, number, h_MD, expert_Mc, y_McD, cfg)


def recorded(cfg: Config, draft: Config) -> tuple[int, int] | None:
    """(layers with experts, experts) that a draft's routing is recorded for; None where the draft
    has others than the target."""
    size = lambda c: (len(routed_layers(c)), c.experts.count)
    return size(cfg) if size(draft) == size(cfg) else None


def routed_layers(cfg: Config) -> list[int]:
    """The numbers of the layers with experts."""
    return [i for i in range(cfg.layers) if cfg.has_experts(i)]


def of_all_layers(routed_LE: Any, cfg: Config) -> np.ndarray:
    """What is recorded of the layers with experts, as bool [all layers, experts]."""
    foreseen = np.zeros((cfg.layers, cfg.experts.count), bool)
    foreseen[routed_layers(cfg)] = np.asarray(routed_LE)
    return foreseen


def apart(layer: Layer) -> SeparateExperts | SplitExperts | None:
    """The layer's experts, if they are arrays of their own."""
    stacks = layer.mlp.expert_gate_up if isinstance(layer.mlp, Experts) else None
    return stacks if isinstance(stacks, SeparateExperts | SplitExperts) else None


def without_experts(layer: Layer) -> Layer:
    """The layer without experts that are arrays of their own: all that is always on the device."""
    if (stacks := apart(layer)) is None:
        return layer
    rest = dataclasses.replace(layer.mlp, expert_gate_up=dataclasses.replace(stacks, each=()))
    return dataclasses.replace(layer, mlp=rest)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames=("x", "cache"))
def _attend_and_route(layer, x, cache, step: Step, real, cfg: Config):
    """(x behind the attention, the cache, the experts' input [M, D], their numbers and weights
    [M, c], room for their outputs [M, c, D], what all tokens get [M, D], tokens of each expert
    [E])."""
    x, cache = attention_branch(layer, x, cache, step, cfg)
    h_MD = normed_input(x, layer.mlp_norm, cfg).reshape(-1, x.shape[-1])
    expert_Mc, weight_Mc = routing(layer.mlp, h_MD, cfg)
    of_text_M = real if real.ndim else jnp.arange(len(h_MD)) < real
    count = jnp.zeros(cfg.experts.count, jnp.int32)
    tokens_E = count.at[jnp.where(of_text_M[:, None], expert_Mc, len(count))].add(1, mode="drop")
    shared_MD = shared_output(layer.mlp, h_MD, cfg)
    y_McD = jnp.zeros((*expert_Mc.shape, h_MD.shape[1]), jnp.float32)
    # To host memory within the program: a copy afterwards takes twice as long.
    tokens_E = jax.device_put(tokens_E, jax.memory.Space.Host)
    return x, cache, (h_MD, expert_Mc, weight_Mc), y_McD, shared_MD, tokens_E


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="y_McD")
def _put_experts(p: Experts, some, number_C, h_MD, expert_Mc, y_McD, cfg: Config):
    """y with the outputs of some experts in the places of the tokens that are routed to them.

    Every pair of a token and an expert has its own place, so the order in which experts come
    changes no number.
    """
    with jax.named_scope("experts"):
        stacks = p.expert_gate_up
        for i, array in enumerate(some):
            known = jnp.maximum(number_C[i], 0)
            bias = lambda stack: None if stack is None else stack[known]  # noqa: B023
            biases = bias(p.expert_gate_up_bias), bias(p.expert_down_bias)
            low = (known,) if isinstance(stacks, SplitExperts) else ()
            y_MD = expert_output(*stacks.matrices(array, *low), biases, h_MD, cfg)
            # A choice and no scatter: those of all experts are one kernel, not several each.
            own_Mc1 = (expert_Mc == number_C[i])[..., None]
            y_McD = jnp.where(own_Mc1, y_MD[:, None], y_McD)
    return y_McD


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="x")
def _finish(gain, x, y_McD, weight_Mc, shared_MD, cfg: Config):
    """(x with what the experts add, one number of it): sums in the order of `llm_jax.mlp`."""
    y_McD = y_McD * weight_Mc[..., None]
    y_MD = functools.reduce(jnp.add, [y_McD[:, i] for i in range(y_McD.shape[1])])
    y_MD = y_MD if shared_MD is None else y_MD + shared_MD
    x = added(x, y_MD.astype(x.dtype).reshape(x.shape), gain, cfg)
    return x, x[0, 0, 0]


def routed_block(
    layer: Layer,
    index: int,
    x: jax.Array,
    cache: Any,
    step: Step,
    real: jax.Array,
    experts: ExpertCache,
    cfg: Config,
) -> tuple[jax.Array, Any, jax.Array]:
    """(x, the cache, one number of x), like `jit_block`, of a layer with experts in a cache.

    `real` [] is the number of tokens that count, or says [M] which; nothing is fetched for the
    others.
    """
    given = layer, x, cache, step, real, cfg
    x, cache, (h_MD, expert_Mc, weight_Mc), y_McD, shared_MD, tokens_E = _attend_and_route(*given)
    stacks = dataclasses.replace(layer.mlp, shared=None, router=None, shared_scale=None)
    tokens_E = np.asarray(tokens_E)
    for some in experts.take(index, tokens_E):
        size = next(n for n in sizes(experts.at_once) if n >= len(some))
        number = np.full(size, -1, np.int32)  # -1: it only fills the program's shape
        number[: len(some)] = [e for e, _ in some]
        arrays = [array for _, array in some]
        arrays += arrays[:1] * (size - len(arrays))
        y_McD = _put_experts(stacks, tuple(arrays), number, h_MD, expert_Mc, y_McD, cfg)
    x, done = _finish(layer.mlp_out_norm, x, y_McD, weight_Mc, shared_MD, cfg)
    return x, cache, done
