"""Which draft tree is the fastest? Replayed from the records of a run with a larger tree.

    python -m experiments.measure.trees records.jsonl --draft-ms 2.1 --verify-ms 66
    python -m experiments.measure.trees experiments/results/cpu_smollm2_trees.jsonl \\
        --draft-ms 2.1 --verify-ms 66 --other-ms 5 --stop-rules

The first command prints and draws tokens per second over depth and width, and names the flags of
the best tree. Costs that are not given are taken from the records. `--stop-rules` compares rules
that stop a tree early: none, the best depth in hindsight, the draft's uncalibrated scores, scores
calibrated on finished rounds (`subspec_jax.stop`), and an oracle that knows what will be accepted.

The second, on real trees of SmolLM2-135M with the costs of Qwen2.5-7B in 8 GB of an H200, printed
tokens/s of: depth 48 97.8, depth 22 123.1, uncalibrated 109.2, calibrated 140.6, oracle 161.3; and
with `--leave-out 131`, an answer that repeats itself: 80.5, 110.5 (depth 19), 90.9, 112.6, 141.2.
With an RTX 4090's (6.5, 160 and 10 ms): 34.9, 46.3, 39.7, 52.4, 61.6; without 131: 28.7, 41.8,
33.1, 42.3, 54.6.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.common import records
from experiments.common.cli import UserError, run
from experiments.common.plots import STYLE, matplotlib_for
from experiments.measure import stop_rules
from llm_jax.files import atomic_file
from subspec_jax.decoder import Round
from subspec_jax.shape import TreeCosts, best_shape, measured_costs, predicted


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """Predict tokens per second of smaller trees from recorded rounds."""

    records: tyro.conf.Positional[Path]
    """A records.jsonl of experiments.speculative, or what experiments.measure.tree_trace wrote."""
    method: str = "subspec"
    """The method whose records count; it must draft beams with a model."""
    leave_out: tuple[str, ...] = ()
    """Samples that do not count."""
    draft_ms: float | None = None
    """Milliseconds of a draft step; the records' median if not given."""
    verify_ms: float | None = None
    """Milliseconds of a pass of the target."""
    other_ms: float | None = None
    """Milliseconds of the rest of a round."""
    stop_rules: bool = False
    """Also compare rules that stop a tree early."""
    plot: Path | None = None
    """The file of the heat map; tree_shape.png beside the records if not given."""
    output: Path | None = None
    """A file to which the numbers are appended as JSON lines."""
    label: str = "recorded rounds, costs as given"
    """What the numbers are, for the lines of --output."""


def main(args: TreeShape, console: Console) -> int:
    found = [r for r in records.read(args.records) if r["sample"] not in args.leave_out]
    texts = stop_rules.texts_of(found, args.method)
    rounds = [r for text in texts for r in stop_rules.visited(text)]
    paths, depths = [r.path for r in rounds], [r.depth for r in rounds]
    deepest = max(depths)
    wide = max(round(r.drafted / r.depth) for r in rounds if r.depth)
    costs = given_costs(args, rounds, deepest, wide)
    rate_LW = predicted(paths, depths, wide, costs)
    depth, width, best = best_shape(paths, depths, wide, costs)
    print_rates(console, rate_LW, deepest)
    whole = rate_LW[-1, -1]
    console.print(
        f"best: --depth {depth} --width {width}, {best:.1f} tokens/s predicted "
        f"({best / whole - 1:+.0%} on depth {deepest}, width {wide})",
        highlight=False,
    )
    path = args.plot or args.records.with_name("tree_shape.png")
    heat_map(rate_LW, path, f"{len(rounds)} rounds of {args.method}, {len(texts)} texts")
    console.print(f"Written: {path}", style="dim", highlight=False, soft_wrap=True)
    about = {
        "label": args.label,
        "trace": args.records.name,
        "texts": len(texts),
        "costs_ms": {name: getattr(args, f"{name}_ms") for name in ("draft", "verify", "other")},
    }
    lines = [dict(about, kind="shape", depth=depth, width=width, tokens_per_s=best)]
    if args.stop_rules:
        found = stop_rules.compare_rules(texts, costs, width=wide)
        print_rules(console, found)
        lines += [dict(about, kind="stop rule", **line) for line in found]
    for line in lines if args.output else ():
        records.append(args.output, line)
    return 0


