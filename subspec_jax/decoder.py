"""The decoding loop: propose a tree, verify it in one streamed pass, keep the target's draws.

Plain decoding is the same loop with a proposer that proposes nothing, so it is a fair baseline.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.attention import caches_for
from llm_jax.cache import KV
from llm_jax.cards import empty
from llm_jax.generation import checked_prompt, checked_seed
from llm_jax.sample import Sampler
from llm_jax.stream import to_device
from subspec_jax import SubspecError
from subspec_jax.accept import Gate
from subspec_jax.bitwise import draws, laid_out
from subspec_jax.check import NotFiniteError, no_numbers, not_finite
from subspec_jax.experts import of_all_layers, recorded
from subspec_jax.logprobs import tell, tell_logits
from subspec_jax.propose import Proposer, Round, State
from subspec_jax.tree import PassShape, cache_slots, live_sizes, path_to, seedling, step_gains
from subspec_jax.verify import Target, Verified, finish_round, run_pass, streamed_prefill

jit_seedling = jax.jit(seedling, static_argnames=("spec", "experts"))


class LengthError(SubspecError):
    """A prompt and its answer do not fit into the cache, or a number of tokens is not valid."""


def check_lengths(prompt: int, new_tokens: int, most: int) -> None:
    """Raises LengthError if so many tokens of a prompt and of its answer cannot be."""
    if new_tokens < 1:
        raise LengthError(f"{new_tokens} new tokens were asked for; give at least 1")
    if prompt + new_tokens > most:
        raise LengthError(
            f"{prompt} prompt tokens and {new_tokens} new ones do not fit into {most}; shorten the "
            "prompt, ask for fewer tokens, or raise max_length"
        )


@dataclasses.dataclass
class Decoder:
    """A target, a proposer and the cache they share. One sequence at a time, batch of one.

    The output is the target's own: greedy tokens, or the tokens that plain sampling draws with the
    same seed. A `gate` gives this up to accept longer paths.
    """

    target: Target
    proposer: Proposer = dataclasses.field(default_factory=Proposer)
    sampler: Sampler = Sampler()
    gate: Gate | None = None
    max_length: int = 2048
    """Most tokens of prompt and answer together."""
    chunk: int = 512
    """Most prompt tokens of a prefill pass; each pass streams all offloaded layers once."""
    shape: PassShape | None = None
    """Of every pass behind the prompt (`subspec_jax.bitwise`): then the output has plain decoding's
    bits too, if that has the same. None: a pass is as large as the proposer's tree."""

    def __post_init__(self):
        spec = self.proposer.spec
        self.slots = cache_slots(self.max_length, spec, self.shape)
        target = self.target
        given = target.params, target.cfg, 1, self.slots, spec.places + 1
        caches = empty(functools.partial(caches_for, *given), target.cfg.cards)
        self.caches = list(caches)
        plain = all(isinstance(cache, KV) for cache in caches)
        self.sizes = live_sizes(self.slots) if plain else [self.slots]
        self.watch: Callable[[], None] | None = None
        """Called between the layers of a pass, to look at memory."""
        self.logprobs = False
        """Whether rounds tell `Round.logprobs`."""

    def rounds(
        self,
        prompt: Sequence[int],
        new_tokens: int,
        seed: int = 0,
        eos: Sequence[int] = (),
        replay: Iterable[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Round]:
        """Rounds until `new_tokens` or a token of `eos` are emitted; the first is the prefill.

        `replay` gives the number of draft tokens to accept in each round, right or wrong. This is
        for timing; the text then has no meaning. `progress` is called with the number of prompt
        tokens in the cache. Raises LengthError before the first pass if the text cannot fit,
        GenerationError for a prompt or a seed that cannot be, and NotFiniteError where the target
        computes NaN or infinity.
        """
        prompt = checked_prompt(prompt, self.target.cfg.vocab).tolist()
        check_lengths(len(prompt), new_tokens, self.max_length)
        spec, cfg = self.proposer.spec, self.target.cfg
        lengths = None if replay is None else iter(replay)
        key = jax.random.key(checked_seed(seed))

        began = time.perf_counter()
        logits, streamed = streamed_prefill(self.target, prompt, self.caches, self.chunk, progress)
        if not np.isfinite(jax.device_get(logits)).all():
            self._fail(prompt)
        first = self.sampler.draw(logits, key, jnp.array([len(prompt)], jnp.int32))
        tokens = [*prompt, int(first[0])]
        at = to_device(jnp.int32(len(prompt)), cfg.cards)
        tree, live = jit_seedling(first[0], spec, self._experts), self._live(tokens)
        state = State(tokens, self.caches, tree, at, key, self.sampler, cfg.cards, live)
        self.proposer.start(state, self.slots, self.chunk)
        jax.block_until_ready(state.caches)
        seconds = time.perf_counter() - began
        said = tell_logits(logits, tokens[-1:]) if self.logprobs else ()
        yield Round(tokens[-1:], other_s=seconds, streamed_bytes=streamed, logprobs=said)

        left, ended = new_tokens - 1, tokens[-1] in eos
        while left > 0 and not ended:
            t0 = time.perf_counter()
            # The host sends its data before the stream starts. Later, it would wait for layers.
            accept = -1 if lengths is None else next(lengths, None)
            if accept is None:
                raise LengthError("the acceptance trace is too short for the tokens asked for")
            accept = to_device(jnp.int32(accept), cfg.cards)
            state.live = self._live(state.tokens)
            self.proposer.prepare(state)
            if self.proposer.on_host:
                self.proposer.propose(state)
            stream = self.target.stream()
            if not self.proposer.on_host:
                self.proposer.propose(state)
            tree, tokens_1E, step = laid_out(state.tree, state.at, spec, state.live, self.shape)
            jax.block_until_ready(tokens_1E)
            experts = self.target.experts
            if experts is not None:
                experts.begin(self._foreseen(state.tree))
            t1 = time.perf_counter()
            arrived = stream.arrived_bytes()
            passed = stream, tokens_1E, state.caches, step, self._between(state), tree.size
            x = run_pass(self.target, *passed)
            jax.block_until_ready(x)
            t2 = time.perf_counter()
            draw_R = draws(self.target.top, x, step, key, cfg, self.sampler, self.shape)
            end = finish_round(
                Verified(
                    top=self.target.top,
                    x_1ED=x,
                    tree=tree,
                    extended=state.tree,
                    caches=tuple(state.caches),
                    at=state.at,
                    key=key,
                    accepted=accept,
                    cfg=cfg,
                    spec=spec,
                    sampler=self.sampler,
                    gate=self.gate,
                    replay=lengths is not None,
                    draw_R=draw_R,
                )
            )
            state.caches[:] = end.caches
            of_tree = (tree.parent_E, tree.depth_E, tree.score_E, tree.size, tree.forwarded)
            host = jax.device_get((end.emitted_P, end.length, end.last, end.finite, *of_tree))
            emitted_P, length, last, finite, parent_E, depth_E, score_E, size, forwarded = host
            emitted = emitted_P[:length].tolist()
            if not finite:
                self._fail([*state.tokens, *emitted[:-1]])
            state.tree = end.tree
            self.proposer.advance(state, end.source_R, int(last), int(forwarded), emitted)
            kept = emitted[:left]
            if hit := [i for i, t in enumerate(kept) if t in eos]:
                kept, ended = kept[: hit[0] + 1], True
            state.tokens.extend(emitted)
            state.at = end.at
            left -= len(kept)
            drafted = int((parent_E >= 0).sum())
            effort = self.proposer.effort(drafted)
            path, said = path_to(last, parent_E), ()
            if self.logprobs:
                where = [(0, place) for place in (0, *path)]
                said = tell(self.target.top, x, where[: len(kept)], kept, cfg)
            result = Round(
                tokens=kept,
                accepted=int(length) - 1,
                drafted=drafted,
                depth=int(np.max(np.where(parent_E >= 0, depth_E, 0))),
                path=path,
                gains=() if effort.get("copied") else step_gains(score_E[:size], spec.width),
                **effort,
                draft_s=t1 - t0,
                verify_s=t2 - t1,
                other_s=time.perf_counter() - t2,
                streamed_bytes=stream.bytes + (experts.bytes if experts else 0),
                pass_bytes=stream.bytes - arrived + (experts.bytes if experts else 0),
                experts=experts and experts.counts,
                logprobs=said,
            )
            self.proposer.learn(result)
            yield result

    def warm_up(
        self,
        prompt: Sequence[int],
        new_tokens: int,
        replay: Callable[[], Iterable[int]] | None = None,
    ) -> None:
        """Decodes a few tokens with every number of live slots that a text this long will have.

        So no program is compiled or loaded later. `replay` makes an iterable for `rounds`.
        """
        sizes, least = self.sizes, len(prompt) + self.proposer.spec.places
        below = [0, *sizes]
        try:
            for i, size in enumerate(sizes):
                if size >= least and below[i] < least + new_tokens:
                    self.sizes = sizes[i:]
                    for _ in self.rounds(prompt, 4, replay=replay and replay()):
                        continue
        finally:
            self.sizes = sizes

    def _fail(self, tokens: list[int]) -> None:
        where = not_finite(self.target, tokens, self.caches, self.chunk)
        raise NotFiniteError(no_numbers(f"{where}, after {len(tokens)} tokens", self.target.cfg))

    def _live(self, tokens) -> int:
        """Slots that attention has to look at: those of the committed tokens and of a tree."""
        needed = len(tokens) - 1 + self.proposer.spec.places
        return next(size for size in self.sizes if size >= needed)

    @property
    def _experts(self) -> tuple[int, int] | None:
        """(layers with experts, experts) whose routing the draft records."""
        if self.target.experts is None or not self.proposer.routes:
            return None
        return recorded(self.target.cfg, self.proposer.cfg)

    def _foreseen(self, tree) -> np.ndarray | None:
        """[layers, experts] that the draft was routed to, for every layer of the target."""
        if tree.routed_LE is None:
            return None
        return of_all_layers(tree.routed_LE, self.target.cfg)

    def _between(self, state):
        def between(layer):
            self.proposer.between(state, layer)
            if self.watch is not None:
                self.watch()

        return between

    def generate(self, prompt: Sequence[int], new_tokens: int, **options: Any) -> list[int]:
        """The new tokens of `rounds` as one list; `options` are those of `rounds`."""
        return [t for r in self.rounds(prompt, new_tokens, **options) for t in r.tokens]
