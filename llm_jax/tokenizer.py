"""Tokenizers: from a Hugging Face folder, from the metadata of a GGUF file, and bytes for tests.

All have the methods encode, decode, chat, stream, `eos` (every id that ends a turn) and `vocab`.
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from llm_jax import CheckpointError, LLMError, chat_template, shown
from llm_jax.extras import need
from llm_jax.token_bytes import TokenBytes, readable
from llm_jax.token_stream import StreamDecoder
from llm_jax.untrusted import inside, read_object, require_text_file

TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<|return|>",
    "<|call|>",
    "</s>",
)
"""Added tokens that end a turn in some model family, besides the eos that a checkpoint names."""


class _Interface:
    """What all tokenizers share: all of it follows from `encode` and `decode`."""

    def chat(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> list[int]:
        """Ids of a conversation (dictionaries with role and content) up to the reply's start.

        Templates that know of tools may show these, and have `tool_calls` of messages.
        """
        return self.encode(plain_chat(messages))

    def template(self, tools: bool = False) -> str | None:
        """The chat template, or that for conversations with tools; None: there is none."""
        return None

    def showing(self, names: Collection[str]) -> Self:
        """A tokenizer that decodes these special tokens to their names, not to nothing."""
        return self

    def token(self, token: int) -> tuple[str, bytes | None]:
        """(name, bytes) of an id; part of a character is named by its bytes. Special tokens have no
        bytes (None)."""
        text = self.decode([token])
        return text, text.encode()

    @property
    def chat_fallback(self) -> str | None:
        """Why `chat` joins messages as plain text, or None where the model's template is used."""
        return "the tokenizer has no chat template"

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, in pieces that never end inside a character."""
        decoder = StreamDecoder(self)
        for token in ids:
            if piece := decoder.push(token):
                yield piece
        if piece := decoder.flush():
            yield piece


@dataclasses.dataclass(frozen=True)
class Tokenizer(_Interface):
    """A `transformers` fast tokenizer behind five plain functions."""

    hf: Any
    eos: tuple[int, ...]
    source: str = "this tokenizer"
    """The file or folder that it is from, for messages."""
    rows: int | None = None
    """Rows of the model's embedding table; a text with a token beyond them is refused."""
    shown: frozenset[int] = frozenset()
    """Special tokens that are decoded to their names."""

    @property
    def vocab(self) -> int:
        """Ids in use; a model's embedding may have more rows."""
        return len(self.hf)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; the model's bos comes first where the model uses one.

        Raises `LLMError` for a text with a token that the model has no row for.
        """
        return self._ids(text, special=True)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens."""
        with named_errors(self.source, "decode these ids"):
            some = [int(i) for i in ids]
            if self.shown:
                some = [i for i in some if i in self.shown or i not in self._special]
            return self.hf.decode(some, skip_special_tokens=not self.shown)

    def showing(self, names: Collection[str]) -> Self:
        shown = frozenset(i for i, name in self._special.items() if name in names)
        return dataclasses.replace(self, shown=shown)

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        added = self.hf.added_tokens_decoder.items()
        return {i: token.content for i, token in added if token.special}

    def token(self, token: int) -> tuple[str, bytes | None]:
        return self._token_bytes(token)

    @functools.cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self.hf)

    def template(self, tools: bool = False) -> str | None:
        template = self.hf.chat_template  # one, or several by name
        if isinstance(template, dict):
            template = (tools and template.get("tool_use")) or template.get("default")
        return template

    def chat(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> list[int]:
        if self.chat_fallback:
            return super().chat(messages)
        template = self.template(tools is not None)
        if not isinstance(template, str):
            found = "several and none is 'default'" if template is None else f"{template!r:.80}"
            raise CheckpointError(
                f"the chat template of {self.source} is no text but {found}; correct it, or remove "
                "it to have messages joined as plain text"
            )
        given = messages, self.hf.special_tokens_map, self.source, tools
        text = chat_template.render(template, *given)
        return self._ids(text, special=False)

    def _ids(self, text: str, special: bool) -> list[int]:
        with named_errors(self.source, "encode this text"):
            ids = list(self.hf.encode(valid(text), add_special_tokens=special))
            if self.rows is not None and (beyond := max(ids, default=0)) >= self.rows:
                token = shown(self.hf.convert_ids_to_tokens(beyond), 60)
                raise LLMError(
                    f"the text has the token '{token}', whose id is {beyond}, and the embedding "
                    f"table of {self.source} has {self.rows} rows; leave it out, or take the "
                    "tokenizer of this very model"
                )
        return ids

    @property
    def chat_fallback(self) -> str | None:
        return None if self.hf.chat_template else super().chat_fallback


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(_Interface):
    """UTF-8 bytes as ids 0 … 255 and one end-of-text id, 256. Needs no files."""

    eos: tuple[int, ...] = (256,)
    vocab: int = 257

    def encode(self, text: str) -> list[int]:
        return list(valid(text).encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")

    def token(self, token: int) -> tuple[str, bytes | None]:
        if token >= 256:
            return "<end>", None
        return readable(bytes([token])), bytes([token])


def valid(text: str) -> str:
    """The text itself; raises `LLMError` where it holds half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LLMError(
            f"character {error.start:,} of the text is half a surrogate pair, "
            f"{text[error.start]!r}; expected Unicode text: remove it, or read the text as UTF-8"
        ) from error
    return text


def plain_chat(messages: list[dict[str, str]]) -> str:
    """A conversation as "role: content" lines, for models without a chat template."""
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"


def wrap(hf: Any, extra_eos: Iterable[int] = (), source: object = "a tokenizer") -> Tokenizer:
    """A `Tokenizer` whose eos holds the tokenizer's own, the extra ids and known turn ends.

    Its chat template has rendered a message, so that a broken one is found before a model is
    loaded; `source` is the file or folder, for messages.
    """
    added = {token.content: i for i, token in hf.added_tokens_decoder.items()}
    if "</b>" in added:  # Gemma has the tags of HTML, of which </s> ends text that is struck out
        added.pop("</s>", None)
    if "<|channel|>" in added:  # gpt-oss ends a message so, of which a turn has several
        added.pop("<|end|>", None)
    ends = [hf.eos_token_id, *extra_eos, *(added.get(name) for name in TURN_ENDS)]
    eos = tuple(dict.fromkeys(int(i) for i in ends if i is not None))
    tokenizer = Tokenizer(hf, eos, str(source))
    tokenizer.chat([dict(role="user", content="Hi!")])
    return tokenizer


LARGEST_GROWTH = 1000
"""A normalizer that makes a text more times longer is a memory bomb."""
READ_BY_TRANSFORMERS = (
    *("*token*.*", "vocab.*", "merges.txt", "tekken.json", "*config.json"),
    *("chat_template.*", "additional_chat_templates/*"),
)
"""The files of a folder that `transformers` may open for a tokenizer."""


def from_folder(path: str | Path) -> Tokenizer:
    """The tokenizer in a Hugging Face folder: tokenizer.json and tokenizer_config.json.

    Folders with other files: `llm_jax.tokenizer_files`.
    """
    library = transformers()
    path = Path(path)
    if not (path / "tokenizer.json").exists():
        raise CheckpointError(
            f"{path} has no tokenizer.json; download it from the model's repository"
        )
    for pattern in READ_BY_TRANSFORMERS:
        for file in path.glob(pattern):
            require_text_file(file)
    if (stated := path / "tokenizer_config.json").exists():
        versions = read_object(stated).get("fast_tokenizer_files")
        for name in versions if isinstance(versions, list) else ():
            require_text_file(inside(path, str(name), stated))
    kind = library.PreTrainedTokenizerFast
    with named_errors(path):
        hf = kind.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        _check_growth(hf)
    return wrap(hf, _generation_ends(path / "generation_config.json"), path)


def _generation_ends(path: Path) -> list[int]:
    """The ids that end a text, as generation_config.json states them: none, one or a list."""
    stated = read_object(path).get("eos_token_id") if path.exists() else None
    ends = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if wrong := [i for i in ends if type(i) is not int or i < 0]:
        raise CheckpointError(
            f"{path}: eos_token_id has {shown(repr(wrong[0]), 80)}; expected a token id or a list "
            "of them: correct it"
        )
    return ends


def _check_growth(hf: Any) -> None:
    """Raises ValueError if the tokenizer makes long texts of short ones: "a" to "aa", forty times,
    are a terabyte."""
    backend = getattr(hf, "backend_tokenizer", None)
    for part in (backend.normalizer, backend.decoder) if backend else ():
        if part is not None and growth(json.loads(part.__getstate__())) > LARGEST_GROWTH:
            raise ValueError(
                f"{type(part).__name__} makes texts over {LARGEST_GROWTH} times longer"
            )
    if len(hf.encode("Hi!")) > LARGEST_GROWTH:
        raise ValueError(f"three characters become more than {LARGEST_GROWTH} tokens")


def growth(part: dict[str, Any]) -> float:
    """How many times longer a normalizer or decoder of tokenizer.json can make a text."""
    if part.get("type") == "Replace":
        pattern = part["pattern"].get("String")  # or a regular expression, which may match nothing
        new = len(part["content"])
        return max(1, new / len(pattern)) if pattern else new + 1
    steps = part.get("normalizers") or part.get("decoders") or ()
    return math.prod(growth(step) for step in steps)


@contextlib.contextmanager
def named_errors(source: object, action: str = "be read") -> Iterator[None]:
    """Whatever the libraries raise for a tokenizer becomes a `CheckpointError` that names it."""
    try:
        yield
    except (LLMError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in the tokenizers' Rust code is no Exception
        reason = shown(str(error) or type(error).__name__)
        raise CheckpointError(
            f"the tokenizer in {source} cannot {action}: {reason}; download it again"
        ) from error


def transformers() -> ModuleType:
    return need("transformers", "models", "reading a tokenizer")
