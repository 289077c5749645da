"""Images with boxes, areas and lanes drawn on them, and panels of several images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.extras import need
from llm_jax.files import atomic_file
from qyolop_jax.config import UNKNOWN, ModelConfig
from qyolop_jax.samples import SampleError

DETECTION_COLORS = (
    (255, 92, 92), (72, 180, 255), (255, 176, 40), (196, 120, 255), (120, 230, 160),
    (240, 120, 200),
)  # fmt: skip
AREA_COLORS = ((48, 208, 96), (60, 130, 246), (240, 190, 70))
LANE_COLORS = ((255, 226, 40), (255, 64, 160), (0, 236, 236), (255, 140, 0))
UNKNOWN_AREA, UNKNOWN_LANE = (150, 196, 110), (250, 250, 250)
CROWD = (150, 150, 150)


def _tint(image, mask, colors, unknown, strength: float) -> None:
    """Mixes the colour of its class into each pixel of a mask that is foreground."""
    table = np.zeros((256, 3), np.float32)
    share = np.zeros(256, np.float32)
    for value in range(1, UNKNOWN):
        table[value], share[value] = colors[(value - 1) % len(colors)], strength
    table[UNKNOWN], share[UNKNOWN], share[255] = unknown, strength, 0.0
    here = share[mask] > 0
    values = mask[here]
    image[here] += share[values][:, None] * (table[values] - image[here])


def overlay(
    image: np.ndarray,
    found: Any,
    cfg: ModelConfig | None = None,
    conf: float = 0.25,
    width: int | None = None,
) -> np.ndarray:
    """A uint8 RGB copy of the image, with everything that was found or is labelled drawn on it.

    `found` has boxes [n, 4], classes [n], masks area and lane [H, W] in pixels of the image, and
    perhaps scores [n]: a `Sample`, or `postprocess.Found`. Boxes with a score below `conf` are left
    out; crowds are grey. `width` scales the result to that many columns.
    """
    cv2 = need("cv2", "vision", "drawing on images")
    cfg = ModelConfig() if cfg is None else cfg
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise SampleError(f"image {image.dtype}{list(image.shape)}; expected uint8[H, W, 3]")
    size = image.shape[:2]
    masks = [np.asarray(found.area), np.asarray(found.lane)]
    for name, mask in zip(("area", "lane"), masks, strict=True):
        if mask.shape != size:
            raise SampleError(f"{name} mask {list(mask.shape)} on an image of {list(size)}")
    factor = (width or size[1]) / size[1]
    if factor != 1.0:
        to = (width, max(round(size[0] * factor), 1))
        image = cv2.resize(image, to, interpolation=cv2.INTER_AREA if factor < 1 else 2)
        masks = [cv2.resize(m, to, interpolation=cv2.INTER_NEAREST_EXACT) for m in masks]
    canvas = image.astype(np.float32)
    _tint(canvas, masks[0], AREA_COLORS, UNKNOWN_AREA, 0.34)
    _tint(canvas, masks[1], LANE_COLORS, UNKNOWN_LANE, 0.75)
    canvas = np.clip(canvas, 0, 255).astype(np.uint8)

    boxes, classes = np.asarray(found.boxes), np.asarray(found.classes)
    scores = getattr(found, "scores", None)
    scores = None if scores is None else np.asarray(scores)
    crowd = np.asarray(getattr(found, "crowd", np.zeros(len(boxes), bool)))
    order = range(len(boxes)) if scores is None else np.argsort(scores)  # the best on top
    thick = max(1, round(canvas.shape[1] / 480))
    for i in order:
        if scores is not None and scores[i] < conf:
            continue
        kind = int(classes[i])
        color = CROWD if crowd[i] else DETECTION_COLORS[kind % len(DETECTION_COLORS)]
        x1, y1, x2, y2 = (int(v) for v in np.round(boxes[i] * factor))
        cv2.rectangle(canvas, (x1, y1), (max(x2 - 1, x1), max(y2 - 1, y1)), color, thick)
        text = cfg.detection[kind] + ("" if scores is None else f" {scores[i]:.2f}")
        write_text(canvas, text + (" (crowd)" if crowd[i] else ""), x1, y1, color)
    return canvas


def write_text(
    canvas: np.ndarray,
    text: str,
    x: int,
    y: int,
    color: Sequence[int],
    larger: float = 1.0,
    back: bool = True,
) -> None:
    """Writes text above (x, y), inside the image, on a plate of this colour, in place."""
    cv2 = need("cv2", "vision", "drawing on images")
    scale = max(0.3, canvas.shape[1] / 1800) * larger
    (wide, high), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    x = max(min(x, canvas.shape[1] - wide - 2), 0)
    y = max(y, high + base + 1)
    if back:
        plate = tuple(int(c) for c in color)
        cv2.rectangle(canvas, (x, y - high - base), (x + wide + 2, y), plate, -1)
        color = (0, 0, 0) if np.dot(color, (0.3, 0.59, 0.11)) > 110 else (255, 255, 255)
    at = (x + 1, y - base // 2 - 1)
    cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, color, 1, cv2.LINE_AA)


def panel(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] = (), gap: int = 6
) -> np.ndarray:
    """One image that shows rows of images, all scaled to the size of the first, under titles.

    A row is usually (labels, prediction) of one image; the end of a shorter row stays dark.
    """
    cv2 = need("cv2", "vision", "drawing on images")
    if not rows or not rows[0]:
        raise SampleError("a panel of no images; expected at least one row of at least one")
    columns = max(len(r) for r in rows)
    if titles and len(titles) != columns:
        raise SampleError(f"{len(titles)} titles for {columns} columns")
    height, width = rows[0][0].shape[:2]
    head = max(22, width // 22) if titles else 0
    shape = (head + len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3)
    canvas = np.full(shape, 24, np.uint8)
    for j, title in enumerate(titles):
        x = gap + j * (width + gap)
        strip = canvas[: head + gap, x : x + width]
        write_text(strip, title, 0, head, (235, 235, 235), 1.7, back=False)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            y, x = head + gap + i * (height + gap), gap + j * (width + gap)
            if image.shape[:2] != (height, width):
                image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            canvas[y : y + height, x : x + width] = image
    return canvas


def legend(cfg: ModelConfig | None = None, width: int = 640) -> np.ndarray:
    """An image that says which colour is which class."""
    cv2 = need("cv2", "vision", "drawing on images")
    cfg = ModelConfig() if cfg is None else cfg
    entries = [
        *zip(cfg.detection, DETECTION_COLORS, strict=False),
        *((f"{n} lane", c) for n, c in zip(cfg.area[1:], AREA_COLORS, strict=False)),
        *((f"{n} line", c) for n, c in zip(cfg.lane[1:], LANE_COLORS, strict=False)),
    ]
    scale, x, y, line = max(0.3, width / 1800), 6, 6, max(16, width // 40)
    places = []
    for text, color in entries:
        (wide, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        if x > 6 and x + line + wide > width:
            x, y = 6, y + line + 4
        places.append((text, color, x, y))
        x += line + wide + 14
    canvas = np.full((y + line + 6, width, 3), 24, np.uint8)
    for text, color, x, y in places:
        cv2.rectangle(canvas, (x, y + 2), (x + line - 6, y + line - 4), color, -1)
        at = (x + line, y + line - 5)
        cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, (235,) * 3, 1, cv2.LINE_AA)
    return canvas


def save_image(path: str | Path, image: np.ndarray) -> None:
    """Writes an RGB image, whole or not at all; the suffix decides the format."""
    cv2 = need("cv2", "vision", "drawing on images")
    path = Path(path)
    try:
        good, data = cv2.imencode(path.suffix, np.ascontiguousarray(np.asarray(image)[..., ::-1]))
    except cv2.error:  # a suffix that it does not know
        good = False
    if not good:
        raise SampleError(f"{path} could not be written as an image; take .png or .jpg")
    with atomic_file(path) as scratch:
        scratch.write_bytes(data.tobytes())
