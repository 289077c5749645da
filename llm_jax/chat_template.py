"""Chat templates of checkpoints, rendered with a bound on time, memory and length.

A template is a program that came with the weights. It runs in `llm_jax.template_worker`, a process
that the system stops; one such process serves all templates, and is started again when it ended.
"""

import atexit
import importlib.metadata
import os
import re
from pathlib import Path
from typing import Any

from llm_jax import CheckpointError, shown
from llm_jax.bounded import Worker, ending
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
    reply = _worker.ask(dict(seconds=SECONDS, render=what))
    if isinstance(reply, int):
        reply = {"error": ending(reply, SECONDS, "rendering it")}
    if "error" in reply:
        raise CheckpointError(
            f"the chat template of {source} cannot be used: {shown(reply['error'])}; correct it, "
            "or remove it to have messages joined as plain text"
        )
    return reply["text"]


def _require_sandbox() -> None:
    """Raises MissingPackage where jinja is too old."""
    version = importlib.metadata.version("jinja2")
    if [int(number) for number in re.findall(r"\d+", version)[:3]] < [3, 1, 6]:
        raise MissingPackage(
            f"a chat template needs jinja2 3.1.6 or newer, and {version} is installed; the "
            "sandbox of older ones does not hold: pip install -U jinja2"
        )


_worker = Worker(WORKER, check=_require_sandbox)
atexit.register(_worker.stop)
os.register_at_fork(after_in_child=_worker.forget)
