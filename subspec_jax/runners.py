"""How a scheduler's requests are decoded: one after another, or several together."""

from collections.abc import Iterator
from typing import Any

import jax

from subspec_jax import SubspecError
from subspec_jax.engine import Engine
from subspec_jax.prefix_cache import Text
from subspec_jax.propose import Round
from subspec_jax.requests import Request

SAMPLERS = 16
"""Different samplers whose programs are kept. Each has programs of its own, so that a server whose
clients ask for ever new temperatures would fill its memory with them."""


class Alone:
    """One request at a time, by the rounds of an engine: for every method."""

    most = 1

    def __init__(self, engine: Engine):
        self._engine = engine
        self._rounds: Iterator[Round] | None = None
        self.samplers: set[Any] = set()
        """Those that there are programs for."""

    @property
    def why_no_grammar(self) -> str | None:
        """Why no request can have a grammar; None: it can."""
        return f"the method {self._engine.method.name} decodes alone, and follows no grammar"

    def start(self, request: Request) -> Any:
        """A handle of the request."""
        self._rounds = self._of(request)
        return self._rounds

    def cached(self, handle: Any) -> int:
        """Prompt tokens that were in the caches already."""
        return 0

    def step(self) -> list[tuple[Any, Round]]:
        """(handle, round) of each request that took part in the next pass; all rounds tell the
        seconds and the bytes of that pass."""
        return [(self._rounds, next(self._rounds))]

    def complete(self, handle: Any) -> bool:
        """Whether the request's grammar has ended."""
        return False

    def error(self, handle: Any) -> str | None:
        """Why this request cannot go on, where the others can."""
        return None

    def leave(self, handle: Any) -> None:
        """Ends the request, whether all of its tokens are decoded or not."""
        handle.close()

    def reset(self) -> None:
        """Called when a pass has failed: caches may be gone, and the next request makes new
        ones."""
        self._engine.decoder = None

    def _of(self, request: Request) -> Iterator[Round]:
        engine = self._engine
        if request.sampler not in self.samplers:
            if len(self.samplers) >= SAMPLERS:
                jax.clear_caches()
                self.samplers.clear()
            self.samplers.add(request.sampler)
        engine.start()
        if engine.decoder is None and engine.device["platform"] == "gpu":
            engine.warm_up(request.prompt, request.new_tokens)  # the plan may be a little too tight
        decoder = engine.decoder or engine.use(engine.method)
        decoder.sampler, decoder.logprobs = request.sampler, request.logprobs is not None
        yield from engine.rounds(request.prompt, request.new_tokens, request.seed, request.eos)


class Together:
    """Up to `Options.texts` requests that share every pass. Samplers are data, and what a request
    has in common with an earlier one is not computed again."""

    def __init__(self, engine: Engine):
        self._engine, self.most = engine, engine.options.texts
        self.why_no_grammar = None

    def start(self, request: Request) -> Text:
        how = request.new_tokens, request.seed, request.sampler, request.eos
        more = dict(grammar=request.grammar, logprobs=request.logprobs is not None)
        text = Text(request.prompt, *how, **more)
        if not self._decoder.join(text):
            raise SubspecError("all texts that this engine can decode together are running")
        return text

    def cached(self, handle: Text) -> int:
        return handle.cached

    def step(self) -> list[tuple[Text, Round]]:
        return self._decoder.step()

    def complete(self, handle: Text) -> bool:
        return handle.complete

    def error(self, handle: Text) -> str | None:
        return handle.failed

    def leave(self, handle: Text) -> None:
        if self._engine.together is not None:
            self._engine.together.leave(handle)

    def reset(self) -> None:
        self._engine.together = None

    @property
    def _decoder(self):
        return self._engine.together or self._engine.batch()


def runner_for(engine: Engine) -> Alone | Together:
    """Several together where the engine is made for it."""
    return Together(engine) if engine.plan.ladder else Alone(engine)
