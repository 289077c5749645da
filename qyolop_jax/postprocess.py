"""From raw outputs to what people use: boxes after NMS and masks, on the original image too.

`to_predictions` is made for jit; the way back through a letterbox is NumPy on the host.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from numpy.typing import ArrayLike

from qyolop_jax import QyolopError
from qyolop_jax.boxes import decode_boxes, image_size, pairwise_iou
from qyolop_jax.config import ModelConfig

CANDIDATES = 512  # best-scored predictions of an image that enter NMS


class PostprocessError(QyolopError):
    """Wrong arguments or transforms; the message says what was expected."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Predictions:
    """What was found in B images, in pixels of the network's input; at most N boxes per image."""

    boxes: jax.Array
    """[B, N, 4] (x1, y1, x2, y2) inside the image, best first; zeros where not valid."""
    scores: jax.Array
    """[B, N] objectness times class probability."""
    classes: jax.Array
    """[B, N] int32."""
    valid: jax.Array
    """[B, N]; true for the first boxes of an image, false for padding."""
    area: jax.Array
    """[B, H, W] uint8, index into `ModelConfig.area`."""
    lane: jax.Array
    """[B, H, W] uint8, index into `ModelConfig.lane`."""
    merged: jax.Array
    """[B, H, W] uint8: background, drivable kinds, then lane kinds, which cover drivable ones."""


def nms(
    boxes_N4: jax.Array, scores_N: jax.Array, classes_N: jax.Array, iou: float, limit: int
) -> tuple[jax.Array, jax.Array]:
    """Indices [limit] of the boxes that greedy NMS keeps in each class, best first; which exist.

    A box is dropped if it overlaps a better kept box of its class by more than `iou`. Scores must
    be in descending order; a score of 0 or less means no box.
    """
    count = len(scores_N)
    clash_NN = pairwise_iou(boxes_N4, boxes_N4) > iou
    clash_NN &= classes_N[:, None] == classes_N[None]
    clash_NN &= jnp.arange(count)[:, None] < jnp.arange(count)[None]  # [better, worse]
    real_N = scores_N > 0

    # Whether a box is kept depends on the better boxes alone: after n rounds the first n are right,
    # and once all are right nothing changes. Chains of boxes are short, so a few rounds are enough;
    # one box after the other would take as many steps as there are boxes.
    def again(state):
        kept_N, _ = state
        now_N = real_N & ~jnp.any(clash_NN & kept_N[:, None], axis=0)
        return now_N, jnp.any(now_N != kept_N)

    kept_N, _ = jax.lax.while_loop(lambda state: state[1], again, (real_N, jnp.array(True)))
    order = jnp.argsort(~kept_N, stable=True)[:limit]  # kept ones first, in their order
    order = jnp.pad(order, (0, max(limit - count, 0)))
    return order, kept_N[order] & (jnp.arange(limit) < count)


def to_predictions(
    raw: dict[str, jax.Array],
    cfg: ModelConfig,
    conf: float = 0.05,
    iou: float = 0.25,
    limit: int = 100,
) -> Predictions:
    """The `Predictions` of a batch from its raw outputs; the defaults are the paper's thresholds.

    A prediction has its best class and counts if its score is at least `conf`. The best 512 enter
    NMS, at most `limit` come out. Made for jit; `limit` is static. PostprocessError for a limit
    below 1.
    """
    if limit < 1:
        raise PostprocessError(f"limit is {limit}; expected at least 1 box an image")
    height, width = image_size(raw, cfg)
    found = decode_boxes(raw, cfg)

    def one(boxes_P4, obj_P, cls_PC):
        per_class = jax.nn.sigmoid(obj_P)[:, None] * jax.nn.sigmoid(cls_PC)
        classes_P, scores_P = jnp.argmax(per_class, -1), jnp.max(per_class, -1)
        scores_P = jnp.where(scores_P >= conf, scores_P, 0)
        scores, top = jax.lax.top_k(scores_P, min(CANDIDATES, len(scores_P)))
        boxes, classes = boxes_P4[top], classes_P[top].astype(jnp.int32)
        kept, valid = nms(boxes, scores, classes, iou, limit)
        edge = jnp.array([width, height, width, height], boxes.dtype)[None]
        boxes = jnp.clip(boxes[kept], 0, edge)
        of = lambda x: jnp.where(valid, x[kept], 0)
        return jnp.where(valid[:, None], boxes, 0), of(scores), of(classes), valid

    with jax.named_scope("predict"):
        detections = jax.vmap(one)(found.boxes_BP4, found.obj_BP, found.cls_BPC)
        area = jnp.argmax(raw["area"], -1).astype(jnp.uint8)
        lane = jnp.argmax(raw["lane"], -1).astype(jnp.uint8)
    return Predictions(*detections, area, lane, merge_masks(area, lane, cfg))


