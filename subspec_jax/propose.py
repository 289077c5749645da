"""Where token trees come from: a draft model, the text itself, or nowhere."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.attention import caches_for, causal_step
from llm_jax.cache import move
from llm_jax.cards import CACHES, empty, on_each
from llm_jax.config import Config
from llm_jax.generation import prefill
from llm_jax.model import hidden
from llm_jax.params import Params
from llm_jax.sample import Sampler
from llm_jax.stream import to_device
from subspec_jax.draft import Drafting, extend_once, grow, grow_along
from subspec_jax.experts import ExpertCounts
from subspec_jax.lookup import Payoff, check_longest, padded
from subspec_jax.stop import StopRule
from subspec_jax.tree import Tree, TreeSpec, commit


@dataclasses.dataclass
class State:
    """What a proposer sees and changes between two passes of the target."""

    tokens: list[int]
    """Prompt and all emitted tokens. The newest one, the root, is in no cache yet."""
    caches: list[Any]
    """The target's caches, one per layer."""
    tree: Tree
    at: jax.Array
    """[] number of committed tokens: slots 0 … at-1 hold the target's exact keys and values. It is
    on the device, because a number sent from the host would wait for the layers being copied."""
    key: jax.Array
    sampler: Sampler
    cards: int = 1
    """Cards that share the target."""
    live: int | None = None
    """This many first slots hold all of the text and the tree; None: look at all slots."""


@dataclasses.dataclass(frozen=True)
class Round:
    """One pass of the target: the tokens it emitted and what it cost, in seconds and bytes."""

    tokens: list[int]
    """The emitted tokens."""
    accepted: int = 0
    """Number of draft tokens on the accepted path, without the bonus."""
    drafted: int = 0
    """Number of verified nodes below the root."""
    depth: int = 0
    """Deepest level of the tree."""
    steps: int = 0
    """Forward passes of the draft."""
    copied: int = 0
    """Looked-up tokens among the nodes."""
    path: tuple[int, ...] = ()
    """Places of the accepted nodes below the root. Rank in a beam's level: (place - 1) % width."""
    gains: tuple[float, ...] = ()
    """For each drafted step: log of the sum of its nodes' sharpened path probabilities."""
    draft_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0
    """Acceptance walk, moving cache rows, and the host."""
    streamed_bytes: int = 0
    experts: ExpertCounts | None = None
    """What the pass needed and found, where it brings experts one by one."""
    pass_bytes: int = 0
    """The part of `streamed_bytes` that moved during `verify_s`; some copies may finish earlier."""
    logprobs: tuple[Any, ...] = ()
    """A `logprobs.Logprob` for each token, where the text asks for them."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole round."""
        return self.draft_s + self.verify_s + self.other_s


class Proposer:
    """Proposes nothing: plain decoding, one token per pass. Subclasses override what they need."""

    spec = TreeSpec("chain", depth=0)
    """Fixed for the whole life of a proposer, so that every round runs the same programs."""
    routes: Any = False
    """Whether the tree records the experts of a draft that has the target's routers."""
    on_host = False
    """Whether the tree is made on the host. Then it is sent before the link is busy with layers."""

    def start(self, state: State, slots: int, chunk: int) -> None:
        """Called when the prompt is in the target's cache and the first token is drawn."""

    def prepare(self, state: State) -> None:
        """Called before the layers of a round's pass are copied, to send data to the device."""

    def propose(self, state: State) -> None:
        """Fills `state.tree`, whose only candidate is the root (unless it was drafted ahead)."""
        state.tree = _only_root(state.tree, self.spec)

    def between(self, state: State, layer: int) -> None:
        """Called during the pass when layer `layer` has been dispatched."""

    def advance(
        self, state: State, source: jax.Array, last: int, forwarded: int, emitted: list[int]
    ) -> None:
        """Called after the pass, when the target has moved cache rows `source` to slots at ….

        `last` is the accepted path's last node. `forwarded` is the number of places that the draft
        has forwarded. `state.tokens` does not hold the emitted tokens yet.
        """

    def effort(self, drafted: int) -> dict[str, int]:
        """`steps` and `copied` of a round with `drafted` nodes below the root. Called once."""
        return {}

    def learn(self, result: Round) -> None:
        """Called after every round with its result."""


