"""Calls in the text of an answer: written examples of each family's format, cut everywhere."""

import json
import random

import pytest
from tool_templates import HERMES, MISTRAL_TEXT, NO_TOOLS, TEMPLATES, UNKNOWN

from experiments.serve.call_formats import FORMATS, format_of
from experiments.serve.calls import Call, Reader

FORM = {form.name: form for form in FORMATS}
SCHEMAS = {
    "run": {
        "type": "object",
        "properties": {
            "code": {"type": "string"},
            "times": {"type": "integer"},
            "deep": {"type": "object"},
        },
    }
}
CALL = '<tool_call>\n{"name": "sum", "arguments": {"a": 1, "b": [2, {"c": "}"}]}}\n</tool_call>'
SUM = ("sum", {"a": 1, "b": [2, {"c": "}"}]})
LIST = '[{"name": "f", "arguments": {"x": "]"}}, {"name": "g", "arguments": {}, "id": "abcdefghi"}]'
WEATHER = '{"name": "weather", "parameters": {"city": "Zürich \\u2192 \\"old\\" {town"}}'
TOWN = ("weather", {"city": 'Zürich → "old" {town'})
HEAD = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
THOUGHT = "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant"

EXAMPLES = [
    # (format, text, content, calls)
    ("hermes", "Just text.\n", "Just text.\n", []),
    ("hermes", "a < b and <tool_ or <b>", "a < b and <tool_ or <b>", []),
    ("hermes", CALL, "", [SUM]),
    ("hermes", f"I look it up.\n\n{CALL}\n{CALL}\n", "I look it up.", [SUM, SUM]),
    ("hermes", f"{CALL}{CALL}", "", [SUM, SUM]),
    ("hermes", f"\n{CALL} Done.", "Done.", [SUM]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    ("hermes", '<tool_call>{"name": "n", "arguments": null}</tool_call>', "", [("n", {})]),
    ("hermes", '<tool_call>{"name": "n", "arguments": "{\\"a\\": 1}"}</tool_call>', "",
     [("n", {"a": 1})]),
    ("hermes", '<tool_call>{"arguments": {"t": "é→😀\\n</tool_call>"}, "name": "not here"}'
     "</tool_call>", "", [("not here", {"t": "é→😀\n</tool_call>"})]),
    ("hermes", CALL.removesuffix("\n</tool_call>"), "", [SUM]),  # its end is no matter
    ("hermes", CALL.removesuffix("call>"), "", [SUM]),
    ("hermes", f"{CALL.removesuffix('</tool_call>')}{CALL}", "", [SUM, SUM]),
    # without a tag the name must be a tool's
    ("hermes", '{"name": "run", "arguments": {"times": 3}}\n', "", [("run", {"times": 3})]),
    ("hermes", '```json\n{\n  "name": "run",\n  "arguments": {}\n}\n```', "", [("run", {})]),
    ("hermes", '```json\n{"name": "run", "arguments": {}}', "", [("run", {})]),
    ("hermes", '{"name": "run", "arguments": {}}\n' + CALL, "", [("run", {}), SUM]),
    # what never becomes a call is content, as it was written
    *(("hermes", f"Hm.\n{text}", f"Hm.\n{text}", []) for text in (
        "<tool_call>", "<tool_call>\n", "<tool_call>\nsum(1)\n</tool_call>\n",
        CALL[:-20], '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call> x',
        '<tool_call>{"name": f, "arguments": {}}</tool_call>', '<tool_call>["f"]</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": [1}]}</tool_call>',
        '<tool_call>' + '{"a":' * 3000 + "1" + "}" * 3000, "<tool_call>" * 3,
        '{"name": "run", "arguments": {}}', '```json\n{"name": "run", "arguments": {}}\n```',
    )),
    *(("hermes", text, text, []) for text in (
        '{"name": "sum", "arguments": {}}', '{"name": "run"}', '{"name": "run", "arguments": {}',
        '```json\n{"name": "sum", "arguments": {}}\n```', "```json\n[1]\n```", "```js", "```\n{}",
    )),
    ("hermes", f"<tool_call>{{oh}}</tool_call>\n{CALL}", "<tool_call>{oh}</tool_call>", [SUM]),
    ("hermes", f"<tool_call>{CALL}", "<tool_call>", [SUM]),
    ("llama", WEATHER, "", [TOWN]),
    ("llama", f"\n<|python_tag|>{WEATHER}", "", [TOWN]),
    ("llama", f"{WEATHER}; {WEATHER};\n{WEATHER}", "", [TOWN, TOWN, TOWN]),
    ("llama", f"{WEATHER}<|python_tag|>{WEATHER} is called.", "is called.", [TOWN, TOWN]),
    ("llama", f"I call. <|python_tag|>{WEATHER}", "I call.", [TOWN]),
    ("llama", '{"type": "function", "name": "f", "parameters": {}}', "", [("f", {})]),
    *(("llama", text, text, []) for text in (
        f"Such as {WEATHER}", '{"name": "Ada", "age": 3}', '{"name": "f"}', "{x} and {y}", "{",
        f"[{WEATHER}]", WEATHER[:-1], "<|python_tag|>print(1)", "Text.\n", '{"a": 1}\n' + WEATHER,
    )),
    ("mistral", f"[TOOL_CALLS] {LIST}", "", [("f", {"x": "]"}), ("g", {})]),
    ("mistral", f"Well. [TOOL_CALLS]{LIST}\n", "Well.", [("f", {"x": "]"}), ("g", {})]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"x": "{"}[TOOL_CALLS]my-tool.v2[ARGS] {}', "",
     [("f", {"x": "{"}), ("my-tool.v2", {})]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{"x": 1.5} ', "", [("f", {"x": 1.5})]),
    ("mistral", '[TOOL_CALLS]f{"x": []}', "", [("f", {"x": []})]),
    *(("mistral", text, text, []) for text in (
        "[TOOL_CALLS]", "[TOOL_CALLS][]", '[TOOL_CALLS][{"name": "f"}, 3]', "[TOOL_CALLS] [",
        "[TOOL_CALLS] no name {}", "[TOOL_CALLS]f[ARGS]", '[TOOL_CALLS]f[ARGS]{"x": 1',
        "[TOOL_CALLS]" + "x" * 400, "[TOOL_CALLS]" + " " * 400 + LIST, "[TOOL", "[1] [TOOL_X]",
    )),
    ("harmony", f'{HEAD}{{"x": 1}}', "", [("f", {"x": 1})]),
    ("harmony", f'{THOUGHT}{HEAD}{{"x": 1}}', "They ask.", [("f", {"x": 1})]),
    ("harmony", f"{THOUGHT}<|channel|>final<|message|>Yes.", "They ask.\n\nYes.", []),
    ("harmony", "<|channel|>final<|message|>Yes <b>.\n", "Yes <b>.\n", []),
    ("harmony", ' to=functions.a.b<|channel|>commentary json<|message|>{}', "", [("a.b", {})]),
    ("harmony", f"{THOUGHT} to=functions.f<|channel|>commentary<|message|>{{}}", "They ask.",
     [("f", {})]),
    ("harmony", "<|channel|>analysis<|message|>Hm.<|end|>", "Hm.", []),
    ("harmony", "<|channel|>comm", "comm", []),
    ("harmony", f"{HEAD}not json", f"{HEAD}not json", []),
    ("coder", "<tool_call>\n<function=run>\n<parameter=code>\nif a < b:\n  print('</')\n"
     "</parameter>\n<parameter=times>\n3\n</parameter>\n</function>\n</tool_call>", "",
     [("run", {"code": "if a < b:\n  print('</')", "times": 3})]),
    ("coder", "Now.\n<function=run>\n<parameter=deep>{\"a\": [1]}</parameter>\n"
     "<parameter=code>7</parameter><parameter=other>7</parameter></function>\n<tool_call>"
     "<function=x></function></tool_call>", "Now.",
     [("run", {"deep": {"a": [1]}, "code": "7", "other": 7}), ("x", {})]),
    ("coder", "<tool_call><function=run><parameter=times>many</parameter></function>", "",
     [("run", {"times": "many"})]),
    *(("coder", text, text, []) for text in (
        "<tool_call>", "<function=", "<function=run", "<function=>", "<tool_call>\n<funktion=a>",
        "<function=run>\n<parameter=code>\nabc", "<function=run>text</function>",
        "<function=" + "x" * 400 + ">", '<tool_call>{"name": "run"}</tool_call>',
    )),
]  # fmt: skip


def read(form, pieces):
    """(content, calls) of a text that comes in pieces."""
    reader = Reader(FORM[form], SCHEMAS)
    found = [part for piece in pieces for part in reader.push(piece)] + reader.flush()
    calls = [part for part in found if isinstance(part, Call)]
    assert reader.push("") == reader.flush() == []
    return "".join(part for part in found if isinstance(part, str)), calls


def cut(text, rng):
    cuts = sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randint(1, 9))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize(
    "form, text, content, calls", EXAMPLES, ids=[f"{e[0]}-{n}" for n, e in enumerate(EXAMPLES)]
)
def test_written_examples(form, text, content, calls):
    said, found = read(form, [text])
    assert said == content
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls
    assert read(form, text) == (said, found)  # a character at a time
    rng = random.Random(0)
    for _ in range(20):
        assert read(form, cut(text, rng)) == (said, found)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_written_comes_the_same_in_pieces(seed):
    """Examples that are cut off, joined and garbled: nothing is lost, and nothing depends on where
    the pieces end."""
    rng, own = random.Random(seed), [*FORM][seed]
    texts = [text for form, text, *_ in EXAMPLES if form == own and len(text) < 500]
    for _ in range(300):
        text = "".join(rng.choice(texts)[rng.randint(-9, 3) :] for _ in range(rng.randint(1, 4)))
        text = text[: rng.randint(0, len(text))]
        for _ in range(rng.randint(0, 3)):
            at = rng.randint(0, len(text))
            text = text[:at] + rng.choice([*'{}[]"\\ \n<;', "</", "a", ""]) + text[at + 1 :]
        whole = read(own, [text])
        assert read(own, text) == whole == read(own, cut(text, rng))
        if not whole[1] and own != "harmony":
            assert whole[0] == text


