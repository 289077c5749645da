"""The progress bar, on a terminal and elsewhere."""

import io

import pytest
from rich.console import Console

from llm_jax.progress import bar


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
