"""Three hundred requests, sixteen at a time, some wrong, some cancelled: none lost or mixed up.

With `-s` it prints its figures.
"""

import dataclasses
import functools
import http.client
import json
import random
import signal
import threading
import time
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from processes import process

from llm_jax.attention import caches_for
from llm_jax.formats import open_checkpoint
from llm_jax.generation import decode_loop, prefill
from llm_jax.sample import Sampler
from llm_jax.testing import tiny_config, tiny_params, write_safetensors

CFG = tiny_config("qwen2", layers=3)
FLAGS = "--memory-limit 16MB --depth 3 --width 2 --draft-group 16 --resident 1 --max-length 256"
FLAGS = [*FLAGS.split(), "--chunk", "64"]
REQUESTS, AT_ONCE, LONGEST = 300, 16, 40
SAMPLERS = ({}, dict(temperature=0.7), dict(temperature=1.0, top_p=0.9))
WRONG = (
    b"", b"{", b"[]", b"\xff" * 50, b'{"model": "thumb"}', b'{"model": 7, "messages": []}',
    b'{"model": "other", "messages": [{"role": "user", "content": "a"}]}',
    b'{"model": "thumb", "messages": [{"role": "user", "content": "a"}], "max_tokens": 9999}',
    b'{"model": "thumb", "messages": [{"role": "user", "content": "a"}], "tools": [1]}',
    b'{"model": "thumb", "messages": ' + b"[" * 5000,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One request: what it asks for, and whether its client goes away."""

    kind: str
    prompt: str
    new: int
    how: tuple
    stream: bool
    wrong: bytes | None = None

    @property
    def body(self) -> bytes:
        asked = dict(model="thumb", messages=[{"role": "user", "content": self.prompt}])
        more = dict(max_tokens=self.new, stream=self.stream, **dict(self.how))
        return json.dumps(asked | more).encode() if self.wrong is None else self.wrong


def jobs(count: int, seed: int) -> list[Job]:
    """Of ten, seven want their answer, two leave before it is complete, and one is wrong."""
    rng, out = random.Random(seed), []
    for i in range(count):
        kind = rng.choice(["whole"] * 7 + ["cancelled"] * 2 + ["wrong"])
        prompt = " ".join(rng.choice(["the", "in", "a", "→", str(i % 12)]) for _ in range(6))
        how = dict(rng.choice(SAMPLERS), seed=rng.randrange(5))
        wrong = rng.choice(WRONG) if kind == "wrong" else None
        out.append(
            Job(kind, prompt, rng.randint(1, LONGEST), tuple(how.items()), i % 2 == 0, wrong)
        )
    return out


def ask(port: int, job: Job, rng: random.Random) -> tuple[int, str | None]:
    """(status, text) of a job; the text of one that was cancelled is None."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        link.request("POST", "/v1/chat/completions", job.body, {"content-type": "application/json"})
        if job.kind == "cancelled" and not job.stream:
            time.sleep(rng.random() / 10)
            return 0, None
        reply = link.getresponse()
        if job.kind == "cancelled":
            reply.read(rng.randrange(1, 1500))
            return reply.status, None
        text = reply.read().decode()
        if reply.status != 200:
            return reply.status, json.loads(text)["error"]["message"]
        if not job.stream:
            return reply.status, json.loads(text)["choices"][0]["message"]["content"]
        lines = [line for line in text.split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]", text[-500:]
        pieces = [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines[:-1]]
        return reply.status, "".join(pieces)
    finally:
        link.close()


def run(port: int, work: list[Job], seed: int) -> dict[int, tuple[int, str | None]]:
    """All jobs by as many clients as are let in at once; what each got, by its number."""
    found, numbered, lock = {}, iter(enumerate(work)), threading.Lock()

    def client(rng):
        while True:
            with lock:
                number, job = next(numbered, (None, None))
            if job is None:
                return
            found[number] = ask(port, job, rng)

    clients = [
        threading.Thread(target=client, args=[random.Random(seed + i)]) for i in range(AT_ONCE)
    ]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(600)
    assert not any(thread.is_alive() for thread in clients)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_safetensors(tmp_path_factory.mktemp("models") / "thumb", tiny_params(CFG), CFG)


@pytest.fixture(scope="module")
def alone(folder):
    """f(job) -> its text by the plain loop of `llm_jax`, without a server or a draft."""
    checkpoint = open_checkpoint(folder)
    params, tokenizer = checkpoint.load(CFG), checkpoint.tokenizer()

    @functools.cache
    def longest(prompt, given):
        """Of every answer to a prompt, the longest: shapes are the same, so programs are few."""
        how = dict(given)
        sampler = Sampler(how.get("temperature", 0.0), top_p=how.get("top_p", 1.0))
        ids, key = (
            tokenizer.chat([{"role": "user", "content": prompt}]),
            jax.random.key(how["seed"]),
        )
        caches = caches_for(params, CFG, 1, 256)
        logits, caches = prefill(params, ids, caches, CFG, chunk=64)
        first = sampler.draw(logits, key, jnp.array([len(ids)], jnp.int32))
        at = jnp.int32(len(ids))
        out, count, _ = decode_loop(params, first, caches, at, key, CFG, LONGEST, sampler)
        assert int(count) == LONGEST
        return [int(first[0]), *out.tolist()]

    def text(job):
        tokens = longest(job.prompt, job.how)[: job.new]
        end = next((i for i, t in enumerate(tokens) if t in tokenizer.eos), job.new)
        return "".join(tokenizer.stream(tokens[:end]))

    return text


@pytest.mark.slow
def test_under_load_nothing_is_lost_mixed_up_or_kept(folder, alone):
    """And after kill -9 in the middle of it, a new process does the same."""
    port, work = 0, jobs(REQUESTS, seed=1)
    expected = {n: alone(job) for n, job in enumerate(work) if job.kind == "whole"}
    for life in range(2):
        flags = ["--model", folder, *FLAGS, "--port", port]
        with process(flags, JAX_DISABLE_MOST_OPTIMIZATIONS="true") as server:
            port = server.port
            run(port, jobs(60, seed=2), 0)  # every program is compiled, all pools are filled
            wait_until_idle(port)
            before, files, began = server.memory(), server.files(), time.monotonic()
            found = run(port, work, 1)
            took, after = time.monotonic() - began, server.memory()
            wrong = [n for n, text in expected.items() if found.get(n) != (200, text)]
            assert not wrong, [(work[n], found.get(n), expected[n]) for n in wrong[:3]]
            assert len(found) == REQUESTS
            refused = {found[n][0] for n, job in enumerate(work) if job.kind == "wrong"}
            assert refused == {400, 404}
            metrics = wait_until_idle(port)
            ends = {k: metrics[f'thimble_requests_total{{end="{k}"}}']
                    for k in ("stop", "length", "cancelled", "error")}  # fmt: skip
            kinds = Counter(job.kind for job in work)
            assert ends["error"] == 0 and ends["stop"] + ends["length"] >= kinds["whole"]
            assert after - before < 24 * 2**20, (before, after)
            assert server.files() <= files + 2
            print(
                f"\n{REQUESTS} requests, {AT_ONCE} at a time, in {took:.1f} s: {dict(kinds)}; "
                f"{len(expected)} texts as alone; {before / 2**20:.0f} MiB before, "
                f"{after / 2**20:.0f} behind; ends with the first 60: {ends}"
            )
            if life == 0:
                crowd = threading.Thread(target=broken_off, args=[port, work[:100]])
                crowd.start()
                time.sleep(1.0)
                assert server.end(signal.SIGKILL) == -signal.SIGKILL
                crowd.join(60)
                assert not crowd.is_alive()
            else:
                assert server.end() == 0 and "Traceback" not in server.output


def broken_off(port, work):
    """Clients of a server that dies: each finds its connection closed, and none waits for ever."""
    for job in work:
        try:
            ask(port, job, random.Random(0))
        except (OSError, http.client.HTTPException, ValueError, AssertionError):
            continue


def wait_until_idle(port: int) -> dict[str, float]:
    """The metrics when nothing runs any more."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        link.request("GET", "/metrics")
        lines = link.getresponse().read().decode().splitlines()
        link.close()
        found = {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
        if not found["thimble_running"] and not found["thimble_queued"]:
            return found
        time.sleep(0.1)
    raise AssertionError("something still runs")
