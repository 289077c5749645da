"""Panoptic driving perception: train in stages, evaluate, predict.

    python -m experiments.qyolop                                # generated scenes, in minutes
    python -m experiments.qyolop train --data camvid apollo --data-dir DATA --size 384 640
    python -m experiments.qyolop evaluate --run FOLDER --data camvid --data-dir DATA
    python -m experiments.qyolop quantize --run FOLDER --sensitivity
    python -m experiments.qyolop export --run FOLDER --format onnx
    python -m experiments.qyolop benchmark --run FOLDER
    python -m experiments.qyolop predict --run FOLDER --input IMAGE, FOLDER or VIDEO

Without flags a network of quarter width learns objects, drivable lanes and typed lines from drawn
scenes, and leaves panels of labels beside predictions to look at.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.common import records
from experiments.qyolop import benchmark as qyolop_benchmark
from experiments.qyolop import deploy as qyolop_deploy
from experiments.qyolop import predict as qyolop_predict
from qyolop_jax import draw, integer, quantize, readers, sources, train, weights
from qyolop_jax.augment import AugmentConfig
from qyolop_jax.config import ConfigError, ModelConfig
from qyolop_jax.evaluate import evaluate, float_forward
from qyolop_jax.fold import fold
from qyolop_jax.formats import ReadError
from qyolop_jax.graph import build, count
from qyolop_jax.losses import LossConfig, LossError
from qyolop_jax.model import initial
from qyolop_jax.samples import Report, SampleError
from qyolop_jax.scales import DEFAULT, NAIVE
from qyolop_jax.scenes.clutter import need_cv2
from qyolop_jax.scenes.generate import Scenes
from qyolop_jax.sources import Cached, Feed, SourceError
from qyolop_jax.train import Optimization, Phase, Stage, TrainError

USER_ERRORS = (
    ConfigError, LossError, ReadError, SampleError, SourceError, TrainError, records.RecordError,
    weights.WeightsError, qyolop_predict.PredictError, *qyolop_deploy.ERRORS,
)  # fmt: skip
DataName = Literal["scenes", "camvid", "apollo", "tusimple", "bdd100k", "typed-lanes"]
FOLDERS = {  # below --data-dir; the first that exists
    "camvid": ("driving/camvid", "camvid"),
    "apollo": ("driving/apollo_lane100", "apollo_lane100", "apollo"),
    "tusimple": ("driving/tusimple16/lanenet6", "tusimple"),
    "bdd100k": ("bdd100k",),
    "typed-lanes": ("typed-lanes", "ivs"),
}
HAS_BOXES = ("scenes", "camvid", "bdd100k", "typed-lanes")
MODEL, INTEGERS = "model.safetensors", "model-int8.safetensors"
THREADS = min(os.cpu_count() or 1, 8)
CALIBRATION = 8
"""Batches of eight images that ranges are taken from."""
LOSS = LossConfig(box="ciou", detection=(0.5, 1.0, 1.0), lane_tversky=(0.3, 0.7))
HELD_OUT = 10**6
"""Seed of the scenes that are for evaluation."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Pretrain, pretrain with mosaic, finetune on everything; continues an --output that exists."""

    data: tuple[DataName, ...] = ("scenes",)
    """Data sets; those without boxes join in the last stage."""
    data_dir: Path | None = None
    scenes: int = 256
    """Generated scenes to train on."""
    held_out: int = 64
    """Other generated scenes, for evaluation."""
    width: float = 0.25
    activation: Literal["silu", "relu", "hardswish"] = "relu"
    """relu is the one that integers do best."""
    size: tuple[int, int] = (160, 256)
    """Height and width that images are brought to, multiples of 32."""
    epochs: tuple[float, float, float, float] = (7, 3, 7, 1)
    """Of pretraining, of pretraining with mosaic, of finetuning, of training in eight bits."""
    batch: int = 4
    rate: float = 2e-3
    """Learning rate of the first stage; a half, a quarter and a fiftieth of it in the others."""
    mix: tuple[float, ...] = ()
    """Share of each of the data in the batches of the last two stages; by their sizes if none."""
    loss: LossConfig = LOSS
    """Not the paper's: CIoU at a weight of 1, and missed lines weigh more than invented ones."""
    augment: AugmentConfig = dataclasses.field(default_factory=lambda: AugmentConfig(mosaic=1.0))
    """The probability of mosaic is that of the stages that have it."""
    optimization: Optimization = dataclasses.field(default_factory=Optimization)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU."""
    seed: int = 0
    save_every: int = 200
    output: Path | None = None


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Scores of a trained model on labelled data."""

    run: Path
    """Folder of `train`, or a file of `train` or `quantize`."""
    data: tuple[DataName, ...] = ("scenes",)
    data_dir: Path | None = None
    split: Literal["val", "train", "test"] = "val"
    scenes: int = 64
    """Generated scenes, if that is the data."""
    batch: int = 8
    protocol: Literal["pooled", "yolop"] = "pooled"
    """yolop averages IoU over batches, to compare with its published numbers."""
    output: Path | None = None
    """A file of JSON lines to append to."""


