"""Compares, in one call, all ways to decode with a model that does not fit.

    python -m experiments.measure.offload --model qwen2.5-7b --memory-limit 8GB --output FOLDER
    python -m experiments.measure.offload --model qwen2.5-32b --memory-limit 24GB --output FOLDER

Baselines: plain streaming with as many resident layers as fit, and transformers with accelerate's
CPU offload, without and with prompt lookup. Ours step by step: raw layers through XLA, kernels,
residuals, a low-bit head, two layers ahead. Each runs in its own process under the memory limit,
with random weights and a replayed acceptance, or on a checkpoint (`--checkpoint`), with real texts
and then also overlapped drafting. Each is one line of offload.jsonl, and a second call continues
where the first one stopped.

On an H200 the first printed tokens/s of: vanilla 7.6, raw 33.4, kernels 90.1, residual 152.1,
low-bit head 162.0, accelerate 0.78, with prompt lookup 0.85; the second, with
`--flags="--max-length 1600"`: vanilla 1.29, low-bit head 34.2. One of the 7B takes 90 seconds.
"""

import dataclasses
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common import records
from experiments.common.cli import UserError, run
from experiments.common.plots import STYLE, drawn_or_said, matplotlib_for
from llm_jax.files import atomic_file

PCIE4, GDDR = 25e9, 1.008e12
"""Bytes a second of an RTX 4090's link, as SubSpec's authors measured it, and of its memory."""

PLAIN = ("--method", "vanilla")
STEPS: dict[str, tuple[str, ...]] = {
    # name -> flags of experiments.speculative
    "vanilla": PLAIN,
    "raw": ("--method", "subspec"),
    "kernels": ("--method", "subspec"),
    "residual": ("--method", "subspec", "--stream", "residual"),
    "low-bit head": ("--method", "subspec", "--stream", "residual", "--draft-head-bits", "4"),
    "two ahead": ("--method", "subspec", "--stream", "residual", "--ahead", "2"),
}
ON_TEXT: dict[str, tuple[str, ...]] = {
    # these depend on the tokens, so they cannot be replayed
    "stopping": (*STEPS["residual"], "--stop-gain", "auto"),
    "lookup": (*STEPS["residual"], "--lookup", "10"),
    "post-speculation": ("--method", "subspec-post", *STEPS["residual"][2:]),
}
FOREIGN = {"accelerate": 0, "accelerate, prompt lookup": 10}
"""Names of the baselines in transformers, and how many tokens they look up."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Run every configuration and compare them."""

    output: Path
    """Folder for offload.jsonl, the plot, and the records of each run."""
    model: str = "qwen2.5-7b"
    memory_limit: str = "8GB"
    checkpoint: Path | None = None
    """Real weights and texts instead of random weights and a replay."""
    converted: Path | None = None
    """The converted checkpoint (experiments.convert); written below --output if not given."""
    replay_acceptance: str = "published"
    only: tuple[str, ...] = ()
    """Names of configurations to run; all if not given."""
    tokens: int = 1360
    """Tokens of our methods: the 48 rounds of the published trace at depth 48, whose mean
    acceptance is the published one. With `--flags="--depth 38"` those rounds have 1200 tokens."""
    plain_tokens: int = 32
    """Tokens of plain decoding, where every token takes equally long."""
    baseline_tokens: int = 8
    """Tokens of the baselines in transformers."""
    seconds: float = 600
    """A configuration that takes longer is stopped."""
    flags: str = ""
    """More flags for every run of experiments.speculative: --flags="--max-length 1600"."""


def configurations(args: Comparison) -> list[str]:
    """The names to run, in order. Raises UserError for an unknown one."""
    names = [*STEPS, *(ON_TEXT if args.checkpoint else ()), *FOREIGN]
    if unknown := [name for name in args.only if name not in names]:
        raise UserError(f"{unknown} are none of {names}")
    return [name for name in names if not args.only or name in args.only]


