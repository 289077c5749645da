"""Which convolutions suffer from 8 bits, and how much it helps to keep them in float."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.common.plots import METHODS, STYLE, drawn_or_said, matplotlib_for
from experiments.common.unfinished import Unfinished
from llm_jax.files import atomic_file
from llm_jax.progress import bar
from qyolop_jax import quantize
from qyolop_jax.graph import Graph
from qyolop_jax.scales import Scales, Settings

ROWS_SHOWN, BARS_DRAWN = 12, 30
TRIED = 3
"""Number of convolutions that are tried in float."""
WORTH = 1.0
"""dB that the worst output must gain for a suggestion."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A folded graph and how it is quantized."""

    graph: Graph
    params: Any
    scales: Scales
    settings: Settings


def measure_sensitivity(
    case: Case,
    batches: Sequence,
    folder: Path,
    about: dict[str, Any],
    console: Console,
    work: Unfinished,
) -> dict[str, Any]:
    """Measures, prints, and writes sensitivity.jsonl (one line per run) and sensitivity.png.

    The line holds signal-to-noise ratios in dB: with 8 bits in one convolution alone, "alone"
    {name: dB}; with 8 bits everywhere, by output, "all"; the same with the worst convolutions
    ("kept") in float, "with_kept"; and with all of them in float, "most", where only the tensors
    between them have 8 bits: no --keep can do better. What `work` has is not measured again.
    """
    total, title = len(case.graph.convs) * len(batches), "Sensitivity of every convolution"
    known = {(at, name): float(value) for at, name, value in work.found(title)}
    if known:
        console.print(f"{title}: {len(known)} of {total} were done before", style="dim",
                      highlight=False)  # fmt: skip
    keep = lambda at, name, value: work.add(title, [at, name, repr(value)])  # JSON has no infinity
    with bar(console, title, total) as step:
        alone = quantize.sensitivity(
            case.graph, case.params, case.scales, batches, case.settings, progress=step,
            known=known, keep=keep,
        )  # fmt: skip
    ranked = sorted(alone, key=lambda name: alone[name])
    tried = tuple([n for n in ranked if n not in case.settings.keep][:TRIED])
    more = dataclasses.replace(case.settings, keep=case.settings.keep + tried)
    every = dataclasses.replace(case.settings, keep=tuple(alone))
    before, after, most = (_noise(case, s, batches, work) for s in (case.settings, more, every))
    found = dict(alone=alone, all=before, kept=more.keep, with_kept=after, most=most)
    work.publish(folder / "sensitivity.jsonl", "sensitivity", found | about)
    _print_sensitivity(case, ranked, found, console)
    if min(after.values()) - min(before.values()) > WORTH:
        console.print(f"These help: --keep {' '.join(more.keep)}", highlight=False, soft_wrap=True)
    else:
        console.print("No --keep suggested: the noise is not of these alone", highlight=False)
    written = [
        str(folder / "sensitivity.jsonl"),
        *drawn_or_said(console, plot_sensitivity, alone, folder),
    ]
    console.print(f"Written: {', '.join(written)}", style="dim", highlight=False, soft_wrap=True)
    return found


def _noise(case: Case, settings: Settings, batches: Sequence, work: Unfinished) -> dict[str, float]:
    """`output_noise`, from `work` where that has it."""
    title = f"noise with {' '.join(settings.keep)} in float"
    if not work.found(title):
        measured = output_noise(case, settings, batches)
        work.add(title, {name: repr(value) for name, value in measured.items()})
    return {name: float(value) for name, value in work.found(title)[0].items()}


def output_noise(case: Case, settings: Settings, batches: Sequence) -> dict[str, float]:
    """Signal-to-noise ratio of every output in dB, with all convolutions quantized; a mean."""
    exact = jax.jit(lambda p, x: quantize.float_tensors(case.graph, p, x)[0])
    ours = jax.jit(lambda p, s, x: quantize.simulated_forward(case.graph, p, s, x, settings))
    found: dict[str, list] = {name: [] for name in case.graph.outputs}
    for batch in batches:
        x = jnp.asarray(quantize.images_of(batch))
        want, got = exact(case.params, x), ours(case.params, case.scales, x)
        for name, values in found.items():
            values.append(quantize.sqnr(want[name], got[name]))
    return {name: sum(values) / len(values) for name, values in found.items()}


def _print_sensitivity(case: Case, ranked: list[str], found: dict, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("convolution", "kernel", "8 bits in it alone, dB", "kB more in float"):
        table.add_column(name, justify="left" if name == "convolution" else "right")
    for name in ranked[:ROWS_SHOWN]:
        shape = case.params[name]["kernel"].shape
        table.add_row(
            name, "x".join(map(str, shape)), f"{found['alone'][name]:.1f}",
            f"{3 * math.prod(shape) / 1e3:.1f}",
        )  # fmt: skip
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD)
    kept = f"{', '.join(found['kept'])} in float"
    for name in ("output", "all in 8 bits, dB", kept, "all in float, 8 bits between"):
        table.add_column(name, justify="left" if name == "output" else "right")
    for name, value in found["all"].items():
        others = (found[k][name] for k in ("with_kept", "most"))
        table.add_row(name, f"{value:.1f}", *(f"{v:.1f}" for v in others))
    console.print(table)


def plot_sensitivity(alone: dict[str, float], folder: Path) -> list[str]:
    """Draws the most sensitive convolutions as bars. Returns the path."""
    matplotlib = matplotlib_for("drawing plots")
    from matplotlib.figure import Figure

    rows = sorted((v, n) for n, v in alone.items() if math.isfinite(v))[:BARS_DRAWN]
    if not rows:
        return []
    with matplotlib.rc_context({**STYLE, "backend": "Agg"}):
        figure = Figure(figsize=(8, 1.5 + 0.22 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.barh([n for _, n in rows], [v for v, _ in rows], color=METHODS[0])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0, labelsize=8)
        axes.grid(axis="x")
        axes.set_xlabel("signal-to-noise ratio of the worst output, dB; less is worse")
        axes.set_title("8 bits in one convolution alone")
        path = folder / "sensitivity.png"
        with atomic_file(path) as scratch:
            figure.savefig(scratch, dpi=150)
    return [str(path)]
