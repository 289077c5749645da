"""Times a model with experts that does not fit: plain passes and trees of several depths.

    python -m experiments.measure.experts --model qwen3-30b-a3b --memory-limit 24GB
    python -m experiments.measure.experts --only tree --stream residual

Weights are random, acceptance is replayed as published for chains (a chance of 0.967 a level), and
routers follow a law of Zipf. Each line of the output is one way to decode: all experts streamed;
the fair baseline, plain decoding that brings only the experts it is routed to and keeps hot ones;
and speculation. A line has tokens/s, bytes a pass, what the pass found on the device and what the
draft foresaw, layer by layer, and predictions: the bytes that the counted popularity of experts
gives, and seconds of a round from timed layers, with assumed and with counted popularity.

Every method runs in a process of its own, because a limit holds for a process.
"""

import dataclasses
import json
import subprocess
import sys
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
from experiments.speculative.replay import acceptance_trace
from llm_jax.progress import default_reporter
from llm_jax.sample import Sampler
from subspec_jax import precompile
from subspec_jax.decoder import Decoder
from subspec_jax.draft_model import Draft
from subspec_jax.engine import Engine
from subspec_jax.predict import RoundCosts, round_seconds, why_not
from subspec_jax.predict import measure as measure_round
from subspec_jax.predict_experts import Routing, expected_experts
from subspec_jax.propose import Round
from subspec_jax.tree import TreeSpec

PROMPT = 32
"""Tokens of the prompt."""


@dataclasses.dataclass(frozen=True)
class ExpertTimes:
    """Time plain decoding and trees of several depths, and compare them."""

    model: str = "qwen3-30b-a3b"
    memory_limit: str = "24GB"
    stream: Literal["raw", "residual"] = "raw"
    """What is brought of an expert: its weights, or what its substitute lacks."""
    depths: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Levels of the trees."""
    draft_bits: Literal[2, 3, 4, 8] = 4
    draft_group: int = 64
    draft_experts: int | None = None
    """Experts that the draft routes a token to; as many as the target if not given."""
    zipf: float = 1.0
    """Exponent of the law of Zipf that the routers follow."""
    rounds: int = 12
    """Rounds of each tree; plain decoding has four times as many."""
    max_length: int = 512
    output: Path = Path("experts.jsonl")
    """File that lines are added to."""
    only: tuple[str, ...] = ()
    """Of "all", "plain" and "tree", the methods to run; all if not given."""
    here: bool = False
    """Run in this process; for one method."""


METHODS = ("all", "plain", "tree")


def main(args: ExpertTimes, console: Console) -> int:
    methods = args.only or METHODS
    if unknown := set(methods) - set(METHODS):
        raise UserError(f"{min(unknown)} is none of {', '.join(METHODS)}")
    if args.rounds < 2 or not args.depths or min(args.depths) < 1:
        raise UserError("--rounds must be at least 2, and --depths at least 1")
    if args.here:
        for method in methods:
            for line in measure(args, method):
                records.append(args.output, line)
    else:
        command = [sys.executable, "-m", "experiments.measure.experts", "--here", *words_of(args)]
        ends = {m: subprocess.run([*command, "--only", m], check=False).returncode for m in methods}
        if failed := [m for m, end in ends.items() if end]:
            show(args, console)
            console.print(f"not measured: {', '.join(failed)}; what went wrong is said above")
            return 1
    show(args, console)
    return 0


def words_of(args: ExpertTimes) -> list[str]:
    """The flags that differ from their defaults, without --here and --only."""
    words = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name in ("here", "only") or value == field.default:
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return words


def measure(args: ExpertTimes, method: str) -> list[dict[str, Any]]:
    """The lines of a method: one, or one for each depth."""
    plain = method != "tree"
    deepest = TreeSpec("chain", depth=max(args.depths), width=1)
    engine = subspec_jax.open(
        args.model,
        args.memory_limit,
        method="vanilla" if plain else "chain",
        tree=deepest,
        draft=Draft(args.draft_bits, args.draft_group, experts=args.draft_experts),
        weights="random",
        quantizer="nearest",
        zipf=args.zipf,
        experts="all" if method == "all" else "routed",
        stream="raw" if plain else args.stream,
        sampler=Sampler(1.0),
        max_length=args.max_length,
        chunk=64,
        replay=True,
        reporter=default_reporter(),
    )
    with engine:
        print(engine.plan, flush=True)
        engine.compile()
        if not plain and engine.device["platform"] == "gpu":
            # While the device is empty: the compiler times its candidates on buffers of its own.
            ahead = {}
            for depth in args.depths:
                plan = dataclasses.replace(engine.plan, spec=_spec(engine, depth))
                ahead[f"depth {depth}"] = precompile.Ahead(
                    plan, engine.options.sampler, replay=True
                )
            precompile.compile_ahead(ahead)
        depths = [0] if plain else sorted(args.depths)
        costs, lines = {d: _costs(engine, d) for d in depths}, []  # while the device is empty
        engine.load()
        for depth in depths:
            whole = dataclasses.replace(engine.method, spec=_spec(engine, depth))
            line, decoder, rounds = _timed(args, method, engine, whole, depth)
            line |= _of_experts(rounds, decoder, depth, engine) if rounds[0].experts else {}
            line |= _predicted(engine, costs[depth], line, decoder) if costs[depth] else {}
            lines.append(line)
            print(json.dumps({k: v for k, v in lines[-1].items() if k in SHOWN}), flush=True)
        return lines


def _spec(engine: Engine, depth: int) -> TreeSpec:
    return dataclasses.replace(engine.plan.spec, depth=depth)


def _costs(engine: Engine, depth: int) -> RoundCosts | None:
    """Times of a round's parts with a tree of that depth; None where rounds are not predicted."""
    plan = dataclasses.replace(engine.plan, spec=_spec(engine, depth))
    if why_not(plan):
        return None
    return measure_round(plan, engine.source.one_layer(plan), engine.options.sampler, 2 * PROMPT)


