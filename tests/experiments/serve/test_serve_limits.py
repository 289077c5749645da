"""Who may ask, how much, and what becomes of those who leave: over real connections."""

import json
import socket
import threading

import pytest

HELLO = [{"role": "user", "content": "hello"}]
SLOW = [{"role": "user", "content": "slow"}]
KEY = {"authorization": "Bearer sesame"}


def opened(server, **body):
    """A connection on which a request was sent and nothing was read."""
    text = json.dumps(dict(model="tiny", max_tokens=400, messages=SLOW) | body).encode()
    link = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
    link.sendall(f"{head}\r\ncontent-length: {len(text)}\r\n\r\n".encode() + text)
    return link


def read_all(link):
    """What comes until the server closes the connection."""
    out = b""
    with link:
        while piece := link.recv(65536):
            out += piece
    return out.decode()


def read_some(link):
    """What comes until the engine is blamed, or the connection ends."""
    text = ""
    with link:
        while "the engine failed" not in text and (piece := link.recv(65536)):
            text += piece.decode()
    return text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_takes_its_sequences_along(serve, until, stream):
    server = serve()
    stats = server.scheduler.stats
    link = opened(server, stream=stream, n=3)
    until(lambda: stats()["running"] == 1 and stats()["queued"] == 2)
    for _ in range(5):
        server.engine.gate.release()
    until(lambda: stats()["tokens"] == 1 + 4 * 4)
    link.close()
    until(lambda: stats()["queued"] == 0)  # those that wait need no round to leave
    server.engine.gate.release()
    until(lambda: stats()["running"] == 0)
    assert stats()["finished"] == {"stop": 0, "length": 0, "cancelled": 3, "error": 0}
    assert stats()["tokens"] <= 1 + 5 * 4 and server.engine.running == 0
    until(lambda: not server.service.live)
    assert server.post()[0] == 200


def test_a_full_queue_says_when_to_come_again(serve, until):
    server = serve(queue=2)
    links = [opened(server)]
    until(lambda: server.scheduler.stats()["running"] == 1)
    links.append(opened(server, messages=HELLO))
    until(lambda: server.scheduler.stats()["queued"] == 1)
    for changes in ({"n": 2}, {"n": 2, "stream": True}):  # one place is left, for all or none
        status, headers, reply = server.post(**changes)
        assert status == 429 and reply["error"]["code"] == "queue_full"
        assert reply["error"]["type"] == "rate_limit_error"
        assert 1 <= int(headers["retry-after"]) <= 60
    until(lambda: server.scheduler.stats()["queued"] == 1)
    links.append(opened(server, messages=HELLO))
    until(lambda: server.scheduler.stats()["queued"] == 2)
    assert server.post()[0] == 429
    assert server.ask("GET", "/health")[0] == 200  # small things are answered meanwhile
    for link in links:
        link.close()
    until(lambda: server.engine.gate.release() or server.scheduler.stats()["running"] == 0)
    assert server.post()[0] == 200


def test_a_key_is_asked_for_everywhere_but_at_the_page(serve):
    server = serve(api_key="sesame")
    body = json.dumps(dict(model="tiny", messages=HELLO, max_tokens=4))
    kind = {"content-type": "application/json"}
    gets, posts = (
        ("/v1/models", "/metrics", "/v1/none"),
        ("/v1/chat/completions", "/v1/completions"),
    )
    keys = (None, "Bearer sesam", "Basic sesame", "sesame", "Bearer caf\xe9")
    for path in (*gets, *posts):
        for key in keys:
            method, wrong = (
                "POST" if path in posts else "GET",
                {"authorization": key} if key else {},
            )
            status, headers, reply = server.ask(method, path, body, kind | wrong)
            assert status == 401 and reply["error"]["code"] == "invalid_api_key"
            assert headers["www-authenticate"] == "Bearer"
            assert reply["error"]["type"] == "authentication_error"
    assert server.ask("GET", "/")[0] == server.ask("GET", "/health")[0] == 200
    assert server.post(headers=KEY)[0] == 200
    assert server.ask("GET", "/v1/models", headers=KEY)[0] == 200


def test_a_name_that_is_not_this_machines_is_refused(serve):
    server = serve(hosts=("127.0.0.1", "localhost", "[::1]"))
    for good in ("localhost", "127.0.0.1:8000", "localhost:1", "[::1]:8000", "[::1]"):
        assert server.ask("GET", "/health", headers={"host": good})[0] == 200
    for bad in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io"):
        status, _, reply = server.ask("GET", "/health", headers={"host": bad})
        assert status == 403 and bad.split(":")[0] in reply["error"]["message"]


def test_a_body_that_is_too_long(serve):
    server = serve(body_limit=2000)
    room = 2000 - len(json.dumps(dict(model="tiny", max_tokens=8, messages=[], user="")))
    assert server.post(messages=[], user="a" * room)[0] == 400  # read, and wrong
    status, _, reply = server.post(messages=[], user="a" * (room + 1))
    assert status == 413 and "longer than 2,000 bytes" in reply["error"]["message"]
    link = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
    link.sendall(f"{head}\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n".encode())
    link.sendall(b"7d1\r\n" + b"a" * 2001 + b"\r\n")  # its length is not said before, and no end
    assert " 413 " in read_all(link).splitlines()[0]


def test_a_body_that_never_comes(serve, monkeypatch):
    from experiments.serve import app

    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    server = serve()
    link = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
    link.sendall(f"{head}\r\ncontent-length: 100\r\n\r\n{{".encode())
    assert " 408 " in link.recv(65536).decode().splitlines()[0]
    link.close()


