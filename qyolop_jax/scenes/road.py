"""The road of a generated scene: its geometry, its paint, and their masks.

Lengths are metres; x is measured from the middle of the car's own lane, z from the camera. Every
pixel of an edge gets the exact share that is covered.
"""

import dataclasses
from functools import partial
from typing import Any

import numpy as np

from qyolop_jax.config import LANE
from qyolop_jax.scenes.figures import shade


@dataclasses.dataclass(frozen=True)
class World:
    """A road and the camera on it."""

    height: int
    width: int
    focal: float
    horizon: float
    middle: float
    """Column of the image towards which the car points."""
    eye: float
    """Camera height."""
    bend: tuple[float, float, float]
    """The road's middle at distance Z is bend · (1, Z, Z²)."""
    edges: tuple[float, ...]
    """x of all lines from left to right; there is a lane between each two."""
    kinds: tuple[str, ...]
    """Kind of each line, from `LANE`."""
    own: int
    """Index of the car's own lane."""
    oncoming: int
    """Number of lanes, from the left, with traffic towards the car."""
    weather: str

    def along(self, z: Any) -> Any:
        """Lateral position of x = 0 at distance z."""
        return self.bend[0] + self.bend[1] * z + self.bend[2] * z * z

    def column(self, x: Any, z: Any) -> Any:
        """Image column of a point on the road."""
        return self.middle + self.focal * (x + self.along(z)) / z

    def put(self, x: Any, z: Any, points_n3: np.ndarray) -> np.ndarray:
        """Points (right, up, beyond) of a figure at (x, z), in pixels [n, 2]."""
        right, up, beyond = points_n3.T
        depth = np.maximum(z + beyond, 0.5)
        u = self.column(x + right, depth)
        return np.stack([u, self.horizon + self.focal * (self.eye - up) / depth], 1)


def world(rng: np.random.Generator, height: int, width: int) -> World:
    """A random road."""
    lane = rng.uniform(3.1, 3.7)
    left, right = (int(rng.choice(3, p=(0.25, 0.5, 0.25))) for _ in range(2))
    count = left + 1 + right
    edges = tuple((i - left - 0.5) * lane for i in range(count + 1))
    oncoming = left if rng.random() < 0.55 else 0
    kinds = ["dashed" if rng.random() < 0.75 else "single" for _ in edges]
    kinds[0], kinds[-1] = ("double" if rng.random() < 0.3 else "single"), "single"
    if oncoming:
        kinds[oncoming] = str(rng.choice(["double", "dashed", "single"], p=(0.7, 0.15, 0.15)))
    bend = (rng.uniform(-0.35, 0.35), rng.uniform(-0.025, 0.025), rng.normal(0, 7e-4))
    return World(
        height, width, width * rng.uniform(0.8, 1.0), height * rng.uniform(0.36, 0.48),
        width * rng.uniform(0.46, 0.54), rng.uniform(1.3, 1.7), bend, edges, tuple(kinds), left,
        oncoming, str(rng.choice(["day", "overcast", "dusk", "night", "rain"],
                                 p=(0.45, 0.2, 0.12, 0.13, 0.1))),
    )  # fmt: skip


def _dash_share(near, far, period, dash, start):
    """Share of the road [near, far] of each row that dashes cover."""
    done = lambda z: np.floor((z - start) / period) * dash + np.minimum((z - start) % period, dash)
    return (done(far) - done(near)) / (far - near)


def _beyond(x, a, b):
    """Share of the pixel [x - 1, x] to the right of an edge from a (top) to b (bottom).

    The mean of clip(x - e, 0, 1) over edges e from a to b.
    """
    summed = lambda s: np.square(np.clip(s, 0, 1)) / 2 + np.maximum(s, 1) - 1
    turn = b - a
    turn = np.where(np.abs(turn) < 0.02, np.float32(0.02), turn)
    return (summed(x - a) - summed(x - a - turn)) / turn


