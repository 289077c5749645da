"""Trained models made ready for use: in 8 bits without training, as StableHLO, as ONNX."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from rich.console import Console

from experiments.common import records
from experiments.qyolop import sensitivity as qyolop_sensitivity
from experiments.qyolop.engines import DeployError, checked, integer_model
from llm_jax.files import atomic_file
from qyolop_jax import export, fold, integer, quantize
from qyolop_jax.evaluate import evaluate, float_forward
from qyolop_jax.export import ExportError
from qyolop_jax.graph import GraphError
from qyolop_jax.observe import Kind, ObserveError
from qyolop_jax.samples import Report
from qyolop_jax.scales import QuantizeError, Settings, plan
from qyolop_jax.scenes.generate import Scenes
from qyolop_jax.sources import Cached, Feed, batches

BATCH = 8
"""Images that are calibrated with at a time."""

ERRORS = (
    DeployError, ExportError, GraphError, integer.IntegerError, ObserveError, QuantizeError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Quantize:
    """A trained model in 8 bits, without training: ranges are taken from a few images."""

    run: Path
    """Folder of `train`, or a model.safetensors."""
    data: tuple[str, ...] = ("scenes",)
    """Data sets as `train` names them; their training images are calibrated with."""
    data_dir: Path | None = None
    scenes: int = 256
    """Generated scenes, if that is the data."""
    images: int = 64
    """To calibrate with."""
    observer: Kind = "percentile"
    """How a range follows from the values seen."""
    percentile: float = 99.99
    per_tensor: bool = False
    """One scale for a whole kernel, not one for every output channel."""
    symmetric: bool = False
    """All zero points 0."""
    keep: tuple[str, ...] = ()
    """Convolutions that stay in float."""
    sensitivity: bool = False
    """Measure what 8 bits in each convolution alone cost, and which to keep in float."""
    evaluate: bool = False
    """Score the model on validation data before and after."""
    held_out: int = 64
    """Generated scenes to score on."""
    seed: int = 0
    output: Path | None = None
    """Default: model-int8.safetensors beside the model; model-int8-ptq if that is there."""


@dataclasses.dataclass(frozen=True)
class Export:
    """A model for other programs, run there once to see that it gives the same."""

    run: Path
    """Folder of `train`, or a file of `train` or `quantize`."""
    format: Literal["onnx", "stablehlo"]
    """stablehlo is what jax.export reads."""
    precision: Literal["int8", "float32"] = "int8"
    size: tuple[int, int] | None = None
    """Height and width, multiples of 32; default: those of the training."""
    output: Path | None = None


def quantize_command(args: Quantize, console: Console) -> int:
    from experiments.qyolop import __main__ as qyolop

    source = args.run / qyolop.MODEL if args.run.is_dir() else args.run
    cfg, variables = qyolop.model_of(args.run)
    if args.images < 1:
        raise DeployError(f"{args.images} images to calibrate with; expected at least 1")
    settings = Settings(
        args.observer, args.percentile, not args.per_tensor, symmetric=args.symmetric,
        keep=args.keep,
    )  # fmt: skip
    graph, params = fold.fold(cfg, variables)
    plan(graph, settings)  # a wrong name in `keep` is an error now, not in a minute
    report = Report()
    few = list(calibration(args, cfg, report))
    total = sum(len(batch["image"]) for batch in few)
    with qyolop.bar(console, f"Calibrating with {total} images", total) as step:
        scales = quantize.calibrate(graph, params, _counted(few, step), settings)
    model = integer.to_integer(graph, params, scales, settings, cfg)
    target = args.output or free_name(source.parent / qyolop.INTEGERS, console)
    target.parent.mkdir(parents=True, exist_ok=True)
    integer.save(model, target)
    before, after = source.stat().st_size, target.stat().st_size
    console.print(
        f"Written: {target}, {before / 1e6:.2f} MB before, {after / 1e6:.2f} MB after: "
        f"{before / after:.2f} times smaller",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    about = dict(
        run=str(args.run), settings=dataclasses.asdict(settings), data=args.data, images=total,
        environment=records.environment(), device=jax.devices()[0].device_kind,
    )  # fmt: skip
    if args.sensitivity:
        case = qyolop_sensitivity.Case(graph, params, scales, settings)
        qyolop_sensitivity.run(case, few[:2], target.parent, about, console)
    if args.evaluate:
        ways = [
            ("float32", float_forward(cfg), variables, before), ("int8", integer.run, model, after)
        ]  # fmt: skip
        for r in (rows := scores(args, cfg, ways, report, console)):
            records.append(target.with_suffix(".jsonl"), r | about)
        qyolop.print_scores(console, rows)
    if report:
        console.print(str(report), style="dim", highlight=False)
    return 0


def free_name(path: Path, console: Console) -> Path:
    """`path`, or one beside it: `train` leaves a better model there, which is not to be lost."""
    if not path.exists():
        return path
    console.print(
        f"{path} is there already and stays; --output {path} would replace it", style="dim",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return path.with_stem(path.stem + "-ptq")


def calibration(args: Quantize, cfg, report: Report) -> Iterator[dict]:
    """Letterboxed batches of `args.images` training images, or of as many as there are."""
    drawn = Scenes(args.scenes, cfg.size, args.seed)
    used = {n: _dataset(n, "train", args, drawn, report) for n in args.data}
    used = {n: Cached(d, 2 * max(cfg.size)) for n, d in used.items()}
    left = min(args.images, sum(map(len, used.values())))
    stream = batches(used, Feed(cfg.size, BATCH, seed=args.seed), report=report)
    while left > 0:
        batch = next(stream)
        yield {name: a[:left] for name, a in batch.items()}
        left -= BATCH


def _dataset(name, split, args, drawn, report):
    from experiments.qyolop import __main__ as qyolop

    if name not in ("scenes", *qyolop.FOLDERS):
        raise DeployError(f"no data set {name!r}; there are scenes, {', '.join(qyolop.FOLDERS)}")
    return qyolop.dataset(name, split, args.data_dir, drawn, report)


def _counted(few, step):
    done = 0
    for batch in few:
        yield batch
        done += len(batch["image"])
        step(done)


def scores(args: Quantize, cfg, ways, report: Report, console: Console) -> list[dict]:
    """A row of scores for each of `ways` (name, forward, values, bytes) and each data set."""
    from experiments.qyolop import __main__ as qyolop

    rows = []
    for data in args.data:
        drawn = Scenes(args.held_out, cfg.size, qyolop.HELD_OUT)
        held = Cached(_dataset(data, "val", args, drawn, report))
        for name, forward, values, size in ways:
            with qyolop.bar(console, f"{name}: {data} val", len(held)) as step:
                found = evaluate(forward, values, held, cfg, report=report, progress=step)
            seconds = qyolop.latency(forward, values, cfg)
            rows.append(
                dict(model=name, data=data, split="val", result=found, bytes=size, seconds=seconds)
            )
    return rows


def export_command(args: Export, console: Console) -> int:
    from experiments.qyolop import __main__ as qyolop

    path, size = args.run.expanduser(), args.size
    if args.precision == "int8":
        path = path / qyolop.INTEGERS if path.is_dir() else path
        model = integer_model(path)
        forward = lambda images: integer.run(model, images)
        onnx = lambda: export.integer_onnx(model, size)
        steps = {n: np.asarray(p["step"]) for n, p in model.outputs.items()}
        mixed = any("factor" not in layer for layer in model.layers.values())
        if size is None:
            beside = path.parent / qyolop.MODEL
            if not beside.is_file():
                raise DeployError(f"{path} does not say its size, and {beside} is not there; "
                                  "give --size HEIGHT WIDTH")  # fmt: skip
            size = qyolop.model_of(beside)[0].size
    else:
        path = path / qyolop.MODEL if path.is_dir() else path
        cfg, variables = qyolop.model_of(path)
        graph, params = fold.fold(cfg, variables)
        size, steps, mixed = size or cfg.size, {}, True
        forward = lambda images: fold.run(graph, params, images)
        onnx = lambda: export.float_onnx(graph, params, size)
    end = ".onnx" if args.format == "onnx" else ".stablehlo"
    stem = path.stem if args.precision == "int8" else f"{path.stem}-float32"
    target = args.output or path.parent / (stem + end)
    with console.status(f"Exporting {path}"), atomic_file(target) as scratch:
        if args.format == "onnx":
            scratch.write_bytes(_needs("onnx", onnx).SerializeToString())
        else:
            scratch.write_bytes(export.serialize(forward, size))
        said = checked(scratch, args.format, args.precision, forward, size, steps, mixed)
    console.print(
        f"Written: {target}, {target.stat().st_size / 1e6:.2f} MB, any batch of {size[0]}x{size[1]}"
        f"\n{said}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def _needs(package: str, make):
    try:
        return make()
    except ImportError as error:
        raise DeployError(f"{error}; pip install '{package}', or -e '.[vision]'") from error
