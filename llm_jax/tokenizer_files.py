"""Which of its files a folder's tokenizer is read from."""

from pathlib import Path

from llm_jax.sentencepiece import from_model
from llm_jax.tekken import from_tekken
from llm_jax.tokenizer import Tokenizer, from_folder

READERS = {"tekken.json": from_tekken, "tokenizer.model": from_model}
"""What is read where there is no tokenizer.json, in this order."""


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer in a folder: of tokenizer.json, of Mistral's tekken.json, or of SentencePiece.

    Raises CheckpointError if there is none, or if it cannot be used.
    """
    if not (folder / "tokenizer.json").exists():
        for name, read in READERS.items():
            if (folder / name).exists():
                return read(folder / name)
    return from_folder(folder)