Vanilla = Proposer

_only_root = jax.jit(commit, static_argnames="spec", donate_argnames="tree")


class ModelDraft(Proposer):
    """A draft model on the device; in SubSpec, substitutes of the target's layers and its cache.

    With `own_cache` the draft keeps its own keys and values (classic speculative decoding, or
    SubSpec without sharing). Then it prefills the prompt and follows the accepted tokens.

    `stop_gain`: the tree stops growing when a step is not expected to add more accepted tokens than
    this. 0 never stops; "auto" is the break-even point (`subspec_jax.stop.StopRule`).

    With `spec.lookup` the draft also scores tokens from earlier in the text: those that followed
    the last tokens of its best guess (n-grams of at most `longest` tokens). It looks up less often
    while this saves few steps.
    """

    @property
    def routes(self) -> bool:
        return self.cfg.experts is not None

    def __init__(
        self,
        params: Params,
        cfg: Config,
        spec: TreeSpec,
        own_cache: bool = False,
        stop_gain: float | str = 0.0,
        longest: int = 3,
    ):
        check_longest(longest)
        if own_cache and spec.extra:
            raise ValueError(
                "drafting during verification needs the shared cache; set extra to 0 or share it"
            )
        self.params, self.cfg, self.spec = params, cfg, spec
        self.own_cache, self.stop_gain, self.longest = own_cache, stop_gain, longest
        self._caches, self._slots = None, 0
        self._payoff, self._text, self._counts = Payoff(), None, None
        self._compiled = set()  # (live slots, sampler) of both ways to grow
        self._extended = 0
        self.stop = StopRule(stop_gain, spec.steps, bool(spec.extra))
        self._cards, self._least_L = 1, jnp.asarray(self.stop.least_gain_L())

    def start(self, state: State, slots: int, chunk: int) -> None:
        self._cards = state.cards
        self._least_L = to_device(self.stop.least_gain_L(), state.cards)
        if self.own_cache:
            if self._caches is None or self._caches[0].slots != slots:
                given = self.params, self.cfg, 1, slots, self.spec.places
                make, parts = functools.partial(caches_for, *given), self.cfg.cards > 1
                self._caches = empty(make, state.cards, parts)
            _, self._caches = prefill(self.params, state.tokens[:-1], self._caches, self.cfg, chunk)
            # Compiled here, not in a later round. The root's own step overwrites the slot.
            root = jnp.array([state.tokens[-1:]], jnp.int32)
            self._caches = _remember(self.params, root, self._caches, state.at, self.cfg)
        self._slots, self._payoff = slots, Payoff()
        if self.spec.lookup and (state.live, state.sampler) not in self._compiled:
            planted, never = state.tree, jnp.full_like(self._least_L, jnp.inf)
            for self._text in (None, to_device(padded(state.tokens, slots), state.cards)):
                state.tree = jax.tree.map(jnp.copy, planted)
                self._grow(state, never)  # only the root's step; the first round repeats it
            state.tree = planted
            self._compiled.add((state.live, state.sampler))

    def prepare(self, state: State) -> None:
        looks = self.spec.lookup and self._payoff.due()
        text_S = padded(state.tokens, self._slots)
        self._text = to_device(text_S, state.cards) if looks else None

    def propose(self, state: State) -> None:
        self._grow(state, self._least_L)
        self._extended = 0

    def _grow(self, state, least_L):
        given = self._drafting(state, self._caches if self.own_cache else tuple(state.caches))
        given = dataclasses.replace(given, least_L=least_L, text_S=self._text)
        self._counts = None
        if self._text is None:
            state.tree, caches = grow(given)
        else:
            state.tree, caches, self._counts = grow_along(given)
        if self.own_cache:
            self._caches = caches
        else:
            state.caches[:] = caches

    def _drafting(self, state, caches) -> Drafting:
        return Drafting(
            params=self.params,
            tree=state.tree,
            caches=caches,
            at=state.at,
            key=state.key,
            cfg=self.cfg,
            spec=self.spec,
            sampler=state.sampler,
            live=state.live,
            longest=self.longest,
        )

    def between(self, state: State, layer: int) -> None:
        due = self.spec.extra * (layer + 1) // self.cfg.layers
        while self._extended < due:
            state.tree, caches = extend_once(self._drafting(state, tuple(state.caches)))
            state.caches[:] = caches
            self._extended += 1

    def advance(
        self, state: State, source: jax.Array, last: int, forwarded: int, emitted: list[int]
    ) -> None:
        if not self.own_cache:
            return
        self._caches = _move(self._caches, source, state.at)
        if last >= forwarded:  # the draft proposed the deepest nodes but did not forward them
            token = jnp.array([[emitted[-2]]], jnp.int32)
            at = state.at + jnp.int32(len(emitted) - 1)
            self._caches = _remember(self.params, token, self._caches, at, self.cfg)

    def effort(self, drafted: int) -> dict[str, int]:
        if self._counts is None:
            return {"steps": 1 + max(0, drafted - 1) // self.spec.width}
        steps, copied, spared = jax.device_get(self._counts).tolist()
        self._payoff.learn(spared / steps)
        return {"steps": steps, "copied": copied}

    def learn(self, result: Round) -> None:
        if self.stop.chance == 0:
            return
        gains, hits = result.gains, ()
        if gains:
            first = (
                1 + result.drafted % self.spec.width
            )  # more than 1 if an earlier round drafted some
            steps = [(place - first) // self.spec.width for place in result.path]
            hits = np.isin(np.arange(len(gains)), steps)
        self.stop.learn(
            gains, hits, result.seconds, len(result.tokens), result.draft_s, result.steps
        )
        self._least_L = to_device(self.stop.least_gain_L(), self._cards)


@functools.partial(jax.jit, donate_argnames="caches")
def _move(caches, source, at):
    return move(caches, source, at)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="caches")
def _remember(params, token, caches, at, cfg):
    step = causal_step(at, 1, caches[0].slots)
    run = on_each(lambda *args: hidden(*args, cfg)[1], cfg.cards, CACHES)
    return run(params, token, caches, step)


class PromptLookup(Proposer):
    """Copies what followed the last few tokens earlier in the text (prompt lookup, n-gram).

    It takes the longest suffix of at most `longest` tokens that also occurs earlier. If there are
    several earlier places, the newest `spec.width` continuations share a tree. No model is needed.
    """

    on_host = True

    def __init__(self, spec: TreeSpec, longest: int = 3):
        check_longest(longest)
        self.spec = dataclasses.replace(spec, kind="beam", extra=0, budget=None, lookup=0)
        self.longest = longest

    def propose(self, state: State) -> None:
        state.tree = to_device(self.tree(state.tokens), state.cards)

    def tree(self, tokens: Sequence[int]) -> Tree:
        """The tree of a text, in NumPy; nothing in it has a score."""
        token, parent, depth = self.continuations(tokens)
        E, C, size = self.spec.places, self.spec.pool, len(token)
        ancestor = np.eye(E, dtype=bool)
        for i in range(1, size):
            ancestor[i] |= ancestor[parent[i]]
        fill = lambda values, rest: np.array(values + [rest] * (E - size), np.int32)
        return Tree(
            token_E=fill(token, 0),
            parent_E=fill(parent, -1),
            depth_E=fill(depth, 0),
            score_E=np.full(E, -np.inf, np.float32),
            ancestor_EE=ancestor,
            size=np.int32(size),
            forwarded=np.int32(0),
            pool_score_C=np.full(C, -np.inf, np.float32),
            pool_parent_C=np.full(C, -1, np.int32),
            pool_token_C=np.zeros(C, np.int32),
        )

    def continuations(self, tokens: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """(token, parent, depth) of the tree's nodes, the root first."""
        token, parent, depth = [tokens[-1]], [-1], [0]
        text = np.asarray(tokens)
        for n in range(min(self.longest, len(tokens) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], n)
            ends = np.flatnonzero((windows == text[-n:]).all(1)) + n
            for end in ends[::-1][: self.spec.width]:
                here = 0
                for t in text[end : end + self.spec.depth].tolist():
                    known = [i for i in range(1, len(token)) if parent[i] == here and token[i] == t]
                    if not known:
                        token.append(t), parent.append(here), depth.append(depth[here] + 1)
                    here = known[0] if known else len(token) - 1
            if len(token) > 1:
                break
        return token, parent, depth
