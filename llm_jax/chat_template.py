"""Chat templates of checkpoints, rendered with a bound on time, memory and length.

A template is a program that came with the weights. It runs in `llm_jax.template_worker`, a process
that the system stops; one such process serves all templates, and is started again when it ended.
"""

import atexit
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from llm_jax import CheckpointError, shown
from llm_jax.extras import MissingPackage, need

SECONDS = 2.0
"""Time of the processor that a template may take; real ones take some thousandths of it."""
CHARACTERS = 1_000_000
"""What a template may add to the messages; real ones add some thousands."""
WORKER = Path(__file__).with_name("template_worker.py")


def render(
    template: str,
    messages: list[dict[str, Any]],
    tokens: dict[str, str],
    source: object,
    tools: list[Any] | None = None,
) -> str:
    """The text of a conversation up to the reply's start, as `transformers` renders it.

    `tokens` are special tokens by their names, such as bos_token; `source` is the file or folder,
    for messages; `tools` are JSON schemas of functions. Raises `CheckpointError` if the template is
    broken, refuses the messages, or passes a bound.
    """
    need("jinja2", "models", "a chat template")
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    own = sum(len(str(value)) for message in messages for value in message.values())
    own += len(str(tools))
    given = dict(messages=messages, tools=tools, documents=None, add_generation_prompt=True)
    what = dict(template=template, most=CHARACTERS + 2 * own, variables=tokens | given)
    reply = _worker.ask(json.dumps(dict(seconds=SECONDS, render=what)))
    if "error" in reply:
        raise CheckpointError(
            f"the chat template of {source} cannot be used: {shown(reply['error'])}; correct it, "
            "or remove it to have messages joined as plain text"
        )
    return reply["text"]


class _Worker:
    """The process, started when it is first asked."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: str) -> dict[str, str]:
        with self.lock:
            process = self.process
            if process is None or process.poll() is not None:
                self.stop()
                process = self.start()
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            except BaseException:  # Ctrl-C: the reply would be taken for that of the next request
                self.stop()
                raise
            if not reply.endswith("\n"):
                return {"error": _ending(self.stop())}
            return json.loads(reply)

    def start(self) -> subprocess.Popen[str]:
        version = importlib.metadata.version("jinja2")
        if [int(number) for number in re.findall(r"\d+", version)[:3]] < [3, 1, 6]:
            raise MissingPackage(
                f"a chat template needs jinja2 3.1.6 or newer, and {version} is installed; the "
                "sandbox of older ones does not hold: pip install -U jinja2"
            )
        self.process = subprocess.Popen(
            # -P: the modules beside the script are not for `import`
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for us; it ends when its input does
        )
        return self.process

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
        self.__init__()


def _ending(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"it takes longer than {SECONDS:g} s"
    return f"rendering it ended with {f'signal {-status}' if status < 0 else f'status {status}'}"


_worker = _Worker()
atexit.register(_worker.stop)
os.register_at_fork(after_in_child=_worker.forget)
