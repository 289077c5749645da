"""The files of one GGUF model: one, or the parts that llama-gguf-split makes of it.

Parts are called NAME-00001-of-00003.gguf. The first one has the metadata, and sometimes no tensors.
Every one says which it is and how many there are.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np

from llm_jax import CheckpointError
from llm_jax.gguf_header import Header, layout_problems, read_header
from llm_jax.untrusted import require_file, unreadable
from llm_jax.values import ConfigError, Values, short

PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
MOST = 99_999
"""The most parts that such names can count."""
MERGE = "put them together with `llama-gguf-split --merge FIRST_PART MODEL.gguf`"
"""What to do with parts whose names do not say which they are."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One file: its header, and its bytes, mapped."""

    path: Path
    header: Header
    data: np.ndarray

    def problems(self) -> tuple[str, ...]:
        """What is wrong with where its tensors lie."""
        return layout_problems(self.header, len(self.data), self.path.name)


def first_part(path: Path) -> Path:
    """The first of the parts that a file belongs to; the file itself, if it is no part."""
    found = PART.fullmatch(path.name)
    return path if found is None else _named(path, found, 1)


def same_model(paths: list[Path]) -> bool:
    """Whether all the files are parts of one model."""
    found = [PART.fullmatch(path.name) for path in paths]
    return None not in found and len({(m["name"], m["count"]) for m in found if m}) == 1


def open_parts(path: Path) -> tuple[Part, ...]:
    """The file, or all parts of which it is the first.

    Raises CheckpointError if it is no GGUF model, and if parts are missing or do not fit together.
    """
    first = open_part(path)
    values = Values(first.header.metadata)
    try:
        kind, count = (
            values.text("general.type", "model"),
            values.integer("split.count", 0, MOST, 0),
        )
        tensors = values.integer("split.tensors.count", 0, 2**31, None)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if kind != "model":
        raise CheckpointError(f"{path} holds no model: its general.type is {short(kind)}")
    if count < 2:
        return (first,)
    named = PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts of a split file, and is not called so "
            f"(…-00001-of-{count:05}.gguf); rename the parts, or {MERGE}"
        )
    files = [_named(path, named, number) for number in range(1, count + 1)]
    if missing := [file.name for file in files if not file.exists()]:
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")
        are = "is" if len(missing) == 1 else "are"
        raise CheckpointError(
            f"{path} is one of {count} parts, of which {some} {are} not there; download what is "
            "missing into its folder"
        )
    parts = (first, *map(open_part, files[1:]))
    for number, part in enumerate(parts):
        own = Values(part.header.metadata)
        try:
            says = own.integer("split.no", 0, MOST, None), own.integer("split.count", 0, MOST, 0)
        except ConfigError as error:
            raise CheckpointError(f"{part.path}: {error}") from error
        if says != (number, count):
            raise CheckpointError(
                f"{part.path} says that it is part {short(says[0])} of {says[1]}, counted from 0; "
                f"expected {number} of {count}: download it again"
            )
    held = sum(len(part.header.tensors) for part in parts)
    if tensors is not None and held != tensors:
        raise CheckpointError(
            f"the {count} parts of {path} hold {held} tensors; expected {tensors}: they are not of "
            "one model, or some are damaged; download them again"
        )
    return parts


def open_part(path: Path) -> Part:
    """One file; raises `CheckpointError` for a file cut inside of its header."""
    if require_file(path).st_size == 0:
        raise CheckpointError(f"{path} is empty; download it again")
    try:
        data = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        return Part(path, read_header(path, data), data)
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes fail in any way; the cause is always the file
        raise CheckpointError(
            f"{path} is truncated or corrupt: its header cannot be read ({error}); "
            "download it again"
        ) from error


def _named(path: Path, part: re.Match, number: int) -> Path:
    return path.with_name(f"{part['name']}-{number:05}-of-{part['count']}.gguf")