def given_costs(args: TreeShape, rounds: list[Round], deepest: int, wide: int) -> TreeCosts:
    """The costs that the rounds measured, replaced by those given as flags."""
    found = measured_costs({(deepest, wide): rounds})
    change = {}
    if args.draft_ms is not None:
        change["draft_s"] = {wide: args.draft_ms / 1e3}
    if args.verify_ms is not None:
        change["verify_s"] = {1 + deepest * wide: args.verify_ms / 1e3}
    if args.other_ms is not None:
        change["other_s"] = args.other_ms / 1e3
    costs = dataclasses.replace(found, **change)
    if not costs.step_s(wide) or not costs.pass_s(1):
        raise UserError("the records have no times; give --draft-ms and --verify-ms")
    return costs


def print_rates(console: Console, rate_LW: np.ndarray, deepest: int) -> None:
    """A row for every fourth depth and for the best depth of each width."""
    table = Table(title="predicted tokens/s", title_justify="left")
    table.add_column("depth", justify="right")
    for width in range(1, rate_LW.shape[1] + 1):
        table.add_column(f"width {width}", justify="right")
    rows = sorted({*range(4, deepest, 4), *(rate_LW.argmax(0) + 1).tolist(), deepest})
    for depth in rows:
        marks = [
            f"[bold]{rate:.1f}[/bold]" if best + 1 == depth else f"{rate:.1f}"
            for rate, best in zip(rate_LW[depth - 1], rate_LW.argmax(0))
        ]
        table.add_row(str(depth), *marks)
    console.print(table)


def print_rules(console: Console, found: Sequence[dict[str, Any]]) -> None:
    """A row for each rule of `stop_rules.compare_rules`."""
    table = Table(title="rules for stopping a tree", title_justify="left")
    for column in ("rule", "tokens/s", "tokens a round", "levels a round", "rounds"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for line in found:
        numbers = (f"{line[name]:.1f}" for name in ("tokens_per_s", "tau", "levels"))
        table.add_row(line["rule"], *numbers, str(line["rounds"]))
    console.print(table)


def heat_map(rate_LW: np.ndarray, path: Path, subtitle: str) -> None:
    """Draws tokens per second over depth and width into a PNG file, and marks the best tree."""
    matplotlib = matplotlib_for("drawing the map")
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "backend": "Agg"}):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axis = figure.subplots()
        levels, widths = rate_LW.shape
        extent = (0.5, levels + 0.5, 0.5, widths + 0.5)
        image = axis.imshow(rate_LW.T, origin="lower", aspect="auto", extent=extent, cmap="viridis")
        row, column = np.unravel_index(rate_LW.argmax(), rate_LW.shape)
        axis.plot(row + 1, column + 1, "o", color="white", markeredgecolor="#222222", markersize=9)
        axis.annotate(
            f"{rate_LW.max():.3g}", (row + 1, column + 1), (9, -4), textcoords="offset points",
            color="#222222", fontweight="bold",
        )  # fmt: skip
        axis.set_yticks(range(1, widths + 1))
        axis.set_xlabel("depth (draft steps a round)")
        axis.set_ylabel("width (nodes a step)")
        axis.set_title(f"Predicted tokens/s ({subtitle})")
        figure.colorbar(image, ax=axis, label="tokens/s")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as scratch:
            figure.savefig(scratch, dpi=150)


def cli(words: Sequence[str] | None = None) -> int:
    return run(TreeShape, main, __doc__, words, again=None)


if __name__ == "__main__":
    sys.exit(cli())
