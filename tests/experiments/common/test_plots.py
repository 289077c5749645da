"""Plots at the end of a run: drawn, or a line that says what they need."""

import io

from rich.console import Console

from experiments.common import plots
from experiments.common.plots import METHODS, drawn_or_said, method_colors
from llm_jax.extras import need


def test_without_matplotlib_a_line_says_what_to_install():
    out = io.StringIO()
    console = Console(file=out, width=200)
    draw = lambda folder: [need("a_package_that_is_not_there", "plots", "drawing plots")]
    assert drawn_or_said(console, draw, "folder") == []
    assert "pip install 'thimble-jax[plots]'" in out.getvalue()
    assert drawn_or_said(console, lambda n: (f"{i}.png" for i in range(n)), 2) == ["0.png", "1.png"]


def test_the_library_is_matplotlib():
    assert plots.matplotlib_for("a test").__name__ == "matplotlib"


def test_colours_begin_again():
    assert method_colors(10) == [*METHODS, *METHODS[:2]]
