"""`python -m experiments.serve` as a process of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]


class Process:
    """A running server, its address and the lines that it wrote."""

    def __init__(self, flags, **environment):
        own = {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "experiments.serve", *map(str, flags)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines = []
        self.process = subprocess.Popen(
            command, env=os.environ | own | environment, cwd=ROOT, **pipes
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def started(self, seconds=300.0):
        """Waits until it serves."""
        end = time.monotonic() + seconds
        while not (found := re.search(r"^Serving (\S+) at (\S+)$", self.output, re.MULTILINE)):
            alive = self.process.poll() is None and time.monotonic() < end
            assert alive, f"the server did not start: {self.output}"
            time.sleep(0.05)
        self.model, self.url = found.groups()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def output(self):
        return "".join(self.lines)

    @property
    def port(self):
        return int(self.url.rsplit(":", 1)[1])

    def memory(self) -> int:
        """Bytes of resident memory."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def files(self) -> int:
        """Open files and connections."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def end(self, sent=signal.SIGTERM, seconds=90.0) -> int:
        """Sends a signal and returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(sent)
        status = self.process.wait(seconds)
        self.reader.join(10)
        return status


@contextlib.contextmanager
def process(flags, **environment):
    """A server for this block; killed where the block did not end it."""
    found = Process(flags, **environment)
    try:
        found.started()
        yield found
    finally:
        found.process.kill()
        found.process.wait(30)
        found.reader.join(10)
        found.process.stdout.close()
