"""The command line that every command shares: flags, console, and errors without a traceback."""

import errno
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
    """The exit status of `main(flags, console)`: 0 or what it returns, 2 for a user's error.

    `command` is a dataclass of flags, or a union of subcommands, for `tyro`; `doc` is shown by
    --help; `words` replace the words of the command line. Where output is not a terminal, tables
    are `width` columns wide, because 80 would cut them. `again` tells how an interrupted run is
    continued, None that it cannot be. An OSError that names a file, such as a folder that cannot
    be written, and a full disk are a user's errors, too.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    flags = tyro.cli(command, args=words, description=doc, prog=_program(main))
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(width, console.width))
    try:
        status = main(flags, console)
    except USER_ERRORS as error:
        fail(str(error))
        return 2
    except KeyboardInterrupt:
        how = f"; {again}" if again else ""
        Console(stderr=True).print(f"\ninterrupted{how}", highlight=False, soft_wrap=True)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        fail(str(error))
        return 2
    except RuntimeError as error:  # JaxRuntimeError, without importing jax here
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(OUT_OF_MEMORY + str(error))
        return 2
    return status if isinstance(status, int) else 0


def _program(main: Callable[..., Any]) -> str:
    """How the command of this main function is called."""
    module = main.__module__
    if module == "__main__" and (spec := sys.modules[module].__spec__):
        module = spec.name
    return f"python -m {module.removesuffix('.__main__')}"


def fail(message: str) -> None:
    """Prints an error as all commands do, on standard error."""
    console = Console(stderr=True)
    console.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
