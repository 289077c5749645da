"""An answer as its rounds come in: the text, and what it took."""

import dataclasses
from typing import Any

from subspec_jax.requests import Request, Told, Update


@dataclasses.dataclass
class Answer:
    """The sum of the updates of one request that came so far."""

    request: Request
    text: str = ""
    logprobs: list[Told] = dataclasses.field(default_factory=list)
    """Of the tokens in `text`, where the request asks."""
    tokens: int = 0
    accepted: int = 0
    cached: int = 0
    passes: int = 0
    """Rounds behind the prompt."""
    decoded: int = 0
    """Tokens of these rounds."""
    seconds: float = 0.0
    """Of these rounds."""
    streamed_bytes: int = 0
    """In these rounds."""
    finish: str | None = None
    error: str = ""

    def add(self, update: Update) -> None:
        self.text += update.text
        self.logprobs += update.logprobs
        self.tokens += len(update.tokens)
        self.accepted += update.accepted
        self.cached = max(self.cached, update.cached)
        self.finish, self.error = update.finish, update.error
        if update.tokens and not update.prefill:
            self.passes += 1
            self.decoded += len(update.tokens)
            self.seconds += update.seconds
            self.streamed_bytes += update.streamed_bytes

    def speeds(self) -> dict[str, Any]:
        """What is special here: how many tokens the draft proposed, tokens a pass (tau), and speeds
        behind the prompt. None before the first round there."""
        rate = lambda amount: round(amount / self.seconds, 4) if self.seconds else None
        return {
            "tokens": self.tokens,
            "accepted": self.accepted,
            "tau": round(self.decoded / self.passes, 4) if self.passes else None,
            "tokens_per_s": rate(self.decoded),
            "streamed_gb_s": rate(self.streamed_bytes / 1e9),
        }
