"""Calls of tools in the text of an answer, as it comes: what is content, and what is a call.

Text before a call goes on at once. From the text that begins a call on (`Format.opens`) all is held
until the call is complete; what never becomes one is content, as it was written. White space next
to calls belongs to neither. However the text is cut into pieces, the result is the same.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

SPACE = " \t\r\n"
TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]]|[\s,:\w.+-]+', re.DOTALL)
"""A piece of JSON: a string, a bracket, or what else may be between them."""


class NoCall(Exception):
    """The text looked like a call, and is none."""


class Call(NamedTuple):
    """A tool that is to be called."""

    name: str
    arguments: str
    """A JSON object."""


class Found(NamedTuple):
    """What the beginning of a text is: calls (or content in place of markup), and its length."""

    pieces: Sequence["Call | str"]
    length: int


@dataclasses.dataclass(frozen=True)
class Known:
    """What the reading of a call goes by, besides its text."""

    schemas: Mapping[str, Any]
    """The JSON schemas of the tools' parameters, by the tools' names."""
    ends: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """Of JSON that is not complete, by where it begins: (looked at so far, open brackets there). So
    a long one is not looked at again and again."""


@dataclasses.dataclass(frozen=True)
class Format:
    """How a family of models writes calls."""

    name: str
    marks: tuple[str, ...]
    """A chat template with all of these is for it."""
    opens: tuple[str, ...]
    """Texts that begin a call."""
    read: Callable[[str, bool, Known], Found | None]
    """Of a text that begins so, and whether it is all: the call; None while it is not complete.
    Raises NoCall."""
    bare: tuple[str, ...] = ()
    """Texts that begin a call where nothing but calls is before them."""
    arguments: str = ""
    """The name of the arguments in a call that is bare JSON beside "name": such a call can be
    forced. Empty where calls are written in another way."""
    between: str = SPACE
    """Characters behind a call that are no content."""
    shows: tuple[str, ...] = ()
    """Special tokens that are part of the format."""
    short_ids: bool = False
    """Whether the template wants ids of nine letters and digits."""
    always: bool = False
    """Whether answers have its markup where there are no tools, too."""


class Reader:
    """The content and the calls of one answer."""

    def __init__(self, form: Format, schemas: Mapping[str, Any]):
        self._form, self._known = form, Known(schemas)
        self._held = ""
        self._from = 0  # before it, nothing held begins a call
        self._content = self._called = False  # what came last, if anything

    def push(self, text: str) -> list[Call | str]:
        """What is known now of the text so far, each piece once."""
        self._held += text
        return list(self._read(last=False))

    def flush(self) -> list[Call | str]:
        """The rest: no more text comes."""
        return list(self._read(last=True))

    def _read(self, last: bool) -> Iterable[Call | str]:
        while self._held:
            if self._called:
                self._held = self._held.lstrip(self._form.between)
            at, opening = self._opening()
            if opening is None:
                yield from self._release(self._end_of_content(last))
                return
            try:
                found = self._form.read(self._held[at:], last, self._known)
                if found is None and last:
                    raise NoCall
            except NoCall:
                self._known.ends.clear()
                self._from, self._called = at + len(opening), False
                self._content = self._content or opening in self._form.bare
                continue
            yield from self._release(len(self._held[:at].rstrip(SPACE)))
            if found is None:
                return
            self._known.ends.clear()
            yield from found.pieces
            at = len(self._held) - len(self._held.lstrip(SPACE))
            self._held, self._from = self._held[at + found.length :], 0
            self._called = any(isinstance(piece, Call) for piece in found.pieces)
            self._content = not self._called

    def _opening(self) -> tuple[int, str | None]:
        """(where the first text that begins a call is, which it is), or None for it."""
        opens = self._form.opens
        found = [(at, o) for o in opens if (at := self._held.find(o, self._from)) >= 0]
        start = len(self._held) - len(self._held.lstrip(SPACE))
        if not self._content:
            bare = (b for b in self._form.bare if self._held.startswith(b, start))
            found += [(start, b) for b in bare]
        return min(found, default=(0, None))

    def _end_of_content(self, last: bool) -> int:
        """How much of the text is content, whatever follows."""
        end = len(self._held)
        if last:
            return end
        held = self._held[self._from :]
        begun = any(bare.startswith(held.lstrip(SPACE)) for bare in self._form.bare)
        if begun and not (self._content or self._from):
            return 0
        parts = (o[:n] for o in self._form.opens for n in range(1, len(o)))
        end -= max((len(part) for part in parts if held.endswith(part)), default=0)
        return len(self._held[:end].rstrip(SPACE))

    def _release(self, end: int) -> Iterable[str]:
        text, self._held = self._held[:end], self._held[end:]
        self._from = max(0, self._from - end)
        if text:
            self._content, self._called = True, False
            yield text


def json_end(text: str, start: int, known: Known) -> int | None:
    """Where the JSON object or list that begins at `start` ends; None: not yet.

    Raises NoCall for what cannot be JSON.
    """
    if text[start : start + 1] not in ("{", "["):
        raise NoCall
    at, depth = known.ends.get(start, (start, 0))
    while at < len(text):
        token = TOKEN.match(text, at)
        if token is None and text[at] != '"':
            raise NoCall
        if token is None:
            break  # a string goes on
        depth += (token[0] in "{[") - (token[0] in "}]")
        at = token.end()
        if not depth:
            return at
    known.ends[start] = at, depth
    return None


def value_of(text: str) -> Any:
    """The value of a JSON text. Raises NoCall for other texts, and for infinity and NaN."""

    def refuse(name):
        raise NoCall

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise NoCall from None


def call_of(value: Any, required: bool = False) -> Call:
    """The call that {"name", "arguments"} is, or with "parameters" in place of "arguments".

    `required`: there must be arguments. Raises NoCall.
    """
    if not isinstance(value, dict):
        raise NoCall
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters"))
    if arguments is None and not required:
        arguments = {}
    if isinstance(arguments, str):  # some models write the object as a string
        arguments = value_of(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise NoCall
    return Call(name, dumped(arguments))


def dumped(arguments: dict[str, Any]) -> str:
    """The object as JSON. Raises NoCall where a number of it is none in JSON, such as 1e999."""
    try:
        return json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        raise NoCall from None


def skip_space(text: str, at: int) -> int:
    """Where the first character from `at` on is that is no white space."""
    return len(text) - len(text[at:].lstrip(SPACE))


def closed(text: str, at: int, closing: str, last: bool) -> int | None:
    """Where a call ends whose closing text may follow at `at`; None: that is not known yet."""
    rest = skip_space(text, at)
    if text.startswith(closing, rest):
        return rest + len(closing)
    if closing.startswith(text[rest:]):  # a part of it, or nothing
        return len(text) if last else None
    return at
