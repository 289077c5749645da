"""Training in four stages: flags, data, scores after every stage, and a comparison at the end."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

from experiments.common import records
from experiments.qyolop.datasets import HAS_BOXES, HELD_OUT_SEED, DataName, dataset
from experiments.qyolop.evaluate import latency, print_report, print_scores
from experiments.qyolop.flags import (
    LARGEST_BATCH,
    LARGEST_SEED,
    MOST_IMAGES,
    FlagError,
    check_data,
    check_folder,
    check_range,
)
from llm_jax.progress import bar
from qyolop_jax import draw
from qyolop_jax.augment import AugmentConfig
from qyolop_jax.config import IGNORE, ModelConfig
from qyolop_jax.evaluation import evaluate
from qyolop_jax.fold import fold
from qyolop_jax.formats import ReadError
from qyolop_jax.graph import build_graph, count
from qyolop_jax.losses import LossConfig
from qyolop_jax.network import (
    INTEGER_FILE,
    MODEL_FILE,
    Network,
    eight_bit_forward,
    load,
)
from qyolop_jax.optimization import Optimization, devices_for
from qyolop_jax.postprocess import Predictions
from qyolop_jax.recipe import AUGMENT, EPOCHS, LOSS, Training, four_stages
from qyolop_jax.samples import Batch, Report, Sample
from qyolop_jax.scales import DEFAULT, NAIVE
from qyolop_jax.scenes import Scenes
from qyolop_jax.sources import Cached
from qyolop_jax.stages import Stage, TrainError, Variables

PANEL_ROWS = 6


@dataclasses.dataclass(frozen=True)
class Train:
    """Pretrain, pretrain with mosaic, finetune on everything; continues an --output that exists."""

    data: tuple[DataName, ...] = ("scenes",)
    """Data sets; those without boxes join in the last two stages, unless all are without."""
    data_dir: Path | None = None
    scenes: int = 256
    """Number of generated scenes to train on."""
    held_out: int = 64
    """Number of other generated scenes, for evaluation."""
    width: float = 0.25
    activation: Literal["silu", "relu", "hardswish"] = "relu"
    """relu is the one that integers do best."""
    size: tuple[int, int] = (160, 256)
    """Height and width that images are brought to, multiples of 32."""
    epochs: tuple[float, float, float, float] = EPOCHS
    """Of pretraining, of pretraining with mosaic, of finetuning, of training in eight bits."""
    batch: int = 4
    devices: int | None = None
    """Number of devices that share every batch; default: as many visible ones as divide it."""
    rate: float = 2e-3
    """Learning rate of the first stage; a half, a quarter and a fiftieth of it in the others."""
    mix: tuple[float, ...] = ()
    """Share of each data set in the batches of the last two stages; by their sizes if none."""
    loss: LossConfig = LOSS
    """Not the paper's: CIoU with a weight of 1, and missed lines cost more than invented ones."""
    augment: AugmentConfig = AUGMENT
    """The probability of mosaic holds in the stages that have mosaic."""
    optimization: Optimization = dataclasses.field(default_factory=Optimization)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU."""
    seed: int = 0
    save_every: int = 200
    """Steps between two checkpoints."""
    output: Path | None = None
    """Folder of the run; a new one below runs/ by default."""


def stages_of(args: Train) -> list[Stage]:
    """The four stages that the flags ask for; without boxes, all of them learn masks alone."""
    first = tuple(name for name in args.data if name in HAS_BOXES) or args.data
    return four_stages(args.epochs, args.batch, args.rate, args.data, first, args.mix)


class Scorer:
    """Scores networks on the validation data and leaves panels of labels beside predictions."""

    def __init__(
        self, data: Mapping[str, Sequence[Sample]], folder: Path, report: Report, console: Console
    ):
        self.data, self.folder, self.report, self.console = data, folder, report, console

    def __call__(self, network: Network, title: str) -> dict[str, dict[str, float]]:
        """The scores by data set; writes panel-TITLE-DATA.png for each."""
        found = {}
        for name, data in self.data.items():
            rows = []

            def look(batch: Batch, p: Predictions, rows=rows) -> None:
                for b in range(len(batch["image"])):
                    if len(rows) < PANEL_ROWS and batch["labelled"][b].any():
                        rows.append(pair(batch, p, b, network.cfg))

            with bar(self.console, f"{title}: {name}", len(data)) as step:
                found[name] = evaluate(
                    network, data, report=self.report, progress=step, look=look
                )  # fmt: skip
            draw.save_image(
                self.folder / f"panel-{title}-{name}.png",
                draw.panel(rows, ("labels", "prediction")),
            )
        return found


def pair(batch: Batch, p: Predictions, b: int, cfg: ModelConfig) -> list[np.ndarray]:
    """(labels drawn over image b of a batch, predictions over the same), for a panel.

    Predicted masks are left out where no mask is labelled, as in the padding.
    """
    image, real, ours = batch["image"][b], batch["valid"][b], p.valid[b]
    nothing = (batch["area"][b] == IGNORE) & (batch["lane"][b] == IGNORE)
    truth = SimpleNamespace(
        boxes=batch["boxes"][b][real], classes=batch["classes"][b][real],
        crowd=batch["crowd"][b][real], area=batch["area"][b], lane=batch["lane"][b],
    )  # fmt: skip
    found = SimpleNamespace(
        boxes=p.boxes[b][ours], classes=p.classes[b][ours], scores=p.scores[b][ours],
        area=np.where(nothing, 0, p.area[b]), lane=np.where(nothing, 0, p.lane[b]),
    )  # fmt: skip
    return [draw.overlay(image, found_, cfg, conf=0.2, width=640) for found_ in (truth, found)]


def check_devices(args: Train, console: Console) -> None:
    """A FlagError where --devices cannot share the batch; says how many do, where there are more
    than one."""
    try:
        mesh = devices_for(args.batch, args.devices)
    except TrainError as error:
        raise FlagError(f"--{error}") from error
    if len(jax.devices()) > 1:
        each = f"{args.batch // mesh.size} of the {args.batch} images of a batch"
        console.print(
            f"Training on {mesh.size} of {len(jax.devices())} devices, {each} on each", style="dim",
            highlight=False,
        )  # fmt: skip


def train_command(args: Train, console: Console) -> int:
    """Trains, compares precisions on the validation data, appends records."""
    check_range(args, 1, MOST_IMAGES, "scenes", "held_out", "save_every")
    check_range(args, 1, LARGEST_BATCH, "batch")
    check_devices(args, console)
    check_range(args, 0, LARGEST_SEED, "seed")
    check_range(args, 1e-6, 1e6, "epochs")
    check_range(args, 1e-12, 1e3, "rate")
    check_range(args, 0, 1e6, "mix")
    check_data(args.data)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = args.output or Path("runs") / f"qyolop-{'-'.join(args.data)}-{stamp}"
    cfg = ModelConfig(args.width, args.activation, size=args.size)
    stages, report = stages_of(args), Report()
    read = lambda name, split, *s: dataset(name, split, args.data_dir, Scenes(*s), report)
    drawn = args.scenes, args.size, args.seed
    training_data = {name: read(name, "train", *drawn) for name in args.data}
    validation = {}
    for name in args.data:
        with contextlib.suppress(ReadError):  # TuSimple has no such split
            validation[name] = Cached(read(name, "val", args.held_out, args.size, HELD_OUT_SEED))
    check_folder(folder)
    scorer = Scorer(validation, folder, report, console)
    training = Training(
        folder, training_data, cfg, stages, loss=args.loss, augment=args.augment,
        optimization=args.optimization, dtype=None if args.dtype == "auto" else args.dtype,
        seed=args.seed, devices=args.devices, report=report,
        validate=lambda stage, network: scorer(network, stage.name),
    )  # fmt: skip
    console.print(f"Results go to {folder}", style="dim", highlight=False, markup=False)
    if not set(args.data) & set(HAS_BOXES):
        console.print(
            f"None of {', '.join(args.data)} has boxes: only areas and lines are learned",
            style="dim",
        )
    parameters, macs = count(build_graph(cfg), cfg.size).total()
    console.print(
        f"{parameters / 1e6:.2f} M parameters, {macs / 1e9:.2f} G multiply-adds an image of "
        f"{cfg.size[0]}x{cfg.size[1]}",
        highlight=False,
    )
    identity = repr(dataclasses.replace(args, output=None, save_every=0, devices=None))
    variables = _train(training, args.save_every, identity, console)
    rows = []
    for r in compare_precisions(training, variables, scorer):
        rows.append(r)
        records.append(folder / "records.jsonl", dict(
            r, settings=identity, parameters=parameters, macs=macs,
            environment=records.environment(), device=jax.devices()[0].device_kind,
        ))  # fmt: skip
    print_scores(console, rows)
    print_report(console, report)
    console.print(
        f"Written: {folder / MODEL_FILE}, {INTEGER_FILE} and panels beside it",
        style="dim", highlight=False,
    )  # fmt: skip
    return 0


def _train(training: Training, save_every: int, identity: str, console: Console) -> Variables:
    phases = training.phases
    before = np.cumsum([0, *(p.steps for p in phases)])
    with bar(console, "Training", int(before[-1])) as step:

        def progress(phase: int, at: int, steps: int, parts: dict) -> None:
            name = phases[phase].stage.name
            loss = f" loss {parts['loss']:.3f}" if parts else ""
            step(int(before[phase]) + at, name + loss)
            if parts and not console.is_terminal and at % 40 == 0:
                console.print(f"  {name} {at}/{steps}{loss}", style="dim", highlight=False)

        return training.run(save_every, identity, progress)


def compare_precisions(
    training: Training, variables: Variables, scorer: Scorer
) -> Iterator[dict[str, Any]]:
    """Rows of scores: in float, quantized after training in two ways, trained in 8 bits, integers.

    Files have a size, and their networks are timed.
    """
    cfg, folder = training.cfg, training.folder
    floats, integers = load(folder / MODEL_FILE), training.network(variables)
    graph, params = fold(cfg, floats.values)
    ways = [("float32", floats, (folder / MODEL_FILE).stat().st_size)]
    for name, settings in (("naive PTQ", NAIVE), ("PTQ", DEFAULT)):
        values = dict(params=params, scales=training.calibrated(graph, params, settings))
        ways.append((name, Network(cfg, eight_bit_forward(graph, settings), values), None))
    ways.append(("QAT", Network(cfg, eight_bit_forward(graph, DEFAULT), variables), None))
    ways.append(("int8", integers, (folder / INTEGER_FILE).stat().st_size))
    for name, network, size in ways:
        seconds = None if size is None else latency(network)
        for data, found in scorer(network, name.replace(" ", "-")).items():
            yield dict(
                model=name, data=data, split="val", result=found, bytes=size, seconds=seconds
            )
