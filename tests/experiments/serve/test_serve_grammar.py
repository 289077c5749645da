"""`response_format`: the command as a process, asked by OpenAI's client, and what is refused."""

import json
import re
from pathlib import Path

import jsonschema
import openai
import pytest
from processes import process
from tool_templates import HERMES

from experiments.serve.body import Body
from experiments.serve.errors import ApiError
from experiments.serve.response_format import MOST, ResponseFormat, format_of
from llm_jax.testing import tiny_config, tiny_params, write_safetensors

pytest.importorskip("llguidance", reason="it follows the grammars")
CFG = tiny_config("qwen2", layers=3)
FLAGS = "--memory-limit 16MB --depth 3 --width 2 --draft-group 16 --resident 1 --max-length 512"
FLAGS = [*FLAGS.split(), "--chunk", "64", "--port", "0", "--parallel", "2"]
FAST = dict(JAX_DISABLE_MOST_OPTIMIZATIONS="true")
SMOLLM2 = Path.home() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 3},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def of_schema(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema} | more}


# ------------------------------------------------------------------ fields


@pytest.mark.parametrize(
    "asked, expected",
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, ResponseFormat("json", '{"type": "object"}')),
        (of_schema({"type": "null"}), ResponseFormat("json", '{"type": "null"}', lenient=True)),
        (of_schema({}, strict=True, description="x"), ResponseFormat("json", "{}", lenient=False)),
        ({"type": "regex", "pattern": "a+"}, ResponseFormat("regex", "a+")),
        ({"type": "grammar", "grammar": "start: A"}, ResponseFormat("lark", "start: A")),
    ],
)
def test_the_forms(asked, expected):
    assert format_of(Body(json.dumps({"response_format": asked}).encode())) == expected


@pytest.mark.parametrize(
    "asked, expected",
    [
        ("json", "is no object"),
        ([], "is no object"),
        ({}, "is no object"),
        ({"type": "xml"}, 'is no object with "type": text, json_object, json_schema, regex'),
        ({"type": ["text"]}, "is no object"),
        ({"type": "text", "schema": {}}, "has the unknown field 'schema'"),
        ({"type": "json_schema"}, ".json_schema is no object with"),
        ({"type": "json_schema", "json_schema": {"schema": "x"}}, ".json_schema is no object with"),
        (of_schema({}, schemas={}), ".json_schema has the unknown field 'schemas'"),
        (of_schema({}, strict="yes"), ".json_schema.strict is neither true nor false"),
        (of_schema({"enum": ["a" * MOST]}), f".json_schema.schema is longer than {MOST:,}"),
        ({"type": "regex"}, ".pattern is no text"),
        ({"type": "regex", "pattern": ""}, ".pattern is no text"),
        ({"type": "grammar", "grammar": 3}, ".grammar is no text"),
    ],
)
def test_what_is_no_format(asked, expected):
    with pytest.raises(ApiError) as caught:
        format_of(Body(json.dumps({"response_format": asked}).encode()))
    error = caught.value.body["error"]
    space = "" if expected[0] == "." else " "
    assert error["message"].startswith(f"response_format{space}{expected}")
    assert error["param"] == "response_format"


# ------------------------------------------------------------------ a process


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = write_safetensors(tmp_path_factory.mktemp("m") / "thumb", tiny_params(CFG), CFG)
    (folder / "chat_template.jinja").write_text(HERMES)
    with (
        process(["--model", folder, *FLAGS], **FAST) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(client, text="Hi", model="thumb", **how):
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], **({"max_tokens": 300} | how)
    )


def test_an_answer_is_json_of_its_schema(client):
    for how in (dict(), dict(temperature=1.0, seed=3), dict(temperature=0.9, top_p=0.9, seed=4)):
        found = ask(client, response_format=of_schema(PERSON, strict=True), **how)
        (choice,) = found.choices
        jsonschema.validate(json.loads(choice.message.content), PERSON)
        assert choice.finish_reason == "stop"
        pieces = list(ask(client, response_format=of_schema(PERSON), stream=True, **how))
        text = "".join(p.choices[0].delta.content or "" for p in pieces)
        assert (text, pieces[-1].choices[0].finish_reason) == (choice.message.content, "stop")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "pet"}}])
