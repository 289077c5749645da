"""Generated scenes: labels agree with geometry computed another way, and with what is drawn."""

import dataclasses

import numpy as np
import pytest

from qyolop_jax.config import DETECTION
from qyolop_jax.samples import SampleError, check_sample
from qyolop_jax.scenes import figures as scene_figures
from qyolop_jax.scenes import generate as scenes
from qyolop_jax.scenes import road as scene_road
from qyolop_jax.scenes.clutter import LOOKS
from qyolop_jax.scenes.generate import Scenes, rasterize, scene

SIZE = (96, 160)
new_generator = np.random.default_rng


def plain(weather="day", **changed):
    """A world that is the same for every generator."""
    w = scene_road.World(
        *SIZE, 140.0, 38.3, 81.0, 1.5, (0.2, 0.004, -0.0008), (-5.1, -1.7, 1.7, 5.2),
        ("single", "double", "dashed", "single"), 1, 1, weather,
    )  # fmt: skip
    return dataclasses.replace(w, **changed)


def board(wide, low, high, z=0.0):
    """A figure that is one upright rectangle."""
    f = scene_figures.Figure()
    f.face(-wide / 2, low, wide / 2, high, (200, 40, 40), z)
    return f


class Generator:
    """A generator that never mirrors: its `random` is fixed."""

    def __init__(self, rng):
        self.rng = rng

    def __getattr__(self, name):
        return getattr(self.rng, name)

    def random(self, *args, **kwargs):
        return self.rng.random(*args, **kwargs) if args or kwargs else 0.9


def staged(monkeypatch, w, users=()):
    """The scene of this world with these road users."""
    fixed = Generator(new_generator(0))
    monkeypatch.setattr(scenes.np.random, "default_rng", lambda seed: fixed)
    monkeypatch.setattr(scenes, "world", lambda rng, height, width: w)
    monkeypatch.setattr(scenes, "users", lambda w, rng: list(users))
    return scene(0, (w.height, w.width))


def test_a_seed_is_a_scene():
    a, b, c = scene(3, SIZE), scene(3, SIZE), scene(4, SIZE)
    for name in ("image", "boxes", "classes", "area", "lane"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.image != c.image).any()
    assert a.labelled == (True, True, True) and not a.crowd.any()


def test_all_classes_and_all_weathers_come():
    rng = np.random.default_rng(0)
    assert {scene_road.world(rng, *SIZE).weather for _ in range(60)} == set(LOOKS)
    found, masks = set(), [set(), set()]
    for s in map(check_sample, Scenes(40, (128, 192), 1)):
        found |= set(s.classes.tolist())
        masks[0] |= set(np.unique(s.area).tolist())
        masks[1] |= set(np.unique(s.lane).tolist())
        assert ((s.boxes[:, 2:] - s.boxes[:, :2]) >= scenes.MIN_SIDE).all()
        assert (s.boxes == np.round(s.boxes)).all()
    assert found == {0, 1, 2, 3} and masks == [{0, 1, 2}, {0, 1, 2, 3}]


@pytest.mark.parametrize("shape", [(64, 96), (192, 320), (384, 640)])
def test_sizes(shape):
    s = check_sample(scene(7, shape))
    assert s.image.shape == (*shape, 3) and (s.area == 1).any()


def test_area_is_where_rays_meet_lanes(monkeypatch):
    """Every pixel's ray against the flat road, in plain Python."""
    w = plain()
    s = staged(monkeypatch, w)
    for v in range(42, 96, 3):
        for u in range(0, 160, 7):
            z = w.focal * w.eye / (v + 0.5 - w.horizon)
            x = (u + 0.5 - w.middle) * z / w.focal
            x -= w.bend[0] + w.bend[1] * z + w.bend[2] * z**2
            inside = w.edges[0] <= x < w.edges[-1]
            own = w.edges[1] <= x < w.edges[2]
            assert s.area[v, u] == (1 if own else 2 if inside else 0), (u, v)
    assert (s.area[:38] == 0).all()


def test_lane_lines_are_painted_where_they_are_labelled(monkeypatch):
    """In the mask a line lies around its x; in the image it is brighter than the road beside it."""
    w = plain("overcast", bend=(0.0, 0.0, 0.0))
    s = staged(monkeypatch, w)
    grey = s.image.astype(float).mean(-1)
    for kind, at in ((1, (0, 3)), (2, (1,)), (3, (2,))):
        rows, columns = np.nonzero(s.lane == kind)
        assert len(rows) > 20
        z = w.focal * w.eye / (rows + 0.5 - w.horizon)
        x = (columns + 0.5 - w.middle) * z / w.focal
        off = np.min([np.abs(x - w.edges[i]) for i in at], 0)
        assert (off <= 0.35 + 1.3 * z / w.focal).all()  # half a double line, and a pixel
        road = (s.area > 0) & (s.lane == 0)
        assert grey[s.lane == kind].mean() > grey[road].mean() + 25
    dashed = np.flatnonzero((s.lane == 3).any(1))
    assert (np.diff(dashed) > 3).any()  # gaps
    double = np.flatnonzero((s.lane == 2).any(1))
    assert (np.diff(double) == 1).all()


def test_edge_coverage_against_sampling():
    rng = np.random.default_rng(0)
    for _ in range(40):
        x, a, turn = rng.uniform(-3, 3), rng.uniform(-3, 3), rng.uniform(-4, 4)
        t = (np.arange(4000) + 0.5) / 4000
        want = np.clip(x - (a + turn * t), 0, 1).mean()
        got = scene_road._beyond(np.float64(x), np.float64(a), np.float64(a + turn))
        np.testing.assert_allclose(got, want, atol=2e-3)


