"""A process for work on what strangers wrote: it has its own limits, and the system can end it.

The script reads a line of JSON for each request and writes one for its reply. It limits its own
memory, and the time of the processor by `signal.ITIMER_PROF`.
"""

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Worker:
    """The process of a script, started when it is first asked, and again when it has ended.

    `check` is called before each start. `hello` is a line that the script reads first; it writes
    nothing for it.
    """

    def __init__(
        self, script: Path, hello: str | None = None, check: Callable[[], None] = lambda: None
    ):
        self.script, self.hello, self.check = script, hello, check
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | int:
        """The reply, or the exit status of a process that ended without one."""
        line = json.dumps(request) + "\n"
        with self.lock:
            try:
                process = self._running()
                process.stdin.write(line)
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            except BaseException:  # Ctrl-C: the reply would be taken for that of the next request
                self.stop()
                raise
            return json.loads(reply) if reply.endswith("\n") else self.stop()

    def _running(self) -> subprocess.Popen[str]:
        process = self.process
        if process is not None and process.poll() is None:
            return process
        self.stop()
        self.check()
        self.process = process = subprocess.Popen(
            # -P: the modules beside the script are not for `import`
            [sys.executable, "-P", str(self.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for us; it ends when its input does
        )
        if self.hello is not None:
            process.stdin.write(self.hello + "\n")
        return process

    def stop(self) -> int:
        """Ends the process; its exit status, which is negative for a signal."""
        process, self.process = self.process, None
        if process is None:
            return 0
        process.kill()  # an exit status that it already has stays
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        return process.wait()

    def forget(self) -> None:
        """In the child of a fork: the process belongs to the parent."""
        self.__init__(self.script, self.hello, self.check)


def ending(status: int, seconds: float, doing: str) -> str:
    """Why a process that ended gave no reply, such as "it takes longer than 2 s"."""
    if status == -signal.SIGPROF:
        return f"it takes longer than {seconds:g} s"
    return f"{doing} ended with {f'signal {-status}' if status < 0 else f'status {status}'}"
