"""Text of token ids as they come, without parts of characters."""

from typing import Any


class StreamDecoder:
    """Turns ids into text; keeps ids back until their bytes are whole characters."""

    def __init__(self, tokenizer: Any):
        self._decode = tokenizer.decode
        self._shown: list[int] = []  # the last ids shown: decoding may depend on what is in front
        self._held: list[int] = []

    @property
    def whole(self) -> bool:
        """Whether no id is kept back."""
        return not self._held

    def push(self, token: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        self._held.append(int(token))
        # A character has at most four bytes; 64 ids without a whole one are not UTF-8.
        return (
            self._release() if not self._text().endswith("\ufffd") or len(self._held) > 64 else ""
        )

    def flush(self) -> str:
        """The text of the ids that are still kept back; U+FFFD stands for incomplete characters."""
        return self._release()

    def _text(self) -> str:
        return self._decode(self._shown + self._held)[len(self._decode(self._shown)) :]

    def _release(self) -> str:
        text = self._text()
        if text:
            self._shown = self._held
        self._held = []
        return text
