"""Scores of predictions: IoU of masks, average precision of boxes, F1 of lane boundaries.

NumPy on the host. Counts are added up over a data set and divided once, at the end. The only
exception is the `yolop` protocol, which makes published numbers comparable.
"""

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from llm_jax.extras import need
from qyolop_jax import QyolopError
from qyolop_jax.config import IGNORE, UNKNOWN

IoUProtocol = Literal["pooled", "yolop"]
"""How the IoU of a data set is averaged; see `Confusion`."""


class MetricError(QyolopError):
    """Wrong masks, boxes or settings; the message says what was expected."""


def _iou(matrix: np.ndarray, absent: float) -> np.ndarray:
    """IoU [C] of a confusion matrix; `absent` for a class that is neither true nor predicted."""
    shared = np.diag(matrix).astype(np.float64)
    union = matrix.sum(0) + matrix.sum(1) - shared
    return np.where(union > 0, shared / np.maximum(union, 1), absent)


def _mean(values) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def _check_masks(truth, predicted, classes: int):
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape:
        raise MetricError(f"a predicted mask of {predicted.shape} for a true one of {truth.shape}")
    bad = np.unique(truth[(truth >= classes) & (truth != IGNORE) & (truth != UNKNOWN)])
    if bad.size:
        raise MetricError(
            f"mask values {bad.tolist()}; expected 0 to {classes - 1}, {UNKNOWN} or {IGNORE}"
        )
    if predicted.size and int(predicted.max()) >= classes:
        raise MetricError(f"class {int(predicted.max())} predicted; there are {classes}")
    return truth, predicted


@dataclasses.dataclass
class Confusion:
    """Confusion matrices of a data set, rows true and columns predicted, filled by `add`.

    `typed` has every class and leaves out IGNORE and UNKNOWN pixels; `binary` has background and
    foreground, and UNKNOWN is foreground. Protocol "pooled" divides once for the data set. "yolop"
    (YOLOP's lib/core/function.py) averages the IoU of batches, weighted by their images, with 0 for
    a class that a batch lacks: it depends on the batch size and is for comparison only.
    """

    names: tuple[str, ...]
    protocol: IoUProtocol = "pooled"

    def __post_init__(self):
        if self.protocol not in ("pooled", "yolop"):
            raise MetricError(f"protocol {self.protocol!r}; expected 'pooled' or 'yolop'")
        if len(self.names) < 2:
            raise MetricError(f"classes {self.names}; expected a background and at least one more")
        self.typed = np.zeros((len(self.names),) * 2, np.int64)
        self.binary = np.zeros((2, 2), np.int64)
        self._batches = []

    def add(self, truth: ArrayLike, predicted: ArrayLike) -> None:
        """Counts a batch of masks [B, H, W] (or one [H, W]) of class indices.

        Images that are IGNORE everywhere do not count. In the YOLOP protocol, one call is one
        batch.
        """
        self.add_counts(*self.counts(truth, predicted))

    def counts(self, truth: ArrayLike, predicted: ArrayLike) -> tuple[int, np.ndarray, np.ndarray]:
        """(labelled images, typed matrix, binary matrix) of a batch alone, for `add_counts`."""
        truth, predicted = _check_masks(truth, predicted, len(self.names))
        seen = truth != IGNORE
        known = seen & (truth != UNKNOWN)
        binary = _count(truth[seen] > 0, predicted[seen] > 0, 2)
        typed = _count(truth[known], predicted[known], len(self.names))
        return int(seen.any((-2, -1)).sum()), typed, binary

    def add_counts(self, images: int, typed: ArrayLike, binary: ArrayLike) -> None:
        """Adds what `counts` gave for a batch."""
        typed, binary = np.asarray(typed, np.int64), np.asarray(binary, np.int64)
        self.typed += typed
        self.binary += binary
        if images and self.protocol == "yolop":
            self._batches.append((images, typed, binary))

    def result(self) -> dict[str, float]:
        """IoU of each class and "mIoU", "foreground IoU", "foreground recall", "binary mIoU".

        From 0 to 1. NaN, which means leave out, for a class that is neither true nor predicted, and
        for all classes if every foreground pixel is UNKNOWN. YOLOP's "lane accuracy" is the
        foreground recall, its lane IoU the foreground IoU, its drivable mIoU the binary mIoU.
        """
        if self.protocol == "pooled":
            return self._scores(self.typed, self.binary, float("nan"))
        keys = self._scores(self.typed, self.binary, 0.0)
        if not self._batches:
            return dict.fromkeys(keys, float("nan"))
        each = [self._scores(typed, binary, 0.0) for _, typed, binary in self._batches]
        images = [n for n, _, _ in self._batches]
        return {k: float(np.average([e[k] for e in each], weights=images)) for k in keys}

    def _scores(self, typed, binary, absent: float) -> dict[str, float]:
        per_class, both = _iou(typed, absent), _iou(binary, absent)
        true = binary[1].sum()
        if true and not typed[1:].sum():  # foreground, but of no known kind
            per_class = np.full(len(self.names), np.nan)
        return {
            **{f"IoU {n}": float(v) for n, v in zip(self.names, per_class, strict=True)},
            "mIoU": _mean(per_class),
            "binary mIoU": _mean(both),
            "foreground IoU": float(both[1]),
            "foreground recall": float(binary[1, 1] / true) if true else absent,
        }


