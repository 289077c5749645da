"""Long work that was begun and not finished: what it has found so far, beside its output.

    with Unfinished(output, identity) as work:
        for name in names:
            found = work.found(name) or [measured(name)]

A folder `OUTPUT.unfinished` has one record for each result. They are gone when the block ends
without an error; after an interrupt, a kill or an error the same command goes on with them.
"""

import contextlib
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from experiments.common import records
from llm_jax.digest import json_digest
from llm_jax.files import atomic_file, locked

FIELDS = ("work", "what", "value", "checksum")


class Unfinished:
    """The results of a piece of work by name, for as long as the work is not finished.

    `identity`, in types that JSON has, is all that decides what the results are; results of another
    identity do not count. Without an output nothing is kept. LockedError while another process does
    work for the same output, RecordError for a damaged file of results.
    """

    def __init__(self, output: Path | None, identity: Any):
        self.work = json_digest(records.plain(identity))
        self.folder = None if output is None else output.with_name(f"{output.name}.unfinished")
        self._found: dict[str, list[Any]] = {}
        self._stack = contextlib.ExitStack()

    @property
    def path(self) -> Path | None:
        """The file of results, None where nothing is kept."""
        return self.folder and self.folder / "records.jsonl"

    def is_begun(self) -> bool:
        """Whether results of this work are on the disk."""
        return self.path is not None and any(r["work"] == self.work for r in self._read())

    def __enter__(self) -> "Unfinished":
        if self.folder is not None:
            self._stack.enter_context(locked(self.folder))
            for r in self._read():
                if r["work"] == self.work:
                    self._found.setdefault(r["what"], []).append(r["value"])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with self._stack:  # the lock is the last to go
            if self.folder is None:
                return
            others = [r for r in self._read() if r["work"] != self.work] if kind is None else []
            if others:  # such as another network's scores in the same output
                with atomic_file(self.path) as scratch:
                    scratch.write_text("".join(json.dumps(r) + "\n" for r in others))
            elif kind is None or not self.path.exists():
                shutil.rmtree(self.folder, ignore_errors=True)

    def found(self, what: str) -> list[Any]:
        """The results of this name, in the order in which they were added."""
        return self._found.get(what, [])

    def add(self, what: str, value: Any) -> None:
        """Keeps a result; returns when the disk has it. NaN and infinities become None."""
        value = records.plain(value)
        self._found.setdefault(what, []).append(value)
        if self.path is not None:
            record = dict(work=self.work, what=what, value=value)
            records.append(self.path, record | dict(checksum=json_digest(record)))

    def publish(self, path: Path, what: str, record: records.Record) -> records.Record:
        """Appends a record to `path`, once for this work, however often it is interrupted.

        Gives the record that counts: the one that was added under this name before, if any.
        """
        before = self.found(what)
        if not before:
            self.add(what, record)
        elif before[0] in records.read(path, ()):
            return before[0]
        records.append(path, (before or [record])[0])
        return self.found(what)[0]

    def _read(self) -> list[records.Record]:
        return records.read(self.path, FIELDS, problem) if self.path else []


def problem(record: records.Record) -> str | None:
    """What is wrong with a record of unfinished work, if anything is."""
    rest = {name: record[name] for name in FIELDS if name != "checksum"}
    if record["checksum"] != json_digest(rest) or not isinstance(record["what"], str):
        return "its checksum is not that of what it holds"
    return None
