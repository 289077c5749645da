"""The results of `experiments.palu`: a table, and a plot of quality against bytes a token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.common.plots import STYLE, matplotlib_for, method_colors
from experiments.common.records import Record
from experiments.palu.methods import PLANNED
from llm_jax.files import atomic_file
from llm_jax.values import is_plain

_SHOWN = ("acc", "acc_norm", "perplexity")
"""The metrics of a task that the table has; the records have all."""


_FIELDS = {
    # field of a record -> its types; what the table and the plot read
    "method": str,
    "sample": str,
    "settings": str,
    "kind": str,
    "evaluation": str,
    "granularity": str,
    "objective": str,
    "search": str,
    "keep": (int, float),
    "key_bits": int,
    "value_bits": int,
    "group": int,
    "rotate": bool,
    "mean_split": bool,
    "rank_kept": (int, float, type(None)),
    "bf16_bytes_per_token": int,
    "result": dict,
}
_RESULTS = {
    "perplexity": ("perplexity", "cache_bytes_per_token", "tokens", "context"),
    "retrieval": ("accuracy", "answer_nll"),
    "task": (),
}
"""The kinds of measurements, and which numbers the result of each has."""


def problem(record: Record) -> str | None:
    """What is wrong with a record that was read, if anything."""
    for name, kinds in _FIELDS.items():
        if not isinstance(record.get(name), kinds):
            return f"not a record of this command: its {name} is {record.get(name)!r:.40}"
    result, kind = record["result"], record["sample"].split("-")[0]
    if kind not in _RESULTS:
        return f"not a record of this command: its sample is {record['sample']!r:.40}"
    for name in (*_RESULTS[kind], *result):
        if not is_plain(float, result.get(name)):
            return f"the {name} of its result is {result.get(name)!r:.40}; expected a number"
    if record["bf16_bytes_per_token"] < 1:
        return f"its bf16_bytes_per_token is {record['bf16_bytes_per_token']}"
    return None


def result_rows(rows: Sequence[Record]) -> list[dict[str, Any]]:
    """One dict a configuration, in order: sizes, perplexity, and all other results."""
    found: dict[str, dict] = {}
    for r in rows:
        name = r["method"]
        if r.get("search") == PLANNED:
            bits = [f"{b:.3g}" for b in r.get("mean_bits", (r["key_bits"], r["value_bits"]))]
            name += f" → groups of {r['group']}, K {bits[0]} V {bits[1]} bit"
        line = found.setdefault(r["settings"], dict(method=name, kind=r["kind"], record=r))
        result = r["result"]
        if r["sample"] == "perplexity":
            line |= dict(
                perplexity=result["perplexity"],
                bytes=result["cache_bytes_per_token"],
                saved=1 - result["cache_bytes_per_token"] / r["bf16_bytes_per_token"],
                kept=r["rank_kept"],
            )
        elif r["sample"].startswith("task-"):
            name = r["sample"].removeprefix("task-").rsplit("-", 1)[0]
            line |= {f"{name}\n{m}": v for m, v in result.items() if m in _SHOWN}
        else:
            line |= {"retrieval": result["accuracy"], "answer -log p": result["answer_nll"]}
    return list(found.values())


def print_results(console: Console, rows: Sequence[Record]) -> None:
    """Prints one line a configuration; perplexity also as a change from the dense model's."""
    lines = result_rows(rows)
    dense = next((l["perplexity"] for l in lines if l["kind"] == "dense"), None)
    shown = Table(box=box.SIMPLE_HEAD)
    shown.add_column("configuration")
    for name in ("rank\nkept", "bytes a\ntoken", "smaller\nthan bf16", "perplexity", "change"):
        shown.add_column(name, justify="right")
    for l in lines:
        if "perplexity" not in l:
            continue
        change = "" if dense is None else f"{l['perplexity'] / dense - 1:+.1%}"
        cells = [
            l["method"],
            "" if l["kept"] is None else f"{l['kept']:.1%}",
            f"{l['bytes']:,.0f}",
            f"{l['saved']:.2%}",
            f"{l['perplexity']:.3f}" if l["perplexity"] < 1e4 else f"{l['perplexity']:.3g}",
            "" if l["kind"] == "dense" else change,
        ]
        shown.add_row(*cells)
    console.print(shown)
    first = next((r for r in rows if r["sample"] == "perplexity"), None)
    if first:
        console.print(
            f"{first['result']['tokens']} predictions of {first['evaluation']} in windows of "
            f"{first['result']['context']}; cache bytes are those of the arrays that were filled, "
            "steps and offsets included",
            style="dim", highlight=False,
        )  # fmt: skip
    usual = {"method", "kind", "record", "perplexity", "bytes", "saved", "kept"}
    if extra := list(dict.fromkeys(k for l in lines for k in l if k not in usual)):
        shown = Table(box=box.SIMPLE_HEAD)
        shown.add_column("configuration", min_width=24)
        for name in extra:
            shown.add_column(name.replace(" ", "\n"), justify="right")
        for l in lines:
            shown.add_row(l["method"], *(f"{l[k]:.3f}" if k in l else "" for k in extra))
        console.print(shown)


def plot_quality(rows: Sequence[Record], folder: Path) -> list[Path]:
    """The path of a PNG: perplexity over the dense model's against bytes a token.

    No path where there is nothing to compare. Raises MissingPackage without matplotlib.
    """
    matplotlib = matplotlib_for("drawing plots")
    lines = [l for l in result_rows(rows) if "perplexity" in l]
    dense = next((l for l in lines if l["kind"] == "dense"), None)
    if dense is None or len(lines) < 2:
        return []
    series: dict[str, list] = {}
    for l in lines:
        r = l["record"]
        if l["kind"] == "palu":
            planned = r["search"] == PLANNED
            shape = "" if planned else f", {r['granularity']}, {r['keep']:g} kept"
            label = r["objective"] + shape
            label += f", {r['search']}" * (r["search"] != "uniform")
            label += ", two classes" * (planned and r.get("classes") == 2)
            label += ", unrotated" * (not r["rotate"] and r["key_bits"] < 16)
            label += ", mean split" * r["mean_split"]
        elif l["kind"] == "dense":
            continue
        else:
            label = l["kind"].rstrip("0123456789")
        series.setdefault(label, []).append((l["bytes"], l["perplexity"] / dense["perplexity"]))
    with matplotlib.rc_context({**STYLE, "backend": "Agg"}):
        figure = _figure(series, dense)
        path = Path(folder) / "quality_against_size.png"
        with atomic_file(path) as scratch:
            figure.savefig(scratch, dpi=150)
    return [path]


def _figure(series, dense):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for color, (label, points) in zip(method_colors(len(series)), series.items(), strict=True):
        points.sort()
        rival = label in ("int", "kivi")
        axes.plot(
            *zip(*points, strict=True),
            marker="s" if rival else "o",
            linestyle="--" if rival else "-",
            color=color,
            label=label,
            linewidth=1.2,
            markersize=4,
        )
    axes.axhline(1, color="#888888", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_ylim(0.95, 2.2)
    axes.set_xlabel("cache bytes a token, all layers, steps and offsets included")
    axes.set_ylabel("perplexity over the dense model's")
    axes.set_title(f"Quality against cache size (dense: {dense['perplexity']:.2f})")
    axes.grid(axis="y")
    axes.legend(fontsize=8, ncols=2)
    return figure
