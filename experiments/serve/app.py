"""The routes: models, chat and text completions, health, metrics and the page."""

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from experiments.serve import page
from experiments.serve.answers import Answers, ClientGone
from experiments.serve.asked import Kind, parse, unfit
from experiments.serve.body import Body
from experiments.serve.errors import JSON, ApiError, refusal
from experiments.serve.guard import Guard, Rate
from experiments.serve.metrics import Counted, Metrics
from experiments.serve.response_format import unsupported
from experiments.serve.settings import Settings
from experiments.serve.stream import Stream, failure, sent, until_gone
from experiments.serve.wire import Wire
from experiments.serve.worker import Worker
from llm_jax import LLMError, shown
from subspec_jax import SubspecError
from subspec_jax.engine import Engine
from subspec_jax.requests import QueueFull, Update
from subspec_jax.scheduler import Scheduler

PAUSE = 15.0
"""Seconds without an update after which a stream gets a comment, so that nobody thinks it broke."""
GONE = 499
"""The status, for the metrics alone, where the client has closed the connection."""
BODY_SECONDS = 30.0
"""Time in which a request's body must arrive."""


class Service:
    """Answers HTTP requests from a scheduler; one `Worker` steps it."""

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        worker: Worker,
        settings: Settings,
        say: Callable[[str], None],
    ):
        self.engine, self.scheduler, self.worker = engine, scheduler, worker
        self.settings, self.say = settings, say
        self.metrics = Metrics(scheduler)
        self.created = int(time.time())
        self.closing = False
        self.live: dict[str, Answers] = {}
        self._tokenizing, self._compiling = asyncio.Lock(), asyncio.Lock()
        self._page, self._policy = page.load()

    def app(self) -> Counted:
        """The ASGI application."""
        routes = [
            Route("/", self.show_page),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]
        wrong = {ApiError: self._refuse, HTTPException: self._refuse, Exception: self._fault}
        inner = Starlette(routes=routes, exception_handlers=wrong)
        settings = self.settings
        guard = Guard(inner, settings.api_key, settings.hosts, Rate(settings.rate_limit))
        return Counted(guard, self.metrics)

    # ------------------------------------------------------------------ small routes

    async def show_page(self, request: HttpRequest) -> Response:
        headers = {"content-security-policy": self._policy, "cache-control": "no-cache"}
        return Response(self._page, headers=headers, media_type="text/html")

    async def health(self, request: HttpRequest) -> Response:
        if self.closing or not self.worker.is_alive():
            return JSON({"status": "closing" if self.closing else "failed"}, 503)
        return JSON({"status": "ok"})

    async def show_metrics(self, request: HttpRequest) -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self.metrics.text(), headers={"content-type": kind})

    async def models(self, request: HttpRequest) -> Response:
        return JSON({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        if (asked := request.path_params["model"]) != self.settings.name:
            raise ApiError(
                404, f"the model '{shown(asked, 60)}' does not exist", "model", "model_not_found"
            )
        return JSON(self._model())

    def _model(self) -> dict[str, Any]:
        plan = self.engine.plan
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.created,
            "owned_by": "thimble-jax",
            "thimble": {
                "max_length": self.engine.options.max_length,
                "method": self.engine.method.name,
                "streamed_bytes_a_pass": plan.streamed_bytes,
                "layers": plan.cfg.layers,
                "resident": plan.resident,
                "temperature": self.settings.temperature,
            },
        }

    # ------------------------------------------------------------------ completions

    async def chat(self, request: HttpRequest) -> Response:
        return await self._answer(request, "chat")

    async def complete(self, request: HttpRequest) -> Response:
        return await self._answer(request, "text")

    async def _answer(self, request: HttpRequest, kind: Kind) -> Response:
        began = time.monotonic()
        body = Body(await self._read(request))
        asked = parse(kind, body, self.settings.name, self.settings.temperature)
        async with self._tokenizing:  # one at a time: tokenizers and templates are not for threads
            shape = await asyncio.to_thread(asked.shape, self.engine.tokenizer)
        grammar = None
        if shape is not None:
            if why := self.scheduler.runner.why_no_grammar:
                raise unsupported(why, shape.field)
            async with self._compiling:  # one at a time: the others' threads are for tokenizing
                grammar = await asyncio.to_thread(shape.grammar, self.engine)
        async with self._tokenizing:
            requests = await asyncio.to_thread(asked.requests, self.engine, grammar)
        answers = self._submit(requests)
        id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        now, tokenizer = int(time.time()), self.engine.tokenizer
        wire = Wire(asked, id, now, self.settings.name, tokenizer)
        self.live[id] = answers
        gone = asyncio.ensure_future(until_gone(request.receive))
        updates = self._timed(answers.updates(gone, PAUSE), began)

        def ended() -> None:
            gone.cancel()
            answers.cancel()
            del self.live[id]

        if asked.stream:
            return Stream(sent(wire, answers, updates), ended)
        try:
            async for _ in updates:
                continue
        except ClientGone:
            return Response(status_code=GONE)
        finally:
            ended()
        if error := failure(answers):
            raise error
        return JSON(wire.whole(answers.choices))

    async def _read(self, request: HttpRequest) -> bytes:
        """The body, if it is JSON and not too long."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":  # which pages of other sites cannot send unasked
            raise ApiError(415, f"the content type is '{shown(kind, 60)}', not application/json")
        most, body = self.settings.body_limit, bytearray()
        length = request.headers.get("content-length", "0")
        too_long = ApiError(413, f"the body is longer than {most:,} bytes")
        if length.isdigit() and len(length) < 20 and int(length) > most:
            raise too_long
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    body += piece
                    if len(body) > most:
                        raise too_long
        except ClientDisconnect:
            raise ApiError(GONE, "the client has gone") from None
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive in {BODY_SECONDS:g} s") from None
        return bytes(body)

    def _submit(self, requests: list) -> Answers:
        if self.closing or not self.worker.is_alive():
            raise ApiError(503, "the server is shutting down", headers={"retry-after": "10"})
        try:
            return Answers(self.scheduler, requests)
        except QueueFull as full:
            seconds = min(60, max(1, math.ceil(full.seconds)))
            raise ApiError(
                429, str(full), code="queue_full", headers={"retry-after": str(seconds)}
            ) from None
        except (SubspecError, LLMError) as error:
            raise unfit(error) from None

    async def _timed(
        self, updates: AsyncIterator[tuple[int, Update] | None], began: float
    ) -> AsyncIterator[tuple[int, Update] | None]:
        """The same updates, while the times until the first token and the last are recorded."""
        first = True
        async for found in updates:
            if first and found and found[1].tokens:
                first = False
                self.metrics.first.observe(time.monotonic() - began)
            yield found
        self.metrics.whole.observe(time.monotonic() - began)

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Lets nobody in any more."""
        self.closing = True
        if self.live:
            self.say(f"Shutting down: {len(self.live)} requests may end first")

    def drop(self) -> None:
        """Ends what still runs, and says what it was."""
        for id, answers in self.live.items():
            done = sum(choice.tokens for choice in answers.choices)
            most = sum(choice.request.new_tokens for choice in answers.choices)
            self.say(f"Dropped {id}: {done} of at most {most} tokens were written")
            answers.dropped = True
            answers.cancel()

    # ------------------------------------------------------------------ errors

    async def _refuse(self, request: HttpRequest, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            what = f"{request.method} {shown(request.url.path, 80)}"
            message = {404: f"unknown URL: {what}", 405: f"{what} is not allowed"}
            words = message.get(error.status_code, str(error.detail))
            error = ApiError(error.status_code, words, headers=dict(error.headers or {}))
        assert isinstance(error, ApiError)
        return refusal(error)

    async def _fault(self, request: HttpRequest, error: Exception) -> Response:
        return refusal(ApiError(500, "the server failed; its log says where"))
