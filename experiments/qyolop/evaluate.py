"""Scores of a trained network on labelled data, and the table that shows scores."""

import dataclasses
import time
from collections.abc import Sequence
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
from experiments.qyolop.datasets import HELD_OUT_SEED, DataName, data_identity, dataset
from experiments.qyolop.flags import (
    LARGEST_BATCH,
    MOST_IMAGES,
    check_data,
    check_file,
    check_range,
)
from llm_jax.digest import file_digest
from llm_jax.progress import bar
from qyolop_jax.evaluation import Part, evaluate
from qyolop_jax.network import MODEL_FILE, Network, load
from qyolop_jax.samples import Report, Sample
from qyolop_jax.scenes import Scenes
from qyolop_jax.sources import LEFT_OUT

SCORE_COLUMNS = {
    "mAP50": "detection/AP50", "mAP": "detection/AP", "recall50": "detection/recall50",
    "drivable mIoU": "area/mIoU", "drivable or not": "area/binary mIoU",
    "lane IoU": "lane/foreground IoU", "lane mIoU": "lane/mIoU", "lane F1@2": "lane/F1@2 any",
}  # fmt: skip
"""Title of a column -> name of the score."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Scores of a trained model on labelled data."""

    run: Path
    """Folder of `train`, or a file of `train` or `quantize`."""
    data: tuple[DataName, ...] = ("scenes",)
    data_dir: Path | None = None
    split: Literal["val", "train", "test"] = "val"
    scenes: int = 64
    """Number of generated scenes, if that is the data."""
    batch: int = 8
    protocol: Literal["pooled", "yolop"] = "pooled"
    """yolop averages IoU over batches, to compare with its published numbers."""
    output: Path | None = None
    """A file of JSON lines to append to; with it an interrupted evaluation goes on."""


def evaluate_command(args: Evaluate, console: Console) -> int:
    """Evaluates, prints a table, appends records; 1 if samples are broken and were left out."""
    check_range(args, 1, MOST_IMAGES, "scenes")
    check_range(args, 1, LARGEST_BATCH, "batch")
    check_data(args.data)
    check_file(args.output, args.run)
    network, report, rows = load(args.run), Report(), []
    scenes = Scenes(args.scenes, network.cfg.size, HELD_OUT_SEED * (args.split == "val"))
    sets = {n: dataset(n, args.split, args.data_dir, scenes, report) for n in args.data}
    identity = dict(
        network=network_digest(args.run), machine=machine(), batch=args.batch,
        protocol=args.protocol,
        data=[data_identity(n, args.split, args.data_dir, scenes) for n in args.data],
    )  # fmt: skip
    try:
        with Unfinished(args.output, identity) as work:
            for name, data in sets.items():
                before = report.counts[LEFT_OUT]
                title = f"Evaluating on {name} {args.split}"
                found = scores(
                    work, title, network, data, console, batch=args.batch,
                    protocol=args.protocol, report=report,
                )  # fmt: skip
                rows.append(dict(model=args.run.name, data=name, split=args.split, result=found))
                if args.output:
                    save_scores(console, work, args.output, dict(
                        rows[-1], protocol=args.protocol, environment=records.environment(),
                        device=jax.devices()[0].device_kind,
                        left_out=report.counts[LEFT_OUT] - before,
                    ))  # fmt: skip
    finally:  # also what was scored before an interrupt
        if rows:
            print_scores(console, rows)
        print_report(console, report)
    return 1 if report.counts[LEFT_OUT] else 0


def network_digest(run: Path) -> str:
    """A digest of the file that `load` reads."""
    run = run.expanduser()
    return file_digest(run / MODEL_FILE if run.is_dir() else run)


def machine() -> dict[str, str]:
    """What else decides the last bits of a result: the device and the version of JAX."""
    return dict(device=jax.devices()[0].device_kind, jax=jax.__version__)


def scores(
    work: Unfinished,
    title: str,
    network: Network,
    data: Sequence[Sample],
    console: Console,
    **settings: Any,
) -> dict[str, float]:
    """The scores of `evaluate` with `settings`, behind a bar; goes on behind what `work` has."""
    parts = {part["start"]: part for part in work.found(title)}
    known: list[Part] = []
    while (at := known[-1]["end"] if known else 0) in parts:
        known.append(parts[at])
    if known:
        images = sum(part["images"] for part in known)
        said = f"{title}: {images} of {len(data)} images were done before"
        console.print(said, style="dim", highlight=False)
    keep = lambda part: work.add(title, part)
    with bar(console, title, len(data)) as step:
        return evaluate(network, data, progress=step, known=known, keep=keep, **settings)


def save_scores(console: Console, work: Unfinished, path: Path, record: dict[str, Any]) -> None:
    """Appends a record; prints its scores where that fails, because they took long."""
    try:
        work.publish(path, f"scores of {record['model']} on {record['data']}", record)
    except OSError:
        console.print(str(record["result"]), markup=False, highlight=False, soft_wrap=True)
        raise


def print_report(console: Console, report: Report) -> None:
    """Prints what was skipped in the data, if anything was."""
    if report:
        console.print(str(report), style="dim", highlight=False, markup=False)


def print_scores(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """A table of the rows (model, data, split, result, and perhaps bytes and seconds)."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("data")
    for name in (*SCORE_COLUMNS, "file MB", "ms an image"):
        table.add_column(name.replace(" ", "\n", 1), justify="right")
    for r in rows:
        cells = [r["result"].get(key, float("nan")) for key in SCORE_COLUMNS.values()]
        size, seconds = r.get("bytes"), r.get("seconds")
        table.add_row(
            r["model"], f"{r['data']} {r['split']}",
            *("" if np.isnan(v) else f"{v:.3f}" for v in cells),
            "" if size is None else f"{size / 1e6:.2f}",
            "" if seconds is None else f"{seconds * 1e3:.1f}",
        )  # fmt: skip
    console.print(table)


def latency(network: Network, repeats: int = 20) -> float:
    """Median seconds from one image to its raw outputs."""
    run = jax.jit(network.forward)
    image = jnp.zeros((1, *network.cfg.size, 3), jnp.uint8)
    jax.block_until_ready(run(network.values, image))
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run(network.values, image))
        took.append(time.perf_counter() - began)
    return float(np.median(took))
