"""Serves a model that does not fit: OpenAI's interface, and a chat page.

    python -m experiments.serve
    python -m experiments.serve --model qwen2.5-7b --memory-limit 8GB --port 8000

The page is at http://127.0.0.1:8000, the interface below /v1. Ctrl-C, or SIGTERM, lets running
answers end first. `docs/serving.md` says what is supported.
"""

import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Sequence

from rich.console import Console

from experiments.common import cli as command_line
from experiments.common.cli import UserError
from experiments.serve.model import ModelFlags, name_of, open_engine, warm_up
from llm_jax.extras import need
from llm_jax.progress import ConsoleReporter
from llm_jax.sample import Sampler
from subspec_jax.memory import parse_bytes
from subspec_jax.scheduler import Scheduler

KEY = "THIMBLE_API_KEY"
PARALLEL = 4
"""Answers that are decoded together where no flag says how many."""
MOST = 1_000_000
"""Of requests in a queue or a minute, and of seconds."""


@dataclasses.dataclass(frozen=True)
class Serve(ModelFlags):
    """Serve a model to OpenAI's clients and to browsers."""

    host: str = "127.0.0.1"
    """The address to listen at. 0.0.0.0: all of this machine's, for others to reach."""
    port: int = 8000
    """0: any free port."""
    name: str | None = None
    """What the model is called in requests; as --model if not given."""
    api_key: str | None = None
    """The key that requests must bring; also $THIMBLE_API_KEY, which other users do not see."""
    temperature: float = 0.0
    """Of requests that name none; 0: greedy."""
    queue: int = 64
    """Requests that may wait; more are told to come again."""
    rate_limit: int = 0
    """Completions a minute from one address; 0: any number."""
    body_limit: str = "1MB"
    """The longest request."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which requests may call this server, as behind a proxy. If not given: this machine's
    own where --host is, and any otherwise."""
    grace: float = 30.0
    """Seconds that answers have to end when the server is told to."""


def main(args: Serve, console: Console) -> int:
    need("uvicorn", "serve", "a server")
    need("starlette", "serve", "a server")
    need("prometheus_client", "serve", "a server")
    from experiments.serve import run
    from experiments.serve.guard import LOOPBACK
    from experiments.serve.settings import Settings

    say = lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)
    check(args)
    usual = Sampler(args.temperature)
    settings = Settings(
        name=args.name or name_of(args.model),
        temperature=args.temperature,
        api_key=args.api_key or os.environ.get(KEY) or None,
        hosts=args.allowed_hosts or (LOOPBACK if args.host in LOOPBACK else ()),
        rate_limit=args.rate_limit,
        body_limit=parse_bytes(args.body_limit),
    )
    with bound(args.host, args.port) as listener:
        address, port = listener.getsockname()[:2]
        with open_engine(args, ConsoleReporter(console), usual, PARALLEL) as engine:
            say(str(engine.plan))
            warm_up(engine)
            if settings.api_key is None and args.host not in LOOPBACK:
                say(f"Anybody who reaches {address} may ask: there is no --api-key")
            shown = f"[{address}]" if ":" in address else address
            service = run.make(engine, Scheduler(engine, queue=args.queue), settings, say)
            run.serve(service, listener, args.grace, f"http://{shown}:{port}")
    return 0


def check(args: Serve) -> None:
    """Raises the error of the first flag that is wrong, before anything is loaded."""
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port is {args.port}; expected 0 to {2**16 - 1}")
    for name in ("queue", "rate_limit", "grace"):
        if not 0 <= getattr(args, name) <= MOST:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {getattr(args, name)}; expected 0 to {MOST:,}")


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address, before the model is loaded: a port in use is told at once."""
    try:
        kind, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(socket.socket(kind))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            undo.pop_all()
    except OSError as error:
        raise UserError(f"cannot listen at {host}, port {port}: {error.strerror}") from error
    return listener


def cli(words: Sequence[str] | None = None) -> int:
    return command_line.run(Serve, main, __doc__, words, again=None)


if __name__ == "__main__":
    sys.exit(cli())
