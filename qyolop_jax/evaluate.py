"""Any forward function on any labelled images: one dict of scores, whatever is behind the forward.

Everything is measured on the network's own grid: images and labels are letterboxed to it, and
padding is ignored.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qyolop_jax.config import ModelConfig
from qyolop_jax.metrics import Boxes, Confusion, LaneF1, average_precision
from qyolop_jax.model import Panoptic
from qyolop_jax.postprocess import Predictions, predict
from qyolop_jax.samples import Batch, Report, Sample
from qyolop_jax.sources import Feed, in_order

Forward = Callable[[Any, jax.Array], dict[str, jax.Array]]
"""(variables, uint8 images [B, H, W, 3]) to raw outputs."""


@functools.cache
def float_forward(cfg: ModelConfig, dtype=jnp.float32) -> Forward:
    """The network as it was trained, with its running statistics."""
    return lambda variables, images: Panoptic(cfg, dtype).apply(variables, images, train=False)


@functools.cache
def predictor(forward: Forward, cfg: ModelConfig, conf: float = 0.05) -> Callable:
    """A jitted function of variables and uint8 images [B, H, W, 3] to `Predictions` in NumPy."""
    run = jax.jit(lambda variables, images: predict(forward(variables, images), cfg, conf))
    return lambda variables, images: jax.tree.map(np.asarray, run(variables, images))


def evaluate(
    forward: Forward,
    variables,
    dataset: Sequence[Sample],
    cfg: ModelConfig,
    batch: int = 8,
    conf: float = 0.01,
    protocol: str = "pooled",
    report: Report | None = None,
    progress: Callable[[int], None] | None = None,
    look: Callable[[Batch, Predictions], None] | None = None,
) -> dict[str, float]:
    """Scores on labelled samples, shares of 1: "detection/AP50", "area/mIoU", "lane/IoU single" …

    Names behind the slash are those of `metrics`; lane F1 is "lane/F1@1 any" and so on. A task that
    no sample has labels for is left out. `conf` is the least score of a box that counts towards
    average precision; broken samples are left out and counted in `report`. `look` is given each
    letterboxed batch and what was found in it.
    """
    run = predictor(forward, cfg, conf)
    truths, found, done = [], [], 0
    area, lane = Confusion(cfg.area, protocol), Confusion(cfg.lane, protocol)
    edges, seen = LaneF1(absent="skip"), np.zeros(3, bool)
    for images, originals in in_order(dataset, Feed(cfg.size, batch), report):
        p, n = run(variables, images["image"]), len(originals)
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
