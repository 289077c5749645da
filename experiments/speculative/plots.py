"""Plots of run records, as PNG files: accepted lengths, acceptance by depth, time per round."""

import math
from collections.abc import Sequence
from pathlib import Path

from experiments.common.plots import STYLE, matplotlib_for, method_colors
from experiments.common.records import Record
from llm_jax.files import atomic_file

PARTS = {"draft": "#56b4e9", "verify": "#0b3c5d", "other": "#c4c8cc"}


def plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """The paths of the PNGs drawn into `folder`; a plot without data to show is left out."""
    matplotlib = matplotlib_for("drawing plots")

    rounds = _rounds(records)
    drafting = {m: r for m, r in rounds.items() if any(r["drafted"])}
    subtitle = _subtitle(records)
    drawn = []
    with matplotlib.rc_context({**STYLE, "backend": "Agg"}):
        for name, draw, data in (
            ("accepted_length", _accepted_length, drafting),
            ("acceptance_by_depth", _acceptance_by_depth, drafting),
            ("time_per_round", _time_per_round, rounds),
        ):
            figure = draw(data, subtitle) if data else None
            if figure is None:
                continue
            path = Path(folder) / f"{name}.png"
            with atomic_file(path) as scratch:
                figure.savefig(scratch, dpi=150)
            drawn.append(path)
    return drawn


def _rounds(records: Sequence[Record]) -> dict[str, dict[str, list]]:
    """{label: {column: values of all rounds of all turns}}, methods in order of appearance."""
    names = ("emitted", "accepted", "drafted", "depth", "draft_s", "verify_s", "other_s")
    replayed = {r["method"] for r in records if r.get("replayed")}
    result: dict[str, dict[str, list]] = {}
    for r in records:
        label = r["method"] + (" (replayed)" if r["method"] in replayed else "")
        columns = result.setdefault(label, {name: [] for name in names})
        for name in names:
            columns[name] += r["rounds"].get(name) or []
    return {label: columns for label, columns in result.items() if columns["emitted"]}


def _subtitle(records: Sequence[Record]) -> str:
    benchmarks = list(dict.fromkeys(str(r.get("benchmark")) for r in records))
    turns = len({(r.get("benchmark"), r["sample"], r["turn"]) for r in records})
    return f"{', '.join(benchmarks)}, {turns} turn{'s' if turns > 1 else ''}"