def command(name: str, args: Comparison, folder: Path) -> list[str]:
    """The words of the command that runs a configuration and writes into `folder`."""
    if name in FOREIGN:
        flags = ["--model", args.model, "--memory-limit", args.memory_limit]
        flags += ["--lookup", str(FOREIGN[name]), "--tokens", str(args.baseline_tokens)]
        return [sys.executable, "-m", "experiments.measure.offload_baselines", *flags,
                "--out", str(folder / "baseline.json")]  # fmt: skip
    flags = list((STEPS | ON_TEXT)[name])
    flags += ["--model", args.model, "--memory-limit", args.memory_limit, "--compare", "--no-show"]
    tokens = args.plain_tokens if name == "vanilla" else args.tokens
    flags += ["--max-new-tokens", str(tokens), "--output", str(folder)]
    if args.checkpoint is None:
        flags += ["--weights", "random", "--samples", "1"]
        flags += ["--replay-acceptance", args.replay_acceptance]
    else:
        flags += ["--checkpoint", str(args.checkpoint)]
        if "residual" in flags:
            flags += ["--converted", str(args.converted or args.output / "converted")]
    return [sys.executable, "-m", "experiments.speculative", *flags, *shlex.split(args.flags)]


def run_configuration(name: str, args: Comparison) -> dict[str, Any]:
    """A configuration's measurements, or {"failed" or "skipped": why}."""
    folder = args.output / name.replace(",", "").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    if name in FOREIGN:
        missing = [m for m in ("torch", "transformers", "accelerate") if not _installed(m)]
        if missing:
            return {"skipped": f"needs pip install {' '.join(missing)}"}
    variables = os.environ | ({"THIMBLE_KERNELS": "off"} if name == "raw" else {})
    try:
        done = subprocess.run(
            command(name, args, folder), env=variables, timeout=args.seconds,
            capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {args.seconds:.0f} s"}
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:500]}
    if name in FOREIGN:
        return json.loads((folder / "baseline.json").read_text())
    return measured(json.loads((folder / "run.json").read_text()))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def measured(meta: dict[str, Any]) -> dict[str, Any]:
    """The record for the run.json of experiments.speculative, in seconds and bytes."""
    (s,) = meta["summaries"]
    plan, passes = meta["plans"][s["method"]], s["passes"]
    per_round = {part: s[f"{part}_s"] / passes for part in ("draft", "verify", "other")}
    found = {
        "tokens_per_s": s["tokens_per_s"],
        "tau": s["tau"],
        "rounds": passes,
        "round_s": per_round,
        "resident": plan["resident"],
        "streamed_bytes": plan["streamed_bytes"],
        "draft_bytes": plan.get("draft_bytes"),
        "stream_bytes_per_s": s["stream_gb_per_s"] and s["stream_gb_per_s"] * 1e9,
        "copy_bytes_per_s": meta["link_bytes_per_s"],
        "read_bytes_per_s": meta["memory_bytes_per_s"],
        "peak_bytes": s["peak_bytes"],
        "planned_bytes": plan["total"],
        "replayed": s["replayed"],
        "device": meta["device"]["kind"],
    }
    if predicted := meta.get("predicted_s", {}).get(s["method"]):
        found["predicted_tokens_per_s"] = s["tau"] / predicted["round"]
        found["predicted_s"] = predicted
        # A pass is never shorter than its copies, if none has begun before, nor than its blocks.
        copies = plan["streamed_bytes"] / meta["link_bytes_per_s"]
        blocks = predicted["block"] * plan["layers"]
        found |= {"copies_s": copies, "blocks_s": blocks}
        found["pass_over_bound"] = per_round["verify"] / max(copies, blocks)
    return found


