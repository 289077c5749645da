"""Tools over HTTP, with OpenAI's own client and a model that says what a test tells it to."""

import contextlib
import functools
import json
from pathlib import Path

import jsonschema
import openai
import pytest
from processes import process
from tool_templates import CODER, HARMONY, HERMES, LLAMA, MISTRAL, NO_TOOLS, UNKNOWN

from experiments.serve.body import Body
from experiments.serve.call_formats import format_of
from experiments.serve.tools import asked_tools, forced_call

QWEN = Path.home() / "models" / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
SUM = {
    "type": "function",
    "function": {
        "name": "sum",
        "description": "Adds → numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "array"}}},
        "strict": True,
    },
}
NAMED = {"name": "now"}
NOW = {"type": "function", "function": NAMED}
ASK = dict(model="tiny", messages=[{"role": "user", "content": "hello"}], tools=[SUM, NOW])
CALLS = 'I add.\n<tool_call>\n{"name": "sum", "arguments": {"a": [1, "→"]}}\n</tool_call>\n'
CALLS += '<tool_call>\n{"name": "later", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def served(servers):
    """f(template) -> (a server, its client), one for each template."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def of(template=HERMES):
            server = servers(template=template)
            how = dict(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
            return server, stack.enter_context(openai.OpenAI(**how))

        yield of


def joined(stream):
    """(content, calls, the end) of a stream's pieces, put together as clients do it."""
    content, calls, ends = "", {}, []
    for piece in stream:
        (choice,) = piece.choices
        content += choice.delta.content or ""
        for delta in choice.delta.tool_calls or ():
            call = calls.setdefault(delta.index, {"id": "", "name": "", "arguments": ""})
            call["id"] += delta.id or ""
            call["name"] += delta.function.name or ""
            call["arguments"] += delta.function.arguments or ""
        ends.append(choice.finish_reason)
    assert not any(ends[:-1])
    return content, [calls[i] for i in range(len(calls))], ends[-1]


@pytest.mark.parametrize(
    "script, changes, content, calls, end",
    [
        (CALLS, {}, "I add.", [("sum", {"a": [1, "→"]}), ("later", {})], "tool_calls"),
        (CALLS[7:], {}, None, [("sum", {"a": [1, "→"]}), ("later", {})], "tool_calls"),
        (CALLS, dict(parallel_tool_calls=False), "I add.", [("sum", {"a": [1, "→"]})],
         "tool_calls"),
        (CALLS, dict(max_tokens=100), f"I add.{CALLS[80:98]}", [("sum", {"a": [1, "→"]})],
         "length"),
        (CALLS, dict(max_tokens=40), CALLS[:40], [], "length"),
        (CALLS, dict(stop=["</tool"]), "I add.", [("sum", {"a": [1, "→"]})], "tool_calls"),
        (CALLS, dict(tool_choice="none"), CALLS, [], "stop"),
        (CALLS, dict(tools=[]), CALLS, [], "stop"),
        ("Nothing to add. ", {}, "Nothing to add. ", [], "stop"),
        ("", {}, "", [], "stop"),
        ("<tool_call>{oh</tool_call>", {}, "<tool_call>{oh</tool_call>", [], "stop"),
    ],
)  # fmt: skip
def test_calls_come_as_openai_has_them(served, script, changes, content, calls, end):
    server, client = served()
    server.engine.script = script
    whole = client.chat.completions.create(**ASK | changes).choices[0]
    found = whole.message.tool_calls or []
    if changes.get("max_tokens") == 100:  # the second call is cut, and so content
        assert whole.message.content.startswith("I add.<tool_call>\n{")
        content = whole.message.content
    assert (whole.message.content, whole.finish_reason) == (content, end)
    assert [(c.function.name, json.loads(c.function.arguments)) for c in found] == calls
    assert all(c.type == "function" and c.id.startswith("call_") for c in found)
    assert len({c.id for c in found}) == len(found)
    said, streamed, ended = joined(client.chat.completions.create(**ASK | changes, stream=True))
    assert (said, ended) == (content or "", end)
    assert [(c["name"], c["arguments"]) for c in streamed] == [
        (c.function.name, c.function.arguments) for c in found
    ]
    assert all(c["id"].startswith("call_") for c in streamed)


