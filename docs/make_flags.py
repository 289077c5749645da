"""Writes docs/flags.md: what --help of every command says.

    python docs/make_flags.py           write the page
    python docs/make_flags.py --print   print it

The commands are those of `experiments.__main__.COMMANDS`. tests/test_docs.py compares the page with
what this makes now.
"""

import contextlib
import importlib
import io
import os
import re
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments.__main__ import COMMANDS, overview

PAGE = Path(__file__).parent / "flags.md"
HEAD = """# Flags

Every command and what its `--help` says. Made by `python docs/make_flags.py`; do not edit this page
by hand. Where the package is installed, `thimble NAME` is short for `python -m experiments.NAME`.
"""
SUBCOMMAND = re.compile(r"^ +• +(\w+)", re.MULTILINE)


def help_of(name: str, *words: str) -> str:
    """What `python -m experiments.name words --help` prints, 100 columns wide, without colours."""
    command = importlib.import_module(COMMANDS[name][0])
    argv, sys.argv = sys.argv, [f"python -m experiments.{name}", *words, "--help"]
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
    os.environ.update(COLUMNS="100", NO_COLOR="1")
    parts = [section(HEAD.strip(), overview()).lstrip()]
    for name in COMMANDS:
        whole = help_of(name)
        parts.append(section(f"## {name}", whole))
        for subcommand in SUBCOMMAND.findall(whole):
            parts.append(section(f"### {name} {subcommand}", help_of(name, subcommand)))
    return "".join(parts)


if __name__ == "__main__":
    wants_print = "--print" in sys.argv
    made = page()
    if wants_print:
        print(made, end="")
    else:
        PAGE.write_text(made)
