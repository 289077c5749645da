"""Everything there is to decode with a model that does not fit, in one call, side by side.

    python -m experiments.measure.offload --model qwen2.5-7b --memory-limit 8GB --output FOLDER
    python -m experiments.measure.offload --model qwen2.5-32b --memory-limit 24GB --output FOLDER

Baselines: plain streaming with best residency, transformers with accelerate's CPU offload and with
prompt lookup. Ours step by step: raw layers through XLA, with kernels, residuals, a low-bit
head, two layers ahead. Each in a process of its own under the memory limit, with random weights and
a replayed acceptance, or on a checkpoint (`--checkpoint`, then real texts and overlapped drafting
too). Every line of offload.jsonl is one of them; a second call goes on where the first stopped.

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
from collections.abc import Iterable
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from experiments.common.plots import STYLE
from experiments.common.records import environment
from llm_jax.files import atomic_file

PCIE4, GDDR = 25e9, 1.008e12
"""Bytes a second of an RTX 4090: its link as measured by SubSpec's authors, and its memory."""

PLAIN = ("--method", "vanilla")
STEPS: dict[str, tuple[str, ...]] = {
    # name -> flags of experiments.speculative, each with more of them up to residual
    "vanilla": PLAIN,
    "raw": ("--method", "subspec"),
    "kernels": ("--method", "subspec"),
    "residual": ("--method", "subspec", "--stream", "residual"),
    "low-bit head": ("--method", "subspec", "--stream", "residual", "--draft-head-bits", "4"),
    "two ahead": ("--method", "subspec", "--stream", "residual", "--ahead", "2"),
}
ON_TEXT: dict[str, tuple[str, ...]] = {
    # what depends on the tokens, so that it cannot be replayed
    "stopping": (*STEPS["residual"], "--stop-gain", "auto"),
    "lookup": (*STEPS["residual"], "--lookup", "10"),
    "post-speculation": ("--method", "subspec-post", *STEPS["residual"][2:]),
}
FOREIGN = {"accelerate": 0, "accelerate, prompt lookup": 10}
"""Names of the baselines in transformers, and how many tokens they look up."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What to compare."""

    output: Path
    """Folder for offload.jsonl, the plot, and each run's own records."""
    model: str = "qwen2.5-7b"
    memory_limit: str = "8GB"
    checkpoint: Path | None = None
    """Real weights and texts instead of random weights and a replay."""
    converted: Path | None = None
    """The checkpoint as residuals (experiments.convert); made below --output if not given."""
    replay_acceptance: str = "published"
    only: tuple[str, ...] = ()
    """Names of configurations to run; all if not given."""
    tokens: int = 1360
    """Of our methods: 48 rounds of the published trace at depth 48, whose mean is the published
    one; with `--flags="--depth 38"` those are 1200."""
    plain_tokens: int = 32
    """Of plain decoding, where each takes as long as the others."""
    baseline_tokens: int = 8
    """Of the baselines in transformers."""
    seconds: float = 600
    """After which a configuration is given up."""
    flags: str = ""
    """More flags for every run of experiments.speculative: --flags="--max-length 1600"."""


def configurations(args: Benchmark) -> list[str]:
    """Names, in order. Raises SystemExit for one that there is not."""
    names = [*STEPS, *(ON_TEXT if args.checkpoint else ()), *FOREIGN]
    if unknown := [name for name in args.only if name not in names]:
        raise SystemExit(f"error: {unknown} are none of {names}")
    return [name for name in names if not args.only or name in args.only]


def command(name: str, args: Benchmark, folder: Path) -> list[str]:
    """What a configuration runs."""
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


def run(name: str, args: Benchmark) -> dict:
    """One configuration's record: what it measured, or why it did not."""
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


def measured(meta: dict) -> dict:
    """The record of a run of experiments.speculative. Seconds and bytes."""
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
        # A pass can be no shorter than its copies, if all are still to come, nor than its blocks.
        copies = plan["streamed_bytes"] / meta["link_bytes_per_s"]
        blocks = predicted["block"] * plan["layers"]
        found |= {"copies_s": copies, "blocks_s": blocks}
        found["pass_over_bound"] = per_round["verify"] / max(copies, blocks)
    return found


def project(record: dict, link: float = PCIE4, memory: float = GDDR) -> float | None:
    """Tokens a second on another card, from the bytes that were counted: the pass at its link, the
    draft at its memory's bandwidth, the rest as measured. Its kernels may do worse."""
    if "round_s" not in record or record.get("draft_bytes") is None:
        return None
    draft = record["draft_bytes"] / memory
    rest = record["round_s"]["other"]
    return record["tau"] / (record["streamed_bytes"] / link + draft + rest)


def table(records: Iterable[dict]) -> Table:
    """A row a configuration."""
    found = {r["configuration"]: r for r in records}
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


def plot(records: list[dict], path: Path) -> None:
    """Bars of tokens a second."""
    import matplotlib

    rows = [r for r in records if "tokens_per_s" in r][::-1]
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


def main(args: Benchmark, console: Console) -> list[dict]:
    """All records, also those of earlier calls on the same folder and with the same settings."""
    path = args.output / "offload.jsonl"
    names = ("model", "memory_limit", "checkpoint", "replay_acceptance", "tokens", "flags")
    settings = {name: getattr(args, name) for name in names}
    settings = json.loads(json.dumps(settings, default=str))
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    records = [r for r in known if r["settings"] == settings and "failed" not in r]
    for name in configurations(args):
        if name in {r["configuration"] for r in records}:
            console.print(f"{name}: done before", style="dim")
            continue
        with console.status(f"{name} …"):
            record = {"configuration": name, "settings": settings, **run(name, args)}
        record |= {"projected_pcie4_tokens_per_s": project(record), "environment": environment()}
        args.output.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        records.append(record)
        console.print(f"{name}: {record.get('tokens_per_s') or record}", highlight=False)
    console.print(table(records))
    plot(records, args.output / "offload.png")
    return records


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__), Console(width=150))
