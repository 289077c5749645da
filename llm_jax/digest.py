"""Identity by content: checksums of arrays and files with XXH3, the fastest hash of its kind.

They find accidents, such as a flipped bit or another file at the same path. They are no defence
against somebody who wants two contents to have the same checksum.
"""

import concurrent.futures
import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from llm_jax.extras import need
from llm_jax.files import atomic_file, cache_folder, parse_json

PART = 2**24
"""Bytes that one thread reads and hashes at a time."""
SETTLED_NS = 2 * 10**9
"""A file changed later than this before it was hashed may change again within the same tick of the
file system's clock, so its digest is not kept."""


def array_digest(array: Any) -> str:
    """XXH3-128 of an array's bytes in row order, in hexadecimal. Shape and dtype do not count."""
    flat = np.ascontiguousarray(np.asarray(array)).reshape(-1)
    return _hexdigest(flat.view(np.uint8).data)


def json_digest(value: Any) -> str:
    """XXH3-128 of a JSON value, whatever the order of its keys and its spaces."""
    return _hexdigest(json.dumps(value, sort_keys=True).encode())


def file_digest(path: Path) -> str:
    """XXH3-128 of the digests of a file's 16 MiB parts, which are read in parallel.

    It is kept (`kept_digest`).
    """
    return kept_digest(path, "xxh3", hash_file)


def kept_digest(
    path: Path, kind: str, hashed: Callable[[Path], str], cache: Path | None = None
) -> str:
    """The file's digest of that kind, from `hashed(path)` or from what was kept of an earlier call.

    It is kept in the cache folder and used again while path, size, times and inode are the same.
    """
    before = _state(path)
    if (known := known_digest(path, kind, cache)) is not None:
        return known
    found = hashed(path)
    if before == _state(path) and time.time_ns() - before["changed"] > SETTLED_NS:
        try:
            with atomic_file(_kept(path, kind, cache)) as scratch:
                record = {"path": str(path), "state": before, "digest": found}
                scratch.write_text(json.dumps(record), encoding="utf-8")
        except OSError:
            pass  # a cache that cannot be written costs time, nothing else
    return found


def known_digest(path: Path, kind: str, cache: Path | None = None) -> str | None:
    """The digest that `kept_digest` would give without reading the file; None where it must."""
    try:
        known = parse_json(_kept(path, kind, cache).read_text(encoding="utf-8"))
        return str(known["digest"]) if known["state"] == _state(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or damaged: hashed again


def _kept(path: Path, kind: str, cache: Path | None) -> Path:
    """The file that keeps a digest."""
    name = _hexdigest(f"{kind} {Path(path).resolve()}".encode())
    return (cache or cache_folder()) / "digests" / f"{name}.json"


def files_digest(paths: Iterable[Path]) -> str:
    """One digest of several files' contents, in the order of their names; names do not count."""
    return json_digest([file_digest(path) for path in sorted(paths, key=lambda path: path.name)])


def _state(path: Path) -> dict[str, int]:
    found = Path(path).stat()
    changed = max(found.st_mtime_ns, found.st_ctime_ns)
    return {
        "size": found.st_size,
        "modified": found.st_mtime_ns,
        "changed": changed,
        "inode": found.st_ino,
    }


def hash_file(path: Path) -> str:
    """The digest of `file_digest`, always by reading the file."""
    buffers, size = threading.local(), Path(path).stat().st_size

    def part(start: int) -> bytes:
        if not hasattr(buffers, "own"):  # one a thread, because making it takes as long as reading
            buffers.own = memoryview(mmap.mmap(-1, PART))  # which the system has back at once
        view, got = buffers.own[: min(PART, size - start)], 0
        while got < len(view) and (n := os.preadv(file.fileno(), [view[got:]], start + got)):
            got += n
        return _xxhash().xxh3_128_digest(view[:got])

    with Path(path).open("rb") as file, concurrent.futures.ThreadPoolExecutor(8) as pool:
        whole = _xxhash().xxh3_128()
        for digest in pool.map(part, range(0, size, PART)):
            whole.update(digest)
        return whole.hexdigest()


def _hexdigest(data: Any) -> str:
    return _xxhash().xxh3_128_hexdigest(data)


def _xxhash() -> ModuleType:
    return need("xxhash", "models", "a checksum")
