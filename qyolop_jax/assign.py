"""Which predictions learn which boxes: SimOTA over the cells and anchors near each box.

M counts the padded boxes of a sample, P its predictions (see `boxes`), K the 27 candidates of a
box: 3 levels x 3 anchors x (its own cell, the nearer neighbour in x, the nearer one in y).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from qyolop_jax.boxes import (
    ANCHORS_PER_CELL,
    Cells,
    Decoded,
    anchors,
    area,
    cells,
    intersection,
    iou,
)
from qyolop_jax.config import ModelConfig

RATIO = 4.0  # an anchor fits a box if neither is this many times as wide or high as the other
TOP = 10  # a box gets as many predictions as the sum of this many best overlaps
IOU_WEIGHT = 3.0  # weight of -log IoU in the cost; the cross-entropy of the class has 1
CROWD_OVERLAP = 0.5  # a prediction with more than this share in a crowd box is left alone


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignment:
    """For every prediction: the box that it learns, and whether it is left alone."""

    box_BP: jax.Array
    """int32, index of the box; -1 for none."""
    ignore_BP: jax.Array
    """bool: no box of its own, but inside a crowd; such a prediction has no objectness loss."""


def box_candidates(
    boxes_M4: jax.Array, fixed: Cells, cfg: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Indices [M, 27] of predictions that could describe each box, and which of them count [M, 27].

    An anchor counts if its width and height are within a factor `RATIO` of the box's, a
    neighbouring cell if it is inside the grid. Candidates that do not count have a valid index too.
    """
    levels = zip(cfg.strides, anchors(cfg), fixed.shapes, fixed.starts[:-1], strict=True)
    wh = boxes_M4[:, 2:] - boxes_M4[:, :2]
    indices, counts = [], []
    for stride, anchor, (rows, columns), start in levels:
        limit = jnp.array([columns, rows], jnp.int32)[None]
        at = (boxes_M4[:, :2] + boxes_M4[:, 2:]) / (2 * stride)
        own = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, limit - 1)
        step = jnp.where(at - own.astype(at.dtype) < 0.5, -1, 1)  # towards the nearer neighbour
        beside = own + step
        inside = (beside >= 0) & (beside < limit)
        beside = jnp.where(inside, beside, own)
        # columns: own cell, neighbour in x, neighbour in y
        x = jnp.stack([own[:, 0], beside[:, 0], own[:, 0]], 1)
        y = jnp.stack([own[:, 1], own[:, 1], beside[:, 1]], 1)
        present = jnp.stack([jnp.ones_like(inside[:, 0]), inside[:, 0], inside[:, 1]], 1)
        ratio = wh[:, None, :] / anchor[None]
        fits = jnp.max(jnp.maximum(ratio, 1 / jnp.maximum(ratio, 1e-9)), -1) < RATIO
        index = (
            start
            + (y * columns + x)[:, :, None] * ANCHORS_PER_CELL
            + jnp.arange(ANCHORS_PER_CELL)[None, None]
        )
        indices.append(index.reshape(len(wh), -1))
        counts.append((present[:, :, None] & fits[:, None, :]).reshape(len(wh), -1))
    return jnp.concatenate(indices, 1), jnp.concatenate(counts, 1)


def match(
    boxes_P4: jax.Array,
    obj_P: jax.Array,
    cls_PC: jax.Array,
    targets_M4: jax.Array,
    classes_M: jax.Array,
    usable_M: jax.Array,
    fixed: Cells,
    cfg: ModelConfig,
) -> jax.Array:
    """Index of the box that each of P predictions of one sample learns, -1 for none.

    A box takes the k cheapest of its candidates; k is the sum of its ten best IoUs, rounded down,
    at least 1. Cost: cross-entropy of sqrt(objectness * class) with the box's class,
    summed over classes, - 3 log IoU. A prediction that two boxes take goes to the one with the
    lower cost (YOLOX, arXiv 2107.08430, as YOLOv7 uses it; but here a box takes only candidates
    whose decoding can reach it).
    """
    index_MK, counts_MK = box_candidates(targets_M4, fixed, cfg)
    counts_MK &= usable_M[:, None]
    overlap_MK = iou(boxes_P4[index_MK], targets_M4[:, None, :])
    overlap_MK = jnp.where(counts_MK, overlap_MK, 0)

    log_p = jax.nn.log_sigmoid(obj_P)[index_MK][..., None] + jax.nn.log_sigmoid(cls_PC)[index_MK]
    log_p = log_p / 2
    log_q = jnp.log(jnp.maximum(-jnp.expm1(log_p), 1e-12))
    is_class = classes_M[:, None, None] == jnp.arange(cls_PC.shape[-1])[None, None]
    entropy_MK = -jnp.where(is_class, log_p, log_q).sum(-1)
    cost_MK = entropy_MK - IOU_WEIGHT * jnp.log(overlap_MK + 1e-8)
    cost_MK = jnp.where(counts_MK, cost_MK, jnp.inf)

    best = jax.lax.top_k(overlap_MK, TOP)[0].sum(-1)
    k_M = jnp.maximum(jnp.floor(best).astype(jnp.int32), 1)
    rank_MK = jnp.argsort(jnp.argsort(cost_MK, axis=1), axis=1)
    taken_MK = counts_MK & (rank_MK < k_M[:, None])

    # a claim (box m, candidate k) stands if no cheaper one, nor an equal one of an earlier box,
    # points at the same prediction
    cost_MK = jnp.where(taken_MK, cost_MK, jnp.inf)
    lowest_P = jnp.full(obj_P.shape, jnp.inf, cost_MK.dtype).at[index_MK].min(cost_MK)
    stands = taken_MK & (cost_MK == lowest_P[index_MK])
    none = len(classes_M)
    box_MK = jnp.where(stands, jnp.arange(none)[:, None], none)
    box_P = jnp.full(obj_P.shape, none, box_MK.dtype).at[index_MK].min(box_MK)
    return jnp.where(box_P < none, box_P, -1).astype(jnp.int32)


def in_crowd(boxes_P4: jax.Array, targets_M4: jax.Array, crowd_M: jax.Array) -> jax.Array:
    """Which predictions [P] have more than half of their area inside some crowd box."""
    shared_PM = intersection(boxes_P4[:, None, :], targets_M4[None])
    inside = shared_PM > CROWD_OVERLAP * area(boxes_P4)[:, None]
    return jnp.any(inside & crowd_M[None], axis=1)


def assign(
    decoded: Decoded, batch: dict[str, jax.Array], cfg: ModelConfig, size: tuple[int, int]
) -> Assignment:
    """The `Assignment` of a batch of images of `size` (H, W); without gradient.

    Padding, crowd boxes, boxes without area and samples without detection labels get no prediction.
    """
    decoded = jax.lax.stop_gradient(decoded)
    fixed = cells(cfg, size)
    real = batch["valid"] & (area(batch["boxes"]) > 0) & batch["labelled"][:, :1]
    usable, crowd = real & ~batch["crowd"], real & batch["crowd"]
    one = lambda *arrays: match(*arrays, fixed, cfg)
    with jax.named_scope("assign"):
        box_BP = jax.vmap(one)(decoded.boxes_BP4, decoded.obj_BP, decoded.cls_BPC, batch["boxes"],
                               batch["classes"], usable)  # fmt: skip
        crowded = jax.vmap(in_crowd)(decoded.boxes_BP4, batch["boxes"], crowd)
    return Assignment(box_BP, crowded & (box_BP < 0))