def project(record: dict[str, Any], link: float = PCIE4, memory: float = GDDR) -> float | None:
    """Tokens a second on another card, or None for a record without rounds.

    The pass takes its streamed bytes over that card's `link`, the draft its bytes over the card's
    `memory` bandwidth, and the rest takes the measured time. The card's kernels may be slower.
    """
    if "round_s" not in record or record.get("draft_bytes") is None:
        return None
    draft = record["draft_bytes"] / memory
    rest = record["round_s"]["other"]
    return record["tau"] / (record["streamed_bytes"] / link + draft + rest)


def comparison_table(runs: Iterable[dict[str, Any]]) -> Table:
    """A row for each configuration."""
    found = {r["configuration"]: r for r in runs}
    base = found.get("vanilla", {}).get("tokens_per_s")
    shown = Table("", "tokens/s", "over\nvanilla", "tau", "draft / verify /\nrest, ms",
                  "GB a pass", "verify /\nbound", "peak / plan\nGiB", "predicted /\nmeasured",
                  "on a 4090\n(projected)")  # fmt: skip
    number = lambda value, form: "" if value is None else format(value, form)
    for name, r in found.items():
        if "tokens_per_s" not in r:
            shown.add_row(name, r.get("skipped") or r.get("failed"))
            continue
        rate, parts = r["tokens_per_s"], r.get("round_s")
        predicted = r.get("predicted_tokens_per_s")
        sizes = [r.get("peak_bytes"), r.get("planned_bytes")]
        shown.add_row(
            name,
            f"{rate:.2f}",
            number(base and rate / base, ".1f"),
            number(r.get("tau"), ".1f"),
            " / ".join(f"{1e3 * s:.0f}" for s in parts.values()) if parts else "",
            number(r["streamed_bytes"] / 1e9, ".2f"),
            number(r.get("pass_over_bound"), ".2f"),
            " / ".join(number(n and n / 2**30, ".2f") for n in sizes),
            number(predicted and predicted / rate, ".2f"),
            number(project(r), ".1f"),
        )
    return shown


def plot_rates(runs: Sequence[dict[str, Any]], path: Path) -> list[Path]:
    """Draws bars of tokens a second into a PNG file. Returns its path."""
    matplotlib = matplotlib_for("drawing plots")

    rows = [r for r in runs if "tokens_per_s" in r][::-1]
    with matplotlib.rc_context({**STYLE, "backend": "Agg"}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1 + 0.4 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        names = [r["configuration"] for r in rows]
        bars = axes.barh(names, [r["tokens_per_s"] for r in rows], color="#0072b2")
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.set_xlabel("tokens a second")
        settings = rows[0]["settings"] if rows else {}
        axes.set_title(f"{settings.get('model')} in {settings.get('memory_limit')}")
        with atomic_file(path) as scratch:
            figure.savefig(scratch, dpi=150, format="png")
    return [path]


def main(args: Comparison, console: Console) -> list[dict[str, Any]]:
    """All records, with those of earlier calls on the same folder with the same settings."""
    path = args.output / "offload.jsonl"
    names = ("model", "memory_limit", "checkpoint", "replay_acceptance", "tokens", "flags")
    settings = {name: getattr(args, name) for name in names}
    settings = json.loads(json.dumps(settings, default=str))
    known = records.read(path, fields=("configuration", "settings"))
    runs = [r for r in known if r["settings"] == settings and "failed" not in r]
    for name in configurations(args):
        if name in {r["configuration"] for r in runs}:
            console.print(f"{name}: done before", style="dim")
            continue
        with console.status(f"{name} …"):
            found = run_configuration(name, args)
        record = {"configuration": name, "settings": settings, **found}
        record |= {
            "projected_pcie4_tokens_per_s": project(record),
            "environment": records.environment(),
        }
        records.append(path, record)
        runs.append(record)
        console.print(f"{name}: {record.get('tokens_per_s') or record}", highlight=False)
    console.print(comparison_table(runs))
    drawn_or_said(console, plot_rates, runs, args.output / "offload.png")
    return runs


def cli(words: Sequence[str] | None = None) -> int:
    return run(Comparison, main, __doc__, words, width=150)


if __name__ == "__main__":
    sys.exit(cli())
