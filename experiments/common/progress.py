"""Progress bars: on a terminal they move, elsewhere one line says what has begun."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


class Bar:
    """A progress bar as a callable: `bar(done)`, or `bar(done, "what it is doing")`."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def __call__(self, done: float, title: str | None = None) -> None:
        self._progress.update(self._task, completed=done, description=title)

    def add(self, count: float) -> None:
        """Moves the bar on by `count`."""
        self._progress.advance(self._task, count)


@contextlib.contextmanager
def bar(console: Console, title: str, total: float) -> Iterator[Bar]:
    """A `Bar` that counts to `total` and disappears at the end."""
    hidden = not console.is_terminal
    if hidden:
        console.print(f"{title} …", style="dim", highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    options = dict(console=console, transient=True, disable=hidden)
    with Progress(*columns, TimeElapsedColumn(), **options) as progress:
        yield Bar(progress, progress.add_task(title, total=total))
