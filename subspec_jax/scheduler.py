"""Many requests over one engine: a queue, one round at a time, and an update for each round.

    scheduler = Scheduler(engine)
    ticket = scheduler.submit(Request(tuple(ids), 64), lambda update: print(update.text, end=""))
    while scheduler.step():
        pass

`submit`, `Ticket.cancel` and `stats` may be called by any thread. One thread calls `step`: it alone
touches the engine, and it calls `on_update`.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from llm_jax import LLMError
from llm_jax.generation import checked_prompt, checked_seed
from subspec_jax import SubspecError
from subspec_jax.decoder import LengthError
from subspec_jax.engine import Engine
from subspec_jax.propose import Round
from subspec_jax.requests import QueueFull, Request, TextUntil, Update

SAMPLERS = 16
"""Different samplers whose programs are kept. Each has programs of its own, so that a server whose
clients ask for ever new temperatures would fill its memory with them."""
RECENT = 64
"""Rounds of which speeds are told."""
OnUpdate = Callable[[Update], None]


class Ticket:
    """A request's place in the queue or among those that run."""

    def __init__(self, request: Request, on_update: OnUpdate, wake: Callable[[], None]):
        self.request, self.on_update, self._wake = request, on_update, wake
        self.cancelled = False

    def cancel(self) -> None:
        """Lets the sequence leave at the next round; its last update says "cancelled"."""
        self.cancelled = True
        self._wake()


@dataclasses.dataclass
class _Running:
    ticket: Ticket
    rounds: Iterator[Round]
    text: TextUntil
    count: int = 0
    """Tokens of the answer so far."""
    began: float = dataclasses.field(default_factory=time.monotonic)


