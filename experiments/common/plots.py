"""What all plots share: their look and the colours of methods."""

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