def _count(truth, predicted, classes: int) -> np.ndarray:
    flat = truth.astype(np.int64) * classes + predicted.astype(np.int64)
    return np.bincount(flat.reshape(-1), minlength=classes**2).reshape(classes, classes)


class Boxes(NamedTuple):
    """Boxes of one image: (x1, y1, x2, y2) [n, 4], classes [n], scores [n] or crowd flags [n]."""

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray | None = None
    crowd: np.ndarray | None = None


def _annotations(images: Sequence[Boxes], classes: int, what: str) -> list[dict]:
    found = []
    for at, image in enumerate(images):
        boxes = np.asarray(image.boxes, np.float64).reshape(-1, 4)
        kinds = np.asarray(image.classes).reshape(-1)
        crowd = np.zeros(len(boxes), bool) if image.crowd is None else np.asarray(image.crowd)
        scores = np.ones(len(boxes)) if image.scores is None else np.asarray(image.scores)
        if not len(boxes) == len(kinds) == len(crowd) == len(scores):
            raise MetricError(
                f"{what} image {at}: {len(boxes)} boxes, {len(kinds)} classes, {len(scores)} "
                f"scores, {len(crowd)} crowd flags; expected as many of each"
            )
        if len(kinds) and not 0 <= kinds.min() <= kinds.max() < classes:
            raise MetricError(f"{what} image {at} has a class outside 0 to {classes - 1}")
        if (boxes[:, 2:] < boxes[:, :2]).any():
            raise MetricError(f"{what} image {at} has a box inside out; expected x1, y1, x2, y2")
        for (x1, y1, x2, y2), kind, score, many in zip(boxes, kinds, scores, crowd, strict=True):
            found.append({
                "id": len(found) + 1,  # COCOeval takes a match with id 0 for none
                "image_id": at,
                "category_id": int(kind),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "score": float(score),
                "iscrowd": int(many),
            })  # fmt: skip
    return found


def average_precision(
    truths: Sequence[Boxes], found: Sequence[Boxes], names: Sequence[str], limit: int = 100
) -> dict[str, float]:
    """AP50, AP (the mean over IoU .5 to .95), recall50 and AP50 of each class, by COCOeval.

    One `Boxes` per image, in the same order. It costs nothing to miss a crowd box or to predict
    boxes of its class inside it. At most `limit` boxes of a class count in an image. Scores are
    from 0 to 1; means are over classes that have a true box, the others are NaN. MissingPackage
    without pycocotools.
    """
    coco_format = need("pycocotools.coco", "vision", "average precision")
    cocoeval = need("pycocotools.cocoeval", "vision", "average precision")
    if len(truths) != len(found):
        raise MetricError(f"predictions of {len(found)} images for {len(truths)}")

    def store(images, what):
        coco = coco_format.COCO()
        coco.dataset = {
            "images": [{"id": i} for i in range(len(images))],
            "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
            "annotations": _annotations(images, len(names), what),
        }
        coco.createIndex()
        return coco

    if not truths:
        keys = ("AP50", "AP", "recall50", *(f"AP50 {name}" for name in names))
        return dict.fromkeys(keys, float("nan"))
    with contextlib.redirect_stdout(io.StringIO()):
        judge = cocoeval.COCOeval(store(truths, "true"), store(found, "predicted"), "bbox")
        judge.params.maxDets = [limit]
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.evaluate()
        judge.accumulate()
    # [IoU, recall step, class, area, limit], -1 where a class has no true box
    precision = judge.eval["precision"][..., 0, 0]
    precision = np.where(precision < 0, np.nan, precision)
    recall = judge.eval["recall"][0, :, 0, 0]
    per_class = [_mean(precision[0, :, i]) for i in range(len(names))]
    return {
        "AP50": _mean(per_class),
        "AP": _mean(precision),
        "recall50": _mean(np.where(recall < 0, np.nan, recall)),
        **{f"AP50 {n}": v for n, v in zip(names, per_class, strict=True)},
    }


RADII = (1, 2, 5)  # pixels, of the lane benchmark
LANE_BITS = {  # of BDD100K's lane byte: task -> (lowest bit, names by value)
    "direction": (5, ("parallel", "vertical")),
    "style": (4, ("solid", "dashed")),
    "category": (0, ("crosswalk", "double other", "double white", "double yellow", "road curb",
                     "single other", "single white", "single yellow")),
}  # fmt: skip


