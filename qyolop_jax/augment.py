"""Images and their labels warped together: letterbox, random perspective, mosaic, flip, colour.

Every source image is warped by one homography, applied to the image (bilinear), the boxes (their
corners) and both masks (nearest), so that they stay aligned; a mosaic is four of them on a canvas.
Points are continuous: pixel i covers [i, i + 1). All randomness comes from a NumPy generator.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from llm_jax.extras import need
from qyolop_jax import QyolopError
from qyolop_jax.config import IGNORE
from qyolop_jax.postprocess import Transform
from qyolop_jax.samples import Sample, SampleError

GREY = 114  # the value outside of all images


class AugmentError(QyolopError):
    """An impossible setting; the message says what is possible."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How much images are changed; the defaults are the paper's (YOLOP's without rotation)."""

    scale: float = 0.25
    """The size is multiplied by 1 - scale to 1 + scale."""
    translate: float = 0.1
    """Largest shift, as a share of width and height, in either direction."""
    rotate: float = 0.0
    """Degrees, in either direction."""
    shear: float = 0.0
    """Degrees, in either direction."""
    perspective: float = 0.0
    """Largest value for each pixel and axis; 0.001 is strong."""
    hue: float = 0.015
    saturation: float = 0.7
    value: float = 0.4
    flip: float = 0.5
    """Probability of a mirrored image."""
    mosaic: float = 0.0
    """Probability of a mosaic of four images."""
    least_side: float = 2.0
    """A box stays if its sides are longer than this, in pixels,"""
    least_share: float = 0.1
    """if more than this share of its area is inside,"""
    most_aspect: float = 20.0
    """and if its longer side is less than this many times its shorter side."""

    def __post_init__(self):
        wrong = [
            f"{name} {getattr(self, name)}"
            for name in ("flip", "mosaic", "hue", "saturation", "value", "translate")
            if not 0 <= getattr(self, name) <= 1
        ]
        wrong += [] if 0 <= self.scale < 1 else [f"scale {self.scale}"]
        wrong += [] if 0 <= self.perspective <= 0.002 else [f"perspective {self.perspective}"]
        wrong += [] if 0 <= self.least_share < 1 else [f"least_share {self.least_share}"]
        wrong += [] if 0 <= self.least_side < 1e4 else [f"least_side {self.least_side}"]
        wrong += [] if self.most_aspect > 1 else [f"most_aspect {self.most_aspect}"]
        wrong += [
            f"{name} {getattr(self, name)}"
            for name in ("rotate", "shear")
            if not 0 <= getattr(self, name) < 80
        ]
        if wrong:
            raise AugmentError(
                f"{', '.join(wrong)}; expected shares and probabilities in 0 to 1, scale below 1, "
                "degrees below 80, perspective up to 0.002, a least side of 0 or more pixels and a "
                "most aspect above 1"
            )


def largest_scale(size: tuple[int, int], into: tuple[int, int]) -> float:
    """The largest scale at which an image of this size (H, W) fits into another."""
    return min(into[0] / size[0], into[1] / size[1])


def moved(x: float, y: float) -> np.ndarray:
    """The 3x3 matrix of a translation."""
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def scaled(x: float, y: float) -> np.ndarray:
    """The 3x3 matrix of a scaling."""
    return np.diag([x, y, 1.0])


def map_points(matrix: np.ndarray, points_n2: ArrayLike) -> np.ndarray:
    """Points [n, 2] through a homography; NaN where one lies at or behind the horizon."""
    points = np.asarray(points_n2, np.float64).reshape(-1, 2)
    x, y, w = matrix @ np.stack([*points.T, np.ones(len(points))])
    w = np.where(w > 1e-6, w, np.nan)
    return np.stack([x / w, y / w], 1)


def map_boxes(matrix: np.ndarray, boxes_n4: ArrayLike) -> np.ndarray:
    """The extents [n, 4] of boxes whose four corners went through a homography."""
    boxes = np.asarray(boxes_n4, np.float64).reshape(-1, 4)
    corners = map_points(matrix, boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2))
    corners = corners.reshape(-1, 4, 2)
    return np.concatenate([corners.min(1), corners.max(1)], 1)


def _pixels(matrix) -> np.ndarray:
    """The matrix between pixel indices, whose centres are half a pixel on."""
    return moved(-0.5, -0.5) @ matrix @ moved(0.5, 0.5)


def warp_image(
    image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], border: int | None = GREY
) -> np.ndarray:
    """An image [H, W, 3] through a homography; where it shrinks, it is averaged first.

    `border` is the grey value around it; None repeats the pixels of its edge.
    """
    cv2 = need("cv2", "vision", "warping images")
    height, width = image.shape[:2]
    # local scales along x and y, at the image's middle
    middle = np.array([width / 2, height / 2])
    around = map_points(matrix, middle + np.array([(0, 0), (1, 0), (0, 1)]))
    across = [np.hypot(*(around[i] - around[0])) for i in (1, 2)]
    small = [
        max(round(n * s), 1) if s < 0.75 else n
        for n, s in zip((width, height), across, strict=True)
    ]
    if small != [width, height]:
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        matrix = matrix @ scaled(width / small[0], height / small[1])
    mode = cv2.BORDER_REPLICATE if border is None else cv2.BORDER_CONSTANT
    return cv2.warpPerspective(
        image, _pixels(matrix), size[::-1], flags=cv2.INTER_LINEAR, borderMode=mode,
        borderValue=(border or 0,) * 3,
    )  # fmt: skip