def merge_masks(area: jax.Array, lane: jax.Array, cfg: ModelConfig) -> jax.Array:
    """One mask of drivable and lane classes, lanes on top; 0 is background."""
    shift = jnp.uint8(len(cfg.area) - 1)
    return jnp.where(lane > 0, lane + shift, area)


class Transform(NamedTuple):
    """A letterbox: network = original * scale + (dx, dy); `size` is the original (H, W)."""

    scale: float
    dx: float
    dy: float
    size: tuple[int, int]


class Found(NamedTuple):
    """What was found in one image, in NumPy, in pixels of the original image."""

    boxes: np.ndarray
    """[n, 4] float32, (x1, y1, x2, y2), best first."""
    scores: np.ndarray
    """[n]."""
    classes: np.ndarray
    """[n], index into `ModelConfig.detection`."""
    area: np.ndarray
    """[H, W] uint8, index into `ModelConfig.area`."""
    lane: np.ndarray
    """[H, W] uint8, index into `ModelConfig.lane`."""
    merged: np.ndarray
    """[H, W] uint8: background, drivable kinds, then lane kinds."""


def _checked(transform) -> Transform:
    scale, dx, dy, (height, width) = transform
    if not scale > 0 or height < 1 or width < 1:
        raise PostprocessError(
            f"letterbox {transform}; expected (scale, dx, dy, (H, W)), scale and size above 0"
        )
    return Transform(scale, dx, dy, (height, width))


def boxes_to_original(boxes: ArrayLike, transform: Transform) -> np.ndarray:
    """Boxes [n, 4] of the network's input as boxes of the original image, clipped to it."""
    scale, dx, dy, (height, width) = _checked(transform)
    back = (np.asarray(boxes, np.float64).reshape(-1, 4) - [dx, dy, dx, dy]) / scale
    return np.clip(back, 0, [width, height, width, height]).astype(np.float32)


def mask_to_original(mask: ArrayLike, transform: Transform) -> np.ndarray:
    """A mask [H, W] of the network's input at the size of the original, by nearest pixel."""
    scale, dx, dy, size = _checked(transform)
    mask = np.asarray(mask)
    at = [
        np.clip(np.floor((np.arange(n) + 0.5) * scale + shift).astype(int), 0, limit - 1)
        for n, shift, limit in zip(size, (dy, dx), mask.shape, strict=True)
    ]
    return mask[np.ix_(*at)]


def to_original(predictions: Predictions, index: int, transform: Transform) -> Found:
    """`Found` in image `index` of a batch; `transform` is its letterbox (scale, dx, dy, (H, W)).

    Boxes that lie entirely in the padding are dropped.
    """
    valid = np.asarray(predictions.valid[index])
    boxes = boxes_to_original(np.asarray(predictions.boxes[index])[valid], transform)
    real = (boxes[:, 2:] > boxes[:, :2]).all(1)
    masks = (predictions.area, predictions.lane, predictions.merged)
    return Found(
        boxes[real],
        np.asarray(predictions.scores[index])[valid][real],
        np.asarray(predictions.classes[index])[valid][real],
        *(mask_to_original(m[index], transform) for m in masks),
    )
