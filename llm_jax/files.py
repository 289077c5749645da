"""Files and folders that appear whole or not at all, whenever a process is killed; and locks."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_jax import LLMError


class LockedError(LLMError):
    """Another process works in an output folder."""


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where fetched files are kept: the argument, $THIMBLE_CACHE, or ~/.cache/thimble-jax."""
    chosen = cache_dir or os.environ.get("THIMBLE_CACHE") or "~/.cache/thimble-jax"
    return Path(chosen).expanduser()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for any other text, however deep it is nested."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps a folder, which is made if needed, for this block; a killed process lets it go, too.

    Raises LockedError at once where another block, of any process, has it. A file system without
    locks, as some network ones are, gives no protection.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"another process writes to {folder}; wait until it ends, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EBADF, errno.ENOTSUP):
                raise
        yield
    finally:
        os.close(handle)


def check_writable(folder: str | Path) -> None:
    """Raises OSError now, before long work, where no file can be written to `folder`.

    The folder is made if needed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = _scratch_folder(folder / "test")
    try:
        (scratch / "test").write_bytes(b"test")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A scratch file near `path` that takes its place when the block ends without an error.

    Its contents are on the disk before it has the name; after an error nothing is left. What a
    killed process left of the same file is removed.
    """
    path = Path(path)
    folder = _scratch_folder(path)
    try:
        scratch = folder / path.name
        yield scratch
        _flush(scratch)
        os.replace(scratch, path)
        _flush(path.parent)  # the name, too, survives a loss of power
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A scratch folder beside `path` that gets its name when the block ends without an error.

    Raises FileExistsError, before the block runs, where `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists")
    scratch = _scratch_folder(path)
    try:
        yield scratch
        for file in (*scratch.rglob("*"), scratch):
            if file.is_file() or file.is_dir():
                _flush(file)
        os.replace(scratch, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch_folder(path: Path) -> Path:
    """A new folder beside `path`, named after it and this process: .model.json.4711.0c9f3a72"""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.*"):
        process = old.name.removeprefix(f".{path.name}.").split(".")[0]
        if process.isdecimal() and not _is_running(int(process)):
            shutil.rmtree(old, ignore_errors=True)
    folder = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    folder.mkdir()  # with the usual permissions, unlike a temporary folder's
    return folder


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
