"""What is answered, and what is refused: statuses and the error's fields."""

import json
from pathlib import Path

import pytest

from experiments.serve import page

JSON = {"content-type": "application/json"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "changes, param",
    [
        (dict(messages=None), "messages"),
        (dict(messages=[]), "messages"),
        (dict(messages="hello"), "messages"),
        (dict(messages=["hello"]), "messages[0]"),
        (dict(messages=[{"role": "king", "content": "a"}]), "messages[0].role"),
        (dict(messages=[{"role": ["user"], "content": "a"}]), "messages[0].role"),
        (dict(messages=[{"role": "user"}]), "messages[0].content"),
        (dict(messages=[*HELLO, {"role": "user", "content": 3}]), "messages[1].content"),
        (dict(messages=[{"role": "user", "content": []}]), "messages[0].content"),
        (
            dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "messages[0].content",
        ),
        (dict(messages=[{"role": "user", "content": "\ud800"}]), "messages"),
        (dict(messages=[{"role": "tool", "content": "a"}]), "messages[0].tool_call_id"),
        (dict(messages=[{"role": "function", "content": "a"}]), "messages[0].role"),
        (dict(model=None), "model"),
        (dict(model=3), "model"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(max_tokens=1.5), "max_tokens"),
        (dict(max_tokens=True), "max_tokens"),
        (dict(max_tokens="8"), "max_tokens"),
        (dict(max_tokens=10**30), "max_tokens"),
        (dict(max_tokens=8, max_completion_tokens=9), "max_tokens"),
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=1e-9), "temperature"),
        (dict(temperature=10**400), "temperature"),
        (dict(temperature="hot"), "temperature"),
        (dict(top_p=0), "top_p"),
        (dict(top_p=1.1), "top_p"),
        (dict(top_k=-1), "top_k"),
        (dict(min_p=2), "min_p"),
        (dict(seed=-1), "seed"),
        (dict(seed=2**32), "seed"),
        (dict(seed=1.0), "seed"),
        (dict(n=0), "n"),
        (dict(n=17), "n"),
        (dict(stop=""), "stop"),
        (dict(stop=["a", 3]), "stop"),
        (dict(stop=["a"] * 17), "stop"),
        (dict(stop="a" * 257), "stop"),
        (dict(stream="yes"), "stream"),
        (dict(stream_options={"include_usage": True}), "stream_options"),
        (dict(stream=True, stream_options={"include_usage": 1}), "stream_options"),
        (dict(stream=True, stream_options=[]), "stream_options"),
        (dict(no_such_field=1), "no_such_field"),
        (dict(chat_template="{{ 1 }}"), "chat_template"),
        (dict(response_format={"type": "json_object"}), "response_format"),
        (dict(tools=[{"type": "function"}]), "tools[0]"),
        (dict(tool_choice="required"), "tool_choice"),
        (dict(logprobs=0), "logprobs"),
        (dict(top_logprobs=2), "top_logprobs"),
        (dict(logprobs=False, top_logprobs=2), "top_logprobs"),
        (dict(logprobs=True, top_logprobs=21), "top_logprobs"),
        (dict(logprobs=True, top_logprobs=True), "top_logprobs"),
        (dict(logit_bias={"5": 1}), "logit_bias"),
        (dict(frequency_penalty=0.5), "frequency_penalty"),
        (dict(max_tokens=2000), "messages"),
    ],
)
def test_a_wrong_field_is_named(server, changes, param):
    status, _, reply = server.post(**changes)
    error = reply["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert param.split("[")[0].split(".")[0] in error["message"] or param == "messages"
    assert server.scheduler.stats()["running"] == 0


@pytest.mark.parametrize(
    "changes, param",
    [
        (dict(), "prompt"),
        (dict(prompt=3), "prompt"),
        (dict(prompt=[]), "prompt"),
        (dict(prompt=["a", [1], 2]), "prompt"),
        (dict(prompt=[[]]), "prompt"),
        (dict(prompt=[True]), "prompt"),
        (dict(prompt=[2**40]), "prompt"),
        (dict(prompt=["a"] * 5, n=4), "n"),
        (dict(prompt="a", echo=True), "echo"),
        (dict(prompt="a", best_of=2), "best_of"),
        (dict(prompt="a", suffix="b"), "suffix"),
        (dict(prompt="a", messages=HELLO), "messages"),
        (dict(prompt="a", logprobs=True), "logprobs"),
        (dict(prompt="a", logprobs=6), "logprobs"),
        (dict(prompt="a", top_logprobs=2), "top_logprobs"),
        (dict(prompt="a", max_completion_tokens=3), "max_completion_tokens"),
    ],
)
def test_a_wrong_field_of_a_text_is_named(server, changes, param):
    status, _, reply = server.post(TEXT, **changes)
    assert (status, reply["error"]["param"]) == (400, param)


def test_ids_that_the_model_has_not_and_empty_prompts(server):
    status, _, reply = server.post(TEXT, prompt=[1, 300])
    assert status == 400 and "ids from 0 to 256" in reply["error"]["message"]
    status, _, reply = server.post(TEXT, prompt=[-1])
    assert status == 400 and "token id -1" in reply["error"]["message"]
    status, _, reply = server.post(TEXT, prompt="")
    assert status == 400 and "the prompt is empty" in reply["error"]["message"]


def test_a_prompt_that_does_not_fit_has_openais_code(server):
    for changes in (
        dict(max_tokens=1990),
        dict(messages=[{"role": "user", "content": "a" * 3000}]),
    ):
        status, _, reply = server.post(**changes)
        error = reply["error"]
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert "the 2000 of a conversation here" in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000],
)
def test_a_body_that_is_no_object(server, body):
    status, _, reply = server.ask("POST", CHAT, body, JSON)
    assert status == 400 and "the body is" in reply["error"]["message"]


