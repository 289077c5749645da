"""Files and folders that appear whole or not at all, whenever a process is killed."""

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


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
        for file in scratch.rglob("*"):
            if file.is_file():
                _flush(file)
        os.replace(scratch, path)
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
    with path.open("rb") as file:
        os.fsync(file.fileno())
