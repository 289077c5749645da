"""tokenizer.model: a SentencePiece model, read without its library.

The file is a protobuf message. Pieces, scores and kinds are those of GGUF's metadata, from which
`llm_jax.gguf_tokenizer` makes a tokenizer. Byte-pair models are supported, with the normalization
that Llama, Mistral and Gemma have: none but the mark for spaces.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_jax import CheckpointError, shown
from llm_jax.gguf_tokenizer import from_metadata
from llm_jax.tokenizer import Tokenizer
from llm_jax.untrusted import read_object, read_text, require_text_file, unreadable
from llm_jax.values import ConfigError, Values, short

_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_CONTROL, _USER_DEFINED = 3, 4
_LONGEST_GAP = 1024
"""The most ids that tokens added behind the pieces may leave out."""


def from_model(path: Path) -> Tokenizer:
    """The tokenizer of a folder's tokenizer.model, and of tokenizer_config.json if it is there."""
    require_text_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        meta = metadata(data)
        meta |= _configured(path.parent, meta)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except CheckpointError:
        raise
    except (ValueError, TypeError, struct.error) as error:
        raise CheckpointError(
            f"{path} is truncated or is no SentencePiece model ({error}); download it again"
        ) from error
    named = {f"tokenizer.ggml.{name}": value for name, value in meta.items()}
    return from_metadata(named | {"tokenizer.chat_template": template_of(path.parent)}, path)


def metadata(data: bytes) -> dict[str, Any]:
    """What the file says, under the names of GGUF's metadata without their prefix.

    Raises ConfigError for what is not supported, ValueError or struct.error for a damaged file.
    """
    tokens, scores, kinds = [], [], []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(memoryview(data)):
        if number == 1:
            piece = dict(_fields(value))
            tokens.append(str(piece[1], "utf-8") if 1 in piece else "")
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
            kinds.append(int(piece.get(3, 1)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not tokens:
        raise ValueError("it has no pieces")
    if (kind := _KINDS.get(trainer.get(3, 1))) != "bpe":
        raise ConfigError(f"the model is of type {kind}; supported is bpe")
    name = shown(str(normalizer.get(1, b""), "utf-8", "replace"))
    if len(normalizer.get(2, b"")) or len(normalizer.get(6, b"")):
        raise ConfigError(f"it normalizes text ({name}); supported is the rule identity")
    if normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24, 0):
        raise ConfigError(
            "it removes spaces, or marks them otherwise; supported are models that keep them "
            "(remove_extra_whitespaces false, escape_whitespaces true)"
        )
    found = dict(model="llama", tokens=tokens, scores=scores, token_type=kinds)
    found["add_space_prefix"] = bool(normalizer.get(3, 1))
    for name, number, default in (("unknown", 40, 0), ("bos", 41, 1), ("eos", 42, 2)):
        if 0 <= (i := _signed(trainer.get(number, default))) < len(tokens):
            found[f"{name}_token_id"] = i
    return found


def _configured(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json and added_tokens.json change: added tokens, ends of a text."""
    stated, tokens = _object(folder / "tokenizer_config.json"), list(meta["tokens"])
    kinds, scores = list(meta["token_type"]), list(meta["scores"])
    values = Values(stated, "tokenizer_config.json: ")
    added: dict[int, tuple[str, bool]] = {}
    for token, i in _object(folder / "added_tokens.json").items():
        added[Values({token: i}, "added_tokens.json: ").integer(token, 0, 2**24)] = token, False
    known = values.mapping("added_tokens_decoder")
    for i in known or ():
        one = known.mapping(i)
        if not i.isdecimal() or len(i) > 8 or one is None:
            known.refuse(i, "an added token, under its id")
        added[int(i)] = one.text("content"), one.flag("special")
    for i in sorted(added):
        if i > len(tokens) + _LONGEST_GAP:
            raise ConfigError(f"the added token {short(added[i][0])} has the id {i}, far behind")
        while i >= len(tokens):  # ids that nobody has
            tokens.append(f"<unused {len(tokens)}>")
            kinds.append(_USER_DEFINED)
            scores.append(0.0)
        tokens[i], kinds[i] = added[i][0], _CONTROL if added[i][1] else _USER_DEFINED
    found = dict(tokens=tokens, token_type=kinds, scores=scores)
    for name in ("bos", "eos"):
        token = stated.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in tokens:
            found[f"{name}_token_id"] = tokens.index(token)
    found["add_bos_token"] = values.flag("add_bos_token", True) and "bos_token_id" in meta | found
    found["add_eos_token"] = values.flag("add_eos_token") and "eos_token_id" in meta | found
    return found


def template_of(folder: Path) -> str | None:
    """The chat template of a folder: chat_template.jinja, or what tokenizer_config.json says."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    found = _object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protobuf message: numbers, or bytes as a memoryview."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError(f"a number ends nowhere, at byte {at}")
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"a field of type {kind}, at byte {at}")
        length = varint() if kind == 2 else 8 if kind == 1 else 4
        if length > len(data) - at:
            raise ValueError(f"a field of {length} bytes, at byte {at}")
        at += length
        yield key >> 3, data[at - length : at]


def _signed(value: int) -> int:
    """A 32-bit number, which protobuf writes as one of 64 bits."""
    return value - 2**64 if value >= 2**63 else value