def test_other_faults_have_their_status(server):
    status, _, reply = server.post(model="gpt-7")
    error = reply["error"]
    assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")
    assert "'gpt-7'" in error["message"] and "'tiny'" in error["message"]
    assert server.ask("GET", "/v1/models/gpt-7")[0] == 404
    assert server.ask("GET", "/v1/nothing")[2]["error"]["message"] == "unknown URL: GET /v1/nothing"
    status, headers, reply = server.ask("GET", CHAT)
    assert (
        status == 405 and headers["allow"] == "POST" and "not allowed" in reply["error"]["message"]
    )
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, _, reply = server.ask("POST", CHAT, b"{}", {"content-type": kind})
        assert status == 415 and "not application/json" in reply["error"]["message"]


def test_half_a_surrogate_pair_in_any_field_is_no_fault_of_the_server(server):
    assert server.post(model="\ud800")[0] == 404
    assert server.post(**{"\ud800": 1})[0] == 400
    status, _, reply = server.post(stop=["\ud800"])
    assert status == 200 and reply["choices"][0]["message"]["content"] == "HELLO HE"


def test_fields_without_effect_pass_with_the_value_that_changes_nothing(server):
    neutral = dict(
        response_format={"type": "text"}, tools=[], tool_choice="none", logprobs=False,
        top_logprobs=0, logit_bias={}, frequency_penalty=0, presence_penalty=0.0, user="me",
        metadata={"a": "b"}, store=True, stop=None, seed=None, top_k=0, stream_options=None,
    )  # fmt: skip
    status, _, reply = server.post(**neutral)
    assert status == 200 and reply["choices"][0]["message"]["content"] == "HELLO HE"


def test_a_chat_answer(server):
    status, _, reply = server.post(max_tokens=9)
    (choice,) = reply["choices"]
    assert status == 200 and reply["object"] == "chat.completion" and reply["model"] == "tiny"
    assert reply["id"].startswith("chatcmpl-") and choice["finish_reason"] == "length"
    assert choice["message"] == {"role": "assistant", "content": "HELLO HEL", "refusal": None}
    prompt = len("user: hello\nassistant:")
    assert reply["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": 9, "total_tokens": prompt + 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    # One token with the prompt, then two rounds of a quarter of a second and a gigabyte each.
    assert choice["thimble"] == {
        "tokens": 9, "accepted": 6, "tau": 4.0, "tokens_per_s": 16.0, "streamed_gb_s": 4.0,
    }  # fmt: skip


def test_roles_parts_and_the_end_of_a_turn(server):
    messages = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("good", "bye")]},
    ]
    _, _, reply = server.post(messages=messages, max_tokens=None)
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == "GOODBYE " and choice["finish_reason"] == "stop"
    assert reply["usage"]["prompt_tokens"] == len("system: be short\nuser: goodbye\nassistant:")
    assert reply["usage"]["completion_tokens"] == 9  # with the token that ended it


def test_without_a_limit_the_answer_fills_the_conversation(server):
    _, _, reply = server.post(max_tokens=None)
    assert reply["usage"]["total_tokens"] == 2000
    assert reply["choices"][0]["finish_reason"] == "length"
    _, _, reply = server.post(TEXT, prompt="a", max_tokens=None)
    assert reply["usage"]["completion_tokens"] == 16


def test_several_answers_to_several_prompts(server):
    server.engine.samplers.clear()
    _, _, reply = server.post(TEXT, prompt=["one", "twooo"], n=2, max_tokens=4, seed=2**32 - 1,
                              temperature=0.5, top_p=0.9, top_k=7, min_p=0.1)  # fmt: skip
    assert [c["text"] for c in reply["choices"]] == ["ONE ", "ONE ", "TWOO", "TWOO"]
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2, 3]
    assert reply["object"] == "text_completion" and reply["id"].startswith("cmpl-")
    assert reply["usage"]["prompt_tokens"] == 8 and reply["usage"]["completion_tokens"] == 16
    samplers, seeds = zip(*server.engine.samplers)
    assert seeds == (2**32 - 1, 0) * 2
    assert {(s.temperature, s.top_p, s.top_k, s.min_p) for s in samplers} == {(0.5, 0.9, 7, 0.1)}


