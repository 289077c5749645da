"""What a command line does with flags, with errors, and with an interrupted run."""

import dataclasses
import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import COMMANDS as listed
from experiments.common import cli
from experiments.common.cli import UserError, run
from llm_jax import LLMError
from llm_jax.extras import MissingPackage
from palu_jax import PaluError
from qyolop_jax import QyolopError
from subspec_jax import SubspecError

ROOT = Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Not shown, because run is given a text."""

    count: int = 3
    """How many."""


def raising(error):
    def main(flags, console):
        raise error

    return main


@pytest.mark.parametrize("returned, status", [(None, 0), ({"a": 1}, 0), (0, 0), (3, 3)])
def test_the_status_is_what_main_returns_or_zero(returned, status):
    seen = []
    main = lambda flags, console: seen.append((flags, console.width)) or returned
    assert run(Flags, main, "A text.", ["--count", "5"], width=140) == status
    assert seen == [(Flags(5), 140)]  # no terminal here: the width is the given one


def test_a_console_that_is_wider_than_asked_for_stays_wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(Flags, lambda flags, console: console.width, "A text.", []) == 200


def test_help_shows_the_text_and_the_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(Flags, raising(AssertionError("main ran")), "What this does.", ["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "What this does." in shown and "--count" in shown and "How many." in shown
    assert "Not shown" not in shown


def test_a_flag_that_cannot_be_read_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(Flags, raising(AssertionError("main ran")), "A text.", ["--count", "many"])
    assert stopped.value.code == 2 and "--count" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        UserError("no [bold]such[/bold] file: 3"),
        MissingPackage("reading it needs cv2: pip install 'thimble-jax[vision]'"),
        *(kind("a long " * 40 + "line") for kind in (LLMError, SubspecError, PaluError)),
        QyolopError("odd"),
        OSError("no file is named"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_users_error_is_one_line_and_status_2(capsys, error):
    assert run(Flags, raising(error), "A text.", []) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"error: {error}\n"


def test_an_error_is_red_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(cli, "Console", forced(cli.Console))
    assert run(Flags, raising(UserError("too small")), "A text.", []) == 2
    assert capsys.readouterr().err == "\x1b[31merror: too small\x1b[0m\n"


def forced(kind):
    """Consoles that believe they write to a terminal with eight colours."""
    return lambda **options: kind(force_terminal=True, color_system="standard", **options)


def test_the_device_out_of_memory_is_a_named_error(capsys):
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
    assert run(Flags, raising(error), "A text.", []) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the device ran out of memory") and err.count("\n") == 1
    assert "--resident" in err and "allocate 9 bytes" in err


OS_ERRORS = {
    "/absent/file: No such file or directory": (errno.ENOENT, "/absent/file"),
    "No space left on device": (errno.ENOSPC,),
    "File too large": (errno.EFBIG,),
    "Input/output error": (errno.EIO,),
    "/a: Is a directory": (errno.EISDIR, "/a"),
    "/a -> /b: Read-only file system": (errno.EROFS, "/a", None, "/b"),
    "/a: Too many open files": (errno.EMFILE, b"/a"),
}


@pytest.mark.parametrize("shown", OS_ERRORS)
def test_an_error_of_the_system_is_one_line_and_status_2(capsys, shown):
    number, *names = OS_ERRORS[shown]
    assert run(Flags, raising(OSError(number, os.strerror(number), *names)), "A text.", []) == 2
    assert capsys.readouterr().err == f"error: {shown}\n"


DEFECTS = [
    ValueError("a defect of the program\nwith details"),
    ImportError("a broken package"),
    RuntimeError("INTERNAL: a defect of a kernel"),
    AssertionError(),
]


@pytest.mark.parametrize("error", DEFECTS, ids=repr)
def test_other_errors_are_faults_of_the_program(capsys, error):
    """One line and status 1; --debug, wherever it stands, shows the traceback."""
    assert run(Flags, raising(error), "A text.", []) == 1
    err = capsys.readouterr().err
    first = (str(error) or "no message").splitlines()[0]
    assert err.startswith(f"error: {type(error).__name__}: {first}. This is a fault of the program")
    assert "--debug" in err and err.count("\n") == 1
    with pytest.raises(type(error)) as caught:
        run(Flags, raising(error), "A text.", ["--debug", "--count", "5"])
    assert caught.value is error


def test_debug_changes_nothing_else():
    assert (
        run(Flags, lambda flags, console: flags.count, "A text.", ["--count", "5", "--debug"]) == 5
    )


def test_control_characters_are_shown_escaped(capsys):
    """A name from a file cannot clear the screen or turn what follows green."""
    assert run(Flags, raising(UserError("no \x1b[2J\x07 in größe\u202e.txt\nnext")), "", []) == 2
    assert capsys.readouterr().err == "error: no \\x1b[2J\\x07 in größe\\u202e.txt\nnext\n"


@pytest.mark.parametrize("again, shown", [("call it again", "; call it again"), (None, "")])
def test_an_interrupted_run_says_how_to_continue(capsys, again, shown):
    assert run(Flags, raising(KeyboardInterrupt()), "A text.", [], again=again) == 130
    assert capsys.readouterr().err == f"\ninterrupted{shown}\n"


PROGRAM = """
import dataclasses, sys
from experiments.common.cli import run

@dataclasses.dataclass(frozen=True)
class Flags:
    lines: int = 100_000

def main(flags, console):
    for number in range(flags.lines):
        print(number)

sys.exit(run(Flags, main, "Counts."))
"""


def test_a_reader_that_has_gone_ends_the_command_quietly():
    """As in `command | head -1`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    with subprocess.Popen([sys.executable, "-c", PROGRAM], **pipes) as process:
        first = process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert (first, err, process.wait(60)) == ("0\n", "", 141)


COMMANDS = [
    "convert",
    *(
        f"measure.{path.stem}"
        for path in sorted((ROOT / "experiments/measure").glob("*.py"))
        if "def cli(" in path.read_text()
    ),
]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_begins_with_how_to_call_it(capsys, name):
    module = importlib.import_module(f"experiments.{name}")
    with pytest.raises(SystemExit) as stopped:
        module.cli(["--help"])
    assert stopped.value.code == 0
    assert f"python -m experiments.{name}" in capsys.readouterr().out


def test_a_module_is_a_command():
    """`python -m` calls its cli with the words of the command line, and exits with its status."""
    command = [sys.executable, "-m", "experiments.measure.trees", "absent.jsonl"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 2 and found.stderr.startswith("error: ")


def test_every_command_is_in_the_list():
    """Of `python -m experiments`."""
    assert len(COMMANDS) == 18 and set(COMMANDS) <= set(listed)
