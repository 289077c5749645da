"""The progress bar, on a terminal and elsewhere."""

import io

import pytest
from rich.console import Console

from llm_jax.progress import ConsoleReporter, Reporter, bar


def shown(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)


def test_where_there_is_no_terminal_one_line_says_what_begins():
    console = shown(False)
    with bar(console, "Reading", 4) as progress:
        progress(2)
        progress.add(1)
        progress(4, "Writing")
    assert console.file.getvalue() == "Reading …\n"


def test_on_a_terminal_the_bar_moves_by_calls_and_by_steps():
    console = shown(True)
    with bar(console, "Reading", 4) as progress:
        task = progress._progress.tasks[0]
        assert (task.description, task.completed, task.total) == ("Reading", 0, 4)
        progress(2)
        assert (task.description, task.completed) == ("Reading", 2)
        progress.add(1.5)
        assert task.completed == 3.5
        progress(4, "Writing")
        assert (task.description, task.completed) == ("Writing", 4)
    text = console.file.getvalue()
    assert "Reading …" not in text and "4/4" in text and "Writing" in text


def test_the_bar_goes_when_its_block_raises():
    console = shown(True)
    with pytest.raises(KeyError), bar(console, "Reading", 4) as progress:
        raise KeyError
    assert progress._progress.finished is False and not progress._progress.live.is_started


def test_a_reporter_keeps_quiet_and_a_console_reporter_speaks():
    silent = Reporter()
    silent.say("nobody hears this")
    with silent.bar("Loading", 3) as step, silent.status("Compiling"):
        step(1)
    out = io.StringIO()
    reporter = ConsoleReporter(Console(file=out, width=80))
    reporter.say("a plan was made")
    with reporter.bar("Loading", 3) as step, reporter.status("Compiling"):
        step(1)
    assert out.getvalue() == "a plan was made\n"  # bars are for terminals


def test_a_terminal_sees_the_bar():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    with ConsoleReporter(console).bar("Loading layers", 3) as step:
        step(3)
    assert "Loading layers" in out.getvalue() and "3/3" in out.getvalue()
