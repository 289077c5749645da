"""What is asked of a scheduler and what it answers: requests, updates, and text up to a stop."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from llm_jax.grammar import Grammar
from llm_jax.sample import Sampler
from llm_jax.token_stream import StreamDecoder
from subspec_jax import SubspecError
from subspec_jax.logprobs import MOST, Logprob

Finish = Literal["stop", "length", "cancelled", "error"]


class QueueFull(SubspecError):
    """As many requests wait as may wait; `seconds` is a guess when there is room again."""

    def __init__(self, waiting: int, seconds: float):
        super().__init__(f"{waiting} requests are waiting or running, which is all that may; retry")
        self.seconds = seconds


@dataclasses.dataclass(frozen=True)
class Request:
    """Token ids to continue, how, and until when."""

    prompt: tuple[int, ...]
    new_tokens: int
    """The most tokens of the answer."""
    seed: int = 0
    sampler: Sampler = Sampler()
    eos: tuple[int, ...] = ()
    """Tokens that end the answer. They are among its tokens and not in its text."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    shows: tuple[str, ...] = ()
    """Special tokens that are in the text by their names; others are not."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told with each token's log-probability; None: it is not
    told either."""
    grammar: Grammar | None = None
    """What the answer must follow; it ends where the grammar does."""

    def __post_init__(self):
        if not all(self.stop):
            raise SubspecError("a stop string is empty; it would end every answer at once")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST:
            raise SubspecError(f"logprobs is {self.logprobs}; expected 0 to {MOST}")


class Told(NamedTuple):
    """A token's log-probability, and where its text begins in the answer's, in characters."""

    start: int
    logprob: Logprob


@dataclasses.dataclass
class Update:
    """What one round gave a request; the last one has `finish`."""

    tokens: list[int]
    accepted: int = 0
    """How many of the tokens, from the first on, the draft proposed. The others are the target's
    own."""
    text: str = ""
    """What may be shown now: no part of a character, and no possible beginning of a stop string."""
    finish: Finish | None = None
    cached: int = 0
    """Prompt tokens whose keys and values came from a prefix cache."""
    parts: tuple[tuple[str, bool], ...] = ()
    """`text` in pieces, each with whether the draft proposed it."""
    logprobs: tuple[Told, ...] = ()
    """Of the tokens whose text ends in `text`, where the request asks. The token of `eos` and those
    that a stop string cuts are not told."""
    prefill: bool = False
    """Whether the round read the prompt; it is the target's own pass, without a draft."""
    seconds: float = 0.0
    streamed_bytes: int = 0
    error: str = ""
    """Why `finish` is "error"."""


class TextUntil:
    """The text of tokens as they come, up to the first stop string.

    A token may complete a stop string that began tokens ago. So the longest end of the text that
    may begin a stop string is held back until more is known. Where several stop strings are found
    at one token, the text ends before the leftmost.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._decoder, self._stop = StreamDecoder(tokenizer), tuple(stop)
        self._held: list[tuple[str, bool]] = []
        self._drafted = False
        self._length = self._shown = 0
        self._unfinished: list[Told] = []  # tokens whose last character is not whole
        self._untold: list[tuple[int, Told]] = []  # with where their text ends
        self.stopped = False

    def push(self, token: int, drafted: bool = False, logprob: Logprob | None = None) -> bool:
        """Adds a token, and returns whether its text completed a stop string."""
        self._drafted = drafted
        if logprob is not None:
            self._unfinished.append(Told(self._length, logprob))
        return self._add(self._decoder.push(token))

    def flush(self) -> bool:
        """Adds what is left of an unfinished character: no token will complete it."""
        return self._add(self._decoder.flush())

    def told(self) -> tuple[Told, ...]:
        """The log-probabilities of the tokens that are wholly shown, each once; see `take`."""
        ready = sum(end <= self._shown for end, _ in self._untold)
        out, self._untold = self._untold[:ready], self._untold[ready:]
        return tuple(told for _, told in out)

    def take(self, last: bool = False) -> tuple[tuple[str, bool], ...]:
        """The pieces that may be shown now, each once; all that is left where no more comes."""
        held = "".join(piece for piece, _ in self._held)
        hold = (
            0 if last or self.stopped else max((_overlap(held, s) for s in self._stop), default=0)
        )
        shown, self._held = _split(self._held, len(held) - hold)
        self._shown += sum(len(piece) for piece, _ in shown)
        return tuple(_merged(shown))

    def _add(self, piece: str) -> bool:
        self._length += len(piece)
        if self._decoder.whole:
            self._untold += [(self._length, told) for told in self._unfinished]
            self._unfinished = []
        if piece and not self.stopped:
            self._held.append((piece, self._drafted))
            held = "".join(piece for piece, _ in self._held)
            found = [at for s in self._stop if (at := held.find(s)) >= 0]
            if found:
                self.stopped = True
                self._held, _ = _split(self._held, min(found))
        return self.stopped


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that is a beginning of the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


def _split(pieces: list[tuple[str, bool]], length: int) -> tuple[list, list]:
    """The pieces of the first `length` characters, and those of the rest."""
    before, behind = [], []
    for piece, drafted in pieces:
        for part, to in ((piece[:length], before), (piece[length:], behind)):
            if part:
                to.append((part, drafted))
        length = max(0, length - len(piece))
    return before, behind


def _merged(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Neighbours of one origin as one piece."""
    out: list[tuple[str, bool]] = []
    for piece, drafted in pieces:
        if out and out[-1][1] == drafted:
            out[-1] = (out[-1][0] + piece, drafted)
        else:
            out.append((piece, drafted))
    return out
