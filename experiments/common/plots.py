"""What all plots share: their look, the colours of methods, and the library that draws them."""

from types import ModuleType
from typing import Any

from rich.console import Console

from llm_jax.extras import MissingPackage, need

METHODS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6a00", "#444444")
"""A colour for each method, in order; after the last one they begin again."""
STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
"""Settings for `matplotlib.rc_context`."""


def method_colors(count: int) -> list[str]:
    """The colours of the first `count` methods."""
    return [METHODS[i % len(METHODS)] for i in range(count)]


def matplotlib_for(purpose: str) -> ModuleType:
    """matplotlib. Raises `MissingPackage`, which names the extra, where it is not installed."""
    return need("matplotlib", "plots", purpose)


def drawn_or_said(console: Console, draw: Any, *arguments: Any) -> list:
    """`draw(*arguments)`, the paths of its plots; without matplotlib a line says what to install.

    For plots at the end of a run, whose other results must not be lost.
    """
    try:
        return list(draw(*arguments))
    except MissingPackage as error:
        console.print(f"no plots: {error}", style="yellow", markup=False, highlight=False)
        return []
