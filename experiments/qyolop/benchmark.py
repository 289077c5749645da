"""How fast a network runs: JAX in float32, bfloat16 and int8 beside onnxruntime, and training.

All ways to run take turns, so that a machine that slows down does so for all of them. A few untimed
calls come before a timed one, and the clock stops when the result is there. Times are medians
with quartiles. Multiply-adds per second are compared with the best large matrix product of the run.
A round, in which every way has one turn, is what an interrupted benchmark keeps.
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
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.common import records
from experiments.common.unfinished import Unfinished
from experiments.qyolop.engines import DeployError, integer_model, onnx_session, pictures
from experiments.qyolop.evaluate import machine
from experiments.qyolop.flags import LARGEST_BATCH, check_file, check_range
from llm_jax.digest import array_digest, json_digest
from llm_jax.extras import MissingPackage
from llm_jax.progress import Bar, bar
from qyolop_jax import export, integer, optimization
from qyolop_jax.config import ModelConfig
from qyolop_jax.fold import fold, run_folded
from qyolop_jax.graph import build_graph, count
from qyolop_jax.losses import LossConfig
from qyolop_jax.model import initial
from qyolop_jax.network import INTEGER_FILE, MODEL_FILE
from qyolop_jax.postprocess import to_predictions
from qyolop_jax.scales import DEFAULT, plan_quantization
from qyolop_jax.scenes import Scenes
from qyolop_jax.sources import Feed, batches
from qyolop_jax.training import float_loss
from qyolop_jax.weights import load_weights

MOST_REPEATS = 10**5
MATMUL_SIDE = dict(cpu=1536, gpu=8192)
"""Side of the square matrices whose product sets the limit."""
WARM = 0.05
"""Seconds of untimed calls before a timed one, at least one call. Idle threads of the call before
still spin for a while; that made onnxruntime twice as slow on two cores."""
TRAINING_MACS = 3
"""Multiply-adds of a training step in those of a forward pass: one forward, two backward."""


@dataclasses.dataclass(frozen=True)
class BenchmarkNetwork:
    """Latency and throughput of one network, in every precision and engine on this machine."""

    run: Path | None = None
    """Folder of `train`, or a model.safetensors; without it weights are random."""
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


@dataclasses.dataclass(frozen=True)
class Way:
    """Something to time: `call()` returns when it is done. `key` goes into its record."""

    key: dict
    call: Callable
    images: int
    macs: int
    """Multiply-adds of one image."""
    limit: str | None = None
    """The matrix product that its rate is compared with."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """The network that is timed."""

    cfg: ModelConfig
    variables: dict
    model: integer.IntegerModel | None
    weights: str
    macs: int
    parameters: int


def subject(args: BenchmarkNetwork, console: Console) -> Subject:
    """The network that `--run` names, or random weights; `model` is None if there is no file."""
    if args.run is None:
        cfg = ModelConfig(args.width, args.activation, size=args.size or (384, 640))
        variables = initial(cfg)
        graph, params = fold(cfg, variables)
        parts = plan_quantization(graph, DEFAULT).parts
        scales = {n: jnp.asarray([[-4.0, 4.0]] * (int(p.max()) + 1)) for n, p in parts.items()}
        model, weights = integer.to_integer(graph, params, scales), "random"
    else:
        folder = args.run.expanduser()
        cfg, variables = load_weights(folder / MODEL_FILE if folder.is_dir() else folder)
        cfg, weights = dataclasses.replace(cfg, size=args.size or cfg.size), str(args.run)
        folder = folder if folder.is_dir() else folder.parent
        try:
            model = integer_model(folder / INTEGER_FILE)
        except DeployError as error:
            console.print(f"int8 is left out: {error}", style="yellow", soft_wrap=True)
            model = None
    parameters, macs = count(build_graph(cfg), cfg.size).total()
    return Subject(cfg, variables, model, weights, macs, parameters)


def forwards(
    s: Subject, batch: int, console: Console
) -> Iterator[tuple[str, str, Callable, tuple]]:
    """Every (engine, precision, function to raw outputs, its arguments) for `batch` images."""
    graph, params = fold(s.cfg, s.variables)
    images = np.resize(pictures(min(batch, 4), s.cfg.size), (batch, *s.cfg.size, 3))
    there = jax.device_put(images)
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), params)
        run = lambda p, x, dtype=dtype: run_folded(graph, p, x, dtype)
        yield "jax", jnp.dtype(dtype).name, run, (cast, there)
    if s.model is not None:
        yield "jax", "int8", integer.run_integer, (s.model, there)
    makes = dict(float32=lambda: export.float_onnx(graph, params, s.cfg.size))
    if s.model is not None:
        makes["int8"] = lambda: export.integer_onnx(s.model, s.cfg.size)
    for precision, make in makes.items():
        try:
            session = onnx_session(make().SerializeToString())
        except MissingPackage as error:
            console.print(f"onnxruntime is left out: {error}", style="yellow", soft_wrap=True)
            return
        yield "onnxruntime", precision, session, (images,)


def inference(s: Subject, batch: int, console: Console) -> Iterator[Way]:
    """The `Way`s for one batch size, each without and with post-processing."""
    on_gpu = jax.default_backend() == "gpu"
    finish = lambda raw: to_predictions(raw, s.cfg)
    for engine, precision, run, arguments in forwards(s, batch, console):
        if engine == "jax":
            raw = jax.jit(run)
            both = jax.jit(lambda *a, run=run: finish(run(*a)))
            limit = precision if on_gpu else "float32"
        else:
            after = jax.jit(finish)
            raw = run
            both = lambda x, run=run, after=after: after(jax.device_put(run(x), cpu()))
            limit = "cpu float32" if on_gpu else "float32"
        for post, f in ((False, raw), (True, both)):
            call = lambda f=f, arguments=arguments: jax.block_until_ready(f(*arguments))
            key = dict(engine=engine, precision=precision, batch=batch, postprocessing=post)
            yield Way(key | dict(task="inference"), call, batch, s.macs, limit)


def cpu() -> jax.Device:
    """The device for onnxruntime's outputs: the CPU, or the accelerator if JAX may use no CPU."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others
        return jax.devices()[0]


