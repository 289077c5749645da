"""How fast does a model decode that fits neither on the device nor into host memory?

    python -m experiments.measure.disk --model qwen2.5-7b --memory-limit 8GB --host-limit 4GB \\
        --folder /data/layers --output disk.jsonl
    python -m experiments.measure.disk --model smollm2-135m --memory-limit 700MB \\
        --host-limit 300MB --folder /tmp/layers

Weights are random and acceptance is replayed as published; the layers are really written to the
folder, once, and really read. One line each for: the disk alone (O_DIRECT, no checks), the stream
alone (reading, checking and copying, no arithmetic), the speculative method, and plain decoding.
"The bound" of a round is the larger of the bytes it reads from disk over the disk's bandwidth, and
the draft with a pass at the link's bandwidth. Memory is what Linux says of the process.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

import subspec_jax
from experiments.common import records
from experiments.common.cli import UserError, run
from experiments.speculative.replay import acceptance_trace
from llm_jax.disk import BLOCK, DiskReader, Slot
from llm_jax.progress import default_reporter
from subspec_jax.draft_model import Draft
from subspec_jax.engine import Engine
from subspec_jax.options import default_tree


@dataclasses.dataclass(frozen=True)
class DiskTimes:
    """A model, its limits, and where its layers are."""

    folder: Path
    """Where the layers are written; it should be on the disk that is measured."""
    model: str = "qwen2.5-7b"
    memory_limit: str = "8GB"
    host_limit: str = "4GB"
    stream: Literal["raw", "residual"] = "residual"
    draft_head_bits: Literal[2, 3, 4, 8] | None = 4
    """Bits of the draft's head."""
    depth: int | None = None
    """Levels of the tree; the machine's if not given."""
    rounds: int = 24
    """Rounds of the speculative method."""
    plain_tokens: int = 3
    """Tokens of plain decoding, whose layers are written too; 0: it is left out."""
    max_length: int = 2048
    prompt: int = 100
    """Tokens of the prompt."""
    output: Path | None = None


def memory_of_process() -> dict[str, int]:
    """Bytes of this process's memory, now and at most, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kept = dict(line.split(":", 1) for line in lines)
    size = lambda name: int(kept[name].split()[0]) * 1024
    return dict(
        rss=size("VmRSS"),
        most_rss=size("VmHWM"),
        of_files=size("RssFile"),
        locked_or_shared=size("RssShmem"),
    )


def bare(engine: Engine, seconds: float = 3.0) -> dict[str, Any]:
    """The disk alone: the layers' blocks, as a stream reads them, without a look at them."""
    reader, ring = DiskReader(check=False), engine.target.ring
    large = [a for layer in ring.layers for a in layer if a.stored > 2**20] or ring.layers[0]
    slot = Slot(max(a.stored for a in large) + 2 * BLOCK)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for a in large:
            reader.read([a], slot)
            if time.perf_counter() - began > seconds:
                break
    reader.close()
    found = reader.reads
    return dict(case="disk", bytes=found.bytes, gb_s=found.bytes_per_s / 1e9, direct=found.direct)


def stream_alone(engine: Engine, passes: int = 2) -> dict[str, Any]:
    """Passes without arithmetic: layers arrive on the device and are let go."""
    target = engine.target
    ready = jax.block_until_ready(jax.numpy.zeros(1))
    before, times, sizes = dataclasses.replace(target.ring.reader.reads), [], 0
    for _ in range(passes):
        began = time.perf_counter()
        stream = target.stream()
        for _ in range(engine.cfg.layers):
            layer = next(stream)
            jax.block_until_ready(layer)
            del layer
            stream.used(ready)
        times.append(time.perf_counter() - began)
        sizes = stream.bytes
    reads = target.ring.reader.reads
    took = dict(bytes=reads.bytes - before.bytes, seconds=reads.seconds - before.seconds)
    return dict(
        case="stream",
        pass_s=min(times),
        streamed_gb_s=sizes / min(times) / 1e9,
        disk_bytes=took["bytes"] // passes,
        disk_gb_s=took["bytes"] / took["seconds"] / 1e9,
    )


