"""Tools that a chat may call: the fields of a request, and its messages as templates want them."""

import dataclasses
import json
import re
import secrets
import string
from collections.abc import Mapping
from typing import Any

from experiments.serve.body import Body
from experiments.serve.call_formats import format_of
from experiments.serve.calls import Call, Format, Reader
from experiments.serve.errors import ApiError
from experiments.serve.response_format import ResponseFormat
from llm_jax import LLMError, shown
from llm_jax.files import parse_json

FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
MOST, DEEPEST = 128, 32
"""Tools of a request, and levels of a schema or of arguments."""
NOTHING = {"type": "object", "properties": {}}
"""The parameters of a tool that states none."""
PLAIN_JSON = dict(whitespace_flexible=False, item_separator=", ", key_separator=": ")
"""JSON as Python writes it, and as models learned to write calls."""
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a chat may call; the model decides whether it does."""

    given: list[dict[str, Any]]
    """As the request has them, for the template; all have `description` and `parameters`, which
    templates rely on, and none `strict`."""
    several: bool = True
    """Whether more than the first call of an answer is told."""
    forced: tuple[str, ...] = ()
    """The tools of which the answer must call one; none: the model decides."""

    @property
    def schemas(self) -> dict[str, Any]:
        """The JSON schema of each tool's parameters."""
        of = (tool["function"] for tool in self.given)
        return {function["name"]: function["parameters"] for function in of}