def bar(console: Console, title: str, total: int):
    """A context manager that gives a function of (done, what to say)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )

    @contextlib.contextmanager
    def run():
        hidden = not console.is_terminal
        if hidden:
            console.print(f"{title} …", style="dim", highlight=False)
        with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
            task = progress.add_task(title, total=total)

            def update(done, say=None):
                progress.update(
                    task, completed=done, **({} if say is None else dict(description=say))
                )

            yield update

    return run()


def dataset(name: str, split: str, data_dir: Path | None, scenes: Scenes, report: Report):
    """A sequence of samples; `scenes` are those of the generator. ReadError without a folder."""
    if name == "scenes":
        return scenes
    if data_dir is None:
        raise ReadError(f"the data set {name} needs --data-dir, a folder with {FOLDERS[name][0]}")
    there = [data_dir.expanduser() / f for f in FOLDERS[name]]
    root = next((f for f in there if f.is_dir()), None)
    if root is None:
        raise ReadError(f"{name}: none of {', '.join(map(str, there))} exists")
    kinds = dict(
        camvid=readers.CamVid, apollo=readers.ApolloScape, tusimple=readers.TuSimple,
        bdd100k=readers.Bdd100k,
    )  # fmt: skip
    make = kinds.get(name, readers.TypedLanes)
    if name == "camvid" and split != "train":
        return make(root, split, lanes=False, report=report)  # derived lanes are no truth
    return make(root, split, report=report)


def model_of(path: Path):
    """(config, variables) from a run's folder or a file."""
    path = path.expanduser()
    return weights.load(path / MODEL if path.is_dir() else path)


def runnable(path: Path):
    """(config, forward function, its values) of a run's folder or of a file, float or integers."""
    path = path.expanduser()
    file = path / MODEL if path.is_dir() else path
    if not integer.is_integer(file):
        cfg, variables = weights.load(file)
        return cfg, float_forward(cfg), variables
    model = integer.load(file)
    if model.config is None:
        raise weights.WeightsError(f"{file} does not say its classes; make it again by `quantize`")
    return model.config, integer.run, model


def stages(args: Train) -> list[Stage]:
    first = tuple(name for name in args.data if name in HAS_BOXES)
    if not first:
        raise TrainError(
            f"none of {', '.join(args.data)} has boxes; add one of {', '.join(HAS_BOXES)}"
        )
    one, two, three, four = args.epochs
    rate, b = args.rate, args.batch
    return [
        Stage("pretrain", one, b, rate, rate / 20, warmup=min(1, one / 4), data=first),
        Stage("mosaic", two, b, rate / 2, rate / 40, mosaic=True, data=first),
        Stage("finetune", three, b, rate / 4, rate / 400, mosaic=True, calm=three / 2,
              data=args.data, shares=args.mix),
        Stage("qat", four, b, rate / 50, rate / 5000, data=args.data, shares=args.mix, kind="qat"),
    ]  # fmt: skip


