"""Grammars that a text must follow, through llguidance: which tokens may come next.

    guide = Guide(tokenizer, cfg.vocab)
    grammar = guide.grammar("json", '{"type": "object"}')

A grammar is a JSON schema, a regular expression, or a grammar in llguidance's kind of Lark. Its
mask goes to the logits before anything is chosen from them, so a text is what plain decoding of
the masked logits gives.

Letters: V vocabulary, W = ceil(V / 32) words of a mask, X rows of logits.
"""

import json
import threading
import weakref
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import LLMError, shown
from llm_jax.bounded import Worker, ending
from llm_jax.extras import need
from llm_jax.grammar_worker import matcher_of, tokens_of
from llm_jax.token_bytes import letters
from llm_jax.tokenizer import ByteTokenizer

Kind = Literal["json", "regex", "lark"]
SECONDS = 2.0
"""Time of the processor that compiling a grammar may take; real ones take some thousandths."""
WORKER = Path(__file__).with_name("grammar_worker.py")


class GrammarError(LLMError):
    """A grammar that cannot be used, or a tokenizer that has none."""


class Walk:
    """Where a text stands in its grammar."""

    def __init__(self, matcher: Any, size: int, vocab: int):
        self._matcher, self._size, self._vocab = matcher, size, vocab

    def fork(self) -> "Walk":
        """The same place, from which one can go on independently."""
        return Walk(self._matcher.deep_copy(), self._size, self._vocab)

    @property
    def over(self) -> bool:
        """Whether the text is complete: nothing may follow but its end."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str:
        """Why there is no way on; empty where there is one."""
        return _short(self._matcher.get_error()) if self._matcher.is_error() else ""

    def take(self, token: int) -> bool:
        """Goes on by a token; False: the grammar does not allow it here."""
        return self._matcher.try_consume_tokens([token]) == 1

    def mask(self) -> np.ndarray:
        """uint32 [W]: bit v % 32 of word v // 32 says whether token v may come next.

        All bits are 0 where there is an error, or where none of the model's tokens may come.
        """
        found = np.zeros(self._size, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(found.ctypes.data, found.nbytes)
        mask = np.zeros(-(-self._vocab // 32), np.uint32)
        if not self._matcher.is_error():
            both = min(len(mask), len(found))
            mask[:both] = found[:both]
            if beyond := -self._vocab % 32:
                mask[-1] &= 2 ** (32 - beyond) - 1
        return mask


class Grammar:
    """A compiled grammar; each text has its own `Walk` through it."""

    def __init__(self, matcher: Any, size: int, vocab: int):
        self._first, self.vocab = Walk(matcher, size, vocab), vocab

    def start(self) -> Walk:
        return self._first.fork()


class Guide:
    """Makes the grammars of a model whose logits have `vocab` columns.

    `eos`: the tokens that end a text, the tokenizer's where none are given. Raises GrammarError for
    a tokenizer whose tokens are not made of bytes, MissingPackage without llguidance. Any thread
    may use it.
    """

    def __init__(self, tokenizer: Any, vocab: int, eos: tuple[int, ...] = ()):
        need("llguidance", "serve", "a grammar")
        self.vocab = vocab
        given = dict(described=_described(tokenizer), eos=list(eos or tokenizer.eos))
        self._worker = Worker(WORKER, hello=json.dumps(given))
        weakref.finalize(self, self._worker.stop)
        self._lock = threading.Lock()
        try:
            self._tokens = tokens_of(**given)
        except (ValueError, RuntimeError) as error:
            name = getattr(tokenizer, "source", "this tokenizer")
            raise GrammarError(f"{name} cannot follow a grammar: {shown(error)}") from error

    def grammar(self, kind: Kind, text: str, lenient: bool = False) -> Grammar:
        """The grammar of a JSON schema, a regular expression, or a Lark grammar.

        `lenient`: what a JSON schema says beyond llguidance's means is not heeded. Raises
        GrammarError for one that is wrong, or too large.
        """
        given = dict(kind=kind, text=text, lenient=lenient)
        reply = self._worker.ask(dict(seconds=SECONDS, grammar=given))
        if isinstance(reply, int):
            reply = {"error": ending(reply, SECONDS, "compiling it")}
        if "error" in reply:
            raise GrammarError(_short(reply["error"]))
        with self._lock:
            matcher = matcher_of(self._tokens, **given)
        return Grammar(matcher, -(-self._tokens.vocab_size // 32), self.vocab)


def _short(message: str) -> str:
    """The first line of what llguidance says, which has the rest for its developers."""
    lines = [line for line in message.splitlines() if line.strip()] or ["it cannot be compiled"]
    return shown(lines[0].replace("panic: ", ""), 300)


def _described(tokenizer: Any) -> str | None:
    """The tokenizer.json of a tokenizer, for llguidance; None: tokens are bytes.

    Llguidance takes every added token like <b> for a special one, which never is text. Here only
    those are that decoding leaves out; so the others stand among the ordinary tokens.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return None
    described = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    vocab = described["model"].get("vocab")
    if isinstance(vocab, dict):
        added = described["added_tokens"]
        for token in added:
            if not token["special"]:
                vocab.setdefault(_spelled(token["content"], described["decoder"]), token["id"])
        described["added_tokens"] = [token for token in added if token["special"]]
    return json.dumps(described | dict(padding=None, truncation=None))


def _spelled(content: str, decoder: dict[str, Any] | None) -> str:
    """An added token as one of the vocabulary: byte-level decoders read each letter as a byte."""
    table = letters()
    known = {byte for byte in range(256) if byte not in table} | {*table.values()}
    if (decoder or {}).get("type") != "ByteLevel" or known.issuperset(map(ord, content)):
        return content
    return content.encode().decode("latin-1").translate(table)


def only(logits_XV: jax.Array, mask_XW: jax.Array) -> jax.Array:
    """The logits, -inf where the bit of a token is 0. Tokens beyond the mask are not allowed."""
    X, V = logits_XV.shape
    bits_XW32 = mask_XW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None] & 1
    bits_XV = bits_XW32.reshape(X, -1)[:, :V] != 0
    bits_XV = jnp.pad(bits_XV, [(0, 0), (0, V - bits_XV.shape[1])])
    return jnp.where(bits_XV, logits_XV, -jnp.inf)