def asked_tools(body: Body) -> Tools | None:
    """The tools of a request; None where there are none, or none may be called."""
    several = body.get("parallel_tool_calls") is None or body.flag("parallel_tool_calls")
    given, choice = body.get("tools"), body.get("tool_choice")
    if given is not None and (not isinstance(given, list) or len(given) > MOST):
        body.refuse("tools", f"a list of at most {MOST} tools")
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(given or ())]
    names = [tool["function"]["name"] for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ApiError(400, f"tools has '{twice}' twice", "tools")
    forced = _forced(choice, names)
    return Tools(tools, several, forced) if tools and choice != "none" else None


def _forced(choice: Any, names: list[str]) -> tuple[str, ...]:
    """The tools of which a call must be one."""
    if choice in (None, "none", "auto"):
        return ()
    if choice == "required":
        chosen = names
    else:
        own = choice.get("function") if isinstance(choice, dict) else None
        if not isinstance(own, dict) or choice.get("type") != "function":
            raise ApiError(
                400, 'tool_choice must be none, auto, required, or {"type": "function", '
                '"function": {"name"}}', "tool_choice",
            )  # fmt: skip
        chosen = [name for name in names if name == own.get("name")]
    if not chosen:
        raise ApiError(400, "tool_choice asks for a tool that is not in tools", "tool_choice")
    return tuple(chosen)


def _tool(tool: Any, where: str) -> dict[str, Any]:
    """A tool as templates want it: `strict` is not for the model."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type") != "function":
        raise ApiError(400, f'{where} is no {{"type": "function", "function": …}}', where)
    for field, kind in (("description", str), ("parameters", dict), ("strict", bool)):
        if not isinstance(function.get(field), (kind, type(None))):
            names = {str: "a string", dict: "a JSON schema", bool: "true or false"}
            where = f"{where}.function.{field}"
            raise ApiError(400, f"{where} is of another type; expected {names[kind]}", where)
    name, expected = function.get("name"), "expected up to 64 letters, digits, and _.-"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        where = f"{where}.function.name"
        raise ApiError(400, f"{where} is {shown(repr(name), 80)}; {expected}", where)
    _check_depth(function, where)
    own = {k: v for k, v in function.items() if k != "strict" and v is not None}
    own = {"name": name, "description": "", "parameters": NOTHING} | own
    return {"type": "function", "function": own}


def _check_depth(value: Any, where: str) -> None:
    """Refuses what is nested deeper than any tool is, which would be slow to render."""
    level = [value]
    for _ in range(DEEPEST):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inner for v in values if isinstance(v, (dict, list))]
        if not level:
            return
    raise ApiError(400, f"{where} is nested deeper than {DEEPEST} levels", where)


def forced_call(form: Format, tools: Tools) -> ResponseFormat:
    """An answer that is a call of one of the tools that are forced, as the model writes calls.
    Raises ApiError for models that do not write them as bare JSON."""
    if not (key := form.arguments):
        words = "this model's calls cannot be forced; tool_choice must be none or auto"
        raise ApiError(400, words, "tool_choice", "unsupported")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, key: schema},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for name, schema in tools.schemas.items()
        if name in tools.forced
    ]
    schema = {"anyOf": calls, "x-guidance": PLAIN_JSON}
    return ResponseFormat("json", json.dumps(schema), lenient=True, field="tools")


# ------------------------------------------------------------------ messages


def tool_result(message: dict[str, Any], content: str, where: str, names: Mapping) -> dict:
    """A message of the role tool; `names` are the tools' by the ids of earlier calls."""
    call = message.get("tool_call_id")
    if not isinstance(call, str):
        field = f"{where}.tool_call_id"
        raise ApiError(400, f"{field} is missing; expected the id of a call", field)
    name = message.get("name") or names.get(call)
    out = {"role": "tool", "content": content, "tool_call_id": call}
    return out | {"name": name} if isinstance(name, str) else out


def calls_of(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The checked `tool_calls` of an assistant's message."""
    calls, out = message["tool_calls"], []
    if not isinstance(calls, list) or len(calls) > MOST:
        raise ApiError(400, f"{where}.tool_calls is no list of calls", f"{where}.tool_calls")
    for i, call in enumerate(calls):
        at = f"{where}.tool_calls[{i}]"
        function = call.get("function") if isinstance(call, dict) else None
        fine = isinstance(function, dict) and call.get("type", "function") == "function"
        if not fine or not isinstance(call.get("id"), str):
            raise ApiError(400, f'{at} is no {{"id", "type": "function", "function"}}', at)
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            field = f"{at}.function.arguments"
            raise ApiError(400, f"{field} is no string; expected JSON in a string", field)
        if not isinstance(function.get("name"), str):  # any: the model may have made it up
            field = f"{at}.function.name"
            raise ApiError(400, f"{field} is no string; expected a tool's name", field)
        _check_depth([object_of(arguments)], at)
        own = {"name": function["name"], "arguments": arguments}
        out.append({"id": call["id"], "type": "function", "function": own})
    return out


def object_of(arguments: str) -> Any:
    """The object that arguments are; the text itself where they are none."""
    try:
        value = parse_json(arguments or "{}")
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


# ------------------------------------------------------------------ the model's template


def format_for(tokenizer: Any, tools: Tools | None) -> Format | None:
    """How the model writes calls; None where its answers are text alone. Raises ApiError where it
    has no way to be told of tools, or writes calls in an unknown one."""
    template = tokenizer.template(tools is not None)
    if tools is None:
        found = format_of(template) if isinstance(template, str) else None
        return found if found is not None and found.always else None
    if not isinstance(template, str) or not re.search(r"\btools\b", template):
        raise ApiError(400, "this model's chat template has no tools; leave them out", "tools")
    if (found := format_of(template)) is None:
        words = "this server does not know how this model writes calls; leave tools out"
        raise ApiError(400, words, "tools", "unsupported")
    return found


def rendered(tokenizer: Any, messages: list[dict[str, Any]], tools: Tools | None) -> list[int]:
    """Ids of a conversation. Raises ApiError where it has calls and the template shows none, and
    what `tokenizer.chat` raises."""
    given = None if tools is None else tools.given
    if any(m["role"] == "tool" or "tool_calls" in m for m in messages):
        template = tokenizer.template(given is not None)
        if not isinstance(template, str) or not re.search("tool_calls|['\"]tool['\"]", template):
            words = "this model's chat template shows no calls of tools; leave them out"
            raise ApiError(400, words, "messages")
        if not wants_text(tokenizer, given):
            messages = list(map(_with_objects, messages))
    return tokenizer.chat(messages, given)


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of calls as objects."""
    if "tool_calls" not in message:
        return message
    change = lambda f: f | {"arguments": object_of(f["arguments"])}
    calls = [call | {"function": change(call["function"])} for call in message["tool_calls"]]
    return message | {"tool_calls": calls}


def wants_text(tokenizer: Any, tools: list[dict[str, Any]] | None) -> bool:
    """Whether the template wants arguments as JSON in a string: it cannot join an object to its
    text, or writes it as Python does."""
    function = {"name": "f", "arguments": '{"needle": "a"}'}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    said = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "b", "tool_call_id": call["id"], "name": "f"},
    ]

    def text(messages):
        try:
            return tokenizer.decode(tokenizer.chat(messages, tools))
        except LLMError:
            return None

    if (found := text(list(map(_with_objects, said)))) is not None:
        return "'needle'" in found
    return text(said) is not None


# ------------------------------------------------------------------ the answer


class Turn:
    """The content and the calls of an answer, as its text comes."""

    def __init__(self, form: Format, tools: Tools | None):
        self._form, self._tools = form, tools
        self._reader, self._count = Reader(form, tools.schemas if tools else {}), 0

    def read(
        self, text: str, finish: str | None
    ) -> tuple[str, dict[int, dict[str, Any]], str | None]:
        """(content, new calls by their numbers, how the answer ended) of the text that comes next.

        `finish` is how it ended, if it did; "tool_calls" where it called a tool and was not cut.
        """
        pieces = self._reader.push(text) + (self._reader.flush() if finish else [])
        content, calls = "", {}
        for piece in pieces:
            if isinstance(piece, str):
                content += piece
            elif self._tools is None:  # nobody asked for a call
                content += f"{piece.name} {piece.arguments}"
            elif self._tools.several or not self._count:
                calls[self._count] = _told(piece, self._form)
                self._count += 1
        ended = "tool_calls" if self._count and finish == "stop" else finish
        return content, calls, ended


def _told(call: Call, form: Format) -> dict[str, Any]:
    """A call as a message's `tool_calls` have it."""
    letters = string.ascii_letters + string.digits
    id = "".join(secrets.choice(letters) for _ in range(9 if form.short_ids else 24))
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": id if form.short_ids else f"call_{id}", "type": "function", "function": function}
