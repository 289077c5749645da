"""Files that somebody else made: opened only if they are files, and their errors have a name."""

import json
import os
import stat
from pathlib import Path, PurePath
from typing import Any

from llm_jax import CheckpointError, shown

LARGEST_TEXT = 1 << 28
"""Bytes of the largest file that is read into memory whole; a tokenizer has some ten million."""

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_file(path: Path) -> os.stat_result:
    """The state of an ordinary file; raises `CheckpointError` for whatever else `path` is.

    Opening a named pipe would wait for ever, and reading a device would never end.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "no file")
        raise CheckpointError(f"{path} is {kind}; expected an ordinary file: remove or replace it")
    return found


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that the system does not let us read."""
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(f"{path} cannot be read: {reason}; check that it is there and readable")


def require_text_file(path: Path) -> None:
    """Raises `CheckpointError` unless it is an ordinary file of at most `LARGEST_TEXT` bytes."""
    size = require_file(path).st_size
    if size > LARGEST_TEXT:
        raise CheckpointError(
            f"{path} has {size:,} bytes; expected at most {LARGEST_TEXT:,}: download it again"
        )


def read_text(path: Path) -> str:
    """The text, in UTF-8, of an ordinary file."""
    require_text_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); download it again"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; a key that is there twice is refused, too."""
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {error}; download it again or correct it"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key '{shown(name, 100)}' is there twice")
        found[name] = value
    return found


def inside(folder: Path, name: str, where: str | Path) -> Path:
    """The file of that name in the folder. `where` names the file that says so, for the message.

    Raises `CheckpointError` for a name that leads out of the folder. The file itself may be a
    link to elsewhere: the cache of the Hub consists of links.
    """
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts or path == PurePath() or "\0" in name:
        raise CheckpointError(
            f"{where} names '{shown(name, 200)}', which is not inside {folder}; expected the name "
            "of a file there: download it again"
        )
    return folder / path
