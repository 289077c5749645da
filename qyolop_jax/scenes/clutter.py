"""The surroundings of a generated road: sky, houses, trees, masts; weather, lamps, noise.

Nothing here has labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.extras import need
from qyolop_jax.scenes.figures import shade
from qyolop_jax.scenes.road import World

WALLS = (
    (178, 160, 140), (150, 120, 100), (190, 184, 172), (140, 144, 150), (168, 110, 88),
    (206, 196, 170), (120, 116, 116),
)  # fmt: skip
LEAVES = ((58, 92, 48), (74, 108, 52), (92, 112, 56), (48, 78, 50), (124, 116, 58))
LOOKS = {
    # weather: sky above, sky at the horizon, brightness, sight in metres, shadow
    "day": ((92, 146, 206), (196, 216, 232), 1.0, 420.0, 0.55),
    "overcast": ((168, 174, 182), (206, 210, 212), 0.92, 260.0, 0.35),
    "dusk": ((70, 84, 130), (236, 172, 122), 0.72, 320.0, 0.35),
    "night": ((20, 24, 44), (52, 56, 78), 0.3, 300.0, 0.3),
    "rain": ((134, 142, 150), (172, 178, 182), 0.78, 120.0, 0.25),
}


def backdrop(w: World, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """An image [H, W, 3] uint8 without road, and colours and sight (metres) for the road."""
    cv2 = need("cv2", "vision", "drawing scenes")
    above, below, _, sight, shadow = LOOKS[w.weather]
    jitter = lambda color, by=10: tuple(
        np.clip(np.asarray(color) + rng.uniform(-by, by, 3), 0, 255)
    )
    above, below = jitter(above), jitter(below)
    grey = rng.uniform(72, 122)
    earth = ((92, 112, 62), (134, 124, 96), (112, 116, 112), (150, 138, 108))[rng.integers(4)]
    ground = dict(
        sight=sight * rng.uniform(0.8, 1.2),
        haze=below,
        shadow=shadow,
        asphalt=jitter((grey, grey, grey + 4), 4),
        pavement=jitter((156, 152, 146), 14),
        walk=rng.uniform(1.6, 3.6),
        white=jitter((232, 232, 226), 12),
        yellow=jitter((224, 178, 62), 14),
    )
    line = int(np.ceil(w.horizon)) + 1
    t = np.linspace(0, 1, line, dtype=np.float32)[:, None, None] ** 1.4
    sky = np.asarray(above, np.float32) * (1 - t) + np.asarray(below, np.float32) * t
    image = np.empty((w.height, w.width, 3), np.uint8)
    image[:line] = np.broadcast_to(sky, (line, w.width, 3))
    if w.weather in ("day", "dusk"):
        small = rng.random((5, 8), dtype=np.float32)
        cloud = cv2.resize(small, (w.width, line), interpolation=cv2.INTER_CUBIC)
        cloud = np.clip(cloud * 2 - rng.uniform(0.8, 1.8), 0, 0.8)[..., None]
        image[:line] = image[:line] * (1 - cloud) + 244 * cloud
    rows = np.arange(line, w.height)[:, None]
    fog = np.exp(-w.focal * w.eye / np.maximum(rows + 0.5 - w.horizon, 0.3) / ground["sight"])
    earth = np.asarray(jitter(earth), np.float32)
    image[line:] = (fog * earth + (1 - fog) * np.asarray(below))[:, None]

    def polygon(points, color, z):
        fog = np.exp(-z / ground["sight"])
        mixed = [float(c * fog + h * (1 - fog)) for c, h in zip(color, below, strict=True)]
        flat = np.round((np.asarray(points) - 0.5) * 16).astype(np.int32)
        cv2.fillPoly(image, [flat], mixed, cv2.LINE_AA, 4)

    steps = np.linspace(-0.05, 1.05, 24) * w.width  # hills or roofs far away
    tops = w.horizon - rng.uniform(0.01, 0.09) * w.height * rng.random(24)
    outline = [*zip(steps, tops, strict=True), (steps[-1], line), (steps[0], line)]
    polygon(outline, (96, 108, 104), 150.0)

    things = []
    for s, edge in ((-1, w.edges[0]), (1, w.edges[-1])):
        z, town = rng.uniform(4, 10), rng.random()
        while z < 90:
            what = rng.choice(["house", "tree", "gap"], p=(0.6 * town, 0.75 - 0.5 * town,
                                                         0.25 - 0.1 * town))  # fmt: skip
            length = rng.uniform(8, 18) if what == "house" else rng.uniform(3, 9)
            x = edge + s * (ground["walk"] + rng.uniform(0.8, 4.0))
            things.append((z, what, s, x, length))
            z += length + rng.uniform(0, 2)
        for z in np.arange(rng.uniform(6, 20), 80, rng.uniform(18, 30)):
            if rng.random() < 0.8:
                things.append((z, "mast", s, edge + s * 0.9, 0.0))
    lamps = []
    for z, what, s, x, length in sorted(things, key=lambda t: -t[0]):
        if what == "house":
            _house(w, rng, polygon, s, x, z, length)
        elif what == "tree":
            _tree(w, rng, polygon, x, z)
        elif what == "mast":
            lamps.append(_mast(w, polygon, s, x, z))
    ground["lamps"] = lamps
    return image, ground


def _points(w, *xyz):
    """Places (x on the road, height, distance) in pixels [n, 2]."""
    x, y, z = np.array(xyz, np.float64).T
    return w.put(x, z, np.stack([np.zeros_like(y), y, np.zeros_like(y)], 1))


def _house(w, rng, polygon, s, x, z, length) -> None:
    wall, storeys = WALLS[rng.integers(len(WALLS))], int(rng.integers(2, 7))
    high, far = storeys * 3.0 + 0.5, z + length
    night = w.weather in ("night", "dusk")
    polygon(_points(w, (x, 0, z), (x, high, z), (x, high, far), (x, 0, far)), shade(wall, 0.85), z)
    end = x + s * 10
    polygon(_points(w, (x, 0, z), (x, high, z), (end, high, z), (end, 0, z)), wall, z)
    if z > 45:
        return
    columns = max(int(length / 2.6), 1)
    corner = lambda a, y: (x, y, z + a)
    ends = [(k + p) * length / columns for k in range(columns) for p in (0.25, 0.75)]
    for floor in range(min(storeys, 4)):
        y = floor * 3.0 + 0.9
        quads = _points(w, *(corner(a, b) for a in ends for b in (y, y + 1.5)))
        for k in range(columns):
            a, b, c, d = quads[4 * k : 4 * k + 4]
            lit = night and rng.random() < 0.4
            polygon([a, b, d, c], (250, 214, 140) if lit else (70, 84, 98), z)


def _tree(w, rng, polygon, x, z) -> None:
    leaf, tall, wide = LEAVES[rng.integers(len(LEAVES))], rng.uniform(4, 8), rng.uniform(1.2, 2.4)
    polygon(_points(w, (x - 0.15, 0, z), (x + 0.15, 0, z), (x + 0.1, tall * 0.6, z),
                    (x - 0.1, tall * 0.6, z)), (84, 66, 50), z)  # fmt: skip
    angle = np.linspace(0, 2 * np.pi, 9, False) + rng.uniform(0, 1, (5, 1))
    around = wide * rng.uniform(0.5, 0.85, (5, 1)) * rng.uniform(0.8, 1.15, (5, 9))
    right = np.cos(angle) * around + rng.uniform(-0.5, 0.5, (5, 1)) * wide
    up = np.sin(angle) * around + tall * rng.uniform(0.55, 0.9, (5, 1))
    blobs = w.put(x, z, np.stack([right, up, np.zeros((5, 9))], -1).reshape(-1, 3))
    for k, blob in enumerate(blobs.reshape(5, 9, 2)):
        polygon(blob, shade(leaf, 0.8 + 0.1 * k), z)


def _mast(w, polygon, s, x, z):
    """Draws a street lamp. Returns (column, row, radius) of its light."""
    grey, arm = (96, 100, 104), x - s * 1.6
    polygon(_points(w, (x - 0.06, 0, z), (x + 0.06, 0, z), (x + 0.05, 6, z), (x - 0.05, 6, z)),
            grey, z)  # fmt: skip
    polygon(_points(w, (x, 6, z), (arm, 6.2, z), (arm, 6.08, z), (x, 5.88, z)), grey, z)
    (u, v) = _points(w, (arm, 6.05, z))[0]
    return u, v, w.focal * 0.25 / z


def light_and_noise(
    w: World,
    rng: np.random.Generator,
    image: np.ndarray,
    lamps: Sequence[tuple],
    ground: dict[str, Any],
) -> np.ndarray:
    """The finished uint8 image, with light and weather, glowing lamps and camera noise."""
    cv2 = need("cv2", "vision", "drawing scenes")
    bright = LOOKS[w.weather][2] * rng.uniform(0.9, 1.1)
    height, width = w.height, w.width
    line = int(np.ceil(w.horizon)) + 1
    wet = w.weather == "rain" or (w.weather == "night" and rng.random() < 0.4)
    if wet:
        lower = height - line
        mirror = cv2.blur(image[:line][::-1], (3, 9))
        n = min(lower, line)
        fade = np.linspace(0.3, 0.05, n, dtype=np.float32)[:, None, None]
        image[line : line + n] += fade * (mirror[:n] - image[line : line + n])
    if w.weather == "night":
        rows, columns = np.arange(height)[:, None], np.arange(width)[None]
        cone = ((columns - w.middle) / (0.42 * width)) ** 2
        cone = np.exp(-cone - ((rows - 0.82 * height) / (0.3 * height)) ** 2)
        gain = bright + 0.75 * cone.astype(np.float32)
        image *= gain[..., None] * np.array([0.98, 0.97, 1.04], np.float32)
    else:
        image *= np.float32(bright)
    shining = [(u, v, r, c, 1.0) for u, v, r, c in lamps]
    if w.weather in ("night", "dusk"):
        shining += [(u, v, r, (255, 220, 160), 1.2) for u, v, r in ground["lamps"]]
    glow = {"night": 1.0, "dusk": 0.6, "rain": 0.45}.get(w.weather, 0.0)
    for u, v, radius, color, strength in shining if glow else ():
        _glow(image, u, v, max(radius, 0.8) * 5, color, strength * glow)
    if w.weather == "rain":
        drops = np.zeros((height, width), np.float32)
        slope = rng.uniform(-0.3, 0.3)
        for x, y, l in zip(rng.uniform(0, width, 70), rng.uniform(0, height, 70),
                           rng.uniform(0.02, 0.07, 70) * height, strict=True):  # fmt: skip
            end = (int(x + slope * l), int(y + l))
            cv2.line(drops, (int(x), int(y)), end, float(rng.uniform(0.05, 0.22)), 1, cv2.LINE_AA)
        image += drops[..., None] * (220 - image)
    tint = rng.uniform(0.96, 1.04, 3).astype(np.float32)
    image *= tint
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.3, 0.8))
    level = rng.uniform(1.5, 5.0) * (1.6 if w.weather == "night" else 1.0)
    noise = rng.integers(0, 256, (2, height, width), np.uint8).astype(np.float32)
    image += ((noise[0] + noise[1] - 255) * np.float32(level / 104))[..., None]
    return np.clip(image, 0, 255).astype(np.uint8)


def _glow(image, u, v, radius, color, strength) -> None:
    """Adds a soft light."""
    height, width = image.shape[:2]
    x1, x2 = max(int(u - radius), 0), min(int(u + radius) + 2, width)
    y1, y2 = max(int(v - radius), 0), min(int(v + radius) + 2, height)
    if x1 >= x2 or y1 >= y2:
        return
    dx = (np.arange(x1, x2, dtype=np.float32)[None] + 0.5 - u) / radius
    dy = (np.arange(y1, y2, dtype=np.float32)[:, None] + 0.5 - v) / radius
    d = dx * dx + dy * dy
    soft = (np.exp(-6 * d) * 0.5 + np.exp(-60 * d)) * strength
    soft = soft * np.clip(1.2 - d, 0, 1)
    image[y1:y2, x1:x2] += soft[..., None].astype(np.float32) * np.asarray(color, np.float32) * 0.9
