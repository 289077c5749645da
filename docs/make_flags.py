"""Writes docs/flags.md: what --help of every command says.

    python docs/make_flags.py           write the page
    python docs/make_flags.py --print   print it

The commands are those of `experiments.__main__.COMMANDS`. tests/test_docs.py compares the page with
what this makes now.
"""

import contextlib
import importlib.util
import io
import os
import re
import sys
import textwrap
from pathlib import Path

PAGE = Path(__file__).parent / "flags.md"
HEAD = """# Flags

Every command and what its `--help` says. Made by `python docs/make_flags.py`; do not edit this page
by hand. `python -m experiments` lists the commands. Where the package is installed, `thimble NAME`
is short for `python -m experiments.NAME`.
"""
SUBCOMMAND = re.compile(r"^ +• +(\w+)", re.MULTILINE)


def help_of(module: str, *words: str) -> str:
    """What `python -m module words --help` prints, 100 columns wide and without colours."""
    package = importlib.util.find_spec(module).submodule_search_locations is not None
    command = importlib.import_module(f"{module}.__main__" if package else module)
    argv, sys.argv = sys.argv, [f"python -m {module}", *words, "--help"]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            command.cli()
    finally:
        sys.argv = argv
    lines = printed.getvalue().strip().splitlines()
    wrapped = (textwrap.fill(line, 100) if line[:1].isalnum() else line.rstrip() for line in lines)
    return "\n".join(wrapped).replace("\n\n\n", "\n\n")


def section(title: str, words: str) -> str:
    return f"\n{title}\n\n```text\n{words}\n```\n"


def page() -> str:
    """The page as Markdown."""
    from experiments.__main__ import COMMANDS

    os.environ.update(COLUMNS="100", NO_COLOR="1")
    parts = [HEAD]
    for module in COMMANDS.values():
        whole = help_of(module)
        parts.append(section(f"## python -m {module}", whole))
        for name in SUBCOMMAND.findall(whole):
            parts.append(section(f"### python -m {module} {name}", help_of(module, name)))
    return "".join(parts)


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parents[1]))
    wants_print = "--print" in sys.argv
    made = page()
    if wants_print:
        print(made, end="")
    else:
        PAGE.write_text(made)