def test_the_rate_of_one_address(serve):
    server = serve(rate_limit=3)
    assert [server.post()[0] for _ in range(5)] == [200, 200, 200, 429, 429]
    status, headers, reply = server.post()
    assert status == 429 and reply["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(headers["retry-after"]) <= 20
    assert server.ask("GET", "/v1/models")[0] == 200


def test_the_rate_by_the_clock():
    from experiments.serve.guard import CLIENTS, Rate

    rate = Rate(60)  # one a second, and 60 at once
    assert [rate.wait("a", 0.0) for _ in range(60)] == [0.0] * 60
    assert rate.wait("a", 0.0) == 1.0 and rate.wait("b", 0.0) == 0.0
    assert rate.wait("a", 0.75) == 0.25
    assert rate.wait("a", 1.0) == 0.0 and rate.wait("a", 1.0) == 1.0
    assert rate.wait("a", 1000.0) == 0.0 and rate._left["a"][0] == 59
    for i in range(2 * CLIENTS):
        rate.wait(f"client {i}", 1000.0)
    assert len(rate._left) == CLIENTS and "a" not in rate._left
    assert Rate(0).wait("a", 0.0) == 0.0


def test_running_answers_may_end_when_the_server_does(serve, until):
    server = serve(grace=30.0)
    link = opened(server, stream=True, max_tokens=21)
    until(lambda: server.scheduler.stats()["running"] == 1)
    server.server.should_exit = True
    until(lambda: server.service.closing)
    assert server.lines[-1] == "Shutting down: 1 requests may end first"
    for _ in range(6):
        server.engine.gate.release()
    text = read_all(link)
    assert text.count('"content":') == 1 + 6 and "[DONE]" in text
    server.thread.join(30)
    assert not server.thread.is_alive()
    assert not [line for line in server.lines if "Dropped" in line]


def test_what_is_dropped_is_named(serve, until):
    server = serve(grace=0.3)
    streamed = opened(server, stream=True)
    until(lambda: server.scheduler.stats()["running"] == 1)
    whole = opened(server, messages=HELLO)
    until(lambda: server.scheduler.stats()["queued"] == 1)
    server.engine.gate.release()
    server.engine.gate.release()
    until(lambda: server.scheduler.stats()["tokens"] == 5)
    ids = list(server.service.live)
    server.server.should_exit = True
    until(lambda: len(server.lines) == 4)
    assert server.lines[1:] == [
        "Shutting down: 2 requests may end first",
        f"Dropped {ids[0]}: 5 of at most 400 tokens were written",
        f"Dropped {ids[1]}: 0 of at most 400 tokens were written",
    ]
    server.engine.gate.release()  # the round that runs
    text = read_all(streamed)
    assert "the server shut down before the answer was complete" in text and "[DONE]" not in text
    assert " 503 " in read_all(whole).splitlines()[0]
    server.thread.join(30)
    assert not server.thread.is_alive()


def test_nobody_is_let_in_while_the_server_ends(serve, until):
    server = serve(grace=30.0)
    server.service.close()
    status, headers, reply = server.post()
    assert status == 503 and headers["retry-after"] and "shutting down" in reply["error"]["message"]
    assert server.ask("GET", "/health")[::2] == (503, {"status": "closing"})


def test_a_silent_stream_gets_comments(serve, until, monkeypatch):
    from experiments.serve import app

    monkeypatch.setattr(app, "PAUSE", 0.05)
    server = serve()
    link = opened(server, stream=True, max_tokens=1)
    text = ""
    while text.count(": the answer is on its way") < 3:
        text += link.recv(65536).decode()
    server.engine.gate.release()
    while "[DONE]" not in text:
        text += link.recv(65536).decode()
    link.close()


def test_a_reader_that_does_not_read_stops_nobody_else(serve, until):
    server = serve()
    link = opened(server, messages=HELLO, stream=True, max_tokens=1900)
    until(lambda: server.scheduler.stats()["finished"]["length"] == 1)
    assert server.post()[0] == 200
    link.close()
    until(lambda: not server.service.live)


def test_an_engine_whose_thread_ended_is_told(serve, until, monkeypatch, caplog):
    server = serve()
    links = [opened(server), opened(server, stream=True)]
    stats = server.scheduler.stats
    until(lambda: stats()["running"] == stats()["queued"] == 1)  # both are there

    def fault():
        raise RuntimeError("a fault")

    monkeypatch.setattr(server.scheduler, "_pass", fault)
    server.engine.gate.release()
    assert " 500 " in read_some(links[0]) and "the engine failed" in read_some(links[1])
    server.service.worker.join(10)
    assert server.ask("GET", "/health")[::2] == (503, {"status": "failed"})
    assert server.post()[0] == 503 and "the engine's thread ended" in caplog.text
    assert server.scheduler.stats()["running"] == server.scheduler.stats()["queued"] == 0


def test_many_clients_at_once_get_their_own_answers(serve):
    server, wrong = serve(), []

    def client(n):
        for i in range(5):
            said = f"I am number {n}, and this is {i}"
            _, _, reply = server.post(messages=[{"role": "user", "content": said}], max_tokens=60)
            text = reply["choices"][0]["message"]["content"]
            if text != (f"{said.upper()} " * 9)[:60]:
                wrong.append((n, i, text))

    threads = [threading.Thread(target=client, args=[n]) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and server.scheduler.stats()["requests"] == 60
