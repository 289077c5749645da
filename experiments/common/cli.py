"""The command line that every command shares: flags, console, and errors without a traceback."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from rich.console import Console

from llm_jax import LLMError
from llm_jax.extras import MissingPackage
from palu_jax import PaluError
from qyolop_jax import QyolopError
from subspec_jax import SubspecError


class UserError(ValueError):
    """What a command cannot do as asked; the message is for the user and needs no traceback."""


USER_ERRORS = (UserError, MissingPackage, LLMError, SubspecError, PaluError, QyolopError)
DEBUG = "--debug"
LIST_MODELS = "--list-models"
OUT_OF_MEMORY = (
    "the device ran out of memory, which the plan should have prevented; set a lower --resident or "
    "a higher --memory-limit, and please report this: "
)


def run(
    command: Any,
    main: Callable[[Any, Console], Any],
    doc: str | None,
    words: Sequence[str] | None = None,
    width: int = 110,
    again: str | None = "the same command with the same --output resumes",
) -> int:
    """The exit status of `main(flags, console)`: 0 or what it returns, and what `status_of` says.

    `command` is a dataclass of flags, or a union of subcommands, for `tyro`; `doc` is shown by
    --help; `words` replace the words of the command line. A command with a flag `model` also knows
    --list-models. Where output is not a terminal, tables
    are `width` columns wide, because 80 would cut them. `again` tells how an interrupted run is
    continued, None that it cannot be. With --debug among the words, errors are raised as they are.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    words = list(sys.argv[1:] if words is None else words)
    debug = DEBUG in words
    words = [word for word in words if word != DEBUG]
    about = f"{(doc or '').rstrip()}\n\n{DEBUG}, anywhere, shows the traceback of an error."
    knows_models = hasattr(command, "model")
    if knows_models:
        about += f"\n{LIST_MODELS} lists what --model knows."
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(width, console.width))
    try:
        if knows_models and LIST_MODELS in words:
            from experiments.common import models

            print(models.table(), flush=True)
            return 0
        flags = tyro.cli(command, args=words, description=about, prog=_program(main))
        status = main(flags, console)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        return status_of(error, again)
    return status if isinstance(status, int) else 0


def status_of(error: BaseException, again: str | None = None) -> int:
    """The exit status for an error, which is told on one line.

    2: what was asked for or given cannot be used, which a user can mend; so are files and folders
    that cannot be read or written, and too little device memory. 130: interrupted. 141: nobody
    reads the output any more. 1: anything else, a fault of this program.
    """
    match error:
        case KeyboardInterrupt():
            how = f"; {again}" if again else ""
            Console(stderr=True).print(f"\ninterrupted{how}", highlight=False, soft_wrap=True)
            return 130
        case BrokenPipeError():  # the reader of our output has gone, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 141
        case OSError():
            fail(_os_error(error))
            return 2
        case _ if isinstance(error, USER_ERRORS):
            fail(str(error))
            return 2
        case RuntimeError() if "RESOURCE_EXHAUSTED" in str(error):  # JaxRuntimeError, without jax
            fail(OUT_OF_MEMORY + str(error))
            return 2
    first = (str(error).strip() or "no message").splitlines()[0]
    fail(
        f"{type(error).__name__}: {first}. This is a fault of the program, not of what you gave "
        f"it: run the command again with {DEBUG}, and report what it shows"
    )
    return 1


def _os_error(error: OSError) -> str:
    """Such as "model/layer-00001.safetensors: No space left on device"."""
    if error.strerror is None:
        return str(error) or type(error).__name__
    where = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' -> '.join(where)}: {error.strerror}" if where else error.strerror


def _program(main: Callable[..., Any]) -> str:
    """How the command of this main function is called."""
    module = main.__module__
    if module == "__main__" and (spec := sys.modules[module].__spec__):
        module = spec.name
    return f"python -m {module.removesuffix('.__main__')}"


def fail(message: str) -> None:
    """Prints an error as all commands do, on standard error, control characters escaped."""
    console = Console(stderr=True)
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
    console.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