def _predicted(engine: Engine, costs: RoundCosts, line: dict, decoder: Decoder) -> dict[str, Any]:
    """The seconds of a round, predicted before and with counted routing, over those measured."""
    plan = dataclasses.replace(engine.plan, spec=_spec(engine, line["depth"]))
    given, measured = (plan, costs, engine.link_bytes_per_s), line["tau"] / line["tokens_per_s"]
    popular = decoder.target.experts.score_LE, engine.cfg.experts.chosen
    before = round_seconds(*given, engine.source.routing())
    after = round_seconds(*given, Routing.counted(*popular, line["foreseen_rate"]))
    return dict(
        predicted_s=dataclasses.asdict(costs) | {"round": before, "counted": after},
        predicted_over_measured=before / measured,
        counted_over_measured=after / measured,
    )


def _timed(args, method, engine, whole, depth) -> tuple[dict[str, Any], Decoder, list[Round]]:
    count = {"all": 4, "plain": 4 * args.rounds, "tree": args.rounds}[method]
    prompt = np.random.default_rng(0).integers(0, engine.cfg.vocab, PROMPT).tolist()
    trace = acceptance_trace("published", whole)
    decoder = engine.warm_up(prompt, 8, whole, trace)
    for _ in range(2):  # the first run compiles, and fills the cache of experts
        accepted, rounds = trace(), []
        room = args.max_length - PROMPT - 1
        for r in decoder.rounds(prompt, room, replay=accepted):
            rounds.append(r)
            if len(rounds) > count:
                break
    rounds = rounds[1:]
    seconds = sum(r.seconds for r in rounds)
    stats = jax.devices()[0].memory_stats() or {}
    line = dict(
        model=args.model,
        method=method,
        stream="raw" if method != "tree" else args.stream,
        depth=depth,
        draft_bits=args.draft_bits if method == "tree" else None,
        draft_experts=args.draft_experts,
        zipf=args.zipf,
        acceptance="published, chains" if method == "tree" else None,
        memory_limit=args.memory_limit,
        rounds=len(rounds),
        tau=sum(len(r.tokens) for r in rounds) / len(rounds),
        tokens_per_s=sum(len(r.tokens) for r in rounds) / seconds,
        draft_ms=_median(r.draft_s for r in rounds),
        pass_ms=_median(r.verify_s for r in rounds),
        rest_ms=_median(r.other_s for r in rounds),
        bytes_a_pass=float(np.mean([r.streamed_bytes for r in rounds])),
        experts_kept=engine.plan.hot,
        link_gb_s=engine.link_bytes_per_s / 1e9,
        peak_gib=stats.get("peak_bytes_in_use", 0) / 2**30,
        planned_gib=engine.plan.total / 2**30,
        device=engine.device,
        environment=records.environment(),
    )
    return line, decoder, rounds


