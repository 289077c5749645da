"""Boxes: raw detection outputs to pixels, and how much two boxes overlap.

A box is (x1, y1, x2, y2) in pixels of the network's input image, float32, half-open. P counts
predictions: level by level (stride 8, 16, 32), then row, column and anchor, in memory order.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from qyolop_jax import QyolopError
from qyolop_jax.config import ModelConfig

ANCHOR_WIDTH = 640  # the image width at which `ModelConfig.anchors` are pixels
ANCHORS_PER_CELL = 3  # of each cell


class BoxError(QyolopError):
    """Raw outputs that do not fit the settings; the message says what was expected."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """Every prediction of a batch: boxes in pixels; objectness and classes as logits."""

    boxes_BP4: jax.Array
    obj_BP: jax.Array
    cls_BPC: jax.Array


@dataclasses.dataclass(frozen=True)
class Cells:
    """The constants of the P predictions, in NumPy: cell corner, stride, anchor in pixels."""

    xy_P2: np.ndarray
    stride_P: np.ndarray
    anchor_P2: np.ndarray
    shapes: tuple[tuple[int, int], ...]
    """Rows and columns of each level."""

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of the first prediction of each level, and then the number of all predictions."""
        counts = [rows * columns * ANCHORS_PER_CELL for rows, columns in self.shapes]
        return tuple(int(n) for n in np.cumsum([0, *counts]))


def anchors(cfg: ModelConfig) -> np.ndarray:
    """Anchors [level, 3, (width, height)] in pixels of an image of `cfg.size`.

    The settings give them for images 640 wide; a network for images 320 wide has anchors half as
    large, and keeps them when it runs on images of another size.
    """
    table = np.asarray(cfg.anchors, np.float32)
    if table.shape != (len(cfg.strides), ANCHORS_PER_CELL, 2) or (table <= 0).any():
        raise BoxError(
            f"anchors of shape {table.shape}; expected {len(cfg.strides)} levels of "
            f"{ANCHORS_PER_CELL} positive (width, height) pairs"
        )
    return table * np.float32(cfg.size[1] / ANCHOR_WIDTH)


def cells(cfg: ModelConfig, size: tuple[int, int]) -> Cells:
    """`Cells` of images of `size` (H, W), both multiples of the largest stride."""
    if any(n <= 0 or n % max(cfg.strides) for n in size):
        raise BoxError(f"image size {size}; expected multiples of {max(cfg.strides)}")
    shapes, xy, stride, anchor = [], [], [], []
    for step, level in zip(cfg.strides, anchors(cfg), strict=True):
        rows, columns = size[0] // step, size[1] // step
        y, x = np.mgrid[:rows, :columns]
        corner = np.stack([x, y], -1).reshape(-1, 1, 2).astype(np.float32)
        shapes.append((rows, columns))
        xy.append(np.repeat(corner, ANCHORS_PER_CELL, 1).reshape(-1, 2))
        stride.append(np.full(rows * columns * ANCHORS_PER_CELL, step, np.float32))
        anchor.append(np.tile(level, (rows * columns, 1)))
    return Cells(*(np.concatenate(a) for a in (xy, stride, anchor)), tuple(shapes))


def image_size(raw: dict[str, jax.Array], cfg: ModelConfig) -> tuple[int, int]:
    """(H, W) of the image behind raw detection outputs; checks every level against it."""
    wanted = [f"detect.{s}" for s in cfg.strides]
    if missing := [name for name in wanted if name not in raw]:
        raise BoxError(f"raw outputs lack {', '.join(missing)}; there are {', '.join(sorted(raw))}")
    rows, columns = raw[wanted[0]].shape[1:3]
    height, width = rows * cfg.strides[0], columns * cfg.strides[0]
    for name, step in zip(wanted, cfg.strides, strict=True):
        shape = (height // step, width // step, ANCHORS_PER_CELL * (5 + len(cfg.detection)))
        if raw[name].ndim != 4 or raw[name].shape[1:] != shape:
            raise BoxError(f"{name} has shape {raw[name].shape}; expected [B, {shape}]")
    return height, width


def decode_boxes(raw: dict[str, jax.Array], cfg: ModelConfig) -> Decoded:
    """All predictions of a batch as boxes in pixels and logits [B, P].

    YOLOv7's form, s the sigmoid of the output: centre (2s - 0.5 + cell) * stride, size
    (2s)^2 * anchor; so a box is at most four times as large as its anchor, and its centre at most
    half a cell outside its own cell.
    """
    fixed = cells(cfg, image_size(raw, cfg))
    fields = 5 + len(cfg.detection)
    flat = [raw[f"detect.{s}"] for s in cfg.strides]
    flat = [x.reshape(x.shape[0], -1, fields).astype(jnp.float32) for x in flat]
    all_BPF = jnp.concatenate(flat, axis=1)
    with jax.named_scope("decode"):
        s_BP4 = jax.nn.sigmoid(all_BPF[..., :4])
        # constants of rank 3, because tests forbid rank promotion
        xy, stride, anchor = (a[None] for a in (fixed.xy_P2, fixed.stride_P[:, None],
                                                fixed.anchor_P2))  # fmt: skip
        centre = (2 * s_BP4[..., :2] - 0.5 + xy) * stride
        half = 2 * jnp.square(s_BP4[..., 2:]) * anchor
        boxes_BP4 = jnp.concatenate([centre - half, centre + half], -1)
    return Decoded(boxes_BP4, all_BPF[..., 4], all_BPF[..., 5:])


def area(boxes: jax.Array) -> jax.Array:
    """Areas [...] of boxes [..., 4]; 0 for a box that is empty or inside out."""
    wh = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return wh[..., 0] * wh[..., 1]


def intersection(a: jax.Array, b: jax.Array) -> jax.Array:
    """Areas [...] that boxes a and b [..., 4] share; leading shapes are equal or broadcast."""
    low = jnp.maximum(a[..., :2], b[..., :2])
    high = jnp.minimum(a[..., 2:], b[..., 2:])
    return area(jnp.concatenate([low, high], -1))


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union [...] of pairs of boxes [..., 4]; 0 where the union is empty."""
    shared = intersection(a, b)
    union = area(a) + area(b) - shared
    return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1), 0)


def pairwise_iou(a_N4: jax.Array, b_M4: jax.Array) -> jax.Array:
    """Intersection over union [N, M] of every box of `a` with every box of `b`."""
    return iou(a_N4[:, None, :], b_M4[None, :, :])


def ciou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Complete IoU [...] of boxes [..., 4] of positive size, in (-2, 1]; 1 where they are equal.

    IoU - (centre distance / diagonal of the hull)^2 - alpha * v, where v compares the aspect
    ratios and alpha = v / (1 - IoU + v) carries no gradient (Zheng et al., arXiv 1911.08287).
    """
    tiny = 1e-7  # of a pixel; keeps the gradient of an arctangent and two ratios finite
    overlap = iou(a, b)
    hull = jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2])
    apart = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
    distance = jnp.sum(apart**2, -1) / (jnp.sum(hull**2, -1) + tiny)
    wh_a, wh_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    angle = lambda wh: jnp.arctan(wh[..., 0] / (wh[..., 1] + tiny))
    v = 4 / math.pi**2 * (angle(wh_a) - angle(wh_b)) ** 2
    alpha = jax.lax.stop_gradient(v / (1 - overlap + v + tiny))
    return overlap - distance - alpha * v