def training(s: Subject, batch: int) -> Iterator[Way]:
    """A `Way` per precision: one optimization step, with the batch already on the device."""
    mesh = optimization.devices_for(batch, len(jax.devices()))
    config = optimization.OPTIMIZATION
    stream = batches(dict(scenes=Scenes(min(batch, 16), s.cfg.size)), Feed(s.cfg.size, batch))
    data = optimization.placed(next(stream), mesh, split=True)
    for dtype in (jnp.float32, jnp.bfloat16):
        step = optimization.make_step(float_loss(s.cfg, LossConfig(), dtype), config, mesh)
        state = optimization.new_state(s.variables, optimization.optimizer(config))
        held = [optimization.placed(state, mesh)]  # a step donates it

        def call(step=step, held=held):
            held[0], parts = step(held[0], data, jnp.float32(1e-6))
            jax.block_until_ready((held[0], parts))

        name = jnp.dtype(dtype).name
        limit = name if jax.default_backend() == "gpu" else "float32"
        key = dict(task="training", engine="jax", precision=name, batch=batch)
        yield Way(key, call, batch, TRAINING_MACS * s.macs, limit)


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
    known: Sequence[Sequence[float]] = (),
    keep: Callable[[list[float]], None] | None = None,
) -> list[list[float]]:
    """Seconds of every call, [ways][repeats]; all take turns, each round begins with another.

    `keep` gets the seconds [ways] of each round; `known` are the first rounds, from before.
    """
    rounds = [list(seconds) for seconds in known[:repeats]]
    for n in range(len(rounds), repeats):
        took = [0.0] * len(ways)
        for k in range(len(ways)):
            at = (n + k) % len(ways)
            until = time.perf_counter() + WARM
            ways[at].call()
            while time.perf_counter() < until:
                ways[at].call()
            began = time.perf_counter()
            ways[at].call()
            took[at] = time.perf_counter() - began
            step(n * len(ways) + k + 1)
        rounds.append(took)
        if keep:
            keep(took)
    return [list(seconds) for seconds in zip(*rounds, strict=True)]