def test_seeds_are_drawn_where_none_is_given(server):
    server.engine.samplers.clear()
    for _ in range(4):
        server.post(temperature=1)
    assert len({seed for _, seed in server.engine.samplers}) == 4
    server.engine.samplers.clear()
    server.post(top_p=0.5)  # greedy: the filters change nothing, and neither does a seed
    (sampler, seed) = server.engine.samplers[0]
    assert sampler == type(sampler)() and seed == 0


def events(text):
    """The values of a stream's events, and whether it was complete."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    values = [line.removeprefix("data: ") for line in lines]
    done = values[-1] == "[DONE]"
    return [json.loads(v) for v in (values[:-1] if done else values)], done


def test_a_stream_is_the_same_answer_in_pieces(server):
    ask = dict(max_tokens=20, stop=["O H"], n=2)
    status, headers, text = server.post(**ask, stream=True, stream_options={"include_usage": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    pieces, done = events(text)
    assert done and len({p["id"] for p in pieces}) == 1
    *pieces, last = pieces
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 14
    assert all(p["usage"] is None for p in pieces)
    _, _, whole = server.post(**ask)
    assert whole["usage"] == last["usage"]
    for choice in whole["choices"]:
        own = [p for p in pieces if p["choices"][0]["index"] == choice["index"]]
        deltas = [p["choices"][0]["delta"] for p in own]
        assert deltas[0] == {"role": "assistant", "content": ""}
        text = "".join(d["content"] for d in deltas)
        assert text == choice["message"]["content"] == "HELL"
        ends = [p["choices"][0]["finish_reason"] for p in own]
        assert ends == [None] * (len(own) - 1) + ["stop"]
        assert own[-1]["thimble"] == choice["thimble"] | {"parts": own[-1]["thimble"]["parts"]}


def test_pieces_say_who_proposed_them(server):
    _, _, text = server.post(max_tokens=9, stream=True)
    parts = [tuple(part) for p in events(text)[0][1:] for part in p["thimble"]["parts"]]
    assert parts == [("H", False), ("ELL", True), ("O", False), (" HE", True), ("L", False)]


def test_a_stream_of_text(server):
    _, _, text = server.post(TEXT, prompt="one", max_tokens=5, stream=True)
    pieces, done = events(text)
    assert done and "".join(p["choices"][0]["text"] for p in pieces) == "ONE O"
    assert all("usage" not in p and p["object"] == "text_completion" for p in pieces)


def test_a_round_that_fails_is_an_error_of_the_server(server):
    broken = dict(messages=[{"role": "user", "content": "broken"}])
    status, _, reply = server.post(**broken)
    assert status == 500 and reply["error"]["type"] == "server_error"
    assert reply["error"]["message"] == "the model computes NaN"
    status, _, text = server.post(**broken, stream=True)
    pieces, done = events(text)
    assert status == 200 and not done  # it had begun
    assert pieces[-1] == {"error": reply["error"]}
    assert server.post()[0] == 200


def test_models_health_and_metrics(server):
    _, _, models = server.ask("GET", "/v1/models")
    (model,) = models["data"]
    assert models["object"] == "list" and model["id"] == "tiny" and model["object"] == "model"
    assert model["thimble"]["max_length"] == 2000
    assert server.ask("GET", "/v1/models/tiny")[2] == model
    assert server.ask("GET", "/health")[::2] == (200, {"status": "ok"})
    before = read_metrics(server)
    server.post(max_tokens=9)
    server.post(temperature=-1)
    server.ask("GET", "/no/such/path")
    after = read_metrics(server)
    gained = {k: v - before.get(k, 0.0) for k, v in after.items()}
    assert gained["thimble_tokens_total"] == 9 and gained["thimble_passes_total"] == 3
    assert gained["thimble_prompt_tokens_total"] == len("user: hello\nassistant:")
    assert gained["thimble_streamed_bytes_total"] == 3e9
    assert gained['thimble_requests_total{end="length"}'] == 1
    path = "/v1/chat/completions"
    assert gained[f'thimble_http_answers_total{{path="{path}",status="200"}}'] == 1
    assert gained[f'thimble_http_answers_total{{path="{path}",status="400"}}'] == 1
    assert gained['thimble_http_answers_total{path="other",status="404"}'] == 1
    assert gained["thimble_first_token_seconds_count"] == 1
    assert after["thimble_running"] == after["thimble_queued"] == 0
    assert 1 < after["thimble_tau"] <= 4


def read_metrics(server):
    lines = server.ask("GET", "/metrics")[2].splitlines()
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_the_page_is_one_small_file():
    text = Path(page.PAGE).read_text()
    assert len(text) < 40_000 and text.count("<script") == text.count("<style") == 1
    assert "innerHTML" not in text and "eval(" not in text and "document.write" not in text