def test_a_call_is_made_where_it_must_be(client, choice):
    """By a model of random weights, which would never write one."""
    only = lambda **kinds: {
        "type": "object", "properties": kinds, "required": [*kinds], "additionalProperties": False
    }  # fmt: skip
    pet = dict(name="pet", parameters=only(kind={"enum": ["cat"]}))
    now = dict(name="now", parameters=only())
    tools = [{"type": "function", "function": f} for f in (pet, now)]
    for how in (dict(), dict(temperature=1.0, seed=3)):
        (found,) = ask(client, tools=tools, tool_choice=choice, max_tokens=60, **how).choices
        assert (found.finish_reason, found.message.content) == ("tool_calls", None)
        (call,) = found.message.tool_calls
        assert call.function.name in (("pet", "now") if choice == "required" else ("pet",))
        arguments = json.loads(call.function.arguments)
        jsonschema.validate(arguments, dict(pet=pet, now=now)[call.function.name]["parameters"])


def test_several_answers_and_one_without(client):
    free = ask(client, "free", max_tokens=20).choices[0].message.content
    with ask(client, "free", max_tokens=20, stream=True) as beside:
        first = next(beside)
        several = ask(client, n=3, response_format=of_schema(PERSON), temperature=1.0, seed=1)
        text = "".join(p.choices[0].delta.content or "" for p in (first, *beside))
    assert text == free  # the companion has no mask
    for choice in several.choices:
        jsonschema.validate(json.loads(choice.message.content), PERSON)


@pytest.mark.parametrize(
    "asked, matches",
    [
        ({"type": "regex", "pattern": "(yes|no), [0-9]{4}"}, r"(yes|no), \d{4}"),
        ({"type": "grammar", "grammar": 'start: "<" start ">" | /[ab]/'}, r"<*[ab]>*"),
    ],
)
def test_beyond_json(client, asked, matches):
    for how in (dict(), dict(temperature=1.0, seed=5)):
        (choice,) = ask(client, response_format=asked, max_tokens=60, **how).choices
        assert re.fullmatch(matches, choice.message.content) or choice.finish_reason == "length"
    prompt = dict(model="thumb", prompt="Say", max_tokens=60)
    found = client.completions.create(**prompt, extra_body={"response_format": asked})
    assert (
        re.fullmatch(matches, found.choices[0].text) or found.choices[0].finish_reason == "length"
    )


def test_an_answer_may_be_cut(client):
    (choice,) = ask(client, response_format=of_schema(PERSON), max_tokens=6).choices
    assert choice.finish_reason == "length" and choice.message.content.startswith('{"name')


@pytest.mark.parametrize(
    "asked, message",
    [
        (of_schema({"type": "nothing"}), "Invalid type: nothing"),
        (of_schema({"type": "array", "uniqueItems": True}, strict=True), "Unimplemented keys"),
        ({"type": "regex", "pattern": "(a"}, "invalid regex"),
        ({"type": "grammar", "grammar": "start: ("}, "Expected token"),
        (of_schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
    ],
)
def test_a_wrong_grammar_is_told(client, asked, message):
    with pytest.raises(openai.BadRequestError, match=re.escape(message)) as caught:
        ask(client, response_format=asked)
    assert caught.value.param == "response_format" and len(caught.value.body["message"]) < 400


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs SmolLM2 in ~/models")
def test_smollm2_answers_in_json():
    flags = ["--model", SMOLLM2, "--memory-limit", "450MB", "--max-length", "512", "--port", "0"]
    schema = PERSON | {"x-guidance": {}}
    with (
        process(flags) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        for text in ("Describe a sailor, in JSON.", "Who was Marie Curie? Answer in JSON."):
            for how in (dict(), dict(temperature=0.8, seed=1)):
                given = dict(model=server.model, response_format=of_schema(schema), **how)
                found = ask(client, text, max_tokens=120, **given)
                jsonschema.validate(json.loads(found.choices[0].message.content), schema)
                assert found.choices[0].finish_reason == "stop"
                assert found.choices[0].model_extra["thimble"]["tau"] > 3
