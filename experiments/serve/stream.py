"""Server-sent events: the pieces of an answer as they are decoded."""

import contextlib
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from experiments.serve.answers import Answers, ClientGone
from experiments.serve.errors import JSON, ApiError
from experiments.serve.wire import Wire
from subspec_jax.requests import Update


def failure(answers: Answers) -> ApiError | None:
    """Why the answers are none, or None where they are fine."""
    if answers.dropped:
        return ApiError(503, "the server shut down before the answer was complete")
    for choice in answers.choices:
        if choice.finish in ("error", "cancelled"):
            return ApiError(500, choice.error or "the answer was cancelled")
    return None


async def sent(
    wire: Wire, answers: Answers, updates: AsyncIterator[tuple[int, Update] | None]
) -> AsyncIterator[bytes]:
    """The lines of a stream of server-sent events."""
    event = lambda value: b"data: " + JSON(value).body + b"\n\n"
    if wire.asked.kind == "chat":
        for index in range(len(answers.choices)):
            yield event(wire.first(index))
    async for found in updates:
        if found is None:
            yield b": the answer is on its way\n\n"
            continue
        index, update = found
        if error := failure(answers):
            yield event(error.body)
            return
        yield event(wire.piece(index, answers.choices[index], update))
    if wire.asked.include_usage:
        yield event(wire.usage(answers.choices))
    yield b"data: [DONE]\n\n"


class Stream(Response):
    """A response whose body comes in pieces; `ended` is called behind it, whatever happens."""

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncIterator[bytes], ended: Callable[[], None]):
        super().__init__(headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.pieces, self.ended = pieces, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            with contextlib.suppress(ClientGone, OSError):
                await send(start)
                async for piece in self.pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.ended()


async def until_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        continue
