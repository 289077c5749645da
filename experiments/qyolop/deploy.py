"""A trained model in 8 bits without training: `quantize`."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.common import records
from experiments.common.unfinished import Unfinished
from experiments.qyolop.datasets import HELD_OUT_SEED, data_identity, dataset
from experiments.qyolop.evaluate import (
    latency,
    machine,
    print_report,
    print_scores,
    save_scores,
    scores,
)
from experiments.qyolop.flags import (
    LARGEST_SEED,
    MOST_IMAGES,
    check_data,
    check_file,
    check_range,
)
from experiments.qyolop.sensitivity import Case, measure_sensitivity
from llm_jax.digest import file_digest
from llm_jax.progress import Bar, bar
from qyolop_jax import integer
from qyolop_jax.config import ModelConfig
from qyolop_jax.fold import fold
from qyolop_jax.graph import Graph
from qyolop_jax.network import INTEGER_FILE, MODEL_FILE, Network, float_forward
from qyolop_jax.observe import ObserverKind
from qyolop_jax.quantize import calibrate_scales
from qyolop_jax.samples import Report
from qyolop_jax.scales import Scales, Settings, plan_quantization
from qyolop_jax.scenes import Scenes
from qyolop_jax.sources import Cached, Feed, batches
from qyolop_jax.weights import load_weights

BATCH = 8
"""Images in a batch of the calibration."""


@dataclasses.dataclass(frozen=True)
class Quantize:
    """A trained model in 8 bits, without training: ranges are taken from a few images."""

    run: Path
    """Folder of `train`, or a model.safetensors."""
    data: tuple[str, ...] = ("scenes",)
    """Data sets as `train` names them; ranges are taken from their training images."""
    data_dir: Path | None = None
    scenes: int = 256
    """Number of generated scenes, if that is the data."""
    images: int = 64
    """Number of images to calibrate with."""
    observer: ObserverKind = "percentile"
    """How a range follows from the values seen."""
    percentile: float = 99.99
    per_tensor: bool = False
    """One scale for a whole kernel, not one for every output channel."""
    symmetric: bool = False
    """All zero points are 0."""
    keep: tuple[str, ...] = ()
    """Convolutions that stay in float."""
    sensitivity: bool = False
    """Measure the cost of 8 bits in each convolution alone, and suggest which to keep in float."""
    evaluate: bool = False
    """Score the model on validation data before and after."""
    held_out: int = 64
    """Number of generated scenes to score on."""
    seed: int = 0
    output: Path | None = None
    """Default: model-int8.safetensors beside the model; model-int8-ptq if that is there."""


def quantize_command(args: Quantize, console: Console) -> int:
    """Calibrates, writes the integer network, and measures what was asked for."""
    check_range(args, 1, MOST_IMAGES, "images", "scenes", "held_out")
    check_range(args, 0, LARGEST_SEED, "seed")
    check_data(args.data)
    settings = Settings(
        args.observer, args.percentile, not args.per_tensor, symmetric=args.symmetric,
        keep=args.keep,
    )  # fmt: skip
    run = args.run.expanduser()
    source = run / MODEL_FILE if run.is_dir() else run
    cfg, variables = load_weights(source)
    graph, params = fold(cfg, variables)
    plan_quantization(graph, settings)  # a wrong name in `keep` is an error now, not in a minute
    identity = _identity(args, source, cfg, settings)
    target = args.output or _free_name(source.parent / INTEGER_FILE, identity, console)
    check_file(target, source)
    with Unfinished(target, identity) as work:
        report = Report()
        few = list(calibration(args, cfg, report))
        total = sum(len(batch["image"]) for batch in few)
        scales = _scales(graph, params, few, settings, console, work)
        model = integer.to_integer(graph, params, scales, settings, cfg)
        network = Network(cfg, integer.run_integer, model)
        network.save(target)
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
            case = Case(graph, params, scales, settings)
            measure_sensitivity(case, few[:2], target.parent, about, console, work)
        if args.evaluate:
            floats = Network(cfg, float_forward(cfg), variables)
            ways = [("float32", floats, before), ("int8", network, after)]
            rows = []
            for r in _scores(args, ways, report, console, work):
                rows.append(r)
                save_scores(console, work, target.with_suffix(".jsonl"), r | about)
            print_scores(console, rows)
        print_report(console, report)
    return 0


def _identity(args: Quantize, source: Path, cfg: ModelConfig, settings: Settings) -> dict[str, Any]:
    """All that decides what `quantize` writes and measures."""
    sets = [
        (n, split, args.data_dir, scenes)
        for n in args.data
        for split, scenes in (("train", _drawn(args, cfg)), ("val", _held_out(args, cfg)))
    ]
    return dict(
        network=file_digest(source), machine=machine(), settings=dataclasses.asdict(settings),
        images=args.images, seed=args.seed,
        data=[data_identity(*each) for each in sets],
    )  # fmt: skip


def _free_name(path: Path, identity: dict[str, Any], console: Console) -> Path:
    """`path`, or a name beside it: a better model of `train` must not be lost.

    What an interrupted run of this identity has written is replaced.
    """
    if not path.exists() or Unfinished(path, identity).is_begun():
        return path
    console.print(
        f"{path} is there already and stays; --output {path} would replace it", style="dim",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return path.with_stem(path.stem + "-ptq")


def _scales(
    graph: Graph, params: Any, few: Sequence[dict], settings: Settings, console: Console,
    work: Unfinished,
) -> Scales:  # fmt: skip
    """The scales that a calibration with these batches gives, or gave before it was stopped."""
    total, title = sum(len(batch["image"]) for batch in few), "Calibrating"
    if before := work.found(title):
        console.print(f"{title} with {total} images was done before", style="dim", highlight=False)
        return {name: jnp.asarray(values, jnp.float32) for name, values in before[0].items()}
    with bar(console, f"{title} with {total} images", total) as step:
        scales = calibrate_scales(graph, params, _counted(few, step), settings)
    work.add(title, scales)
    return scales


def calibration(
    args: Quantize, cfg: ModelConfig, report: Report
) -> Iterator[dict[str, np.ndarray]]:
    """Letterboxed batches of `args.images` training images, or of all where there are fewer."""
    drawn = _drawn(args, cfg)
    used = {n: dataset(n, "train", args.data_dir, drawn, report) for n in args.data}
    used = {n: Cached(d, 2 * max(cfg.size)) for n, d in used.items()}
    left = min(args.images, sum(map(len, used.values())))
    stream = batches(used, Feed(cfg.size, BATCH, seed=args.seed), report=report)
    while left > 0:
        batch = next(stream)
        yield {name: a[:left] for name, a in batch.items()}
        left -= BATCH


def _counted(few: Sequence[dict], step: Bar) -> Iterator[dict]:
    done = 0
    for batch in few:
        yield batch
        done += len(batch["image"])
        step(done)


def _drawn(args: Quantize, cfg: ModelConfig) -> Scenes:
    """The generated scenes for the calibration."""
    return Scenes(args.scenes, cfg.size, args.seed)


def _held_out(args: Quantize, cfg: ModelConfig) -> Scenes:
    """The generated scenes to score on."""
    return Scenes(args.held_out, cfg.size, HELD_OUT_SEED)


def _scores(
    args: Quantize,
    ways: Sequence[tuple[str, Network, int]],
    report: Report,
    console: Console,
    work: Unfinished,
) -> Iterator[dict[str, Any]]:
    """A row of scores for each of `ways` (name, network, bytes) and each data set.

    What is wrong with the data goes to the report once, not for every way.
    """
    for data in args.data:
        drawn = _held_out(args, ways[0][1].cfg)
        held = Cached(dataset(data, "val", args.data_dir, drawn, report))
        for n, (name, network, size) in enumerate(ways):
            heard = Report() if n else report
            found = scores(work, f"{name}: {data} val", network, held, console, report=heard)
            title = f"latency of {name} on {data}"
            if not work.found(title):
                work.add(title, latency(network))
            yield dict(
                model=name, data=data, split="val", result=found, bytes=size,
                seconds=work.found(title)[0],
            )  # fmt: skip
