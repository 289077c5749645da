"""The scores of any network on labelled images, as one dict.

Everything is measured on the network's own grid: images and labels are letterboxed to it, and
padding is ignored. What a batch adds to the scores is a `Part`, which can be kept in a file: an
evaluation that was stopped goes on behind the parts that it is given.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qyolop_jax.config import ModelConfig
from qyolop_jax.metrics import (
    Boxes,
    Confusion,
    IoUProtocol,
    LaneF1,
    MetricError,
    average_precision,
)
from qyolop_jax.network import Network, predictor
from qyolop_jax.postprocess import Predictions
from qyolop_jax.samples import Batch, Report, Sample
from qyolop_jax.sources import Feed, Loaded, loaded_in_order

Part = dict[str, Any]
"""What one batch adds to the scores, in types that JSON has, None for NaN: numbers of its samples
("start" to before "end"), "images", the tasks with labels ("labelled"), "boxes", "area", "lane" and
"edges" for the metrics, and what was "counted" in the report."""


def evaluate(
    network: Network,
    dataset: Sequence[Sample],
    batch: int = 8,
    conf: float = 0.01,
    protocol: IoUProtocol = "pooled",
    report: Report | None = None,
    progress: Callable[[int], None] | None = None,
    look: Callable[[Batch, Predictions], None] | None = None,
    known: Sequence[Part] = (),
    keep: Callable[[Part], None] | None = None,
    run: Callable[[Any, np.ndarray], Predictions] | None = None,
) -> dict[str, float]:
    """Scores on labelled samples, from 0 to 1: "detection/AP50", "area/mIoU", "lane/IoU single" …

    The part of a name after the slash is a name of `metrics`; lane F1 is "lane/F1@1 any" and so on.
    A task that no sample has labels for is left out. `conf` is the least score of a box that counts
    towards average precision. All true boxes count, and the 100 best boxes found in an image, as in
    COCO. Broken samples are left out and counted in `report`; without one they are errors. `look`
    gets each letterboxed batch and what was found in it. `keep` gets the part of each batch; those
    in `known`, the first ones of the same evaluation, are not measured again. `run` computes the
    predictions of (values, images) in place of the network, as another engine does. MetricError
    where no sample is left.
    """
    if not 0 <= conf <= 1:
        raise MetricError(f"conf is {conf}; expected a score from 0 to 1")
    run = run or predictor(network.forward, network.cfg, conf)
    tally, start = Tally(network.cfg, protocol), 0
    for part in known:
        tally.add(part)
        start = part["end"]
        for reason, name, times in part["counted"] if report is not None else ():
            report.count(reason, name, times)
    if progress and known:
        progress(tally.images)
    for loaded in loaded_in_order(dataset, Feed(network.cfg.size, batch), report, start):
        p = run(network.values, loaded.batch["image"])
        part = part_of(loaded, p, network.cfg)
        tally.add(part)
        if keep:
            keep(part)
        if look:
            look(loaded.batch, p)
        if progress:
            progress(tally.images)
    if not tally.images:
        why = "; ".join(str(report).splitlines()) if report else "there are none"
        raise MetricError(f"none of {len(dataset)} samples could be scored: {why}")
    return tally.scores()


def part_of(loaded: Loaded, p: Predictions, cfg: ModelConfig) -> Part:
    """What a batch and what was found in it add to the scores."""
    images, n = loaded.batch, len(loaded.originals)
    boxes, edges = [], LaneF1(absent="skip")
    for b in np.flatnonzero(images["labelled"][:n, 0]):
        real, ours = images["valid"][b], p.valid[b]
        boxes.append([
            *(images[name][b][real].tolist() for name in ("boxes", "classes", "crowd")),
            *(a[b][ours].tolist() for a in (p.boxes, p.classes, p.scores)),
        ])  # fmt: skip
    for b in np.flatnonzero(images["labelled"][:n, 2]):
        edges.add(images["lane"][b], p.lane[b], cfg.lane)
    counts = lambda names, true, found: [
        np.asarray(a).tolist() for a in Confusion(names).counts(true, found)
    ]
    number = lambda value: None if np.isnan(value) else float(value)
    return dict(
        start=loaded.start, end=loaded.end, images=n, counted=[list(c) for c in loaded.counted],
        labelled=images["labelled"][:n].any(0).tolist(), boxes=boxes,
        area=counts(cfg.area, images["area"], p.area),
        lane=counts(cfg.lane, images["lane"], p.lane),
        edges={k: [[number(v) for v in row] for row in rows] for k, rows in edges.images.items()},
    )  # fmt: skip


class Tally:
    """The sum of parts, and the scores that follow from it."""

    def __init__(self, cfg: ModelConfig, protocol: IoUProtocol):
        self.cfg, self.images, self.seen = cfg, 0, np.zeros(3, bool)
        self.area, self.lane = Confusion(cfg.area, protocol), Confusion(cfg.lane, protocol)
        self.edges = LaneF1(absent="skip")
        self.truths: list[Boxes] = []
        self.found: list[Boxes] = []

    def add(self, part: Part) -> None:
        """Adds a batch."""
        self.images += part["images"]
        self.seen |= np.array(part["labelled"], bool)
        for true, kinds, crowd, boxes, classes, scores in part["boxes"]:
            lists = (true, kinds, None, crowd), (boxes, classes, scores)
            for images, values in zip((self.truths, self.found), lists, strict=True):
                images.append(Boxes(*(None if v is None else np.array(v) for v in values)))
        self.area.add_counts(*part["area"])
        self.lane.add_counts(*part["lane"])
        self.edges.extend(part["edges"])

    def scores(self) -> dict[str, float]:
        """The scores of all batches, see `evaluate`."""
        scores = {}
        if self.seen[0]:
            boxes = average_precision(self.truths, self.found, self.cfg.detection)
            scores |= {f"detection/{name}": value for name, value in boxes.items()}
        for at, (name, confusion) in enumerate((("area", self.area), ("lane", self.lane)), 1):
            if self.seen[at]:
                scores |= {f"{name}/{k}": v for k, v in confusion.result().items()}
        if self.seen[2]:
            for name, by_radius in self.edges.result().items():
                scores |= {
                    f"lane/F1@{r} {name.removeprefix('kind/')}": float(v)
                    for r, v in zip(self.edges.radii, by_radius, strict=True)
                }
        return scores
