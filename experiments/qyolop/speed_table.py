"""The table that `benchmark` prints."""

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

SCORES = {
    "mAP50": "detection/AP50",
    "drivable or not": "area/binary mIoU",
    "lane IoU": "lane/foreground IoU",
}
"""Title of a column -> name of the score."""


def print_speed(rows: list[dict], console: Console) -> None:
    """Prints the records of `benchmark`: a line of limits, and a row for each way."""
    limits = [
        f"{r['precision']} {r['gmacs_per_second']:,.0f} GMAC/s ({r['side']}x{r['side']})"
        for r in rows if r["task"] == "matmul"
    ]  # fmt: skip
    console.print(f"Best matrix products: {', '.join(limits)}", highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    names = (
        "", "batch", "ms", "quartiles", "least", "CPU's\nleast", "with boxes\nand masks",
        "images/s", "x\nfloat32", "GMAC/s", "of\nmatmul",
    )  # fmt: skip
    for name in names:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    ms = lambda s: f"{1e3 * s:.0f}" if s >= 1 else f"{1e3 * s:.4g}"
    of = lambda r: tuple(r[k] for k in ("task", "engine", "precision", "batch"))
    whole = {of(r): r["seconds"] for r in rows if r.get("postprocessing")}
    for r in rows:
        if r["task"] == "matmul" or r.get("postprocessing"):
            continue
        title = f"{r['engine']} {r['precision']}" + " training" * (r["task"] == "training")
        share, ratio = r.get("share_of_limit"), r.get("times_float32")
        table.add_row(
            title, str(r["batch"]), ms(r["seconds"]), f"{ms(r['low'])}-{ms(r['high'])}",
            ms(r["least"]), ms(r["cpu_least"]),
            ms(whole[of(r)]) if of(r) in whole else "",
            f"{r['images_per_second']:.1f}", "" if ratio is None else f"{ratio:.2f}",
            f"{r['gmacs_per_second']:,.1f}", "" if share is None else f"{share:.1%}",
        )  # fmt: skip
    console.print(table)
    if any("scores" in r for r in rows):
        console.print(_scores(rows))


def _scores(rows: list[dict]) -> Table:
    """How right each precision of each engine is on every data set."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "data", *SCORES):
        table.add_column(name, justify="right" if name in SCORES else "left", no_wrap=True)
    for r in rows:
        for data, found in r.get("scores", {}).items():
            values = [found.get(key) for key in SCORES.values()]
            cells = ("" if v is None or np.isnan(v) else f"{v:.4f}" for v in values)
            table.add_row(f"{r['engine']} {r['precision']}", data, *cells)
    return table
