"""The server's life: it listens, and when it is told to end, running answers may end first."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from experiments.serve.app import Service
from experiments.serve.settings import Settings
from experiments.serve.worker import Worker
from subspec_jax.engine import Engine
from subspec_jax.scheduler import Scheduler

LAST_WORDS = 5
"""Seconds in which dropped answers can still say so."""
LAST_ROUND = 60
"""Seconds that the last round may take."""


def make(
    engine: Engine, scheduler: Scheduler, settings: Settings, say: Callable[[str], None]
) -> Service:
    return Service(engine, scheduler, Worker(scheduler), settings, say)


class Server(uvicorn.Server):
    """Closes the service first, and drops what runs after a time."""

    def __init__(self, service: Service, config: uvicorn.Config, grace: float, address: str):
        super().__init__(config)
        self.service, self.grace, self.address = service, grace, address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.service.say(f"Serving {self.service.settings.name} at {self.address}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.close()
        dropping = asyncio.get_running_loop().call_later(self.grace, self.service.drop)
        await super().shutdown(sockets)
        dropping.cancel()


def configured(service: Service, grace: float) -> uvicorn.Config:
    return uvicorn.Config(
        service.app(),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        loop="asyncio",
        http="h11",
        ws="none",
        timeout_graceful_shutdown=int(grace) + LAST_WORDS,
    )


def serve(service: Service, listener: socket.socket, grace: float, address: str) -> None:
    """Returns when a signal ended it and the engine's thread is done."""
    config = configured(service, grace)
    service.worker.start()
    with _signals_end_it():
        Server(service, config, grace, address).run(sockets=[listener])
    if not service.worker.stop(LAST_ROUND):
        service.say("The last round did not end; leaving it")


@contextlib.contextmanager
def _signals_end_it() -> Iterator[None]:
    """uvicorn raises a signal again when it has ended because of it; that is no news then."""
    names = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.signal(name, lambda *_: None) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
