"""SIGINT and SIGTERM between two steps of work, not in the middle of one."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], None]]:
    """Gives a function that acts on a signal that has come, and does nothing before.

    SIGINT then raises KeyboardInterrupt and SIGTERM SystemExit(143), unless the program has its own
    handlers, which are called. The second signal acts at once. Outside the main thread, signals are
    left alone.
    """
    before: dict[int, Any] = {}
    came: list[int] = []

    def note(number, frame):
        came.append(number)
        signal.signal(number, before[number])

    def act() -> None:
        if came:
            number = came.pop()
            if callable(before[number]):
                before[number](number, None)
            else:
                raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield act
        act()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
