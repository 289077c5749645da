"""Downloaded files hashed again: what is in a cache is what was published, or an error says so.

The Hub's cache names each file after its content: the sha256 of large files, git's sha1 of others.
A file is hashed once, and again when it has changed (`llm_jax.digest.kept_digest`).
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llm_jax import CheckpointError
from llm_jax.digest import kept_digest, known_digest
from llm_jax.untrusted import require_file, unreadable

BLOCK = 1 << 22
ANNOUNCED = 1 << 28
"""Bytes from which on hashing takes long enough to be announced."""


def commit(folder: Path) -> str | None:
    """The commit that a folder of the Hub's cache holds; None for other folders."""
    known = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    return folder.name if known else None


def check_snapshot(
    folder: Path, names: Iterable[str], cache: Path, progress: Callable[[str], None]
) -> None:
    """Hashes a snapshot's files that match `names`; raises `CheckpointError` for one that differs.

    A file that the Hub's cache did not name after its content has nothing to be compared with.
    `folder` may be a file of a snapshot, too.
    """
    files = {file for name in names for file in folder.glob(name)} if folder.is_dir() else {folder}
    check([(f.absolute(), d) for f in sorted(files) if (d := published(f))], cache, progress)


def published(file: Path) -> str:
    """The digest that the Hub published for a file of its cache; empty for other files.

    The first link leads to blobs/DIGEST. Another one may follow, to a file that repositories
    share; its name is a hash of another kind.
    """
    target = Path(os.readlink(file)) if file.is_symlink() else Path()
    return target.name if target.parent.name == "blobs" and _algorithm(target.name) else ""


def check(
    files: list[tuple[Path, str]], cache: Path, progress: Callable[[str], None] = lambda line: None
) -> None:
    """Raises `CheckpointError` unless each file has its digest; `cache` keeps what is known."""
    new = [path for path, d in files if known_digest(path, _algorithm(d), cache) is None]
    if (size := sum(require_file(path).st_size for path in new)) > ANNOUNCED:
        progress(f"checking {size / 1e9:.1f} GB of {new[0].parent} once")

    def digest(file):
        path, algorithm = file[0], _algorithm(file[1])
        return kept_digest(path, algorithm, lambda path: hashed(path, algorithm), cache)

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(digest, files))
    for (path, expected), digest in zip(files, found, strict=True):
        if digest != expected:
            raise CheckpointError(
                f"{path} has {_algorithm(expected)} {digest}; expected {expected}: it was damaged "
                f"or changed after the download; delete it ({path.resolve()}) and try again"
            )


def hashed(path: Path, algorithm: str) -> str:
    """The sha256 of a file, or the sha1 that git gives it."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    if algorithm == "sha1":
        digest.update(b"blob %d\0" % path.stat().st_size)
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def _algorithm(digest: str) -> str:
    """What a hexadecimal digest is of; empty for any other text."""
    lengths = {64: "sha256", 40: "sha1"}
    return lengths.get(len(digest), "") if re.fullmatch("[0-9a-f]+", digest) else ""
