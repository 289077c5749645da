"""What Prometheus reads at /metrics."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from subspec_jax.scheduler import Scheduler

SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions")
GAUGES = {
    "queued": "Requests that wait",
    "running": "Requests that are decoded",
    "batch": "Requests that shared a pass in the last rounds, prefills left out",
    "tau": "Tokens a pass of the last rounds, prefills left out",
    "tokens_per_s": "Tokens a second of the last rounds",
    "bytes_per_s": "Bytes of weights a second that streamed in the last rounds",
}
TOTALS = {
    "tokens": "Tokens decoded",
    "passes": "Passes of the target, prefills included",
    "prompt_tokens": "Prompt tokens read",
    "cached_tokens": "Prompt tokens taken from a prefix cache",
    "streamed_bytes": "Bytes of weights copied to the device",
}


class Metrics:
    """A registry of its own, with the scheduler's numbers as they are when it is read."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler, self.registry = scheduler, CollectorRegistry()
        self.registry.register(self)
        own = dict(registry=self.registry, namespace="thimble")
        self.answers = Counter(
            "http_answers", "HTTP answers by path and status", ("path", "status"), **own
        )
        self.first = Histogram(
            "first_token_seconds", "From a request to its first token", buckets=SECONDS, **own
        )
        self.whole = Histogram(
            "request_seconds", "From a request to its last token", buckets=SECONDS, **own
        )

    def collect(self) -> Iterator[Metric]:
        stats = self._scheduler.stats()
        for name, what in GAUGES.items():
            yield GaugeMetricFamily(f"thimble_{name}", what, value=stats[name] or 0.0)
        for name, what in TOTALS.items():
            yield CounterMetricFamily(f"thimble_{name}", what, value=stats[name])
        ends = CounterMetricFamily("thimble_requests", "Requests by how they ended", labels=["end"])
        for end, count in stats["finished"].items():
            ends.add_metric([end], count)
        yield ends

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Counted:
    """An ASGI application whose answers are counted by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in PATHS else "other"
                self._metrics.answers.labels(path, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted)
