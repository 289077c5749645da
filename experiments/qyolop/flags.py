"""Checks of flags and outputs, made before any long work."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common.cli import UserError
from llm_jax.files import check_writable

MOST_IMAGES, LARGEST_BATCH, LARGEST_SEED = 10**7, 4096, 2**31 - 1


class FlagError(UserError):
    """A flag that cannot be; the message names it and says what is possible."""


def flag(name: str) -> str:
    """A field as it is written on a command line."""
    return "--" + name.replace("_", "-")


def check_range(args: Any, low: float, high: float, *names: str) -> None:
    """FlagError unless these flags, or all their values, are from `low` to `high`; NaN is not."""
    for name in names:
        value = getattr(args, name)
        for one in value if isinstance(value, tuple) else (value,):
            if not low <= one <= high:
                raise FlagError(f"{flag(name)} is {one}; expected {low} to {high}")


def check_data(names: Sequence[str]) -> None:
    """FlagError unless there is a data set, and none twice."""
    if not names:
        raise FlagError("--data is empty; expected at least one data set")
    if len(set(names)) < len(names):
        raise FlagError(f"--data is {' '.join(names)}; expected each data set once")


def check_file(path: Path | None, *inputs: Path) -> None:
    """FlagError unless a file can be written at `path`, which is none of `inputs`."""
    if path is None:
        return
    if path.resolve() in [i.resolve() for i in inputs]:
        raise FlagError(f"--output {path} would replace the input; take another name")
    if path.exists() and not path.is_file():
        raise FlagError(f"--output {path} is there and is no file; take another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise FlagError(f"--output {path} cannot be written ({error}); take another") from error


def check_folder(path: Path) -> None:
    """FlagError unless files can be written in the folder `path`, which is made."""
    try:
        check_writable(path)
    except OSError as error:
        raise FlagError(
            f"--output {path} cannot be written as a folder ({error}); take another"
        ) from error