def _figure(rows: int, height: float, **options):
    """A figure outside of pyplot, which would keep it, and its axes in a column."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.subplots(rows, 1, squeeze=False, **options)[:, 0]


def _whole_numbers(axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=12, integer=True))


def _accepted_length(drafting: dict[str, dict[str, list]], subtitle: str):
    """A histogram of draft tokens accepted per round for each method, one below the other."""
    from matplotlib.ticker import PercentFormatter

    count = len(drafting)
    longest = max(max(c["accepted"], default=0) for c in drafting.values())
    figure, axes = _figure(count, 1.5 + 1.5 * count, sharex=True)
    for axis, color, (label, columns) in zip(axes, method_colors(count), drafting.items()):
        accepted = columns["accepted"]
        share = [accepted.count(k) / len(accepted) for k in range(longest + 1)]
        mean = sum(accepted) / len(accepted)
        axis.bar(range(longest + 1), share, width=0.86, color=color)
        axis.axvline(mean, color="#222222", linewidth=1.2, linestyle=(0, (4, 2)))
        axis.set_ylim(0, max(share) * 1.3)
        left = mean < longest / 2
        axis.annotate(
            f"mean {mean:.1f}", (mean, 1), (6 if left else -6, -4),
            xycoords=("data", "axes fraction"), textcoords="offset points", va="top",
            ha="left" if left else "right", fontsize=9,
        )  # fmt: skip
        axis.set_title(f"{label}  ·  {len(accepted)} rounds", fontsize=10, fontweight="normal")
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.yaxis.set_major_locator(_few())
        axis.grid(axis="y")
    axes[-1].set_xlabel("draft tokens accepted in a round")
    _whole_numbers(axes[-1].xaxis)
    axes[-1].set_xlim(-0.6, longest + 0.6)
    figure.supylabel("share of the rounds", fontsize=10)
    figure.suptitle(
        f"Accepted length per round ({subtitle})", x=0.01, ha="left", fontsize=12, fontweight="bold"
    )
    return figure


def _few():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=3)


def acceptance(accepted: Sequence[int], depth: Sequence[int]) -> list[tuple[int, int, int]]:
    """[(d, rounds whose tree reaches level d, those of them that accepted d or more), ...]."""
    levels = range(1, max(depth, default=0) + 1)
    reached = [[a for a, deepest in zip(accepted, depth) if deepest >= d] for d in levels]
    return [(d, len(r), sum(a >= d for a in r)) for d, r in zip(levels, reached)]


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927)."""
    p, shrink = hits / trials, 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _acceptance_by_depth(drafting: dict[str, dict[str, list]], subtitle: str):
    """P(d or more tokens accepted | the tree reaches level d) with 95 % intervals."""
    curves = {m: acceptance(c["accepted"], c["depth"]) for m, c in drafting.items()}
    curves = {m: curve for m, curve in curves.items() if curve}
    if not curves:
        return None
    figure, (axis,) = _figure(1, 4.6)
    for color, marker, (label, curve) in zip(
        method_colors(len(curves)), "os^Dv<>p" * len(curves), curves.items()
    ):
        levels = [d for d, _, _ in curve]
        low, high = zip(*(wilson(hits, trials) for _, trials, hits in curve))
        share = [hits / trials for _, trials, hits in curve]
        axis.fill_between(levels, low, high, color=color, alpha=0.15, linewidth=0)
        axis.plot(levels, share, color=color, marker=marker, markersize=4, label=label)
    axis.set_ylim(0, 1.02)
    deepest = max(curve[-1][0] for curve in curves.values())
    axis.set_xlim(0.5, deepest + 0.5)
    _whole_numbers(axis.xaxis)
    axis.grid()
    axis.set_xlabel("depth d (draft tokens)")
    axis.set_ylabel("P(accepted ≥ d), of rounds that drafted d deep")
    axis.set_title(f"Acceptance by depth ({subtitle})")
    axis.legend(loc="best", title="band: 95 % interval", title_fontsize=8, fontsize=9)
    return figure


def _time_per_round(rounds: dict[str, dict[str, list]], subtitle: str):
    """Bars of milliseconds per round, split into draft, verify and other."""
    mean_ms = {
        label: [1e3 * sum(c[f"{part}_s"]) / len(c["emitted"]) for part in PARTS]
        for label, c in rounds.items()
    }
    longest = max(map(sum, mean_ms.values()))
    if not longest:
        return None
    figure, (axis,) = _figure(1, 1.7 + 0.6 * len(rounds))
    for i, (label, columns) in enumerate(rounds.items()):
        left = 0.0
        for part, value in zip(PARTS, mean_ms[label]):
            axis.barh(i, value, 0.62, left, color=PARTS[part], label=part if i == 0 else None)
            left += value
        tau = sum(columns["emitted"]) / len(columns["emitted"])
        per_token = f"{_ms(left / tau)} a token" if tau else "no tokens"
        axis.annotate(
            f"{_ms(left)} for {tau:.3g} token{'' if tau == 1 else 's'}\n= {per_token}",
            (left, i), (6, 0), textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    axis.set_yticks(range(len(rounds)), list(rounds))
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, longest * 1.32)
    axis.grid(axis="x")
    axis.set_xlabel("milliseconds per round (one target pass and the draft before it)")
    axis.set_title(f"Time per round ({subtitle})", pad=26)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    return figure


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"
