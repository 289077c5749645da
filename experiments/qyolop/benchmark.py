"""How fast and how right a network runs: JAX beside onnxruntime, OpenVINO, LiteRT; and training.

All ways to run take turns, so that a machine that slows down does so for all of them. A few untimed
calls come before a timed one, and the clock stops when the result is there. Times are medians with
quartiles, the least, and the processor's own time, which all threads add up to. Multiply-adds per
second are compared with the best large matrix product of the run. A round, in which every way has
one turn, is what an interrupted benchmark keeps.
"""

import contextlib
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.common import records
from experiments.common.unfinished import Unfinished
from experiments.qyolop.datasets import HELD_OUT_SEED, DataName, data_identity, dataset
from experiments.qyolop.engines import DeployError
from experiments.qyolop.evaluate import machine, scores
from experiments.qyolop.flags import (
    LARGEST_BATCH,
    MOST_IMAGES,
    check_data,
    check_file,
    check_range,
)
from experiments.qyolop.speed_table import print_speed
from experiments.qyolop.ways import Engine, Subject, Way, cpu, inference, subject, training
from llm_jax.digest import array_digest, json_digest
from llm_jax.progress import Bar, bar
from qyolop_jax.config import ModelConfig
from qyolop_jax.network import Network
from qyolop_jax.samples import Report
from qyolop_jax.scenes import Scenes

MOST_REPEATS, MOST_THREADS = 10**5, 1024
MATMUL_SIDE = dict(cpu=1536, gpu=8192)
"""Side of the square matrices whose product sets the limit."""
Times = tuple[float, float]
"""Seconds, and seconds of the processor, which all threads of this process add up to."""
WARM = 0.05
"""Seconds of untimed calls before a timed one, at least one call. Idle threads of the call before
still spin for a while; that made onnxruntime twice as slow on two cores."""


@dataclasses.dataclass(frozen=True)
class BenchmarkNetwork:
    """Latency and throughput of one network, in every precision and engine on this machine."""

    run: Path | None = None
    """Folder of `train`, or a file of `train` or `quantize`; without it weights are random."""
    engines: tuple[Engine, ...] = ("jax", "onnxruntime")
    """openvino and litert are extras: pip install 'thimble-jax[openvino,litert]'."""
    threads: int | None = None
    """Threads of every engine but jax; default: all cores."""
    data: tuple[DataName, ...] = ()
    """Also score every precision of every engine on these; the batch is the first --batch."""
    data_dir: Path | None = None
    split: Literal["val", "train", "test"] = "val"
    images: int = 64
    """Images of each data set to score on, the first ones; all where there are fewer."""
    width: float = 0.25
    """For random weights."""
    activation: Literal["silu", "relu", "hardswish"] = "relu"
    """For random weights."""
    size: tuple[int, int] | None = None
    """Height and width, multiples of 32; default: the training's, 384 640 for random weights."""
    batch: tuple[int, ...] = (1, 16)
    repeats: int = 20
    train_batch: tuple[int, ...] = ()
    """Also time training steps with this many images."""
    output: Path | None = None
    """A file of JSON lines to append to; with it an interrupted benchmark keeps whole rounds."""


def products() -> Iterator[Way]:
    """A `Way` per matrix product that sets a limit: float32, and on a GPU also 16 and 8 bits."""
    backend = jax.default_backend()
    device, kinds = jax.devices()[0], dict(float32=jnp.float32)
    if backend == "gpu":
        kinds |= dict(bfloat16=jnp.bfloat16, int8=jnp.int8)
    cases = [(name, kind, device, MATMUL_SIDE.get(backend, 4096)) for name, kind in kinds.items()]
    if backend == "gpu":  # onnxruntime's
        cases.append(("cpu float32", jnp.float32, cpu(), MATMUL_SIDE["cpu"]))
    for name, kind, place, n in cases:
        wide = jnp.int32 if kind == jnp.int8 else kind
        a = jax.device_put(np.ones((n, n), np.int8), place).astype(kind)
        dot = jax.jit(lambda a, b, wide=wide: jax.lax.dot(a, b, preferred_element_type=wide))
        call = lambda dot=dot, a=a: jax.block_until_ready(dot(a, a))
        key = dict(task="matmul", engine="jax", precision=name, batch=1, side=n)
        yield Way(key, call, 1, n**3)