def _median(seconds) -> float:
    return float(np.median(list(seconds))) * 1e3


def _of_experts(rounds: Sequence[Round], decoder, depth: int, engine) -> dict[str, Any]:
    """What passes needed and found, and what the counted popularity predicts for it."""
    total = lambda name: np.sum([getattr(r.experts, name) for r in rounds], axis=0)
    needed, held, foreseen, fetched = map(total, ("needed", "held", "foreseen", "fetched"))
    cache, n = decoder.target.experts, len(rounds)
    share = lambda part: np.round(part / np.maximum(needed, 1), 3).tolist()
    nodes, size = 1 + depth, cache.host[-1][0].nbytes
    predicted = expected_experts(cache.score_LE, nodes, engine.cfg.experts.chosen, cache.capacity)
    return dict(
        needed_a_layer=float(needed.mean() / n),
        hit_rate=float(held.sum() / needed.sum()),
        foreseen_rate=float(foreseen.sum() / max(1, needed.sum() - held.sum())),
        fetched_and_used=float((needed - held).sum() / max(1, fetched.sum())),
        hit_by_layer=share(held),
        foreseen_by_layer=share(foreseen),
        predicted_bytes_a_pass=predicted * size,
        copy_ms=float(np.mean([r.streamed_bytes for r in rounds])) / engine.link_bytes_per_s * 1e3,
    )


SHOWN = (
    "method", "stream", "depth", "tau", "tokens_per_s", "draft_ms", "pass_ms", "bytes_a_pass",
    "predicted_bytes_a_pass", "predicted_over_measured", "counted_over_measured",
    "hit_rate", "foreseen_rate", "needed_a_layer", "peak_gib",
)  # fmt: skip
COLUMNS = ("method", "depth", "tau", "tokens/s", "x plain", "draft ms", "pass ms", "GB a pass",
           "predicted", "held", "foreseen")  # fmt: skip


def show(args: ExpertTimes, console: Console) -> None:
    """The newest line of each way to decode, beside the fair baseline."""
    if not args.output.exists():
        return
    lines = [json.loads(line) for line in args.output.read_text().splitlines()]
    key = lambda r: (r["method"], r["stream"], r["depth"], r["draft_bits"], r["draft_experts"])
    mine = {
        key(r): r
        for r in lines
        if (r["model"], r["memory_limit"], r["zipf"]) == (args.model, args.memory_limit, args.zipf)
    }
    fair = next((r["tokens_per_s"] for r in mine.values() if r["method"] == "plain"), None)
    table = Table(title=f"{args.model} in {args.memory_limit}")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "method" else "right")
    for r in mine.values():
        percent = lambda name, r=r: f"{r[name]:.0%}" if name in r else ""
        predicted = r.get("predicted_bytes_a_pass")
        table.add_row(
            f"{r['method']}, {r['stream']}" if r["method"] == "tree" else r["method"],
            str(r["depth"] or ""),
            f"{r['tau']:.1f}",
            f"{r['tokens_per_s']:.1f}",
            "" if fair is None else f"{r['tokens_per_s'] / fair:.2f}",
            f"{r['draft_ms']:.0f}",
            f"{r['pass_ms']:.0f}",
            f"{r['bytes_a_pass'] / 1e9:.2f}",
            "" if predicted is None else f"{predicted / 1e9:.2f}",
            percent("hit_rate"),
            percent("foreseen_rate"),
        )
    console.print(table)
    for r in (r for r in mine.values() if "predicted_over_measured" in r):
        before, after = r["predicted_over_measured"], r["counted_over_measured"]
        said = f"predicted / measured {before:.2f}, with counted routing {after:.2f}"
        console.print(f"{r['method']}, depth {r['depth']}: {said}")


def cli(words: Sequence[str] | None = None) -> int:
    return run(ExpertTimes, main, __doc__, words)


if __name__ == "__main__":
    sys.exit(cli())