def test_content_comes_at_once_and_a_call_when_it_is_complete():
    reader, steps = Reader(FORM["hermes"], {}), []
    for piece in ("I look", " it up. ", "<tool", '_call>{"name": "f"', ', "arguments": {}}',
                  "</tool_call>", "\n", "So ", "it is <", "b>"):  # fmt: skip
        steps.append(reader.push(piece))
    call = Call("f", "{}")
    assert steps == [["I look"], [" it up."], [], [], [], [call], [], ["So"], [" it is"], [" <b>"]]
    assert reader.flush() == []


def test_a_template_says_which_format_its_calls_have():
    for name, template in TEMPLATES.items():
        assert format_of(template) is FORM[name]
    assert format_of(MISTRAL_TEXT) is FORM["mistral"]
    assert format_of(NO_TOOLS) is format_of(UNKNOWN) is None
    assert format_of(HERMES + "<arg_key>") is None  # GLM's, which begins alike


def test_long_arguments_are_read_in_little_time():
    """A hundred thousand characters in two thousand rounds."""
    text = '<tool_call>{"name": "f", "arguments": {"a": "' + "x{\\n" * 25_000 + '"}}</tool_call>'
    pieces = [text[at : at + 50] for at in range(0, len(text), 50)]
    content, [call] = read("hermes", pieces)
    assert not content and json.loads(call.arguments) == {"a": "x{\n" * 25_000}
