"""Labelled images, batches of static shape, and a count of what was skipped.

NumPy alone. A sample may lack labels for some of the three tasks; the mask of such a task is
`IGNORE` everywhere. Letters: B batch, M boxes an image, H height, W width.
"""

import contextlib
import dataclasses
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from qyolop_jax import QyolopError
from qyolop_jax.config import AREA, DETECTION, IGNORE, LANE, UNKNOWN

TASKS = ("detection", "area", "lane")
"""The order of `Sample.labelled`."""

Batch = dict[str, np.ndarray]
"""image u8 [B, H, W, 3], boxes f32 [B, M, 4], classes i32 [B, M], valid and crowd bool [B, M], area
and lane u8 [B, H, W], labelled bool [B, 3]."""


class SampleError(QyolopError):
    """A wrong sample or batch; the message names it and says what was expected."""


@dataclasses.dataclass
class Sample:
    """One image and its labels. Boxes are half-open, in pixels of this image."""

    image: np.ndarray
    """[H, W, 3] uint8, RGB."""
    boxes: np.ndarray
    """[n, 4] float32, (x1, y1, x2, y2)."""
    classes: np.ndarray
    """[n] int32, index into the detection classes."""
    crowd: np.ndarray
    """[n] bool: several objects, or one that does not count; it gets no loss and no metric."""
    area: np.ndarray
    """[H, W] uint8: 0 to 2, `UNKNOWN` or `IGNORE`."""
    lane: np.ndarray
    """[H, W] uint8: 0 to 3, `UNKNOWN` or `IGNORE`."""
    labelled: tuple[bool, bool, bool]
    """Which of detection, area and lane have labels."""
    name: str = ""


def make_sample(
    image: ArrayLike,
    boxes: ArrayLike | None = None,
    classes: ArrayLike | None = None,
    crowd: ArrayLike | None = None,
    area: ArrayLike | None = None,
    lane: ArrayLike | None = None,
    name: str = "",
) -> Sample:
    """A `Sample` with the labels that are given; a task whose label is None is unlabelled."""
    image = np.asarray(image)
    ignored = np.full(image.shape[:2], IGNORE, np.uint8)
    boxes_n4 = np.asarray([] if boxes is None else boxes, np.float32).reshape(-1, 4)
    n = len(boxes_n4)
    return Sample(
        image,
        boxes_n4,
        np.asarray([] if classes is None else classes, np.int32).reshape(-1),
        np.zeros(n, bool) if crowd is None else np.asarray(crowd, bool).reshape(-1),
        ignored if area is None else np.asarray(area),
        ignored.copy() if lane is None else np.asarray(lane),
        (boxes is not None, area is not None, lane is not None),
        name,
    )


def check_sample(
    sample: Sample,
    detection: Sequence[str] = DETECTION,
    area: Sequence[str] = AREA,
    lane: Sequence[str] = LANE,
) -> Sample:
    """The same sample. Raises a SampleError that says what is wrong with it."""
    where = f"sample {sample.name or '(no name)'}"
    image = sample.image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise SampleError(
            f"{where}: image {image.dtype}{list(image.shape)}; expected uint8[H, W, 3], not empty"
        )
    height, width = image.shape[:2]
    for task, mask, kinds, known in zip(
        TASKS[1:], (sample.area, sample.lane), (area, lane), sample.labelled[1:], strict=True
    ):
        if mask.dtype != np.uint8 or mask.shape != (height, width):
            raise SampleError(
                f"{where}: {task} mask {mask.dtype}{list(mask.shape)}; expected uint8 of the "
                f"image's size [{height}, {width}]"
            )
        values = np.flatnonzero(np.bincount(mask.reshape(-1), minlength=256))
        allowed = {*range(len(kinds)), UNKNOWN, IGNORE} if known else {IGNORE}
        if wrong := sorted(set(values.tolist()) - allowed):
            raise SampleError(
                f"{where}: {task} mask has values {wrong}; expected "
                + (f"0 to {len(kinds) - 1}, 254 or 255" if known else "255 alone, as unlabelled")
            )
    boxes, n = sample.boxes, len(sample.boxes)
    if boxes.dtype != np.float32 or boxes.shape != (n, 4):
        raise SampleError(f"{where}: boxes {boxes.dtype}{list(boxes.shape)}; expected float32[n,4]")
    if len(sample.classes) != n or len(sample.crowd) != n:
        raise SampleError(
            f"{where}: {n} boxes, {len(sample.classes)} classes and {len(sample.crowd)} crowd "
            "flags; expected as many of each"
        )
    if n and not sample.labelled[0]:
        raise SampleError(f"{where}: {n} boxes, though detection is not labelled")
    inside = (boxes >= 0).all(1) & (boxes <= [width, height, width, height]).all(1)
    good = inside & (boxes[:, 2:] > boxes[:, :2]).all(1)
    if not good.all():
        bad = boxes[~good][0].tolist()
        raise SampleError(
            f"{where}: box {bad}; expected x1 < x2 and y1 < y2 within {width}x{height} pixels"
        )
    if n and not (sample.classes.min() >= 0 and sample.classes.max() < len(detection)):
        raise SampleError(
            f"{where}: class {int(sample.classes.max())}; there are {len(detection)} classes"
        )
    return sample