def decoded(
    engine: Engine, args: DiskTimes, name: str, rounds: int, disk_gb_s: float
) -> dict[str, Any]:
    """Rounds of a method, after two that are not counted."""
    method = engine.methods[name]
    trace = acceptance_trace("published", method)
    prompt = np.random.default_rng(0).integers(0, engine.cfg.vocab, args.prompt).tolist()
    decoder = engine.warm_up(prompt, 4, method, trace)
    room = args.max_length - args.prompt
    kept, began, reads = [], 0.0, None
    for i, one in enumerate(decoder.rounds(prompt, room, replay=trace())):
        if i == 2:
            began, reads = time.perf_counter(), dataclasses.replace(engine.target.ring.reader.reads)
        if i > 2:
            kept.append(one)
        if len(kept) == rounds:
            break
    wall = time.perf_counter() - began
    read = engine.target.ring.reader.reads.bytes - reads.bytes
    plan, count = engine.plans[name], len(kept)
    mean = lambda field: float(np.mean([getattr(r, field) for r in kept]))
    disk_s = read / count / (disk_gb_s * 1e9)
    link_s = mean("draft_s") + plan.streamed_bytes / engine.link_bytes_per_s
    tokens = sum(len(r.tokens) for r in kept)
    return dict(
        case=name,
        rounds=count,
        tau=tokens / count,
        tokens_per_s=tokens / wall,
        round_s=wall / count,
        draft_s=mean("draft_s"),
        pass_s=mean("verify_s"),
        rest_s=mean("other_s"),
        disk_bytes_a_round=read / count,
        disk_s=disk_s,
        link_s=link_s,
        over_the_bound=wall / count / max(disk_s, link_s),
        resident=plan.resident,
        on_disk=len(plan.disk),
        streamed_bytes=plan.streamed_bytes,
        host_bytes=dict(plan.host),
    )


def measure(args: DiskTimes, emit: Callable[[dict[str, Any]], None]) -> None:
    """Emits the lines."""
    shape = {} if args.depth is None else {"depth": args.depth}
    engine = subspec_jax.open(
        args.model,
        args.memory_limit,
        host=args.host_limit,
        method="subspec",
        also=("vanilla",) if args.plain_tokens else (),
        tree=default_tree(**shape),
        draft=Draft(head_bits=args.draft_head_bits),
        stream=args.stream,
        weights="random",
        quantizer="nearest",
        disk_folder=args.folder,
        max_length=args.max_length,
        replay=True,
        reporter=default_reporter(),
    )
    with engine:
        print(engine.plan, flush=True)
        if not engine.plan.disk:
            raise UserError("all layers fit into these limits; lower --host-limit")
        began = time.perf_counter()
        engine.start()
        started = time.perf_counter() - began
        stamp = dict(
            model=args.model,
            stream=args.stream,
            memory_limit=args.memory_limit,
            host_limit=args.host_limit,
            link_gb_s=engine.link_bytes_per_s / 1e9,
            device=engine.device,
            environment=records.environment(),
        )
        line = lambda found: emit(stamp | found | dict(memory=memory_of_process()))
        line(dict(case="start", seconds=started, probed_gb_s=engine.disk_bytes_per_s / 1e9))
        engine.use("subspec")
        line(dict(case="load", seconds=engine.timings["load_s"]))
        line(disk := bare(engine))
        line(stream_alone(engine))
        line(decoded(engine, args, "subspec", args.rounds, disk["gb_s"]))
        if args.plain_tokens:
            line(decoded(engine, args, "vanilla", args.plain_tokens, disk["gb_s"]))


def main(args: DiskTimes, console: Console) -> None:
    def emit(found: dict[str, Any]) -> None:
        console.print({k: v for k, v in found.items() if k != "environment"})
        if args.output:
            records.append(args.output, found)

    measure(args, emit)


def cli(words: Sequence[str] | None = None) -> int:
    return run(DiskTimes, main, __doc__, words, again=None)


if __name__ == "__main__":
    sys.exit(cli())