def test_dash_share_against_sampling():
    rng = np.random.default_rng(1)
    for _ in range(20):
        near, length, start = rng.uniform(3, 40), rng.uniform(0.1, 9), rng.uniform(0, 8)
        z = near + length * (np.arange(20000) + 0.5) / 20000
        want = ((z - start) % 8.0 < 3.0).mean()
        got = scene_road._dash_share(near, near + length, 8.0, 3.0, start)
        np.testing.assert_allclose(got, want, atol=1e-3)


def test_a_box_is_the_visible_extent(monkeypatch):
    """A board at known metres: projected by hand. A nearer one hides its left part."""
    w = plain(bend=(0.0, 0.0, 0.0))
    far, near = board(2.0, 0.5, 2.5), board(1.0, 0.0, 3.5)
    s = staged(monkeypatch, w, [(1, 0.5, 14.0, far), (0, -0.6, 7.0, near)])
    assert s.classes.tolist() == [0, 1]  # nearest first
    column = lambda x, z: w.middle + w.focal * x / z
    row = lambda y, z: w.horizon + w.focal * (w.eye - y) / z
    want = [
        [column(-1.1, 7), row(3.5, 7), column(-0.1, 7), row(0, 7)],
        [column(-0.1, 7), row(2.5, 14), column(1.5, 14), row(0.5, 14)],
    ]
    np.testing.assert_allclose(s.boxes, np.clip(want, 0, 160), atol=1.01)
    x1, y1, x2, y2 = s.boxes[0].astype(int)
    assert (s.area[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1] == 0).all()
    assert (s.lane[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1] == 0).all()
    assert (s.area[y2 + 2 :, x1:x2] > 0).all()


@pytest.mark.parametrize(
    ("user", "why"),
    [
        ((1, -0.6, 20.0, board(1.0, 0.3, 1.2)), "hidden"),
        ((1, 1.2, 60.0, board(1.0, 0.3, 1.5)), "below 4 pixels"),
        ((1, 30.0, 10.0, board(1.0, 0.3, 1.5)), "outside"),
        ((1, 6.15, 10.0, board(1.0, 0.3, 1.5)), "mostly outside"),
    ],
)
def test_what_would_be_too_hidden_or_small_is_not_there(monkeypatch, user, why):
    w = plain(bend=(0.0, 0.0, 0.0))
    wall = (0, -0.6, 7.0, board(1.0, 0.0, 3.5))
    alone, both = staged(monkeypatch, w, [wall]), staged(monkeypatch, w, [wall, user])
    assert both.classes.tolist() == [0], why
    np.testing.assert_array_equal(alone.area, both.area)


def test_traffic_on_the_left_is_a_mirror(monkeypatch):
    w = plain()
    users = [(1, 0.5, 12.0, board(2.0, 0.5, 2.5))]
    right = staged(monkeypatch, w, users)
    monkeypatch.setattr(Generator, "random", lambda self, *a, **k: (
        self.rng.random(*a, **k) if a or k else 0.1))  # fmt: skip
    left = staged(monkeypatch, w, users)
    np.testing.assert_array_equal(left.area, right.area[:, ::-1])
    x1, y1, x2, y2 = right.boxes[0]
    np.testing.assert_array_equal(left.boxes, [[160 - x2, y1, 160 - x1, y2]])


def inside(points, contours):
    """Even-odd rule, ray by ray."""
    count = np.zeros(len(points), int)
    for c in contours:
        for (x1, y1), (x2, y2) in zip(c, np.roll(c, -1, 0), strict=True):
            spans = (y1 > points[:, 1]) != (y2 > points[:, 1])
            with np.errstate(divide="ignore", invalid="ignore"):
                x = x1 + (points[:, 1] - y1) * (x2 - x1) / (y2 - y1)
            count += spans & (points[:, 0] < x)
    return count % 2 == 1


@pytest.mark.parametrize("name", DETECTION)
def test_cover_is_the_area_of_the_polygons(name):
    """Against a point in each of 8x8 parts of a pixel."""
    rng = np.random.default_rng(2)
    f = scene_figures.Figure()
    args = {"vehicle": (f, rng, 1.0, False), "pedestrian": (f, rng)}
    getattr(scene_figures, name)(*args.get(name, (f, rng, False)))
    shapes, lamps = f.projected(lambda p: np.stack([30 + 20 * p[:, 0], 46 - 20 * p[:, 1]], 1))
    y0, x0, color, cover = rasterize(shapes, 60, 60)
    k = 8
    grid = (np.arange(60 * k) + 0.5) / k
    points = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    hit = np.zeros(len(points), bool)
    for contours, _ in shapes:
        hit |= inside(points, contours)
    want = hit.reshape(60, k, 60, k).mean((1, 3))
    got = np.zeros((60, 60))
    got[y0 : y0 + cover.shape[0], x0 : x0 + cover.shape[1]] = cover
    assert abs(got - want).mean() < 0.02 and abs(got.sum() / want.sum() - 1) < 0.15
    assert (color <= 255 * cover[..., None] + 1).all()
    assert lamps or name in ("pedestrian", "bicycle")


def test_scenes_are_a_sequence():
    few = Scenes(3, (64, 96), seed=5)
    assert len(few) == 3 and few[2].name == "scene (5, 2)"
    np.testing.assert_array_equal(few[1].image, scene((5, 1), (64, 96)).image)
    with pytest.raises(IndexError, match="scene 3 of 3"):
        few[3]
    with pytest.raises(SampleError, match="at least 64x64"):
        scene(0, (32, 320))