Counted = tuple[str, str, int]
"""Reason, name and times, as `Report.count` takes them."""
_caught = threading.local()


class Report:
    """What was skipped or changed, how often, and the first names. Threads may share one."""

    SHOWN = 3  # names for each reason

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}
        self._lock = threading.Lock()

    def count(self, reason: str, name: str = "", times: int = 1) -> None:
        """Adds `times` to the count of a reason; zero adds nothing."""
        if times < 1:
            return
        if (counted := getattr(_caught, "counted", None)) is not None:
            counted.append((reason, name, times))
            return
        with self._lock:
            self.counts[reason] += times
            shown = self.names.setdefault(reason, [])
            if name and name not in shown and len(shown) < self.SHOWN:
                shown.append(name)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """One line for each reason, most frequent first."""
        with self._lock:
            if not self.counts:
                return "nothing was skipped"
            lines = []
            for reason, times in self.counts.most_common():
                names = ", ".join(self.names[reason])
                more = ", …" if names and times > len(self.names[reason]) else ""
                lines.append(f"{times} x {reason}" + (f" ({names}{more})" if names else ""))
            return "\n".join(lines)

    def __getstate__(self):
        return {"counts": self.counts, "names": self.names}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())


@contextlib.contextmanager
def caught() -> Iterator[list[Counted]]:
    """A list of what this thread counts in the block; no report hears of it."""
    _caught.counted = counted = []
    try:
        yield counted
    finally:
        _caught.counted = None


def clip_boxes(boxes_n4: ArrayLike, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [n, 4] clipped to the image, and which of them [n] have an area left."""
    boxes = np.asarray(boxes_n4, np.float32).reshape(-1, 4)
    clipped = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    return clipped, (clipped[:, 2:] > clipped[:, :2]).all(1)


def collate(samples: Sequence[Sample], max_boxes: int = 64, report: Report | None = None) -> Batch:
    """A `Batch` of samples of one size, each with `max_boxes` places for boxes.

    Where a sample has more boxes, crowds and then the smallest are dropped, and `report` counts
    them. Without a report that is a SampleError, because an object without a label would be
    learned as background.
    """
    if not samples:
        raise SampleError("a batch of no samples; expected at least one")
    sizes = {s.image.shape for s in samples}
    if len(sizes) > 1:
        raise SampleError(
            f"images of {len(sizes)} sizes in a batch, {sorted(sizes)}; letterbox them to one"
        )
    if max_boxes < 1:
        raise SampleError(f"max_boxes is {max_boxes}; expected at least 1")
    size = len(samples)
    boxes = np.zeros((size, max_boxes, 4), np.float32)
    classes = np.zeros((size, max_boxes), np.int32)
    valid, crowd = (np.zeros((size, max_boxes), bool) for _ in range(2))
    for i, s in enumerate(samples):
        kept = np.arange(len(s.boxes))
        if len(kept) > max_boxes:
            if report is None:
                raise SampleError(
                    f"sample {s.name or i}: {len(kept)} boxes do not fit into {max_boxes} places; "
                    "raise max_boxes, or pass a report to drop and count the smallest"
                )
            report.count(f"box beyond {max_boxes} an image", s.name, len(kept) - max_boxes)
            extent = (s.boxes[:, 2:] - s.boxes[:, :2]).prod(1)
            kept = np.sort(np.lexsort((-extent, s.crowd))[:max_boxes])
        n = len(kept)
        boxes[i, :n], classes[i, :n], crowd[i, :n] = s.boxes[kept], s.classes[kept], s.crowd[kept]
        valid[i, :n] = True
    return dict(
        image=np.stack([s.image for s in samples]),
        boxes=boxes,
        classes=classes,
        valid=valid,
        crowd=crowd,
        area=np.stack([s.area for s in samples]),
        lane=np.stack([s.lane for s in samples]),
        labelled=np.array([s.labelled for s in samples], bool),
    )