def warmed(ways: Iterable[Way], step: Bar, console: Console) -> list[Way]:
    """Compiles all ways; returns those that run, and prints which do not."""
    good = []
    for n, way in enumerate(ways, 1):
        try:
            way.call()
            good.append(way)
        except jax.errors.JaxRuntimeError as error:  # no room
            what = f"{way.key['engine']} {way.key['precision']} batch {way.key['batch']}"
            console.print(f"{what} is left out: {str(error)[:200]}", style="yellow")
        step(n)
    return good


def turns(
    ways: Sequence[Way],
    repeats: int,
    step: Bar,
    known: Sequence[Sequence[Times]] = (),
    keep: Callable[[list[Times]], None] | None = None,
) -> list[list[Times]]:
    """The times of every call, [ways][repeats]; all take turns, each round begins with another.

    `keep` gets the times [ways] of each round; `known` are the first rounds, from before.
    """
    rounds = [[(wall, cpu) for wall, cpu in times] for times in known[:repeats]]
    for n in range(len(rounds), repeats):
        took = [(0.0, 0.0)] * len(ways)
        for k in range(len(ways)):
            at = (n + k) % len(ways)
            until = time.perf_counter() + WARM
            ways[at].call()
            while time.perf_counter() < until:
                ways[at].call()
            began, spent = time.perf_counter(), time.process_time()
            ways[at].call()
            took[at] = time.perf_counter() - began, time.process_time() - spent
            step(n * len(ways) + k + 1)
        rounds.append(took)
        if keep:
            keep(took)
    return [list(times) for times in zip(*rounds, strict=True)]


def speed_rows(ways: Sequence[Way], took: Sequence[Sequence[Times]]) -> list[dict]:
    """A record for each way: times, rates and ratios."""
    least = lambda times: min(wall for wall, _ in times)
    best = {w.key["precision"]: w.macs / least(t) for w, t in zip(ways, took) if "side" in w.key}
    rows = []
    for way, times in zip(ways, took):
        seconds, cpu = zip(*times)
        low, middle, high = np.percentile(seconds, (25, 50, 75))
        rate = way.images * way.macs / (min(seconds) if "side" in way.key else middle)
        row = way.key | dict(
            seconds=middle, low=low, high=high, least=min(seconds), repeats=len(seconds),
            cpu_seconds=float(np.median(cpu)), cpu_least=min(cpu),
            images_per_second=way.images / middle, gmacs_per_second=rate / 1e9,
        )  # fmt: skip
        if way.limit in best:
            row |= dict(limit=f"{way.limit} matmul", share_of_limit=rate / best[way.limit])
        rows.append(row)
    same = lambda r: tuple(r.get(k) for k in ("task", "engine", "batch", "postprocessing"))
    base = {same(r): r["seconds"] for r in rows if r["precision"] == "float32"}
    for r in rows:
        if r["task"] != "matmul" and same(r) in base:
            r["times_float32"] = base[same(r)] / r["seconds"]
    return rows