class Scheduler:
    """Requests in the order in which they came; `most` of them run at a time, `queue` may wait.

    An answer is what its request gives alone: nothing of another request, or of how many tokens a
    round brings, is in it. This engine decodes one sequence, so `most` is 1.
    """

    def __init__(self, engine: Engine, most: int = 1, queue: int = 64):
        if most != 1:
            raise SubspecError(f"{most} sequences at a time: this engine decodes 1")
        if queue < 0:
            raise SubspecError(f"the queue is to hold {queue} requests; expected 0 or more")
        self.most, self.queue = most, queue
        self._engine = engine
        self._changed = threading.Condition()
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._running: list[_Running] = []
        self._samplers: set[Any] = set()
        self._recent: collections.deque[Update] = collections.deque(maxlen=RECENT)
        self._took: collections.deque[float] = collections.deque([1.0], maxlen=16)
        self._totals = collections.Counter()

    # ------------------------------------------------------------------ any thread

    def submit(self, request: Request, on_update: OnUpdate) -> Ticket:
        """Queues a request. `on_update` gets its updates, from the thread that calls `step`.

        Raises QueueFull; LengthError for a prompt that cannot fit with its answer; GenerationError
        for one with unknown tokens, and for a seed that cannot be; SubspecError for what this
        engine does not do.
        """
        self.check(request)
        ticket = Ticket(request, on_update, self._wake)
        with self._changed:
            there = len(self._running) + sum(not t.cancelled for t in self._waiting)
            if there >= self.most + self.queue:
                took = sum(self._took) / len(self._took)
                raise QueueFull(there, took * there / self.most)
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def check(self, request: Request) -> None:
        """Raises what `submit` would raise for this request if there were room."""
        if request.logprobs is not None:
            raise SubspecError("the probabilities of tokens are not kept; leave logprobs out")
        checked_prompt(request.prompt, self._engine.cfg.vocab)
        checked_seed(request.seed)
        most, asked = self._engine.options.max_length, len(request.prompt) + request.new_tokens
        if request.new_tokens < 1:
            raise LengthError(f"{request.new_tokens} new tokens were asked for; give at least 1")
        if asked > most:
            raise LengthError(
                f"{len(request.prompt)} prompt tokens and {request.new_tokens} new ones are more "
                f"than the {most} of a conversation here; shorten the prompt or ask for fewer"
            )

    def wait(self, seconds: float) -> None:
        """Returns when there is something to do, or after so many seconds."""
        with self._changed:
            if not self._waiting and not self._running:
                self._changed.wait(seconds)

    def stats(self) -> dict[str, Any]:
        """Numbers of the moment, speeds of the last rounds, and totals since the start.

        tau is the number of tokens a pass, prefills left out; None before the first pass.
        """
        with self._changed:
            recent, totals = list(self._recent), dict(self._totals)
            queued, running = sum(not t.cancelled for t in self._waiting), len(self._running)
        decoded = [u for u in recent if not u.prefill]
        seconds = sum(u.seconds for u in recent)
        rate = lambda amount: amount / seconds if seconds else 0.0
        names = ("requests", "tokens", "passes", "prompt_tokens", "cached_tokens", "streamed_bytes")
        ends = ("stop", "length", "cancelled", "error")
        return {
            "queued": queued,
            "running": running,
            **{name: totals.get(name, 0) for name in names},
            "finished": {end: totals.get(end, 0) for end in ends},
            "tau": sum(len(u.tokens) for u in decoded) / len(decoded) if decoded else None,
            "tokens_per_s": rate(sum(len(u.tokens) for u in recent)),
            "bytes_per_s": rate(sum(u.streamed_bytes for u in recent)),
        }

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # ------------------------------------------------------------------ the engine's thread

    def step(self) -> bool:
        """Lets requests leave and enter, runs one round of each that runs; False: none is there."""
        with self._changed:
            gone = [t for t in self._waiting if t.cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
        for ticket in gone:
            self._tell(ticket, Update([], finish="cancelled"))
        while len(self._running) < self.most and self._waiting:
            with self._changed:
                ticket = self._waiting.popleft()
                running = _Running(ticket, self._rounds(ticket.request), self._text(ticket))
                self._running.append(running)
        for running in list(self._running):
            self._tell(running.ticket, update := self._round(running))
            if update.finish:
                self._leave(running)
        return bool(self._running or self._waiting)

    def abandon(self, why: str) -> None:
        """Ends all requests with an error: no more rounds will come."""
        with self._changed:
            left = [*(running.ticket for running in self._running), *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for ticket in left:
            self._tell(ticket, Update([], finish="error", error=why))

    def _text(self, ticket: Ticket) -> TextUntil:
        return TextUntil(self._engine.tokenizer, ticket.request.stop)

    def _rounds(self, request: Request) -> Iterator[Round]:
        """The engine's rounds. The first one makes programs for a sampler that is new."""
        engine = self._engine
        if request.sampler not in self._samplers:
            if len(self._samplers) >= SAMPLERS:
                jax.clear_caches()
                self._samplers.clear()
            self._samplers.add(request.sampler)
        engine.start()
        if engine.decoder is None and engine.device["platform"] == "gpu":
            engine.warm_up(request.prompt, request.new_tokens)  # the plan may be a little too tight
        decoder = engine.decoder or engine.use(engine.method)
        decoder.sampler = request.sampler
        yield from engine.rounds(request.prompt, request.new_tokens, request.seed, request.eos)

    def _round(self, running: _Running) -> Update:
        if running.ticket.cancelled:
            return Update([], finish="cancelled")
        try:
            result = next(running.rounds)
        except Exception as error:
            if not isinstance(error, (SubspecError, LLMError)):
                logging.exception("a round failed")
                self._engine.decoder = (
                    None  # its caches may be gone; the next request makes new ones
                )
            return Update([], finish="error", error=str(error) or type(error).__name__)
        return self._update(running, result)

    def _update(self, running: _Running, result: Round) -> Update:
        """What a round means to its request: tokens behind the end are left out."""
        request, text, first = running.ticket.request, running.text, running.count == 0
        tokens, finish = [], None
        for i, token in enumerate(result.tokens):
            tokens.append(token)
            if token in request.eos or text.push(token, i < result.accepted):
                finish = "stop"
            elif running.count + len(tokens) >= request.new_tokens:
                finish = "length"
            if finish:
                break
        if finish and text.flush():
            finish = "stop"
        parts = text.take(last=finish is not None)
        running.count += len(tokens)
        return Update(
            tokens,
            accepted=min(result.accepted, len(tokens)),
            text="".join(piece for piece, _ in parts),
            finish=finish,
            parts=parts,
            prefill=first,
            seconds=result.seconds,
            streamed_bytes=result.streamed_bytes,
        )

    def _leave(self, running: _Running) -> None:
        running.rounds.close()
        with self._changed:
            self._running.remove(running)
            self._took.append(time.monotonic() - running.began)

    def _tell(self, ticket: Ticket, update: Update) -> None:
        """Counts an update and hands it on. Whoever cannot take it any more is left alone."""
        with self._changed:
            if update.tokens:
                self._recent.append(update)
                self._totals["tokens"] += len(update.tokens)
                self._totals["passes"] += 1
                self._totals["streamed_bytes"] += update.streamed_bytes
            if update.prefill:
                self._totals["prompt_tokens"] += len(ticket.request.prompt)
                self._totals["cached_tokens"] += update.cached
            if update.finish:
                self._totals["requests"] += 1
                self._totals[update.finish] += 1
        try:
            ticket.on_update(update)
        except Exception:
            logging.exception("an update found no taker; its request is cancelled")
            ticket.cancelled = True