def test_several_answers_have_their_own_calls(served):
    server, client = served()
    server.engine.script = CALLS
    choices = client.chat.completions.create(**ASK, n=3).choices
    assert len({call.id for c in choices for call in c.message.tool_calls}) == 6
    pieces = list(client.chat.completions.create(**ASK, n=3, stream=True))
    for index in range(3):
        own = [piece for piece in pieces if piece.choices[0].index == index]
        content, calls, _ = joined(own)
        assert content == "I add." and [c["name"] for c in calls] == ["sum", "later"]


def test_the_prompt_is_the_templates(served):
    """A call and its result go back as they came, and `strict` is not for the model."""
    server, client = served()
    server.engine.script = CALLS
    message = client.chat.completions.create(**ASK).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "3"}]}
        for call in message.tool_calls
    ]
    seen, tokenizer = [], server.engine.tokenizer
    chat = type(tokenizer).chat
    object.__setattr__(
        tokenizer, "chat", lambda *given: seen.append(given) or chat(tokenizer, *given)
    )
    server.engine.script = "It is 3."
    messages = [*ASK["messages"], message.model_dump(exclude_none=True), *results]
    reply = client.chat.completions.create(**ASK | dict(messages=messages))
    object.__delattr__(tokenizer, "chat")
    assert reply.choices[0].message.content == "It is 3."
    text = tokenizer.decode(chat(tokenizer, *seen[-1]))
    assert CALLS in text and text.count("<tool_response>\n3\n</tool_response>") == 2
    assert '{"name": "sum", "description": "Adds → numbers.", "parameters"' in text
    assert "strict" not in text
    assert reply.usage.prompt_tokens == len(text.encode())
    assert [m.get("name") for m in seen[-1][0][-2:]] == ["sum", "later"]


def test_ids_are_those_that_a_template_takes_back(served):
    server, client = served(MISTRAL)
    server.engine.script = '[TOOL_CALLS][{"name": "now", "arguments": {}}]'
    message = client.chat.completions.create(**ASK).choices[0].message
    (call,) = message.tool_calls
    assert len(call.id) == 9 and call.id.isalnum()
    result = {"role": "tool", "tool_call_id": call.id, "content": "noon"}
    messages = [*ASK["messages"], message.model_dump(exclude_none=True), result]
    server.engine.script = "It is noon."
    reply = client.chat.completions.create(**ASK | dict(messages=messages))
    assert reply.choices[0].message.content == "It is noon."
    result["tool_call_id"] = "call_1"  # which this template does not take
    with pytest.raises(openai.BadRequestError, match="ids have length 9"):
        client.chat.completions.create(**ASK | dict(messages=messages))


def test_types_are_the_schemas(served):
    server, client = served(CODER)
    server.engine.script = "<function=sum><parameter=a>[1]</parameter></function>"
    (call,) = client.chat.completions.create(**ASK).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"a": [1]}


@pytest.mark.parametrize("template", (None, NO_TOOLS, UNKNOWN))
def test_a_model_that_knows_no_tools(served, template):
    server, client = served(template)
    server.engine.script = CALLS
    with pytest.raises(openai.BadRequestError, match=r"tools|calls") as found:
        client.chat.completions.create(**ASK)
    assert found.value.param == "tools"
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    with pytest.raises(openai.BadRequestError, match="shows no calls") as found:
        client.chat.completions.create(**ASK | dict(tools=[], messages=[*ASK["messages"], said]))
    assert found.value.param == "messages"
    reply = client.chat.completions.create(**ASK | dict(tool_choice="none"))
    assert reply.choices[0].message.content == CALLS  # they are not shown, and none is read