def warp_mask(
    mask: np.ndarray, matrix: np.ndarray, size: tuple[int, int], border: int = IGNORE
) -> np.ndarray:
    """A mask [H, W] through a homography: the value under each pixel's centre."""
    cv2 = need("cv2", "vision", "warping images")
    return cv2.warpPerspective(
        mask, _pixels(matrix), size[::-1], flags=cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_CONSTANT, borderValue=border,
    )  # fmt: skip


def compose(
    parts: Sequence[tuple[Sample, np.ndarray]],
    size: tuple[int, int],
    cfg: AugmentConfig | None = None,
) -> Sample:
    """One sample of this size from several, each through its homography.

    Masks are `IGNORE` outside of all images and where a part has no labels for the task; a mask is
    labelled if that of any part is. Detection is labelled only if it is in all parts, because an
    object without a box would be learned as background. Boxes outside are dropped, and with `cfg`
    also those that it calls too small.
    """
    height, width = size
    image = np.full((height, width, 3), GREY, np.uint8)
    area, lane = (np.full(size, IGNORE, np.uint8) for _ in range(2))
    boxes, classes, crowd = [], [], []
    alone = len(parts) == 1
    for s, matrix in parts:
        if alone:
            image = warp_image(s.image, matrix, size)
            area, lane = (warp_mask(mask, matrix, size) for mask in (s.area, s.lane))
        else:
            paste(s, matrix, (image, area, lane))
        kept, cut = keep_boxes(map_boxes(matrix, s.boxes), size, cfg)
        boxes.append(cut[kept])
        classes.append(s.classes[kept])
        crowd.append(s.crowd[kept])
    detection = all(s.labelled[0] for s, _ in parts)
    return Sample(
        image,
        np.concatenate(boxes).astype(np.float32) if detection else np.zeros((0, 4), np.float32),
        np.concatenate(classes) if detection else np.zeros(0, np.int32),
        np.concatenate(crowd) if detection else np.zeros(0, bool),
        area,
        lane,
        (detection, *(any(s.labelled[t] for s, _ in parts) for t in (1, 2))),
        "+".join(s.name for s, _ in parts),
    )