def boundary_f1(truth: ArrayLike, predicted: ArrayLike, radii: Sequence[int] = RADII) -> np.ndarray:
    """F1 [len(radii)] of two binary masks [H, W] that match within a disk of each radius in pixels.

    Precision is the share of predicted pixels within the disk around a true pixel, recall the
    opposite. NaN if both masks are empty, 0 if one is. As bdd100k/eval/lane.py measures it.
    """
    cv2 = need("cv2", "vision", "F1 of lane boundaries")
    truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
    if truth.shape != predicted.shape or truth.ndim != 2:
        raise MetricError(f"lane masks of {truth.shape} and {predicted.shape}; expected two [H, W]")
    if not truth.any() or not predicted.any():
        return np.full(len(radii), 0.0 if truth.any() or predicted.any() else np.nan)
    scores = []
    for radius in radii:
        y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        disk = (x**2 + y**2 <= radius**2).astype(np.uint8)
        near = lambda mask: cv2.dilate(mask.astype(np.uint8), disk) > 0  # noqa: B023
        right = (predicted & near(truth)).sum() / predicted.sum()
        found = (truth & near(predicted)).sum() / truth.sum()
        scores.append(2 * right * found / (right + found) if right + found else 0.0)
    return np.array(scores)


def bdd100k_lanes(byte_HW: ArrayLike) -> dict[str, np.ndarray]:
    """Boolean masks [H, W] of the 12 classes of a bit-packed lane mask, by "task/name".

    Bits 0-2 are the category, bit 3 background, bit 4 the style, bit 5 the direction.
    """
    byte = np.asarray(byte_HW)
    if byte.dtype != np.uint8 or byte.ndim != 2:
        raise MetricError(f"lane bytes are {byte.dtype} {byte.shape}; expected uint8 [H, W]")
    marked = (byte >> 3) & 1 == 0
    return {
        f"{task}/{name}": marked & ((byte >> low) & (len(names) - 1) == value)
        for task, (low, names) in LANE_BITS.items()
        for value, name in enumerate(names)
    }


@dataclasses.dataclass
class LaneF1:
    """F1 of lane boundaries, a mean over images for each class, filled by `add` or `add_bdd100k`.

    An image where a class is neither true nor predicted counts as 1 with absent "one" (as BDD100K
    does it, which flatters rare classes), and does not count with "skip".
    """

    absent: Literal["one", "skip"] = "one"
    radii: tuple[int, ...] = RADII

    def __post_init__(self):
        if self.absent not in ("one", "skip"):
            raise MetricError(f"absent {self.absent!r}; expected 'one' or 'skip'")
        self.images: dict[str, list[np.ndarray]] = {}

    def _add(self, name: str, truth, predicted) -> None:
        self.images.setdefault(name, []).append(boundary_f1(truth, predicted, self.radii))

    def extend(self, images: Mapping[str, Sequence[ArrayLike]]) -> None:
        """Adds what another one has in `images`: F1 [radius] of each image, by class."""
        for name, rows in images.items():
            self.images.setdefault(name, []).extend(np.asarray(row, np.float64) for row in rows)

    def add(self, truth: ArrayLike, predicted: ArrayLike, names: Sequence[str]) -> None:
        """One image's masks [H, W] of class indices; `names` from background on.

        Adds "kind/<name>" for each kind and "any" for all foreground. IGNORE pixels do not count.
        An image with UNKNOWN pixels adds to "any" alone.
        """
        truth, predicted = _check_masks(truth, predicted, len(names))
        predicted = np.where(truth == IGNORE, 0, predicted)
        self._add("any", (truth > 0) & (truth != IGNORE), predicted > 0)
        if not (truth == UNKNOWN).any():
            for value, name in enumerate(names[1:], 1):
                self._add(f"kind/{name}", truth == value, predicted == value)

    def add_bdd100k(self, truth: ArrayLike, predicted: ArrayLike) -> None:
        """One image's bit-packed lane masks, uint8 [H, W]; adds BDD100K's 12 classes."""
        predicted = bdd100k_lanes(predicted)
        for name, mask in bdd100k_lanes(truth).items():
            self._add(name, mask, predicted[name])

    def result(self) -> dict[str, np.ndarray]:
        """F1 [radius] from 0 to 1: of each class, and of each task (the mean of its classes).

        NaN, left out of the task's mean, if no image counts.
        """
        over = lambda rows: np.array([_mean(column) for column in np.array(rows).T])
        absent = 1.0 if self.absent == "one" else np.nan
        found = {
            name: over(np.where(np.isnan(images), absent, images))
            for name, images in self.images.items()
        }
        tasks = dict.fromkeys(name.split("/")[0] for name in found if "/" in name)
        return found | {
            task: over([row for name, row in found.items() if name.startswith(f"{task}/")])
            for task in tasks
        }
