"""The scores of any network on labelled images, as one dict.

Everything is measured on the network's own grid: images and labels are letterboxed to it, and
padding is ignored.
"""

from collections.abc import Callable, Sequence

import numpy as np

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
from qyolop_jax.sources import Feed, in_order


def evaluate(
    network: Network,
    dataset: Sequence[Sample],
    batch: int = 8,
    conf: float = 0.01,
    protocol: IoUProtocol = "pooled",
    report: Report | None = None,
    progress: Callable[[int], None] | None = None,
    look: Callable[[Batch, Predictions], None] | None = None,
) -> dict[str, float]:
    """Scores on labelled samples, from 0 to 1: "detection/AP50", "area/mIoU", "lane/IoU single" …

    The part of a name after the slash is a name of `metrics`; lane F1 is "lane/F1@1 any" and so on.
    A task that no sample has labels for is left out. `conf` is the least score of a box that counts
    towards average precision. All true boxes count, and the 100 best boxes found in an image, as in
    COCO. Broken samples are left out and counted in `report`; without one they are errors. `look`
    gets each letterboxed batch and what was found in it. MetricError where no sample is left.
    """
    if not 0 <= conf <= 1:
        raise MetricError(f"conf is {conf}; expected a score from 0 to 1")
    cfg = network.cfg
    run = predictor(network.forward, cfg, conf)
    truths, found, done = [], [], 0
    area, lane = Confusion(cfg.area, protocol), Confusion(cfg.lane, protocol)
    edges, seen = LaneF1(absent="skip"), np.zeros(3, bool)
    for images, originals in in_order(dataset, Feed(cfg.size, batch), report):
        p, n = run(network.values, images["image"]), len(originals)
        seen |= images["labelled"][:n].any(0)
        for b in np.flatnonzero(images["labelled"][:n, 0]):
            real, ours = images["valid"][b], p.valid[b]
            crowd = images["crowd"][b][real]
            truths.append(Boxes(images["boxes"][b][real], images["classes"][b][real], None, crowd))
            found.append(Boxes(p.boxes[b][ours], p.classes[b][ours], p.scores[b][ours]))
        for b in np.flatnonzero(images["labelled"][:n, 2]):
            edges.add(images["lane"][b], p.lane[b], cfg.lane)
        area.add(images["area"], p.area)
        lane.add(images["lane"], p.lane)
        done += n
        if look:
            look(images, p)
        if progress:
            progress(done)
    if not done:
        why = "; ".join(str(report).splitlines()) if report else "there are none"
        raise MetricError(f"none of {len(dataset)} samples could be scored: {why}")
    scores = {}
    if seen[0]:
        boxes = average_precision(truths, found, cfg.detection)
        scores |= {f"detection/{name}": value for name, value in boxes.items()}
    for at, (name, confusion) in enumerate((("area", area), ("lane", lane)), 1):
        if seen[at]:
            scores |= {f"{name}/{k}": v for k, v in confusion.result().items()}
    if seen[2]:
        for name, by_radius in edges.result().items():
            scores |= {
                f"lane/F1@{r} {name.removeprefix('kind/')}": float(v)
                for r, v in zip(edges.radii, by_radius, strict=True)
            }
    return scores
