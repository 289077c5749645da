"""Many requests over one engine: a queue, one pass at a time, and an update for each round.

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
from collections.abc import Callable
from typing import Any

from llm_jax import LLMError
from llm_jax.generation import checked_prompt, checked_seed
from llm_jax.grammar import GrammarError
from subspec_jax import SubspecError
from subspec_jax.decoder import LengthError
from subspec_jax.engine import Engine
from subspec_jax.propose import Round
from subspec_jax.requests import QueueFull, Request, TextUntil, Update
from subspec_jax.runners import runner_for

RECENT = 64
"""Passes of which speeds are told."""
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
    handle: Any
    """What the runner knows it by."""
    text: TextUntil
    count: int = 0
    """Tokens of the answer so far."""
    reads: bool = True
    """Whether its prompt is still being read."""
    began: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass(frozen=True)
class _Pass:
    tokens: int
    texts: int
    seconds: float
    streamed_bytes: int
    prefill: bool


class Scheduler:
    """Requests in the order in which they came; `most` of them run at a time, `queue` may wait.

    An answer is what its request gives alone: nothing of another request, or of how many tokens a
    round brings, is in it. `most` is what the engine was opened for (`Options.texts`).
    """

    def __init__(self, engine: Engine, queue: int = 64):
        if queue < 0:
            raise SubspecError(f"the queue is to hold {queue} requests; expected 0 or more")
        self.runner = runner_for(engine)
        self.most, self.queue = self.runner.most, queue
        self._engine = engine
        self._changed = threading.Condition()
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._running: list[_Running] = []
        self._recent: collections.deque[_Pass] = collections.deque(maxlen=RECENT)
        self._took: collections.deque[float] = collections.deque([1.0], maxlen=16)
        self._totals = collections.Counter()

    # ------------------------------------------------------------------ any thread

    def submit(self, request: Request, on_update: OnUpdate) -> Ticket:
        """Queues a request. `on_update` gets its updates, from the thread that calls `step`.

        Raises QueueFull; LengthError for a prompt that cannot fit with its answer; GenerationError
        for one with unknown tokens, and for a seed that cannot be; GrammarError where none can be
        followed; SubspecError for what this engine does not do.
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
        if request.grammar is not None and self.runner.why_no_grammar:
            raise GrammarError(self.runner.why_no_grammar)
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

        tau is the number of tokens that a pass gives each request, and batch the number of requests
        that share it, prefills left out; None before the first pass.
        """
        with self._changed:
            recent, totals = list(self._recent), dict(self._totals)
            queued, running = sum(not t.cancelled for t in self._waiting), len(self._running)
        decoded = [p for p in recent if not p.prefill]
        seconds = sum(p.seconds for p in recent)
        rate = lambda amount: amount / seconds if seconds else 0.0
        texts = sum(p.texts for p in decoded)
        names = ("requests", "tokens", "passes", "prompt_tokens", "cached_tokens", "streamed_bytes")
        ends = ("stop", "length", "cancelled", "error")
        return {
            "queued": queued,
            "running": running,
            "most": self.most,
            **{name: totals.get(name, 0) for name in names},
            "finished": {end: totals.get(end, 0) for end in ends},
            "batch": texts / len(decoded) if decoded else None,
            "tau": sum(p.tokens for p in decoded) / texts if texts else None,
            "tokens_per_s": rate(sum(p.tokens for p in recent)),
            "bytes_per_s": rate(sum(p.streamed_bytes for p in recent)),
        }

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # ------------------------------------------------------------------ the engine's thread

    def step(self) -> bool:
        """Lets requests leave and enter, and runs one pass for those that run; False: none is
        there."""
        with self._changed:
            gone = [t for t in self._waiting if t.cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
        for ticket in gone:
            self._tell(ticket, Update([], finish="cancelled"))
        for running in [r for r in self._running if r.ticket.cancelled]:
            self._end(running, Update([], finish="cancelled"))
        self._enter()
        if self._running:
            self._pass()
        return bool(self._running or self._waiting)

    def abandon(self, why: str) -> None:
        """Ends all requests with an error: no more rounds will come."""
        with self._changed:
            left = [*(running.ticket for running in self._running), *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for ticket in left:
            self._tell(ticket, Update([], finish="error", error=why))

    def _enter(self) -> None:
        while len(self._running) < self.most:
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
                shown = self._engine.tokenizer.showing(ticket.request.shows)
                text = TextUntil(shown, ticket.request.stop)
                running = _Running(ticket, None, text)
                self._running.append(running)
            try:
                running.handle = self.runner.start(ticket.request)
            except Exception as error:
                self._end(running, self._fault(error))

    def _pass(self) -> None:
        """One pass: of all that run, or of those that the engine takes first."""
        try:
            results = self.runner.step()
        except Exception as error:
            fault = self._fault(error)
            for running in list(self._running):
                self._end(running, fault)
            return
        of = {id(running.handle): running for running in self._running}
        found = [(of[id(handle)], result) for handle, result in results]
        updates = [(running, self._update(running, result)) for running, result in found]
        self._count(updates)
        for running, update in updates:
            if why := self.runner.error(running.handle):
                update = Update([], finish="error", error=why)
            if update.finish:
                self._end(running, update)
            elif update.tokens:
                self._tell(running.ticket, update)

    def _fault(self, error: Exception) -> Update:
        """What a pass that failed means to those that took part in it."""
        if not isinstance(error, (SubspecError, LLMError)):
            logging.exception("a round failed")
            self.runner.reset()
        return Update([], finish="error", error=str(error) or type(error).__name__)

    def _count(self, updates: list[tuple[_Running, Update]]) -> None:
        seconds = max((u.seconds for _, u in updates), default=0.0)  # all have the same,
        streamed = max((u.streamed_bytes for _, u in updates), default=0)  # for one pass
        tokens = sum(len(u.tokens) for _, u in updates)
        prefill = any(running.reads for running, _ in updates)
        with self._changed:
            if updates:
                self._recent.append(_Pass(tokens, len(updates), seconds, streamed, prefill))
            self._totals["passes"] += bool(updates)
            self._totals["tokens"] += tokens
            self._totals["streamed_bytes"] += streamed
            for running, update in updates:
                if update.prefill:
                    self._totals["prompt_tokens"] += len(running.ticket.request.prompt)
                    self._totals["cached_tokens"] += update.cached
                running.reads = running.reads and not update.tokens

    def _end(self, running: _Running, update: Update) -> None:
        if running.handle is not None:
            self.runner.leave(running.handle)
        with self._changed:
            if running not in self._running:
                return  # it was abandoned, and told so
            self._running.remove(running)
            self._took.append(time.monotonic() - running.began)
        self._tell(running.ticket, update)

    def _update(self, running: _Running, result: Round) -> Update:
        """What a round means to its request: tokens behind the end are left out."""
        request, text, first = running.ticket.request, running.text, running.count == 0
        tokens, finish = [], None
        said = [one._replace(top=one.top[: request.logprobs]) for one in result.logprobs]
        said = said or [None] * len(result.tokens)
        for i, token in enumerate(result.tokens):
            tokens.append(token)
            ended = token in request.eos or text.push(token, i < result.accepted, said[i])
            if ended or (i + 1 == len(result.tokens) and self.runner.complete(running.handle)):
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
            cached=self.runner.cached(running.handle),
            parts=parts,
            logprobs=text.told(),
            prefill=first and bool(tokens),
            seconds=result.seconds,
            streamed_bytes=result.streamed_bytes,
        )

    def _tell(self, ticket: Ticket, update: Update) -> None:
        """Counts an update and hands it on. Whoever cannot take it any more is left alone."""
        with self._changed:
            if update.finish:
                self._totals["requests"] += 1
                self._totals[update.finish] += 1
        try:
            ticket.on_update(update)
        except Exception:
            logging.exception("an update found no taker; its request is cancelled")
            ticket.cancelled = True
