"""Generated road scenes with exact labels of every class, to try everything at once.

A flat road seen from a car: lanes, painted lines, road users, surroundings, weather. Scenes do not
replace real images; say "synthetic" about what is measured on them. Lengths are metres, the camera
looks along Z, and x on the road is measured from the middle of the car's own lane.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np

from llm_jax.extras import need
from qyolop_jax.config import DETECTION
from qyolop_jax.samples import Sample, SampleError, make_sample
from qyolop_jax.scenes import figures
from qyolop_jax.scenes.clutter import backdrop, light_and_noise
from qyolop_jax.scenes.figures import Figure
from qyolop_jax.scenes.road import World, road, shadow, world

FINE = 3  # figures are drawn this many times larger, then averaged
MIN_SIDE = 4  # least side of a box in pixels
MIN_SEEN = 0.45  # a figure with a smaller visible share is left out of the scene


def users(w: World, rng: np.random.Generator) -> list[tuple[int, float, float, Figure]]:
    """Candidates (class, x, z, figure); none is inside another."""
    found = []

    def add(name, x, z, oncoming=False):
        f = Figure()
        if name == "vehicle":
            figures.vehicle(f, rng, -1.0 if x + w.along(z) > 0 else 1.0, oncoming)
        elif name == "pedestrian":
            figures.pedestrian(f, rng)
        else:
            getattr(figures, name)(f, rng, oncoming)
        found.append((DETECTION.index(name), float(x), float(z), f))

    for i in range(len(w.edges) - 1):
        middle = (w.edges[i] + w.edges[i + 1]) / 2
        z = rng.uniform(8, 26) if i == w.own else rng.uniform(5, 22)
        while z < 62 and rng.random() < 0.72:
            name = str(rng.choice(["vehicle", "scooter", "bicycle"], p=(0.6, 0.23, 0.17)))
            side = 0.3 if name == "vehicle" else 1.2
            if name == "vehicle" or z < 34:
                add(name, middle + rng.uniform(-side, side), z, i < w.oncoming)
            z += rng.uniform(8, 26) + (10 if name == "vehicle" else 0)
    for s, edge in ((-1, w.edges[0]), (1, w.edges[-1])):
        if rng.random() < 0.3:  # parked beside the road
            z = rng.uniform(7, 14)
            for _ in range(rng.integers(1, 5)):
                add("vehicle", edge + s * 1.5, z, s < 0)
                z += rng.uniform(6.5, 9)
            continue
        if rng.random() < 0.35:
            add("bicycle", edge - s * rng.uniform(0.3, 0.6), rng.uniform(6, 24), s < 0)
        if rng.random() < 0.25:
            add("scooter", edge + s * rng.uniform(0.6, 1.4), rng.uniform(6, 24), s < 0)
        for _ in range(rng.integers(0, 4)):
            add("pedestrian", edge + s * rng.uniform(0.9, 2.6), rng.uniform(5, 26))
    if rng.random() < 0.2:
        for _ in range(rng.integers(1, 4)):
            add("pedestrian", rng.uniform(w.edges[0], w.edges[-1]), rng.uniform(9, 22))
    return found


def rasterize(
    shapes: Sequence[tuple], height: int, width: int
) -> tuple[int, int, np.ndarray, np.ndarray] | None:
    """(row, column, colour [h, w, 3] times cover, cover [h, w]) of the part inside the image.

    None if less than a quarter of the figure's extent is inside.
    """
    cv2 = need("cv2", "vision", "drawing scenes")
    every = np.concatenate([c for rings, _ in shapes for c in rings])
    low, high = every.min(0), every.max(0)
    x1, y1 = np.maximum(np.floor(low), 0).astype(int)
    x2, y2 = np.minimum(np.ceil(high), (width, height)).astype(int)
    if x2 <= x1 or y2 <= y1 or (x2 - x1) * (y2 - y1) < 0.25 * np.prod(high - low):
        return None
    fine = FINE if (x2 - x1) * (y2 - y1) < 8000 else 2
    canvas = np.zeros(((y2 - y1) * fine, (x2 - x1) * fine, 4), np.uint8)
    flat = np.round(((every - (x1, y1)) * fine - 0.5) * 16).astype(np.int32)  # 1/16 pixels
    sizes = [len(c) for rings, _ in shapes for c in rings]
    parts = iter(np.split(flat, np.cumsum(sizes)[:-1]))
    for rings, color in shapes:
        cv2.fillPoly(canvas, [next(parts) for _ in rings], (*color, 255.0), cv2.LINE_8, 4)
    small = cv2.resize(canvas, (int(x2 - x1), int(y2 - y1)), interpolation=cv2.INTER_AREA)
    return y1, x1, small[..., :3].astype(np.float32), small[..., 3].astype(np.float32) / 255


def scene(seed: int | Sequence[int], size: tuple[int, int] = (192, 320)) -> Sample:
    """The `Sample` of a seed: labels for all three tasks, boxes of what is visible, no crowds.

    Every road user in the image has a box; those that would be too small or too hidden are not
    drawn. Masks show what is visible: 0 where a road user covers a lane or a line. SampleError for
    less than 64x64 pixels.
    """
    height, width = size
    if height < 64 or width < 64:
        raise SampleError(f"a scene of {height}x{width} pixels; expected at least 64x64")
    rng = np.random.default_rng(seed)
    w = world(rng, height, width)
    image, ground = backdrop(w, rng)
    image = image.astype(np.float32)
    area, lane = road(w, rng, image, ground)

    placed, taken = [], np.zeros((height, width), bool)
    for kind, x, z, figure in sorted(users(w, rng), key=lambda u: u[2]):  # nearest first
        shapes, lamps = figure.projected(partial(w.put, x, z))
        drawn = rasterize(shapes, height, width)
        if drawn is None:
            continue
        y0, x0, color, cover = drawn
        here = slice(y0, y0 + cover.shape[0]), slice(x0, x0 + cover.shape[1])
        solid = cover >= 0.5
        seen = solid & ~taken[here]
        ys, xs = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        if (
            seen.sum() < MIN_SEEN * max(solid.sum(), 1)
            or min(np.ptp(ys), np.ptp(xs)) + 1 < MIN_SIDE
        ):
            continue
        taken[here] |= solid
        box = x0 + xs[0], y0 + ys[0], x0 + xs[-1] + 1, y0 + ys[-1] + 1
        placed.append((kind, x, z, here, color, cover, lamps, box))

    owner = np.full((height, width), -1, np.int16)
    for i in range(len(placed) - 1, -1, -1):  # farthest first
        kind, x, z, here, color, cover, *_ = placed[i]
        shadow(w, image, x, z, 1.0 if kind == DETECTION.index("vehicle") else 0.35, ground)
        fog = np.float32(np.exp(-z / ground["sight"]))
        part = cover[..., None]
        haze = np.asarray(ground["haze"], np.float32)
        image[here] = image[here] * (1 - part) + color * fog + haze * part * (1 - fog)
        owner[here][cover >= 0.5] = i
    area[owner >= 0], lane[owner >= 0] = 0, 0
    lamps = []
    for i, (*_, found, _) in enumerate(placed):
        for (u, v), radius, color in found:
            inside = 0 <= u < width and 0 <= v < height
            if inside and owner[int(v), int(u)] == i:
                lamps.append((u, v, radius, color))
    image = light_and_noise(w, rng, image, lamps, ground)
    boxes, classes = [p[-1] for p in placed], [p[0] for p in placed]
    if rng.random() < 0.3:  # traffic on the left
        image, area, lane = (np.ascontiguousarray(a[:, ::-1]) for a in (image, area, lane))
        boxes = [(width - x2, y1, width - x1, y2) for x1, y1, x2, y2 in boxes]
    return make_sample(image, boxes, classes, None, area, lane, f"scene {seed}")


@dataclasses.dataclass(frozen=True)
class Scenes(Sequence):
    """A sequence of generated scenes: number i is `scene((seed, i), size)`."""

    count: int
    size: tuple[int, int] = (192, 320)
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        return scene((self.seed, index), self.size)
