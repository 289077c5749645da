"""What `response_format` asks an answer to be: JSON, JSON of a schema, or text of a grammar."""

import dataclasses
import json
from typing import Any, NoReturn

from experiments.serve.body import Body
from experiments.serve.errors import ApiError
from llm_jax import shown
from llm_jax.extras import MissingPackage
from llm_jax.grammar import Grammar, GrammarError, Kind
from subspec_jax.engine import Engine

FIELD = "response_format"
MOST = 2**17
"""Characters of a schema, a pattern or a grammar."""
FIELDS = {
    "text": set(),
    "json_object": set(),
    "json_schema": {"json_schema"},
    "regex": {"pattern"},
    "grammar": {"grammar"},
}
SCHEMA_FIELDS = {"name", "schema", "strict", "description"}


@dataclasses.dataclass(frozen=True)
class ResponseFormat:
    """A grammar that is not compiled yet."""

    kind: Kind
    text: str
    lenient: bool = False
    """Whether what no grammar can say of a schema is left out."""
    field: str = FIELD
    """The field of a request that asks for it."""

    def grammar(self, engine: Engine) -> Grammar:
        """Takes up to some seconds, the first one most. Raises ApiError for one that is wrong."""
        try:
            return engine.guide.grammar(self.kind, self.text, self.lenient)
        except GrammarError as error:
            raise ApiError(400, f"{self.field} cannot be used: {error}", self.field) from None
        except MissingPackage as error:
            raise unsupported(error, self.field) from None


def unsupported(why: object, field: str = FIELD) -> ApiError:
    return ApiError(400, f"{field} is not supported: {why}", field, "unsupported")


def format_of(body: Body) -> ResponseFormat | None:
    """None: any text. Raises ApiError, which names what is wrong."""
    found = body.get(FIELD)
    if found is None:
        return None
    kind = found.get("type") if isinstance(found, dict) else None
    if not isinstance(kind, str) or kind not in FIELDS:
        refuse(f'is no object with "type": {", ".join(FIELDS)}')
    if extra := found.keys() - FIELDS[kind] - {"type"}:
        refuse(f"has the unknown field '{shown(min(extra), 60)}'")
    match kind:
        case "text":
            return None
        case "json_object":
            return ResponseFormat("json", '{"type": "object"}')
        case "json_schema":
            return _schema(found.get("json_schema"))
        case "regex":
            return ResponseFormat("regex", _text(found.get("pattern"), "pattern"))
    return ResponseFormat("lark", _text(found.get("grammar"), "grammar"))


def _schema(found: Any) -> ResponseFormat:
    if not isinstance(found, dict) or not isinstance(found.get("schema"), dict):
        refuse('.json_schema is no object with an object "schema"')
    if extra := found.keys() - SCHEMA_FIELDS:
        refuse(f".json_schema has the unknown field '{shown(min(extra), 60)}'")
    strict = found.get("strict")
    if strict is not None and not isinstance(strict, bool):
        refuse(".json_schema.strict is neither true nor false")
    text = json.dumps(found["schema"])
    return ResponseFormat("json", _text(text, "json_schema.schema"), lenient=not strict)


def _text(found: Any, name: str) -> str:
    if not isinstance(found, str) or not found:
        refuse(f".{name} is no text")
    if len(found) > MOST:
        refuse(f".{name} is longer than {MOST:,} characters")
    return found


def refuse(what: str) -> NoReturn:
    between = "" if what.startswith(".") else " "
    raise ApiError(400, f"{FIELD}{between}{what}", FIELD)
