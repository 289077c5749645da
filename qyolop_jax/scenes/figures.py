"""Road users as coloured polygons: cars, vans, lorries, buses, people, scooters, bicycles.

A figure is drawn in metres; a function projects its points into the image, which gives it the right
perspective. Colours are RGB.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

Color = tuple[float, float, float]
Points = np.ndarray | Sequence[tuple[float, float, float]]
Put = Callable[[np.ndarray], np.ndarray]
"""Points [n, 3] (right of the figure's middle, above the ground, beyond its front face; metres) as
points [n, 2] of the image, in pixels."""

TYRE, GLASS, CHROME = (24, 24, 26), (46, 58, 70), (196, 198, 202)
SKIN = ((236, 188, 156), (198, 144, 108), (142, 96, 66), (92, 62, 46))
PAINT = (
    (226, 228, 230), (186, 190, 194), (92, 96, 102), (38, 40, 46), (150, 30, 34), (36, 62, 120),
    (28, 92, 78), (196, 170, 60), (120, 84, 60), (70, 120, 170),
)  # fmt: skip
CLOTHES = (
    (196, 48, 44), (48, 92, 170), (236, 190, 60), (60, 130, 84), (222, 222, 218), (40, 42, 50),
    (130, 70, 130), (220, 120, 50), (110, 120, 130), (88, 64, 50),
)  # fmt: skip
_CIRCLE = np.array([(np.cos(t), np.sin(t), 0) for t in np.linspace(0, 2 * np.pi, 20, False)])


def shade(color: Sequence[float], by: float) -> Color:
    """The colour, lighter (`by` above 1) or darker."""
    return tuple(min(255.0, c * by) for c in color)


@dataclasses.dataclass
class Figure:
    """Polygons in metres, in painting order, and lamps."""

    shapes: list = dataclasses.field(default_factory=list)
    """Pairs (contours of points (x, y, z), colour); the second contour is a hole."""
    lamps: list = dataclasses.field(default_factory=list)
    """Pairs ((x, y, radius), colour)."""

    def polygon(self, points: Points, color: Color) -> None:
        """Adds a polygon; points are (right of the middle, above the ground, beyond the front)."""
        self.shapes.append(([points], color))

    def face(
        self, x1: float, y1: float, x2: float, y2: float, color: Color, z: float = 0.0
    ) -> None:
        """Adds an upright rectangle that faces the camera."""
        self.polygon([(x1, y1, z), (x2, y1, z), (x2, y2, z), (x1, y2, z)], color)

    def side(self, x: float, y1: float, z1: float, y2: float, z2: float, color: Color) -> None:
        """Adds an upright rectangle along the road."""
        self.polygon([(x, y1, z1), (x, y1, z2), (x, y2, z2), (x, y2, z1)], color)

    def disc(
        self, x: float, y: float, rx: float, ry: float, color: Color, hole: float = 0.0
    ) -> None:
        """Adds an ellipse that faces the camera; `hole` is the empty share of its radius."""
        rings = [
            _CIRCLE * (rx * r, ry * r, 0) + (x, y, 0) for r in ((1.0, hole) if hole else (1.0,))
        ]
        self.shapes.append((rings, color))

    def wheel(self, x: float, z: float, radius: float, color: Color = TYRE) -> None:
        """Adds a disc that stands along the road."""
        self.polygon(_CIRCLE[:, [2, 1, 0]] * radius + (x, radius, z), color)

    def limb(self, points: Sequence[tuple[float, float]], width: float, color: Color) -> None:
        """Adds a line of this width through points (x, y)."""
        for (ax, ay), (bx, by) in itertools.pairwise(points):
            size = max(math.hypot(bx - ax, by - ay), 1e-6)
            ux, uy = (bx - ax) / size * width / 3, (by - ay) / size * width / 3
            ax, ay, bx, by = ax - ux, ay - uy, bx + ux, by + uy
            nx, ny = -uy * 1.5, ux * 1.5  # half the width across
            quad = [(ax - nx, ay - ny, 0), (bx - nx, by - ny, 0), (bx + nx, by + ny, 0)]
            self.polygon([*quad, (ax + nx, ay + ny, 0)], color)

    def lamp(self, x: float, y: float, size: float, color: Color) -> None:
        """Adds a lamp that faces the camera."""
        self.disc(x, y, size, size * 0.8, color)
        self.lamps.append(((x, y, size), color))

    def projected(self, put: Put) -> tuple[list, list]:
        """(shapes, lamps) with points [n, 2] in pixels; `put` projects all points in one call."""
        contours = [np.asarray(c, np.float64) for rings, _ in self.shapes for c in rings]
        ends = np.array([(x + dx, y, 0) for (x, y, r), _ in self.lamps for dx in (0, r)])
        points = put(np.concatenate([*contours, ends.reshape(-1, 3)]))
        edges = np.cumsum([len(c) for c in contours])
        *parts, ends = np.split(points, edges)
        parts = iter(parts)
        shapes = [([next(parts) for _ in rings], color) for rings, color in self.shapes]
        lamps = [
            (a, float(b[0] - a[0]), color)
            for a, b, (_, color) in zip(ends[::2], ends[1::2], self.lamps, strict=True)
        ]
        return shapes, lamps


def _lights(f: Figure, half, y, size, oncoming) -> None:
    for x in (-half, half):
        f.lamp(x, y, size, (255, 246, 214) if oncoming else (222, 36, 30))


def car(f: Figure, rng: np.random.Generator, sx: float, oncoming: bool) -> None:
    """Draws a car. `sx` is -1 or 1: the side that the camera sees."""
    paint = PAINT[rng.integers(len(PAINT))]
    w, length = 0.9 * rng.uniform(0.95, 1.05), rng.uniform(3.8, 4.6)
    belt, top = 0.88, rng.uniform(1.4, 1.6)
    dark, glass = shade(paint, 0.72), GLASS
    near, back = (1.0, 2.6) if oncoming else (0.35, 2.5)  # where the cabin begins, its length
    f.side(sx * w, 0.22, 0.1, belt, length, dark)
    for z in (0.85, length - 0.8):
        f.wheel(sx * w, z, 0.33)
    cabin = [(sx * w, belt, near), (sx * w * 0.8, top, near + 0.5)]
    cabin += [(sx * w * 0.8, top, near + back - 0.4), (sx * w, belt, near + back)]
    f.polygon(cabin, shade(paint, 0.6))
    f.polygon([(x * 0.98, belt + (y - belt) * 0.85, z) for x, y, z in cabin], shade(glass, 0.9))
    f.polygon([(-w, belt, 0), (w, belt, 0), (w, belt, near), (-w, belt, near)], shade(paint, 1.12))
    for x in (-w + 0.16, w - 0.16):
        f.face(x - 0.12, 0, x + 0.12, 0.4, TYRE)
    screen = [(-w, belt, near), (w, belt, near), (w * 0.8, top, near + 0.5)]
    screen += [(-w * 0.8, top, near + 0.5)]
    f.polygon(screen, paint)
    f.polygon([(x * 0.88, belt + (y - belt) * 0.86, z) for x, y, z in screen], glass)
    f.face(-w, 0.2, w, belt, paint)
    f.face(-w, 0.2, w, 0.42, shade(paint, 0.55))
    if oncoming:
        f.face(-w * 0.55, 0.46, w * 0.55, 0.64, (30, 32, 36))
    f.face(-0.24, 0.44, 0.24, 0.56, (232, 232, 226))
    _lights(f, w * 0.78, 0.7, 0.14, oncoming)


def box(f: Figure, rng: np.random.Generator, sx: float, oncoming: bool, kind: str) -> None:
    """Draws a van, a lorry or a bus."""
    w, low, high, length = {
        "van": (1.0, 0.3, rng.uniform(1.9, 2.3), 5.0),
        "lorry": (1.22, 0.75, rng.uniform(2.8, 3.4), 8.0),
        "bus": (1.25, 0.32, rng.uniform(2.9, 3.2), 11.0),
    }[kind]
    paint = (PAINT if kind != "bus" else CLOTHES)[rng.integers(10)]
    f.side(sx * w, low, 0, high, length, shade(paint, 0.74))
    if kind != "lorry":
        f.side(sx * w, high * 0.52, 0.3, high * 0.85, length - 0.4, GLASS)
        for z in np.arange(1.6, length - 1, 1.6):
            f.side(sx * w, high * 0.5, z, high * 0.87, z + 0.12, shade(paint, 0.7))
    for z in (1.2, length - 1.2):
        f.wheel(sx * w, z, 0.45)
    for x in (-w + 0.22, w - 0.22):
        f.face(x - 0.17, 0, x + 0.17, low + 0.2, TYRE)
    f.face(-w, low, w, high, paint)
    if oncoming or kind != "lorry":
        f.face(-w * 0.86, high * 0.5, w * 0.86, high * 0.86, GLASS)
    else:  # doors
        f.face(-0.03, low + 0.1, 0.03, high - 0.1, shade(paint, 0.6))
        f.face(-w * 0.92, high - 0.16, w * 0.92, high - 0.1, shade(paint, 0.75))
    if kind == "bus":
        f.face(-w * 0.5, high * 0.88, w * 0.5, high * 0.96, (250, 196, 70))
    f.face(-w, low, w, low + 0.2, shade(paint, 0.5))
    _lights(f, w * 0.8, low + 0.32, 0.13, oncoming)


def vehicle(f: Figure, rng: np.random.Generator, sx: float, oncoming: bool) -> None:
    """Draws mostly a car, sometimes a van, a lorry or a bus."""
    kind = rng.choice(["car", "van", "lorry", "bus"], p=[0.66, 0.14, 0.12, 0.08])
    if kind == "car":
        car(f, rng, sx, oncoming)
    else:
        box(f, rng, sx, oncoming, kind)


def _head(f: Figure, x, y, r, skin, cover) -> None:
    f.disc(x, y, r * 0.85, r, skin)
    f.polygon(_CIRCLE[:11] * (r * 0.95, r * 1.05, 0) + (x, y, 0), cover)


def pedestrian(f: Figure, rng: np.random.Generator) -> None:
    """Draws a person who walks or stands."""
    skin, hair = SKIN[rng.integers(4)], ((40, 30, 24), (96, 66, 40), (30, 30, 34))[rng.integers(3)]
    coat, legs = CLOTHES[rng.integers(10)], ((44, 48, 66), (70, 66, 60), (34, 34, 38))
    trousers = legs[rng.integers(3)]
    stride, swing = rng.uniform(0, 0.34), rng.choice([-1, 1])
    for s, tone in ((-1, 0.8), (1, 1.0)):
        foot = s * swing * stride + s * 0.07
        knee = foot * 0.45 + 0.04 * swing
        f.limb([(s * 0.07, 0.86), (knee, 0.46), (foot, 0.05)], 0.17, shade(trousers, tone))
        f.limb([(foot, 0.04), (foot + 0.09 * swing, 0.04)], 0.09, (30, 28, 28))
    f.limb([(-0.19, 1.36), (-0.24 - stride * 0.4, 0.88)], 0.12, shade(coat, 0.78))
    f.polygon(
        [(-0.17, 0.8, 0), (0.17, 0.8, 0), (0.23, 1.42, 0), (0.1, 1.5, 0), (-0.1, 1.5, 0),
         (-0.23, 1.42, 0)], coat,
    )  # fmt: skip
    f.limb([(0.19, 1.36), (0.24 + stride * 0.4, 0.88)], 0.12, shade(coat, 0.88))
    if rng.random() < 0.3:
        f.face(-0.15, 0.95, 0.15, 1.36, CLOTHES[rng.integers(10)])
    _head(f, 0, 1.63, 0.14, skin, hair)


def scooter(f: Figure, rng: np.random.Generator, oncoming: bool) -> None:
    """Draws a motor scooter and its rider: a helmet, a solid body, small wheels."""
    paint, coat = CLOTHES[rng.integers(10)], CLOTHES[rng.integers(10)]
    helmet = ((240, 240, 236), (220, 40, 36), (30, 30, 34), (244, 200, 50))[rng.integers(4)]
    if rng.random() < 0.6:  # from behind or in front
        f.face(-0.08, 0, 0.08, 0.55, TYRE)
        for s in (-1, 1):
            f.limb([(s * 0.15, 0.85), (s * 0.3, 0.6), (s * 0.24, 0.22)], 0.17, (48, 50, 64))
            f.limb([(0, 1.02), (s * 0.36, 1.08)], 0.06, TYRE)
            f.limb([(s * 0.24, 1.36), (s * 0.38, 1.14)], 0.13, shade(coat, 0.82))
            f.disc(s * 0.37, 1.3, 0.07, 0.05, CHROME)
        f.polygon(
            [(-0.2, 0.3, 0), (0.2, 0.3, 0), (0.29, 0.62, 0), (0.2, 0.9, 0), (-0.2, 0.9, 0),
             (-0.29, 0.62, 0)], paint,
        )  # fmt: skip
        f.polygon([(-0.22, 0.84, 0), (0.22, 0.84, 0), (0.27, 1.42, 0), (-0.27, 1.42, 0)], coat)
        f.face(-0.11, 0.36, 0.11, 0.5, (232, 232, 226))
        f.lamp(0, 0.68, 0.1, (255, 246, 214) if oncoming else (226, 32, 28))
        if oncoming:
            f.disc(0, 1.58, 0.13, 0.15, SKIN[rng.integers(4)])
        _head(f, 0, 1.6, 0.18, helmet if not oncoming else GLASS, helmet)
        return
    g = rng.uniform(0.55, 1) * rng.choice([-1, 1])  # how far it is turned, and to which side
    at = lambda *points: [(x * g, y) for x, y in points]
    solid = lambda color, *points: f.polygon([(x * g, y, 0) for x, y in points], color)
    for x in (-0.58, 0.6):
        f.disc(x * g, 0.25, 0.25 * abs(g), 0.25, TYRE)
        f.disc(x * g, 0.25, 0.1 * abs(g), 0.1, CHROME)
    solid(paint, (-0.9, 0.48), (-0.3, 0.26), (0.3, 0.26), (0.36, 0.36), (0.0, 0.4), (-0.1, 0.74),
          (-0.88, 0.78))  # fmt: skip
    solid(shade(paint, 0.85), (0.3, 0.28), (0.5, 0.34), (0.42, 1.02), (0.3, 1.0))
    solid((30, 28, 30), (-0.86, 0.76), (-0.05, 0.72), (-0.1, 0.86), (-0.84, 0.86))
    f.limb(at((0.36, 1.0), (0.24, 1.12)), 0.07, TYRE)
    f.lamp(0.5 * g, 0.86, 0.08, (255, 246, 214))
    f.lamp(-0.9 * g, 0.66, 0.07, (226, 32, 28))
    f.limb(at((-0.3, 0.9), (0.12, 0.76), (0.12, 0.36)), 0.19, (48, 50, 64))
    f.limb(at((-0.34, 0.92), (-0.26, 1.34)), 0.38, coat)
    f.limb(at((-0.2, 1.3), (0.24, 1.1)), 0.13, shade(coat, 0.82))
    _head(f, -0.18 * g, 1.62, 0.18, GLASS, helmet)


def bicycle(f: Figure, rng: np.random.Generator, oncoming: bool) -> None:
    """Draws a bicycle and its rider: large thin wheels, an open frame, at most a small helmet."""
    frame, coat = CLOTHES[rng.integers(10)], CLOTHES[rng.integers(10)]
    skin = SKIN[rng.integers(4)]
    cover = ((40, 30, 24), (120, 84, 50), (230, 230, 80))[rng.integers(3)]
    legs = ((44, 48, 66), (150, 120, 96), (34, 34, 38))[rng.integers(3)]
    if rng.random() < 0.3:  # from behind or in front
        f.face(-0.035, 0, 0.035, 0.72, TYRE)
        for s, up in ((-1, 0.12), (1, 0.3)):
            f.limb([(s * 0.09, 0.98), (s * 0.15, 0.3 + up)], 0.14, legs)
            f.limb([(s * 0.18, 1.4), (s * 0.3, 1.08)], 0.1, shade(coat, 0.82))
            f.limb([(0, 1.04), (s * 0.3, 1.04)], 0.04, TYRE)
        f.polygon([(-0.13, 0.92, 0), (0.13, 0.92, 0), (0.21, 1.46, 0), (-0.21, 1.46, 0)], coat)
        _head(f, 0, 1.62, 0.13, skin if oncoming else cover, cover)
        return
    g = rng.uniform(0.5, 1) * rng.choice([-1, 1])
    at = lambda *points: [(x * g, y) for x, y in points]
    for x in (-0.54, 0.54):
        f.disc(x * g, 0.35, 0.35 * abs(g), 0.35, TYRE, hole=0.8)
    f.limb(at((-0.28, 1.0), (-0.08, 0.5), (0.16, 0.32)), 0.14, shade(legs, 0.7))
    f.limb(at((-0.54, 0.35), (-0.06, 0.33), (0.4, 0.8), (-0.2, 0.78), (-0.06, 0.33)), 0.06, frame)
    f.limb(at((-0.54, 0.35), (-0.2, 0.78), (-0.23, 0.92)), 0.05, frame)
    f.limb(at((0.54, 0.35), (0.4, 0.8), (0.38, 1.0), (0.5, 1.02)), 0.055, frame)
    f.limb(at((-0.36, 0.95), (-0.12, 0.95)), 0.08, TYRE)
    f.limb(at((-0.26, 1.0), (0.1, 0.72), (-0.04, 0.24)), 0.15, legs)
    f.limb(at((-0.26, 1.02), (0.06, 1.42)), 0.3, coat)
    f.limb(at((0.1, 1.38), (0.2, 1.12), (0.46, 1.04)), 0.1, shade(coat, 0.82))
    _head(f, 0.2 * g, 1.62, 0.14, skin, cover)
