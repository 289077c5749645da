"""What stands in front of all routes: the host's name, the key, the rate, and headers."""

import hmac
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from experiments.serve.errors import ApiError, refusal
from llm_jax import shown

OPEN = ("/", "/health")
"""Paths without a key: the page, which asks for it, and whether the server is there."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
CLIENTS = 10_000
"""Addresses whose requests are counted, at most."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Rate:
    """At most so many requests a minute from one address; that many at once. 0: any number."""

    def __init__(self, a_minute: int):
        self.a_minute = a_minute
        self._left: dict[str, tuple[float, float]] = {}  # address -> (requests left, when)

    def wait(self, address: str, now: float) -> float:
        """Seconds until this address may ask again; 0: it may now, and this request is counted."""
        if not self.a_minute:
            return 0.0
        left, when = self._left.pop(address, (float(self.a_minute), now))
        left = min(self.a_minute, left + (now - when) * self.a_minute / 60)
        may = left >= 1
        self._left[address] = (left - may, now)  # behind all others, the oldest is in front
        if len(self._left) > CLIENTS:
            del self._left[next(iter(self._left))]
        return 0.0 if may else (1 - left) * 60 / self.a_minute


class Guard:
    """An ASGI application in front of another one.

    A page of another site can reach a server on this machine by a name that it owns. So where the
    server is bound to the loopback address, requests must call it by one of `hosts`.
    """

    def __init__(self, app: ASGIApp, key: str | None, hosts: Sequence[str], rate: Rate):
        self.app, self._key, self._hosts, self._rate = app, key, hosts, rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            return await refusal(error)(scope, receive, with_headers)
        await self.app(scope, receive, with_headers)

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if host.rsplit(":", 1)[-1].isdigit() else host
        if self._hosts and name not in self._hosts:
            raise ApiError(
                403, f"this server is not called '{shown(name, 60)}'; see --allowed-hosts"
            )
        if path in OPEN:
            return
        if self._key is not None:
            kind, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self._key.encode())
            if kind.lower() != "bearer" or not right:
                raise ApiError(
                    401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key", headers={"www-authenticate": "Bearer"},
                )  # fmt: skip
        if scope["method"] == "POST":
            address = (scope.get("client") or ("unknown",))[0]
            if seconds := self._rate.wait(address, time.monotonic()):
                raise ApiError(
                    429, f"more than {self._rate.a_minute} requests a minute; slow down",
                    code="rate_limit_exceeded", headers={"retry-after": str(int(seconds) + 1)},
                )  # fmt: skip
