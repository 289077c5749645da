"""The bytes that a token stands for: a part of a character, or several characters."""

import re
from typing import Any

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How SentencePiece writes a token that is one byte."""


class TokenBytes:
    """(name, bytes) of the tokens of a `transformers` fast tokenizer.

    Special tokens, which are in no text, have a name and no bytes (None).
    """

    def __init__(self, hf: Any):
        self._hf, self._count = hf, len(hf)
        added = hf.added_tokens_decoder
        self._special = {i: token.special for i, token in added.items()}
        self._letters, decoder = None, hf.backend_tokenizer.decoder
        if decoder is not None and b'"ByteLevel"' in decoder.__getstate__():
            moved = letters()
            self._letters = {chr(moved.get(byte, byte)): byte for byte in range(256)}

    def __call__(self, token: int) -> tuple[str, bytes | None]:
        # A model may have more rows than there are tokens.
        text = self._hf.convert_ids_to_tokens(token) if token < self._count else None
        if text is None:
            return f"<{token}>", None
        if self._special.get(token):
            return text, None
        found = self._bytes(token, text)
        return readable(found), found

    def _bytes(self, token: int, text: str) -> bytes:
        if token in self._special:
            return text.encode()
        if self._letters is not None:
            return bytes(self._letters[letter] for letter in text if letter in self._letters)
        if byte := BYTE.fullmatch(text):
            return bytes([int(byte[1], 16)])
        return text.replace("▁", " ").encode()


def readable(text: bytes) -> str:
    r"""Bytes as text, or as `\xf0` where they are no whole characters."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in text)


def letters() -> dict[int, int]:
    """Byte -> the letter above 255 by which byte-level BPE (GPT-2's) writes it; others are
    themselves."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in plain)
    return {byte: 256 + n for n, byte in enumerate(others)}