def benchmark_command(args: BenchmarkNetwork, console: Console) -> int:
    """Times every way, prints a table, appends records."""
    check_range(args, 1, MOST_REPEATS, "repeats")
    check_range(args, 1, LARGEST_BATCH, "batch", "train_batch")
    check_range(args, 1, MOST_IMAGES, "images")
    if args.threads is not None:
        check_range(args, 1, MOST_THREADS, "threads")
    if args.data:
        check_data(args.data)
    if not args.train_batch and not (args.batch and args.engines):
        raise DeployError("there is nothing to time; give --batch and --engines, or --train-batch")
    check_file(args.output)
    random = ModelConfig(args.width, args.activation, size=args.size or (384, 640))
    s = subject(args.run, random, args.size, console)
    device = jax.devices()[0].device_kind
    console.print(
        f"{s.parameters / 1e6:.2f} M parameters, {s.macs / 1e9:.2f} G multiply-adds an image of "
        f"{s.cfg.size[0]}x{s.cfg.size[1]}, weights: {s.weights}, on {device}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    with Unfinished(args.output, _identity(args, s)) as work:
        if not work.found("rows"):
            work.add("rows", timed(args, s, work, console))
        rows = work.found("rows")[0]
        for n, row in enumerate(rows):
            if args.output:
                work.publish(args.output, f"row {n}", row)
    print_speed(rows, console)
    return 0


def timed(args: BenchmarkNetwork, s: Subject, work: Unfinished, console: Console) -> list[dict]:
    """The records of all ways; goes on behind the rounds that `work` has of the same ways."""
    ways = [*products()]
    for batch in args.batch:
        ways += inference(s, batch, args.engines, args.threads)
    for batch in args.train_batch:
        ways += training(s, batch)
    with bar(console, "Compiling", len(ways)) as step:
        ways = warmed(ways, step, console)
    title = f"round {json_digest([way.key for way in ways])}"
    if known := work.found(title)[: args.repeats]:
        console.print(f"Timing: {len(known)} of {args.repeats} rounds were done before",
                      style="dim", highlight=False)  # fmt: skip
    with bar(console, "Timing", len(ways) * args.repeats) as step:
        took = turns(ways, args.repeats, step, known, lambda times: work.add(title, times))
    same = dict(
        weights=s.weights, width=s.cfg.width, activation=s.cfg.activation, size=s.cfg.size,
        parameters=s.parameters, macs=s.macs, devices=len(jax.devices()),
        environment=_environment(),
    )  # fmt: skip
    device = jax.devices()[0].device_kind
    on_device = lambda r: r["engine"] == "jax" and "cpu" not in r["precision"]
    rows = [
        r | dict(device=device if on_device(r) else "cpu") | same for r in speed_rows(ways, took)
    ]
    for way, row in zip(ways, rows):
        if way.predict is not None and way.images == args.batch[0] and args.data:
            row["scores"] = scored(args, s, way, work, console)
    return rows


def scored(
    args: BenchmarkNetwork, s: Subject, way: Way, work: Unfinished, console: Console
) -> dict[str, dict[str, float]]:
    """The scores of one way on every data set that is asked for, by its name."""
    found, report = {}, Report()
    network = Network(s.cfg, lambda *_: {}, None)  # `way.predict` takes its place
    for name in args.data:
        scenes = Scenes(args.images, s.cfg.size, HELD_OUT_SEED * (args.split == "val"))
        data = dataset(name, args.split, args.data_dir, scenes, report)
        title = f"{way.key['engine']} {way.key['precision']} on {name} {args.split}"
        first = [data[i] for i in range(min(args.images, len(data)))]
        batch = args.batch[0]
        found[name] = scores(
            work, title, network, first, console, batch=batch, run=way.predict, report=report
        )
    return found


def _identity(args: BenchmarkNetwork, s: Subject) -> dict[str, Any]:
    """All that decides the times: the network, what is asked for, and this machine."""
    found = _environment()
    about = dict(packages=found["packages"], host=platform.node(), cpus=found["cpu_count"])
    weights = [array_digest(a) for a in jax.tree.leaves((s.variables, s.model))]
    asked = dataclasses.asdict(dataclasses.replace(args, run=None, output=None))
    scenes = Scenes(args.images, s.cfg.size, 0)
    asked["data"] = [data_identity(n, args.split, args.data_dir, scenes) for n in args.data]
    asked["data_dir"] = None
    return dict(asked, weights=weights, machine=machine() | about)


def _environment() -> dict[str, Any]:
    found = records.environment()
    for name in ("onnxruntime", "onnx", "openvino", "ai-edge-litert", "flax", "optax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["packages"][name] = importlib.metadata.version(name)
    return found
