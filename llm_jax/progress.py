"""Progress of long work: bars on a terminal, one line at the start elsewhere, or nothing."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

Progress = Callable[[int], None]
"""Hears how many steps of long work are done."""


class Bar:
    """A progress bar as a callable: `bar(done)`, or `bar(done, "what it is doing")`."""

    def __init__(self, progress: Any, task: Any):
        self._progress, self._task = progress, task

    def __call__(self, done: float, title: str | None = None) -> None:
        more = {} if title is None else {"description": title}
        self._progress.update(self._task, completed=done, **more)

    def add(self, count: float) -> None:
        """Moves the bar on by `count`."""
        self._progress.advance(self._task, count)


@contextlib.contextmanager
def bar(console: Any, title: str, total: float) -> Iterator[Bar]:
    """A `Bar` that counts to `total` on a rich console, and is removed at the end."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    hidden = not console.is_terminal
    if hidden:
        console.print(f"{title} …", style="dim", highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    options = dict(console=console, transient=True, disable=hidden)
    with Progress(*columns, TimeElapsedColumn(), **options) as progress:
        yield Bar(progress, progress.add_task(title, total=total))


class Reporter:
    """Hears of long work and of what a user should know. This one keeps quiet."""

    def say(self, message: str, warning: bool = False) -> None:
        """A line for the user."""

    @contextlib.contextmanager
    def bar(self, title: str, total: float) -> Iterator[Callable[[float], None]]:
        """Gives a function that hears how much of `total` is done."""
        yield lambda done: None

    @contextlib.contextmanager
    def status(self, title: str) -> Iterator[None]:
        """Work whose length is not known."""
        yield


class ConsoleReporter(Reporter):
    """Writes to a rich console; bars only where it is a terminal."""

    def __init__(self, console: Any):
        self.console = console

    def say(self, message: str, warning: bool = False) -> None:
        style = "yellow" if warning else "dim"
        self.console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, title: str, total: float) -> Iterator[Callable[[float], None]]:
        if not self.console.is_terminal:
            yield lambda done: None
            return
        with bar(self.console, title, total) as step:
            yield step

    @contextlib.contextmanager
    def status(self, title: str) -> Iterator[None]:
        with self.console.status(f"{title} …"):
            yield


def default_reporter() -> Reporter:
    """Bars and lines on standard error where that is a terminal, else nothing."""
    if not sys.stderr.isatty():
        return Reporter()
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return Reporter()
    return ConsoleReporter(Console(stderr=True))
