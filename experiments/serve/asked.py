"""What /v1/chat/completions and /v1/completions ask for, checked field by field."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any, Literal

from experiments.serve.body import Body
from experiments.serve.calls import Format
from experiments.serve.errors import ApiError
from experiments.serve.logprobs import asked_logprobs
from experiments.serve.response_format import ResponseFormat, format_of, unsupported
from experiments.serve.tools import (
    FIELDS,
    Tools,
    asked_tools,
    calls_of,
    forced_call,
    format_for,
    rendered,
    tool_result,
)
from llm_jax import LLMError, shown
from llm_jax.grammar import Grammar, GrammarError
from llm_jax.sample import Sampler
from subspec_jax import SubspecError
from subspec_jax.decoder import LengthError
from subspec_jax.engine import Engine
from subspec_jax.requests import Request

CHOICES = 16
"""Most answers to one HTTP request."""
STOPS, STOP_LENGTH = 16, 256
"""Most stop strings, and the most characters of one."""
LEGACY_TOKENS = 16
"""Tokens of /v1/completions where none are asked for, as OpenAI has it."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
ROLES["tool"] = "tool"
COMMON = ("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop")
COMMON += ("stream", "stream_options", "logprobs", "response_format")
KNOWN = {
    "chat": (*COMMON, "messages", "max_completion_tokens", "top_logprobs", *FIELDS),
    "text": (*COMMON, "prompt"),
}
Kind = Literal["chat", "text"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A checked request; its text is not in tokens yet."""

    kind: Kind
    messages: list[dict[str, Any]]
    prompts: list[str | tuple[int, ...]]
    """Of a chat none; of /v1/completions one or several."""
    n: int
    """Answers to each prompt."""
    new_tokens: int | None
    """None: as many as fit."""
    sampler: Sampler
    seed: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    format: ResponseFormat | None
    """What the answer is to be; None: any text."""
    logprobs: int | None
    """The likeliest tokens that are told with each token; None: no token is told."""
    tools: Tools | None
    """What a chat may call."""

    def form(self, tokenizer: Any) -> Format | None:
        """How calls are written in the answer; None: it is text alone. Raises ApiError."""
        return format_for(tokenizer, self.tools) if self.kind == "chat" else None

    def shape(self, tokenizer: Any) -> ResponseFormat | None:
        """What the answer is made to be; None: any text. Raises ApiError."""
        if self.tools is None or not self.tools.forced:
            return self.format
        if self.format is not None:
            words = "a call that must be made has a form of its own; leave response_format out"
            raise ApiError(400, words, "tool_choice")
        return forced_call(self.form(tokenizer), self.tools)

    def requests(self, engine: Engine, grammar: Grammar | None = None) -> list[Request]:
        """One for each answer. Takes a while: it tokenizes. Raises ApiError."""
        out, most = [], engine.options.max_length
        form = self.form(engine.tokenizer)
        shows = () if form is None else form.shows
        try:
            if self.kind == "chat":
                ids = [rendered(engine.tokenizer, self.messages, self.tools)]
            else:
                encode = engine.tokenizer.encode
                ids = [tuple(encode(p)) if isinstance(p, str) else p for p in self.prompts]
        except LLMError as error:
            raise ApiError(
                400, str(error), "messages" if self.kind == "chat" else "prompt"
            ) from None
        for prompt in ids:
            new = max(1, most - len(prompt)) if self.new_tokens is None else self.new_tokens
            for i in range(self.n):
                seed = (self.seed + i) % 2**32
                how = seed, self.sampler, engine.eos, self.stop
                more = dict(logprobs=self.logprobs, shows=shows, grammar=grammar)
                out.append(Request(tuple(prompt), new, *how, **more))
        return out


def parse(kind: Kind, body: Body, model: str, temperature: float) -> Asked:
    """What a body asks for. Raises ApiError, which names the field that is wrong."""
    body.check_names(KNOWN[kind])
    if (asked := body.text("model")) != model:
        raise ApiError(
            404,
            f"the model '{shown(asked, 60)}' does not exist; this server has '{model}'",
            "model",
            "model_not_found",
        )
    messages = _messages(body) if kind == "chat" else []
    prompts = _prompts(body) if kind == "text" else []
    n = body.integer("n", 1, CHOICES, 1)
    if n * max(1, len(prompts)) > CHOICES:
        raise ApiError(400, f"n and prompt ask for more than {CHOICES} answers", "n")
    sampler = _sampler(body, temperature)
    drawn = 0 if sampler.greedy else secrets.randbits(32)
    return Asked(
        kind,
        messages,
        prompts,
        n,
        _new_tokens(kind, body),
        sampler,
        body.integer("seed", 0, 2**32 - 1, drawn),
        _stop(body),
        body.flag("stream"),
        _include_usage(body),
        format_of(body),
        asked_logprobs(kind, body),
        asked_tools(body) if kind == "chat" else None,
    )


def unfit(error: SubspecError | LLMError) -> ApiError:
    """The error of a request that the scheduler refuses."""
    if isinstance(error, GrammarError):
        return unsupported(error)
    code = "context_length_exceeded" if isinstance(error, LengthError) else None
    return ApiError(400, str(error), "messages" if code else None, code)


# ------------------------------------------------------------------ fields


def _messages(body: Body) -> list[dict[str, Any]]:
    found = body.get("messages")
    if not isinstance(found, list) or not found:
        body.refuse("messages", "a list of at least one message")
    out, called = [], {}
    for i, message in enumerate(found):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{where} is no object; expected role and content", where)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ApiError(
                400, f"{where}.role is {shown(repr(role), 40)}; expected one of {', '.join(ROLES)}",
                f"{where}.role",
            )  # fmt: skip
        content, calls = message.get("content"), message.get("tool_calls")
        if calls and role != "assistant":
            raise ApiError(400, f"{where}.tool_calls is for the role assistant", where)
        text = "" if calls and content is None else _content(content, where)
        if role == "tool":
            out.append(tool_result(message, text, where, called))
            continue
        out.append({"role": ROLES[role], "content": text})
        if calls:
            out[-1]["tool_calls"] = calls_of(message, where)
            called |= {call["id"]: call["function"]["name"] for call in out[-1]["tool_calls"]}
    return out


def _content(content: Any, where: str) -> str:
    """The text of a message: a string, or a list of parts that are all text."""
    where = f"{where}.content"
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(400, f"{where} is no text; expected a string, or a list of parts", where)
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ApiError(
                400, f"{where} has a part of type {shown(repr(kind), 40)}; only text is supported",
                where,
            )  # fmt: skip
    return "".join(part["text"] for part in content)


def _prompts(body: Body) -> list[str | tuple[int, ...]]:
    found = body.get("prompt")
    if isinstance(found, str):
        return [found]
    expected = "a string, token ids, or a list of such"
    if not isinstance(found, list) or not found:
        body.refuse("prompt", expected)
    if _are_ids(found):
        return [tuple(found)]
    for prompt in found:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and _are_ids(prompt)):
            raise ApiError(400, f"prompt holds something else; expected {expected}", "prompt")
    return [p if isinstance(p, str) else tuple(p) for p in found]


def _are_ids(values: Sequence[Any]) -> bool:
    """Whether all are whole numbers that an int32 holds; which ones exist is checked later."""
    return bool(values) and all(type(v) is int and abs(v) < 2**31 for v in values)


def _new_tokens(kind: Kind, body: Body) -> int | None:
    default = LEGACY_TOKENS if kind == "text" else None
    old = body.integer("max_tokens", 1, 2**31 - 1, default)
    new = body.integer("max_completion_tokens", 1, 2**31 - 1, old)
    if "max_tokens" in body and old != new:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one", "max_tokens")
    return new


def _sampler(body: Body, temperature: float) -> Sampler:
    temperature = body.number("temperature", temperature)
    top_k, top_p = body.integer("top_k", 0, 2**31 - 1, 0), body.number("top_p", 1.0)
    min_p = body.number("min_p", 0.0)
    try:
        sampler = Sampler(temperature, top_k, top_p, min_p)
    except LLMError as error:
        raise ApiError(400, str(error), str(error).split()[0]) from None
    return Sampler() if sampler.greedy else sampler  # the filters change nothing then


def _stop(body: Body) -> tuple[str, ...]:
    found = body.get("stop")
    found = [] if found is None else [found] if isinstance(found, str) else found
    fine = isinstance(found, list) and all(isinstance(s, str) and s for s in found)
    if not fine or len(found) > STOPS or any(len(s) > STOP_LENGTH for s in found):
        body.refuse("stop", f"up to {STOPS} strings of 1 to {STOP_LENGTH} characters")
    return tuple(found)


def _include_usage(body: Body) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        body.refuse("stream_options", 'an object with "include_usage"')
    if not body.flag("stream"):
        raise ApiError(400, "stream_options is for streams; set stream to true", "stream_options")
    return options.get("include_usage", False)