def paste(s: Sample, matrix: np.ndarray, onto: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Draws a sample through a homography onto (image, area, lane), in place."""
    cv2 = need("cv2", "vision", "warping images")
    size, source = onto[0].shape[:2], s.image.shape[:2]
    extent = map_boxes(matrix, [[0, 0, source[1], source[0]]])[0]
    if not np.isfinite(extent).all():  # it crosses the horizon
        extent = np.array([0, 0, size[1], size[0]])
    x1, y1 = np.clip(np.floor(extent[:2]), 0, size[::-1]).astype(int)
    x2, y2 = np.clip(np.ceil(extent[2:]), 0, size[::-1]).astype(int)
    if x1 >= x2 or y1 >= y2:
        return
    matrix, part = moved(-x1, -y1) @ matrix, (y2 - y1, x2 - x1)
    here = warp_mask(np.ones(source, np.uint8), matrix, part, 0)
    drawn = (
        warp_image(s.image, matrix, part, None),
        *(warp_mask(m, matrix, part) for m in (s.area, s.lane)),
    )
    for new, whole in zip(drawn, onto, strict=True):
        cv2.copyTo(new, here, whole[y1:y2, x1:x2])


def keep_boxes(
    full_n4: np.ndarray, size: tuple[int, int], cfg: AugmentConfig | None
) -> tuple[np.ndarray, np.ndarray]:
    """(which boxes stay [n], all of them [n, 4] clipped to the image)."""
    full = np.asarray(full_n4, np.float64)
    edge = np.array([size[1], size[0], size[1], size[0]], np.float64)
    cut = np.clip(full, 0, edge)
    cut32 = cut.astype(np.float32)  # what is stored must have an area left
    sides = cut[:, 2:] - cut[:, :2]
    good = np.isfinite(full).all(1) & (cut32[:, 2:] > cut32[:, :2]).all(1)
    if cfg is not None:
        long, short = sides.max(1, initial=0), np.maximum(sides.min(1, initial=np.inf), 1e-9)
        share = sides.prod(1) / np.maximum((full[:, 2:] - full[:, :2]).prod(1), 1e-9)
        good &= (sides > cfg.least_side).all(1) & (share > cfg.least_share)
        good &= long / short < cfg.most_aspect
    return good, cut


def letterbox_matrix(size: tuple[int, int], into: tuple[int, int]) -> tuple[np.ndarray, Transform]:
    """The homography that centres an image in another size, and the same as a `Transform`."""
    scale = largest_scale(size, into)
    dy, dx = ((n - m * scale) / 2 for n, m in zip(into, size, strict=True))
    return moved(dx, dy) @ scaled(scale, scale), Transform(scale, dx, dy, tuple(size))


def letterbox(s: Sample, size: tuple[int, int]) -> tuple[Sample, Transform]:
    """The sample scaled to fit and centred, with grey, ignored pixels around it; and its transform.

    720x1280 into 384x640 has scale 0.5, with 12 rows above and below.
    """
    matrix, transform = letterbox_matrix(s.image.shape[:2], size)
    return dataclasses.replace(compose([(s, matrix)], size), name=s.name), transform


def letterbox_image(image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, Transform]:
    """The same for an image without labels."""
    matrix, transform = letterbox_matrix(image.shape[:2], size)
    return warp_image(image, matrix, size), transform


def perspective_matrix(
    rng: np.random.Generator, cfg: AugmentConfig, canvas: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """A random homography from a canvas (H, W) to an image of `size`, centre to centre."""
    centre = moved(-canvas[1] / 2, -canvas[0] / 2)
    bend = np.eye(3)
    bend[2, :2] = rng.uniform(-cfg.perspective, cfg.perspective, 2)
    angle = np.deg2rad(rng.uniform(-cfg.rotate, cfg.rotate))
    scale = rng.uniform(1 - cfg.scale, 1 + cfg.scale)
    turn = np.eye(3)
    turn[:2, :2] = scale * np.array([[np.cos(angle), -np.sin(angle)],
                                     [np.sin(angle), np.cos(angle)]])  # fmt: skip
    slant = np.eye(3)
    slant[0, 1], slant[1, 0] = np.tan(np.deg2rad(rng.uniform(-cfg.shear, cfg.shear, 2)))
    x, y = rng.uniform(0.5 - cfg.translate, 0.5 + cfg.translate, 2)
    return moved(x * size[1], y * size[0]) @ slant @ turn @ bend @ centre


def mosaic_parts(
    samples: Sequence[Sample], size: tuple[int, int], rng: np.random.Generator
) -> list[tuple[Sample, np.ndarray]]:
    """Four samples around a random point of a canvas of twice the size, each with its homography.

    The point is uniform between 0.5 and 1.5 times `size`; each image is scaled to fit `size` and
    has one corner at the point.
    """
    if len(samples) != 4:
        raise SampleError(f"a mosaic of {len(samples)} samples; expected 4")
    y, x = (rng.uniform(0.5 * n, 1.5 * n) for n in size)
    parts = []
    for i, s in enumerate(samples):
        height, width = s.image.shape[:2]
        scale = largest_scale((height, width), size)
        left, up = i % 2 == 0, i < 2
        at = moved(x - left * width * scale, y - up * height * scale)
        parts.append((s, at @ scaled(scale, scale)))
    return parts


def flip(s: Sample) -> Sample:
    """The sample mirrored left to right."""
    width = s.image.shape[1]
    x1, y1, x2, y2 = s.boxes.T
    mirror = lambda a: np.ascontiguousarray(a[:, ::-1])
    boxes = np.stack([width - x2, y1, width - x1, y2], 1)
    return dataclasses.replace(
        s, image=mirror(s.image), boxes=boxes, area=mirror(s.area), lane=mirror(s.lane)
    )


def recolour(image: np.ndarray, rng: np.random.Generator, cfg: AugmentConfig) -> np.ndarray:
    """The image with hue, saturation and value changed by random factors, as YOLO does."""
    cv2 = need("cv2", "vision", "warping images")
    gain = 1 + rng.uniform(-1, 1, 3) * (cfg.hue, cfg.saturation, cfg.value)
    if not (cfg.hue or cfg.saturation or cfg.value):
        return image
    x = np.arange(256)
    tables = [(x * gain[0]) % 180, np.clip(x * gain[1], 0, 255), np.clip(x * gain[2], 0, 255)]
    planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    planes = [cv2.LUT(p, t.astype(np.uint8)) for p, t in zip(planes, tables, strict=True)]
    return cv2.cvtColor(cv2.merge(planes), cv2.COLOR_HSV2RGB)


def augment(
    samples: Sequence[Sample], size: tuple[int, int], rng: np.random.Generator, cfg: AugmentConfig
) -> Sample:
    """One sample of this size, from one or as a mosaic of four, changed at random by `cfg`."""
    if len(samples) == 1:
        (s,) = samples
        matrix, _ = letterbox_matrix(s.image.shape[:2], size)
        warp = perspective_matrix(rng, cfg, size, size)
        parts = [(s, warp @ matrix)]
    else:
        parts = mosaic_parts(samples, size, rng)
        warp = perspective_matrix(rng, cfg, [2 * n for n in size], size)
        parts = [(s, warp @ matrix) for s, matrix in parts]
    found = compose(parts, size, cfg)
    found = dataclasses.replace(found, image=recolour(found.image, rng, cfg))
    return flip(found) if rng.random() < cfg.flip else found