def speed_rows(ways: Sequence[Way], took: Sequence[Sequence[float]]) -> list[dict]:
    """A record for each way: times, rates and ratios."""
    best = {w.key["precision"]: w.macs / min(t) for w, t in zip(ways, took) if "side" in w.key}
    rows = []
    for way, seconds in zip(ways, took):
        low, middle, high = np.percentile(seconds, (25, 50, 75))
        rate = way.images * way.macs / (min(seconds) if "side" in way.key else middle)
        row = way.key | dict(
            seconds=middle, low=low, high=high, least=min(seconds), repeats=len(seconds),
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
    if not args.batch and not args.train_batch:
        raise DeployError("there is nothing to time; give --batch or --train-batch")
    check_file(args.output)
    s = subject(args, console)
    device = jax.devices()[0].device_kind
    console.print(
        f"{s.parameters / 1e6:.2f} M parameters, {s.macs / 1e9:.2f} G multiply-adds an image of "
        f"{s.cfg.size[0]}x{s.cfg.size[1]}, {s.weights} weights, on {device}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    with Unfinished(args.output, _identity(args, s)) as work:
        if not work.found("rows"):
            work.add("rows", timed(args, s, work, console))
        rows = work.found("rows")[0]
        for n, row in enumerate(rows):
            if args.output:
                work.publish(args.output, f"row {n}", row)
    _print_speed(rows, console)
    return 0


def timed(args: BenchmarkNetwork, s: Subject, work: Unfinished, console: Console) -> list[dict]:
    """The records of all ways; goes on behind the rounds that `work` has of the same ways."""
    ways = [*products()]
    for batch in args.batch:
        ways += inference(s, batch, console)
    for batch in args.train_batch:
        ways += training(s, batch)
    with bar(console, "Compiling", len(ways)) as step:
        ways = warmed(ways, step, console)
    title = f"round {json_digest([way.key for way in ways])}"
    if known := work.found(title)[: args.repeats]:
        console.print(f"Timing: {len(known)} of {args.repeats} rounds were done before",
                      style="dim", highlight=False)  # fmt: skip
    with bar(console, "Timing", len(ways) * args.repeats) as step:
        took = turns(ways, args.repeats, step, known, lambda seconds: work.add(title, seconds))
    same = dict(
        weights=s.weights, width=s.cfg.width, activation=s.cfg.activation, size=s.cfg.size,
        parameters=s.parameters, macs=s.macs, devices=len(jax.devices()),
        environment=_environment(),
    )  # fmt: skip
    device = jax.devices()[0].device_kind
    on_device = lambda r: r["engine"] == "jax" and "cpu" not in r["precision"]
    return [
        r | dict(device=device if on_device(r) else "cpu") | same for r in speed_rows(ways, took)
    ]


def _identity(args: BenchmarkNetwork, s: Subject) -> dict[str, Any]:
    """All that decides the times: the network, what is asked for, and this machine."""
    found = _environment()
    about = dict(packages=found["packages"], host=platform.node(), cpus=found["cpu_count"])
    weights = [array_digest(a) for a in jax.tree.leaves((s.variables, s.model))]
    asked = dataclasses.asdict(dataclasses.replace(args, run=None, output=None))
    return dict(asked, weights=weights, machine=machine() | about)


def _environment() -> dict[str, Any]:
    found = records.environment()
    for name in ("onnxruntime", "onnx", "flax", "optax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["packages"][name] = importlib.metadata.version(name)
    return found


def _print_speed(rows: list[dict], console: Console) -> None:
    limits = [
        f"{r['precision']} {r['gmacs_per_second']:,.0f} GMAC/s ({r['side']}x{r['side']})"
        for r in rows if r["task"] == "matmul"
    ]  # fmt: skip
    console.print(f"Best matrix products: {', '.join(limits)}", highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    names = ("", "batch", "ms", "quartiles", "with boxes\nand masks", "images/s", "x\nfloat32",
             "GMAC/s", "of\nmatmul")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    ms = lambda s: f"{1e3 * s:.0f}" if s >= 1 else f"{1e3 * s:.4g}"
    of = lambda r: tuple(r[k] for k in ("task", "engine", "precision", "batch"))
    whole = {of(r): r["seconds"] for r in rows if r.get("postprocessing")}
    for r in rows:
        if r["task"] == "matmul" or r.get("postprocessing"):
            continue
        title = f"{r['engine']} {r['precision']}" + " training" * (r["task"] == "training")
        share, ratio = r.get("share_of_limit"), r.get("times_float32")
        table.add_row(
            title, str(r["batch"]), ms(r["seconds"]), f"{ms(r['low'])}-{ms(r['high'])}",
            ms(whole[of(r)]) if of(r) in whole else "",
            f"{r['images_per_second']:.1f}", "" if ratio is None else f"{ratio:.2f}",
            f"{r['gmacs_per_second']:,.1f}", "" if share is None else f"{share:.1%}",
        )  # fmt: skip
    console.print(table)