def road(
    w: World, rng: np.random.Generator, image: np.ndarray, ground: dict
) -> tuple[np.ndarray, np.ndarray]:
    """Paints the road into a float image, in place; the masks (area, lane) of an empty road."""
    top = int(np.ceil(w.horizon)) + 1
    rows = np.arange(top, w.height)[:, None]
    distance = lambda v: w.focal * w.eye / np.maximum(v - w.horizon, 0.3)
    z, near, far = distance(rows + 0.5), distance(rows + 1), distance(rows)
    column = np.arange(w.width)[None] + 0.5
    at = partial(w.column, z=z)
    haze = np.exp(-z / ground["sight"]).astype(np.float32)
    lower = image[top:].reshape(-1, 3)

    def paint(x1, x2, color, share=None, least=0.0):
        """Paints the strip from x1 to x2. Returns (flat indices of pixels, share of each covered).

        `share` [rows, 1] of it is painted; it is at least `least` pixels wide.
        """
        used = rows if share is None else rows[share[:, 0] > 0]
        depth = distance(np.stack([used, used + 1]))
        at = lambda x: w.column(x, depth).astype(np.float32)
        a, b = at(x1), at(x2)  # [top and bottom of the row, rows, 1]
        if least:
            slope = (a[1] - a[0] + b[1] - b[0]) / 2
            grow = np.maximum(np.float32(least) * np.sqrt(1 + slope * slope) - (b - a), 0) / 2
            a, b = a - grow, b + grow
        start = np.floor(np.minimum(*a))
        size = int(np.clip(np.max(np.maximum(*b) - start, initial=0) + 2, 1, w.width))
        if wide := share is None and size > 0.3 * w.width:
            size = w.width
        start = np.clip(start, 0, w.width - size).astype(int)
        place = start + np.arange(size)  # only pixels near the strip, so that thin ones are fast
        right = (place + 1).astype(np.float32)
        cover = _beyond(right, *a) - _beyond(right, *b)
        if share is not None:
            cover *= share[share[:, 0] > 0].astype(np.float32)
        flat = (used - top) * w.width + place
        mix = (cover * haze[used[:, 0] - top])[..., None]
        color = np.asarray(color, np.float32)
        if wide:
            lower[:] += mix.reshape(-1, 1) * (color - lower)
        else:
            old = lower[flat]
            lower[flat] = old + mix * (color - old)
        return flat, cover

    first, last = w.edges[0], w.edges[-1]
    for s, edge in ((-1, first), (1, last)):
        x = sorted((edge + s * 0.3, edge + s * ground["walk"]))
        paint(*x, ground["pavement"])
        x = sorted((edge + s * 0.28, edge + s * 0.5))
        paint(*x, shade(ground["pavement"], 1.12))
    paint(first - 0.35, last + 0.35, ground["asphalt"])
    for i in range(len(w.edges) - 1):  # wheel tracks
        middle = (w.edges[i] + w.edges[i + 1]) / 2
        for x in (middle - 0.8, middle + 0.8):
            paint(x - 0.3, x + 0.3, shade(ground["asphalt"], 0.95))
    for _ in range(rng.integers(0, 5)):  # patches of other asphalt
        x, length, start = rng.uniform(first, last), rng.uniform(1, 6), rng.uniform(5, 30)
        here = np.clip(np.minimum(far, start + length) - np.maximum(near, start), 0, None)
        tone = shade(ground["asphalt"], rng.uniform(0.7, 1.2))
        paint(max(x - rng.uniform(0.3, 1.5), first), min(x + 1, last), tone, here / (far - near))
    stripes = rng.random() < 0.2
    if stripes:  # a crossing: white, and no lane line
        start = rng.uniform(8, 20)
        here = np.clip(np.minimum(far, start + 3) - np.maximum(near, start), 0, None)
        for x in np.arange(first + 0.3, last - 0.4, 0.9):
            paint(x, x + 0.45, ground["white"], here / (far - near))

    area = np.zeros((w.height, w.width), np.uint8)
    lane = np.zeros_like(area)
    for i in range(len(w.edges) - 1):
        inside = (at(w.edges[i]) <= column) & (column < at(w.edges[i + 1]))
        area[top:][inside] = 1 if i == w.own else 2
    period, share = rng.uniform(6, 10), rng.uniform(0.4, 0.58)
    shown = far - near < 0.45 * period  # beyond, dashes are smaller than rows
    thick, yellow = rng.uniform(0.12, 0.2), rng.random() < 0.5
    for i, (x, kind) in enumerate(zip(w.edges, w.kinds, strict=True)):
        central = i == w.oncoming and (w.oncoming or kind == "double")
        color = ground["yellow"] if yellow and central else ground["white"]
        worn = rng.uniform(0.7, 1.0)
        color = np.asarray(color) * worn + np.asarray(ground["asphalt"]) * (1 - worn)
        here = shown.astype(np.float64)
        if kind == "dashed":
            here = here * _dash_share(near, far, period, share * period, rng.uniform(0, period))
        if kind == "double":
            where, cover = paint(
                x - 1.5 * thick, x + 1.5 * thick, ground["asphalt"], here, least=2.4
            )
            for s in (-1, 1):
                paint(x + s * thick - thick / 2, x + s * thick + thick / 2, color, here, least=0.9)
        else:
            where, cover = paint(x - thick / 2, x + thick / 2, color, here, least=1.2)
        lane[top:].reshape(-1)[where[cover >= 0.5]] = LANE.index(kind)
    return area, lane


def shadow(
    w: World, image: np.ndarray, x: float, z: float, half: float, ground: dict[str, Any]
) -> None:
    """Darkens the ground under a figure, in place."""
    u, v = w.column(x, z + 0.4 * half), w.horizon + w.focal * w.eye / (z + 0.4 * half)
    rx, ry = max(w.focal * half * 1.1 / z, 1.0), max(w.focal * 0.28 * half / z, 0.7)
    x1, x2 = max(int(u - rx), 0), min(int(u + rx) + 2, w.width)
    y1, y2 = max(int(v - ry), int(w.horizon) + 1), min(int(v + ry) + 2, w.height)
    if x1 >= x2 or y1 >= y2:
        return
    dx = (np.arange(x1, x2)[None] + 0.5 - u) / rx
    dy = (np.arange(y1, y2)[:, None] + 0.5 - v) / ry
    dark = np.clip(1.3 - dx * dx - dy * dy, 0, 1) * ground["shadow"]
    image[y1:y2, x1:x2] *= (1 - dark[..., None]).astype(np.float32)