def deep(levels):
    return {"a": deep(levels - 1)} if levels else {}


def call_with(**changes):
    function = {"name": "f", "arguments": "{}"}
    call = {"id": "a", "type": "function", "function": function} | changes
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    return dict(messages=[{"role": "user", "content": "a"}, message])


def tool(**changes):
    return dict(tools=[{"type": "function", "function": {"name": "f"} | changes}])


@pytest.mark.parametrize(
    "changes, param",
    [
        (dict(tools={}), "tools"),
        (dict(tools=[NOW] * 129), "tools"),
        (dict(tools=[NOW, NOW]), "tools"),
        (dict(tools=["now"]), "tools[0]"),
        (dict(tools=[NOW, {"type": "custom"}]), "tools[1]"),
        (tool(name="a b"), "tools[0].function.name"),
        (tool(name="a" * 65), "tools[0].function.name"),
        (tool(name=3), "tools[0].function.name"),
        (tool(description=3), "tools[0].function.description"),
        (tool(parameters=[]), "tools[0].function.parameters"),
        (tool(strict=1), "tools[0].function.strict"),
        (tool(parameters=deep(900)), "tools[0]"),
        (dict(tools=None, tool_choice="required"), "tool_choice"),
        (dict(tool_choice="required", response_format={"type": "json_object"}), "tool_choice"),
        (dict(tool_choice={"type": "function", "function": {"name": "now"}}), "tool_choice"),
        (dict(tool_choice={"type": "function", "function": "sum"}), "tool_choice"),
        (dict(tool_choice="sometimes"), "tool_choice"),
        (dict(tool_choice=[]), "tool_choice"),
        (dict(parallel_tool_calls="no"), "parallel_tool_calls"),
        (dict(functions=[{}]), "functions"),
        (dict(messages=[{"role": "tool", "tool_call_id": 3, "content": "a"}]),
         "messages[0].tool_call_id"),
        (dict(messages=[{"role": "tool", "tool_call_id": "a"}]), "messages[0].content"),
        (dict(messages=[{"role": "user", "content": "a", "tool_calls": [{}]}]), "messages[0]"),
        (dict(messages=[{"role": "assistant", "tool_calls": {"a": 1}}]),
         "messages[0].tool_calls"),
        (call_with(id=None), "messages[1].tool_calls[0]"),
        (call_with(type="custom"), "messages[1].tool_calls[0]"),
        (call_with(function="f"), "messages[1].tool_calls[0]"),
        (call_with(function={"name": "f", "arguments": {}}),
         "messages[1].tool_calls[0].function.arguments"),
        (call_with(function={"arguments": "{}"}), "messages[1].tool_calls[0].function.name"),
        (call_with(function={"name": "f", "arguments": json.dumps(deep(900))}),
         "messages[1].tool_calls[0]"),
        (call_with(function={"name": "f", "arguments": "\ud800"}), "messages"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(served, changes, param):
    server, _ = served()
    status, _, reply = server.post(**dict(tools=[SUM]) | changes)
    assert (status, reply["error"]["param"]) == (400, param)
    server.engine.script = "Fine."
    fine = call_with(function={"name": "any/name", "arguments": "no JSON"})
    assert server.post(tools=[SUM], **fine)[0] == 200


@pytest.mark.parametrize("template, key", [(HERMES, "arguments"), (LLAMA, "parameters")])
@pytest.mark.parametrize(
    "choice, names",
    [("required", {"sum", "now"}), (dict(type="function", function=NAMED), {"now"})],
)
def test_a_call_that_must_be_made_is_json_of_a_schema(template, key, choice, names):
    """By an independent validator of schemas."""
    asked = dict(tools=[SUM, NOW], tool_choice=choice)
    found = forced_call(format_of(template), asked_tools(Body(json.dumps(asked).encode())))
    assert (found.kind, found.field) == ("json", "tools")
    validator = jsonschema.Draft202012Validator(json.loads(found.text))
    for call, fine in (
        ({"name": "sum", key: {"a": [1]}}, "sum" in names),
        ({"name": "now", key: {}}, True),
        ({"name": "sum", key: {"a": 1}}, False),
        ({"name": "sum"}, False),
        ({"name": "other", key: {}}, False),
    ):
        assert validator.is_valid(call) == fine


@pytest.mark.parametrize("template", [MISTRAL, CODER, HARMONY])
def test_calls_in_another_form_cannot_be_forced(served, template):
    server, _ = served(template)
    status, _, reply = server.post(tools=[SUM], tool_choice="required")
    assert (status, reply["error"]["param"]) == (400, "tool_choice")
    assert "cannot be forced" in reply["error"]["message"]


def test_the_channels_of_gpt_oss_are_no_text_of_an_answer(served):
    """With tools and without; a call that nobody asked for is told as content."""
    server, client = served(HARMONY)
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    server.engine.script = f"{thought}<|channel|>final<|message|>It is noon."
    call = f'{thought}<|channel|>commentary to=functions.now <|constrain|>json<|message|>{{"a": 1}}'
    for tools in (ASK["tools"], []):
        server.engine.script = f"{thought}<|channel|>final<|message|>It is noon."
        choice = client.chat.completions.create(**ASK | dict(tools=tools)).choices[0]
        assert choice.message.content == "Hm.\n\nIt is noon."
        assert joined(client.chat.completions.create(**ASK | dict(tools=tools), stream=True)) == (
            choice.message.content, [], "stop"
        )  # fmt: skip
        server.engine.script = call
        choice = client.chat.completions.create(**ASK | dict(tools=tools)).choices[0]
        if tools:
            assert choice.message.tool_calls[0].function.name == "now"
            assert choice.message.content == "Hm."
        else:
            assert choice.message.content == 'Hm.now {"a": 1}' and choice.finish_reason == "stop"
    text = client.completions.create(model="tiny", prompt="a", max_tokens=200).choices[0].text
    assert text == call


@pytest.mark.slow
@pytest.mark.skipif(not QWEN.exists(), reason=f"{QWEN} is not there")
def test_qwen_calls_a_tool_and_reads_its_result():
    flags = ["--model", QWEN, "--memory-limit", "1500MB", "--max-length", "1024", "--port", "0"]
    weather = {
        "name": "get_weather",
        "description": "Get the current weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    }
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(process([*flags, "--name", "qwen"]))
        how = dict(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
        client = stack.enter_context(openai.OpenAI(**how))
        messages = [{"role": "user", "content": "What is the weather in Paris right now?"}]
        ask = dict(model="qwen", max_tokens=60)
        ask |= dict(tools=[{"type": "function", "function": weather}], messages=messages)
        (choice,) = client.chat.completions.create(**ask).choices
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        content, calls, end = joined(client.chat.completions.create(**ask, stream=True))
        assert (content, end) == ("", "tool_calls")
        assert [(c["name"], c["arguments"]) for c in calls] == [
            (call.function.name, call.function.arguments)
        ]
        forced = dict(tool_choice={"type": "function", "function": {"name": "get_weather"}})
        say = [{"role": "user", "content": "Tell me a joke."}]
        (must,) = client.chat.completions.create(**ask | forced | dict(messages=say)).choices
        assert must.message.tool_calls[0].function.name == "get_weather"
        messages.append(choice.message.model_dump(exclude_none=True))
        result = {"role": "tool", "tool_call_id": call.id, "content": "17 degrees, rain"}
        messages.append(result)
        ask["tool_choice"] = "none"  # so small a model would call again and again
        reply = client.chat.completions.create(**ask)
        assert "rain" in reply.choices[0].message.content