class Run:
    """One training run: its data, its folder, and what it says."""

    def __init__(self, args: Train, console: Console, folder: Path):
        self.args, self.console, self.folder = args, console, folder
        need_cv2().setNumThreads(1)  # several samples at a time are warped already
        self.report = Report()
        self.cfg = ModelConfig(args.width, args.activation, size=args.size)
        self.dtype = jnp.float32
        if args.dtype == "bfloat16" or (args.dtype == "auto" and jax.default_backend() == "gpu"):
            self.dtype = jnp.bfloat16
        load = lambda n, split, *s: dataset(n, split, args.data_dir, Scenes(*s), self.report)
        drawn = args.scenes, args.size, args.seed
        enough = math.ceil(max(args.size) * (1 + args.augment.scale))  # no warp enlarges more
        self.training = {n: Cached(load(n, "train", *drawn), enough) for n in args.data}
        self.validation = {}
        for name in args.data:
            with contextlib.suppress(ReadError):  # TuSimple has no such split
                found = load(name, "val", args.held_out, args.size, HELD_OUT)
                self.validation[name] = Cached(found)

    def phases(self) -> list[Phase]:
        args, found = self.args, []
        for at, stage in enumerate(stages(args)):
            used = {n: self.training[n] for n in stage.data}
            shares = dict(zip(stage.data, stage.shares, strict=True)) if stage.shares else None

            def stream(mosaic, at=at, used=used, shares=shares):
                augment = args.augment
                if not mosaic:
                    augment = dataclasses.replace(augment, mosaic=0.0)
                seed = 1000 * args.seed + 10 * at + mosaic
                feed = Feed(self.cfg.size, args.batch, augment, seed, threads=THREADS)
                return sources.batches(used, feed, shares, report=self.report)

            found.append(Phase(
                stage, self.loss(stage), self.begin if stage.kind == "float" else self.quantized,
                stream, sources.per_epoch(used, args.batch, shares), self.validator(stage),
            ))  # fmt: skip
        return found

    def loss(self, stage: Stage):
        if stage.kind == "float":
            return train.float_loss(self.cfg, self.args.loss, self.dtype)
        graph, _ = fold(self.cfg, initial(self.cfg))
        return train.qat_loss(graph, self.cfg, self.args.loss, DEFAULT)

    def begin(self, variables):
        return initial(self.cfg, self.args.seed) if variables is None else variables

    def quantized(self, variables, settings=DEFAULT):
        """Folded parameters and ranges calibrated on a few batches; any, where a state follows."""
        graph, params = fold(self.cfg, self.begin(variables))
        return dict(params=params, scales=self.calibrated(graph, params, settings))

    def calibrated(self, graph, params, settings):
        feed = Feed(self.cfg.size, 8, seed=self.args.seed)
        stream = sources.batches(self.training, feed, report=self.report)
        few = [next(stream) for _ in range(CALIBRATION)]
        return quantize.calibrate(graph, params, few, settings)

    def validator(self, stage: Stage):
        """Scores and a panel at the end of a stage; the float model is stored after its last."""

        def validate(variables, step, last):
            if not last:
                return {}
            variables = jax.device_get(variables)
            if stage.name == "finetune":
                weights.save(self.folder / MODEL, self.cfg, variables)
            if stage.kind == "qat":
                graph, _ = fold(self.cfg, initial(self.cfg))
                return self.scores(eight_bits(graph, DEFAULT), variables, stage.name)
            return self.scores(float_forward(self.cfg), variables, stage.name)

        return validate

    def scores(self, forward, variables, title: str) -> dict:
        found = {}
        for name, data in self.validation.items():
            rows = []

            def look(batch, p, rows=rows):
                for b in range(len(batch["image"])):
                    if len(rows) < 6 and batch["labelled"][b].any():
                        rows.append(qyolop_predict.pair(batch, p, b, self.cfg))

            with bar(self.console, f"{title}: {name}", len(data)) as step:
                found[name] = evaluate(
                    forward, variables, data, self.cfg, report=self.report,
                    progress=step, look=look,
                )  # fmt: skip
            draw.save(
                self.folder / f"panel-{title}-{name}.png",
                draw.panel(rows, ("labels", "prediction")),
            )
        return found


def train_command(args: Train, console: Console) -> int:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = args.output or Path("runs") / f"qyolop-{'-'.join(args.data)}-{stamp}"
    run = Run(args, console, folder)
    console.print(f"Results go to {folder}", style="dim", highlight=False)
    counts = count(build(run.cfg), run.cfg.size)
    parameters, macs = counts.total()
    console.print(
        f"{parameters / 1e6:.2f} M parameters, {macs / 1e9:.2f} G multiply-adds an image of "
        f"{run.cfg.size[0]}x{run.cfg.size[1]}",
        highlight=False,
    )
    phases = run.phases()
    identity = repr(dataclasses.replace(args, output=None, save_every=0))
    total = sum(p.steps for p in phases)
    before = np.cumsum([0, *(p.steps for p in phases)])
    with bar(console, "Training", total) as step:

        def progress(phase, at, steps, parts):
            loss = f" loss {parts['loss']:.3f}" if parts else ""
            step(int(before[phase]) + at, f"{phases[phase].stage.name}{loss}")
            if parts and not console.is_terminal and at % 40 == 0:
                console.print(
                    f"  {phases[phase].stage.name} {at}/{steps}{loss}", style="dim", highlight=False
                )

        variables = train.fit(
            folder, phases, args.optimization, args.save_every, identity=identity, progress=progress
        )
    rows, path = compare(run, variables), folder / "records.jsonl"
    for r in rows:
        records.append(path, dict(
            r, settings=identity, parameters=parameters, macs=macs,
            environment=records.environment(), device=jax.devices()[0].device_kind,
        ))  # fmt: skip
    print_scores(console, rows)
    if run.report:
        console.print(str(run.report), style="dim", highlight=False)
    console.print(
        f"Written: {folder / MODEL}, {INTEGERS} and panels beside it", style="dim", highlight=False
    )
    return 0


@functools.cache
def eight_bits(graph, settings):
    """The forward function of a folded graph in simulated eight bits."""
    return lambda v, images: quantize.forward(graph, v["params"], v["scales"], images, settings)


