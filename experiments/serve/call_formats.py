"""The formats in which families of models write calls; a chat template says which is its own."""

import re
from typing import Any

from experiments.serve.calls import (
    SPACE,
    Call,
    Format,
    Found,
    Known,
    NoCall,
    call_of,
    closed,
    dumped,
    json_end,
    skip_space,
    value_of,
)

LONGEST = 256
"""Characters of a name, and of what is between a marker and arguments."""


def format_of(template: str) -> Format | None:
    """The format of the calls that a chat template asks for, by its text; None: no known one."""
    if any(foreign in template for foreign in FOREIGN):
        return None
    return next((f for f in FORMATS if all(mark in template for mark in f.marks)), None)


HERMES = (("<tool_call>", "</tool_call>"), ("```json", "```"), ("", ""))


def _hermes(text: str, last: bool, known: Known) -> Found | None:
    """<tool_call> {"name", "arguments"} </tool_call>: Hermes, Qwen 2.5 and 3.

    Small ones forget the tag, or write a fence in its place. Then the name must be a tool's."""
    opening, closing = next(pair for pair in HERMES if text.startswith(pair[0]))
    at = skip_space(text, len(opening))
    if at == len(text) or (end := json_end(text, at, known)) is None:
        return None
    tagged = opening == "<tool_call>"
    call = call_of(value_of(text[at:end]), required=not tagged)
    if not tagged and call.name not in known.schemas:
        raise NoCall
    behind = closed(text, end, closing, last) if closing else end
    return None if behind is None else Found([call], behind)


def _llama(text: str, last: bool, known: Known) -> Found | None:
    """{"name", "parameters"}, where it is all of the answer or behind <|python_tag|>: Llama 3."""
    tag = "<|python_tag|>"
    at = skip_space(text, len(tag)) if text.startswith(tag) else 0
    if at == len(text) or (end := json_end(text, at, known)) is None:
        return None
    return Found([call_of(value_of(text[at:end]), required=True)], end)


MISTRAL_HEAD = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*[\w-]+\s*)?(?:\[ARGS\]\s*)?")


def _mistral(text: str, last: bool, known: Known) -> Found | None:
    """[TOOL_CALLS] and a list of calls, or a name, [ARGS] and an object (from version 11 on)."""
    start = len("[TOOL_CALLS]")
    at = skip_space(text, start)
    if at < start + LONGEST and text.startswith("[", at):
        if (end := json_end(text, at, known)) is None:
            return None
        if not (calls := [call_of(value) for value in value_of(text[at:end])]):
            raise NoCall
        return Found(calls, end)
    brace = text.find("{", start, start + LONGEST)
    if brace < 0:
        if len(text) >= start + LONGEST:
            raise NoCall
        return None
    if (head := MISTRAL_HEAD.fullmatch(text[start:brace])) is None:
        raise NoCall
    if (end := json_end(text, brace, known)) is None:
        return None
    return Found([call_of({"name": head[1], "arguments": value_of(text[brace:end])})], end)


def _coder(text: str, last: bool, known: Known) -> Found | None:
    """<function=NAME> with <parameter=NAME> value </parameter>: Qwen3-Coder."""
    at, arguments = 0, {}
    if text.startswith("<tool_call>"):
        at = skip_space(text, len("<tool_call>"))
    if (tag := _tag(text, at, "<function=")) is None:
        return None
    name, at = tag
    types = _types(known.schemas.get(name))
    while not text.startswith("</function>", at := skip_space(text, at)):
        if "</function>".startswith(text[at:]):
            return None
        if (tag := _tag(text, at, "<parameter=")) is None:
            return None
        parameter, at = tag
        if (end := text.find("</parameter>", at)) < 0:
            return None
        value = text[at:end].removeprefix("\n").removesuffix("\n")
        arguments[parameter] = _typed(value, types.get(parameter))
        at = end + len("</parameter>")
    at += len("</function>")
    behind = closed(text, at, "</tool_call>", last)
    return None if behind is None else Found([Call(name, dumped(arguments))], behind)


def _tag(text: str, at: int, opening: str) -> tuple[str, int] | None:
    """(the name in a tag that must be at `at`, where it ends); None: it is not complete."""
    if opening.startswith(text[at : at + len(opening)]) and len(text) - at < len(opening):
        return None
    end = text.find(">", at, at + len(opening) + LONGEST)
    if not text.startswith(opening, at) or (end < 0 and len(text) - at >= len(opening) + LONGEST):
        raise NoCall
    if end < 0:
        return None
    if not (name := text[at + len(opening) : end].strip()):
        raise NoCall
    return name, end + 1


def _types(schema: Any) -> dict[str, Any]:
    """The types of parameters, as a JSON schema states them."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    properties = properties if isinstance(properties, dict) else {}
    return {k: v.get("type") for k, v in properties.items() if isinstance(v, dict)}


def _typed(text: str, kind: Any) -> Any:
    """A parameter's value: a text where it is to be one or is no JSON."""
    if kind == "string":
        return text
    try:
        return value_of(text)
    except NoCall:
        return text


HARMONY_HEAD = re.compile(
    r"(<\|end\|>)?(?:<\|start\|>assistant)?\s*(to=[^<\s]*)?\s*<\|channel\|>([^<]*)"
    r"(?:<\|constrain\|>[^<]*)?<\|message\|>"
)
RECIPIENT = re.compile(r"\bto=functions\.([\w.-]+)")
HARMONY = ("<|start|>", "<|end|>", "<|channel|>", "<|constrain|>", "<|message|>")


def _harmony(text: str, last: bool, known: Known) -> Found | None:
    """<|channel|>commentary to=functions.NAME <|message|> object: gpt-oss. Other channels are
    content, without their heads and a blank line apart."""
    head = HARMONY_HEAD.match(text[:LONGEST])
    if head is None:
        stray = next((token for token in HARMONY if text.startswith(token)), None)
        if last and stray:
            return Found([], len(stray))
        if len(text) >= LONGEST or "<|message|>" in text:
            raise NoCall
        return None
    to = RECIPIENT.search(f"{head[2] or ''} {head[3]}")
    if to is None:
        return Found(["\n\n"] if head[1] else [], head.end())
    at = skip_space(text, head.end())
    if at == len(text) or (end := json_end(text, at, known)) is None:
        return None
    return Found([call_of({"name": to[1], "arguments": value_of(text[at:end])})], end)


FORMATS = (
    Format("coder", ("<function=", "<parameter="), ("<tool_call>", "<function="), _coder),
    Format(
        "hermes", ("<tool_call>",), ("<tool_call>",), _hermes, bare=("```json", "{"),
        arguments="arguments",
    ),
    Format(
        "mistral", ("[TOOL_CALLS]",), ("[TOOL_CALLS]",), _mistral,
        shows=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), short_ids=True,
    ),
    Format(
        "harmony", ("<|channel|>", "<|call|>", "functions"), HARMONY[:3], _harmony,
        bare=("to=functions.",), shows=HARMONY, always=True,
    ),
    Format(
        "llama", ("dictionary of argument name", "tool_calls"), ("<|python_tag|>",), _llama,
        bare=("{",), between=SPACE + ";", shows=("<|python_tag|>",), arguments="parameters",
    ),
)  # fmt: skip
"""The first one that a template has the marks of is its own."""
FOREIGN = ("<arg_key>",)
"""Marks of formats that have the marks of a known one, too, and are others."""
