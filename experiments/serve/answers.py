"""From the engine's thread to the event loop: the updates of one HTTP request's answers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from experiments.common.answer import Answer
from subspec_jax.requests import Request, Update
from subspec_jax.scheduler import Scheduler


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Answers:
    """The answers to the requests, all of them in the queue or none.

    Raises what `Scheduler.submit` raises.
    """

    def __init__(self, scheduler: Scheduler, requests: Sequence[Request]):
        self.choices = [Answer(request) for request in requests]
        self.dropped = False
        """Whether the server ended before they did."""
        self._arrived: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._tickets = []
        try:
            for i, request in enumerate(requests):
                put = lambda update, i=i: self._put(i, update)
                self._tickets.append(scheduler.submit(request, put))
        except Exception:
            self.cancel()
            raise

    def cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    def _put(self, index: int, update: Update) -> None:
        """Called by the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the connection
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, update))

    async def updates(
        self, gone: asyncio.Future, pause: float
    ) -> AsyncIterator[tuple[int, Update] | None]:
        """(which answer, its update) until all have ended; None after so many seconds without one.

        Raises ClientGone when `gone` is done.
        """
        while not all(answer.finish for answer in self.choices):
            arrived = asyncio.ensure_future(self._arrived.get())
            try:
                either = {arrived, gone}
                await asyncio.wait(either, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise ClientGone
                if arrived.done():
                    index, update = arrived.result()
                    self.choices[index].add(update)
                    yield index, update
                else:
                    yield None
            finally:
                arrived.cancel()