def compare(run: Run, trained) -> list[dict]:
    """The float model, quantized after training in two ways, trained in eight bits, in integers."""
    cfg, variables = weights.load(run.folder / MODEL)
    graph, params = fold(cfg, variables)
    model = integer.to_integer(graph, trained["params"], trained["scales"], config=cfg)
    integer.save(model, run.folder / INTEGERS)
    ways = [("float32", float_forward(cfg), variables, (run.folder / MODEL).stat().st_size)]
    for name, settings in (("naive PTQ", NAIVE), ("PTQ", DEFAULT)):
        scales = run.calibrated(graph, params, settings)
        ways.append((name, eight_bits(graph, settings), dict(params=params, scales=scales), None))
    ways.append(("QAT", eight_bits(graph, DEFAULT), trained, None))
    ways.append(("int8", integer.run, model, (run.folder / INTEGERS).stat().st_size))
    rows = []
    for name, forward, values, size in ways:
        seconds = None if size is None else latency(forward, values, cfg)
        for data, found in run.scores(forward, values, name.replace(" ", "-")).items():
            rows.append(dict(
                model=name, data=data, split="val", result=found, bytes=size, seconds=seconds
            ))  # fmt: skip
    return rows


def latency(forward, values, cfg: ModelConfig, repeats: int = 20) -> float:
    """Median seconds of raw outputs of one image."""
    run = jax.jit(forward)
    image = jnp.zeros((1, *cfg.size, 3), jnp.uint8)
    jax.block_until_ready(run(values, image))
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run(values, image))
        took.append(time.perf_counter() - began)
    return float(np.median(took))


SHOWN = {
    "mAP50": "detection/AP50", "mAP": "detection/AP", "recall50": "detection/recall50",
    "drivable mIoU": "area/mIoU", "drivable or not": "area/binary mIoU",
    "lane IoU": "lane/foreground IoU", "lane mIoU": "lane/mIoU", "lane F1@2": "lane/F1@2 any",
}  # fmt: skip


def print_scores(console: Console, rows: Sequence[dict]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("data")
    for name in (*SHOWN, "file MB", "ms an image"):
        table.add_column(name.replace(" ", "\n", 1), justify="right")
    for r in rows:
        cells = [r["result"].get(key, float("nan")) for key in SHOWN.values()]
        size, seconds = r.get("bytes"), r.get("seconds")
        table.add_row(
            r["model"], f"{r['data']} {r['split']}",
            *("" if np.isnan(v) else f"{v:.3f}" for v in cells),
            "" if size is None else f"{size / 1e6:.2f}",
            "" if seconds is None else f"{seconds * 1e3:.1f}",
        )  # fmt: skip
    console.print(table)


def evaluate_command(args: Evaluate, console: Console) -> int:
    cfg, forward, values = runnable(args.run)
    report, rows = Report(), []
    for name in args.data:
        scenes = Scenes(args.scenes, cfg.size, HELD_OUT if args.split == "val" else 0)
        data = dataset(name, args.split, args.data_dir, scenes, report)
        with bar(console, f"Evaluating on {name} {args.split}", len(data)) as step:
            found = evaluate(
                forward, values, data, cfg, args.batch, protocol=args.protocol,
                report=report, progress=step,
            )  # fmt: skip
        rows.append(dict(model=args.run.name, data=name, split=args.split, result=found))
        if args.output:
            records.append(args.output, dict(
                rows[-1], protocol=args.protocol, environment=records.environment(),
                device=jax.devices()[0].device_kind,
            ))  # fmt: skip
    print_scores(console, rows)
    if report:
        console.print(str(report), style="dim", highlight=False)
    return 0


def main(args, console: Console) -> int:
    if isinstance(args, Train):
        return train_command(args, console)
    if isinstance(args, Evaluate):
        return evaluate_command(args, console)
    if isinstance(args, qyolop_deploy.Quantize):
        return qyolop_deploy.quantize_command(args, console)
    if isinstance(args, qyolop_deploy.Export):
        return qyolop_deploy.export_command(args, console)
    if isinstance(args, qyolop_benchmark.Benchmark):
        return qyolop_benchmark.main(args, console)
    return qyolop_predict.main(args, *runnable(args.run), console)


def cli(words: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    words = list(sys.argv[1:] if words is None else words)
    command = (
        Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[qyolop_deploy.Quantize, tyro.conf.subcommand("quantize")]
        | Annotated[qyolop_deploy.Export, tyro.conf.subcommand("export")]
        | Annotated[qyolop_benchmark.Benchmark, tyro.conf.subcommand("benchmark")]
        | Annotated[qyolop_predict.Predict, tyro.conf.subcommand("predict")]
    )
    args = tyro.cli(command, args=words or ["train"], description=__doc__)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(130, console.width))
    try:
        return main(args, console)
    except USER_ERRORS as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("\ninterrupted; the same command with --output resumes")
        return 130


if __name__ == "__main__":
    sys.exit(cli())
