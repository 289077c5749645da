"""A server in this process, over an engine that does as it is told."""

import contextlib
import http.client
import json
import socket
import threading
import time

import pytest
from fake_engine import FakeEngine

from experiments.serve import run
from experiments.serve.settings import Settings
from subspec_jax.scheduler import Scheduler


class Served:
    """A running server: its address, its parts, and what it said."""

    def __init__(self, queue=64, grace=5.0, template=None, **settings):
        self.engine, self.lines = FakeEngine(template), []
        self.scheduler = Scheduler(self.engine, queue=queue)
        how = Settings(**({"name": "tiny"} | settings))
        self.service = run.make(self.engine, self.scheduler, how, self.lines.append)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = run.configured(self.service, grace)
        self.server = run.Server(self.service, config, grace, self.url)
        self.thread = threading.Thread(target=self.server.run, args=[[self.listener]])

    def __enter__(self):
        self.service.worker.start()
        self.thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        for _ in range(10_000):  # whoever still waits for a round gets it
            self.engine.gate.release()
        self.thread.join(30)
        assert self.service.worker.stop(30) and not self.thread.is_alive()

    def ask(self, method, path, body=None, headers=()):
        """(status, headers, value or text) of one request."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, 30)) as link:
            link.request(method, path, body, dict(headers))
            reply = link.getresponse()
            text = reply.read().decode()
            is_json = reply.headers["content-type"] == "application/json"
            return reply.status, reply.headers, json.loads(text) if is_json else text

    def post(self, path="/v1/chat/completions", headers=(), **body):
        """The same for a JSON body; what is not given is a small question."""
        default = dict(model="tiny", max_tokens=8)
        if path.endswith("chat/completions"):
            default["messages"] = [{"role": "user", "content": "hello"}]
        text = json.dumps(default | body)
        return self.ask("POST", path, text, {"content-type": "application/json"} | dict(headers))


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def until():
    """f(condition): returns when it holds."""
    return wait_until


@pytest.fixture
def serve():
    """f(**settings) -> a server of this test's own."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(Served(**settings))


@pytest.fixture(scope="module")
def servers():
    """f(**settings) -> a server for the tests of a file."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(Served(**settings))


@pytest.fixture(scope="module")
def server():
    """One server for the tests of a file that leave nothing behind."""
    with Served() as server:
        yield server
