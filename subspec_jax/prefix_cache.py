"""Texts that are decoded together, and the rows of the caches that they have.

A row that is free keeps what it holds, so that a later text with the same beginning need not
compute it again: the second turn of a chat costs its new tokens alone.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from llm_jax.grammar import Grammar, Walk
from llm_jax.sample import Sampler

LEAST_SHARED = 16
"""Tokens from which on the beginning of a running text is copied rather than computed."""


@dataclasses.dataclass(eq=False)
class Text:
    """A text that is being decoded."""

    prompt: Sequence[int]
    new_tokens: int
    seed: int = 0
    sampler: Sampler = Sampler()
    eos: Sequence[int] = ()
    replay: Iterable[int] | None = None
    """As in `Decoder.rounds`."""
    grammar: Grammar | None = None
    """What its new tokens must follow. The text ends where the grammar does."""
    walk: Walk | None = None
    """Where in its grammar it stands."""
    logprobs: bool = False
    """Whether its rounds tell `Round.logprobs`."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    """The prompt and all emitted tokens."""
    row: int = -1
    """Its row of the caches; -1: it has none."""
    at: int = 0
    """Tokens whose keys and values are in the row."""
    cached: int = 0
    """Prompt tokens that were in the caches already."""
    done: bool = False
    """Whether its last token is emitted."""
    failed: str | None = None
    """Why it cannot go on."""

    @property
    def new(self) -> list[int]:
        """The emitted tokens."""
        return self.tokens[len(self.prompt) :]

    @property
    def complete(self) -> bool:
        """Whether its grammar allows nothing more."""
        return self.walk is not None and self.walk.over


class Rows:
    """The rows of the caches: who has them, and what the free ones still hold."""

    def __init__(self, count: int, rewinds: bool = True):
        self.rewinds = rewinds
        """Whether a row can be used from any earlier token on."""
        self.users: list[Text | None] = [None] * count
        self.held: list[list[int]] = [[] for _ in range(count)]
        """The tokens whose keys and values a free row holds."""
        self._used = [0] * count
        self._clock = 0

    @property
    def free(self) -> list[int]:
        """The rows without a user, the one that was used longest ago first."""
        return sorted(
            (r for r, user in enumerate(self.users) if user is None), key=self._used.__getitem__
        )

    def take(self, text: Text) -> tuple[int, int, int] | None:
        """(row, row to copy from, tokens of the prompt that it then holds); None: no row is free.

        The longest common beginning with any row is used; the last token of a prompt is always
        computed, because what follows it is not stored.
        """
        if not (free := self.free):
            return None
        shared = [self._shared(text, r) for r in range(len(self.users))]
        best = max(range(len(shared)), key=lambda r: (shared[r], self.users[r] is None))
        held, row = shared[best], free[0]
        if held and self.users[best] is None and 2 * held >= len(self.held[best]):
            row = best  # it goes on where it is
        elif held < LEAST_SHARED:
            held, best = 0, row
        self.users[row], self.held[row] = text, []
        self._touch(row)
        return row, best, held

    def _shared(self, text: Text, row: int) -> int:
        user = self.users[row]
        held = self.held[row] if user is None else user.tokens[: user.at]
        most = min(len(held), len(text.prompt) - 1)
        same = np.asarray(held[:most]) == np.asarray(text.prompt[:most])
        count = most if same.all() else int(np.argmin(same))
        return count if self.rewinds or count == len(held) else 0

    def leave(self, text: Text) -> None:
        """Frees the text's row, which keeps what it holds."""
        self.users[text.row], self.held[text.row] = None, text.tokens[: text.at]
        self._touch(text.row)

    def _touch(self, row: int) -> None:
        self._clock += 1
        self._used[row] = self._clock
