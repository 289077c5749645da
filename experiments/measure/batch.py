"""Times several texts decoded together, for each number of them: total and per-text tokens/s.

    python -m experiments.measure.batch --model qwen2.5-7b --memory-limit 8GB --output FILE
    python -m experiments.measure.batch --texts 1 8 --methods vanilla

Weights are random and acceptance is replayed as published, so every pass is the real work and the
text means nothing. All texts begin together; the time to the first token is that of their prompts'
shared passes. Each line of the output is one number of texts with one method, in a process of its
own, because a limit holds for a process.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import subspec_jax
from experiments.common import records
from experiments.common.cli import UserError, run
from experiments.measure.experts import words_of
from experiments.speculative.replay import BLOCK, acceptance_trace
from llm_jax.progress import default_reporter
from subspec_jax.draft_model import Draft
from subspec_jax.options import default_tree
from subspec_jax.prefix_cache import Text


@dataclasses.dataclass(frozen=True)
class BatchTimes:
    """Time rounds of several texts together."""

    model: str = "qwen2.5-7b"
    memory_limit: str = "8GB"
    texts: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of texts."""
    methods: tuple[Literal["subspec", "vanilla"], ...] = ("subspec", "vanilla")
    stream: Literal["raw", "residual"] = "residual"
    draft_head_bits: Literal[2, 3, 4, 8] | None = 4
    depth: int | None = None
    width: int | None = None
    prompt: int = 256
    """Tokens of each prompt."""
    rounds: int = BLOCK
    """Rounds that are timed, after two that are not; `BLOCK` have the published mean."""
    max_length: int = 2048
    output: Path = Path("batch.jsonl")
    """File that lines are added to."""
    here: bool = False
    """Run in this process; for one number and one method."""


def main(args: BatchTimes, console: Console) -> int:
    if args.rounds < 1 or not args.texts or min(args.texts) < 1:
        raise UserError("--rounds and --texts must be at least 1")
    if args.here:
        records.append(args.output, measure(args, args.texts[0], args.methods[0]))
        return 0
    failed = []
    for method in args.methods:
        for n in args.texts:
            one = dataclasses.replace(args, texts=(n,), methods=(method,))
            command = [sys.executable, "-m", "experiments.measure.batch", "--here", *words_of(one)]
            if subprocess.run(command, check=False).returncode:
                failed.append(f"{method} of {n}")
    show(args, console)
    if failed:
        console.print(f"not measured: {', '.join(failed)}; what went wrong is said above")
    return bool(failed)


def measure(args: BatchTimes, texts: int, method: str) -> dict[str, Any]:
    """The line of this number of texts."""
    plain = method == "vanilla"
    shape = {k: v for k in ("depth", "width") if (v := getattr(args, k)) is not None}
    engine = subspec_jax.open(
        args.model,
        args.memory_limit,
        method=method,
        tree=default_tree(**shape),
        draft=Draft(head_bits=None if plain else args.draft_head_bits),
        stream="raw" if plain else args.stream,
        weights="random",
        quantizer="nearest",
        max_length=args.max_length,
        texts=texts,
        ladder=(texts,),
        replay=True,
        reporter=default_reporter(),
    )
    with engine:
        print(engine.plan, flush=True)
        decoder = engine.batch()
        trace = lambda seed: acceptance_trace("published", engine.method, seed)()
        rng = np.random.default_rng(0)
        room = args.max_length - args.prompt
        for warm in (True, False):
            some = [
                Text(rng.integers(0, engine.cfg.vocab, args.prompt).tolist(), room, replay=trace(i))
                for i in range(texts)
            ]
            for text in some:
                decoder.join(text)
            began = time.perf_counter()
            while any(t.at < args.prompt for t in some):
                decoder.step()
            first_s = time.perf_counter() - began
            rounds = [decoder.step() for _ in range(2 if warm else 2 + args.rounds)]
            for text in some:
                decoder.leave(text)
        rounds = [r for r in rounds[2:] if len(r) == texts]
        spent = [one[0][1] for one in rounds]  # the parts of a round are the same for all texts
        tokens = sum(len(r.tokens) for one in rounds for _, r in one)
        seconds = sum(r.seconds for r in spent)
        median = lambda name: float(np.median([getattr(r, name) for r in spent])) * 1e3
        stats = jax.devices()[0].memory_stats() or {}
        return dict(
            model=args.model,
            method=method,
            texts=texts,
            stream="raw" if plain else args.stream,
            memory_limit=args.memory_limit,
            max_length=args.max_length,
            acceptance=None if plain else "published",
            nodes=1 + spent[0].drafted,
            rounds=len(rounds),
            tau=tokens / len(rounds) / texts,
            tokens_per_s=tokens / seconds,
            tokens_per_s_a_text=tokens / seconds / texts,
            first_token_s=first_s,
            draft_ms=median("draft_s"),
            pass_ms=median("verify_s"),
            rest_ms=median("other_s"),
            bytes_a_pass=float(np.mean([r.streamed_bytes for r in spent])),
            resident=engine.plan.resident,
            link_gb_s=engine.link_bytes_per_s / 1e9,
            peak_gib=stats.get("peak_bytes_in_use", 0) / 2**30,
            planned_gib=engine.plan.total / 2**30,
            device=engine.device,
            environment=records.environment(),
        )


COLUMNS = ("method", "texts", "tokens/s", "x one", "a text", "tau", "first token, s", "draft ms",
           "pass ms", "rest ms", "GB a pass", "resident")  # fmt: skip


def show(args: BatchTimes, console: Console) -> None:
    """The newest line of each number of texts and each method."""
    if not args.output.exists():
        return
    lines = [json.loads(line) for line in args.output.read_text().splitlines()]
    mine = {
        (r["method"], r["texts"]): r
        for r in lines
        if (r["model"], r["memory_limit"]) == (args.model, args.memory_limit)
    }
    table = Table(title=f"{args.model} in {args.memory_limit}")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "method" else "right")
    for (method, texts), r in mine.items():
        one = mine.get((method, 1), {}).get("tokens_per_s")
        table.add_row(
            method,
            str(texts),
            f"{r['tokens_per_s']:.1f}",
            "" if one is None else f"{r['tokens_per_s'] / one:.2f}",
            f"{r['tokens_per_s_a_text']:.1f}",
            f"{r['tau']:.1f}",
            f"{r['first_token_s']:.2f}",
            f"{r['draft_ms']:.0f}",
            f"{r['pass_ms']:.0f}",
            f"{r['rest_ms']:.0f}",
            f"{r['bytes_a_pass'] / 1e9:.2f}",
            str(r["resident"]),
        )
    console.print(table)


def cli(words: Sequence[str] | None = None) -> int:
    return run(BatchTimes, main, __doc__, words)


if __name__ == "__main__":
    sys.exit(cli())
