"""Records on disk: one JSON object a line, appended so that a killed run can be resumed."""

import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from experiments.common.cli import UserError
from llm_jax.files import atomic_file, parse_json
from llm_jax.untrusted import require_file

log = logging.getLogger(__name__)

Record = dict[str, Any]
TURN = ("method", "sample", "turn")
"""The fields that every record of a decoded turn has."""


class RecordError(UserError):
    """What is wrong with a file of records, and what to do about it."""


def append(path: Path, record: Record) -> None:
    """Writes `record` as one line at the end of `path`, and waits until it is on the disk.

    A half-written line that an earlier, killed run left is removed first, so the new one cannot
    become part of it. NumPy and JAX values become numbers and lists, NaN and infinities null.
    Raises TypeError for what JSON cannot hold; the file then stays as it was.
    """
    path = Path(path)
    line = json.dumps(plain(record)).encode() + b"\n"  # first, because it may raise
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _mend(file)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _mend(file: BinaryIO) -> None:
    """Ends the last line of an open file with a newline if it is whole, and else removes it."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read() == b"\n":
        return
    file.seek(0)
    tail = file.read().rpartition(b"\n")[2]
    if _parse(tail, ()) is None:
        file.truncate(file.seek(0, os.SEEK_END) - len(tail))
    else:
        file.write(b"\n")


def read(
    path: Path, fields: Sequence[str] = TURN, problem: Callable[[Record], str | None] | None = None
) -> list[Record]:
    """The records in `path`, all of which must have `fields`; none if there is no file.

    `problem(record)` may say what else is wrong with one.

    A half-written last line is dropped, with a warning in the log. Raises `RecordError` for any
    other line that is no record, because a killed run cannot have left it.
    """
    path = Path(path)
    if not path.exists():
        return []
    require_file(path)
    *lines, tail = path.read_bytes().split(b"\n")
    found = [*enumerate(lines, 1), (len(lines) + 1, tail)]
    records = []
    for number, line in found:
        if not line.strip():
            continue
        record = _parse(line, fields)
        if record is None and number > len(lines):
            log.warning(
                "%s: dropped the half-written last line (line %d) that an interrupted run left;"
                " what it recorded will be run again",
                path,
                number,
            )
            continue
        wrong = f"not a record ({line[:40]!r})" if record is None else problem and problem(record)
        if wrong:
            raise RecordError(
                f"{path}, line {number}: {wrong}. Expected one JSON object a line with"
                f" {', '.join(fields)}. Delete the line; what it recorded is run again."
            )
        records.append(record)
    return records


def _parse(line: bytes, fields: Sequence[str]) -> Record | None:
    """The record on a line, or None if it is no JSON object with `fields`."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and set(fields) <= set(record) else None


def write_json(path: Path, obj: Any) -> None:
    """Writes `obj` as JSON; a reader sees the old file or the new one, never a part."""
    with atomic_file(path) as scratch:
        scratch.write_text(json.dumps(plain(obj), indent=2) + "\n")


def plain(value: Any) -> Any:
    """`value` in types that JSON has. NaN and infinities become None, since JSON lacks them."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return plain(value.tolist())
    raise TypeError(f"a record cannot hold a {type(value).__name__}: {value!r}")


def environment() -> dict[str, Any]:
    """What the numbers were measured with; the caller adds the device."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": {name: _version(name) for name in ("jax", "jaxlib", "numpy")},
        **_commit(Path(__file__).parents[2]),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> dict[str, Any]:
    """The commit of the checkout at `root` and whether files differ from it; None outside one."""

    def git(*args: str) -> str:
        command = ("git", "-C", str(root), *args)
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:  # an installed copy may lie inside another repository, whose commit says nothing
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return {"commit": None, "modified": None}
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit yet
        return {"commit": None, "modified": None}
