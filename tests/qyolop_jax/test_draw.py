"""Overlays: each colour where its class is, boxes where boxes are; panels side by side."""

import dataclasses

import cv2
import numpy as np
import pytest

from qyolop_jax import draw
from qyolop_jax.config import IGNORE, UNKNOWN, ModelConfig
from qyolop_jax.samples import SampleError, make_sample
from qyolop_jax.scenes.generate import scene

SIZE = (96, 160)


def blank(**changed):
    grey = np.full((*SIZE, 3), 100, np.uint8)
    zero = np.zeros(SIZE, np.uint8)
    return dataclasses.replace(make_sample(grey, [], [], None, zero, zero.copy()), **changed)


@dataclasses.dataclass
class Found:
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    area: np.ndarray
    lane: np.ndarray


@pytest.mark.parametrize("value", [1, 2, UNKNOWN])
def test_areas_are_tinted(value):
    s = blank()
    s.area[10:20, 30:50], s.area[40:50] = value, IGNORE
    color = draw.UNKNOWN_AREA if value == UNKNOWN else draw.AREA_COLORS[value - 1]
    got = draw.overlay(s.image, s)
    want = 100 + 0.34 * (np.array(color) - 100.0)
    assert np.abs(got[10:20, 30:50] - want).max() <= 1
    got[10:20, 30:50] = 100
    assert (got == 100).all() and (s.image == 100).all()  # nothing else, and a copy


@pytest.mark.parametrize("value", [1, 2, 3, UNKNOWN])
def test_lanes_cover_areas(value):
    s = blank()
    s.area[:], s.lane[10:20] = 1, value
    color = draw.UNKNOWN_LANE if value == UNKNOWN else draw.LANE_COLORS[value - 1]
    got = draw.overlay(s.image, s)
    below = 100 + 0.34 * (np.array(draw.AREA_COLORS[0]) - 100.0)
    assert np.abs(got[10:20] - (below + 0.75 * (np.array(color) - below))).max() <= 1.5


def test_boxes_have_their_colour_and_the_unlikely_are_left_out():
    zero = np.zeros(SIZE, np.uint8)
    found = Found(
        np.array([[20, 30, 60, 70], [90, 30, 130, 70]], np.float32), np.array([1, 3]),
        np.array([0.9, 0.2], np.float32), zero, zero,
    )  # fmt: skip
    image = np.full((*SIZE, 3), 100, np.uint8)
    got = draw.overlay(image, found)
    for y, x in ((69, 40), (50, 20), (50, 59)):
        assert got[y, x].tolist() == list(draw.DETECTION_COLORS[1])
    assert (got[31:69, 21:59] == 100).all() and (got[70:] == 100).all()
    assert (got[:, 88:] == 100).all()
    both = draw.overlay(image, found, conf=0.1)
    assert both[50, 90].tolist() == list(draw.DETECTION_COLORS[3])
    assert (both[18:30, 20:60] != 100).any()  # the name above


def test_crowds_are_grey():
    s = blank(boxes=np.array([[20, 30, 60, 70]], np.float32), classes=np.array([1], np.int32),
              crowd=np.array([True]))  # fmt: skip
    assert draw.overlay(s.image, s)[50, 20].tolist() == list(draw.CROWD)


@pytest.mark.parametrize("width", [80, 320])
def test_sizes(width):
    s = scene(3, SIZE)
    got = draw.overlay(s.image, s, width=width)
    assert got.shape == (width * 96 // 160, width, 3) and got.dtype == np.uint8
    thin = blank(boxes=np.array([[40, 30, 80, 60]], np.float32), classes=np.array([0], np.int32),
                 crowd=np.array([False]))  # fmt: skip
    f = width / 160
    drawn = draw.overlay(thin.image, thin, width=width)
    assert drawn[int(45 * f), int(40 * f)].tolist() == list(draw.DETECTION_COLORS[0])


def test_own_classes_have_names():
    cfg = ModelConfig(detection=tuple("abcdefgh"))
    s = blank(boxes=np.array([[20, 30, 60, 70]], np.float32), classes=np.array([7], np.int32),
              crowd=np.array([False]))  # fmt: skip
    assert draw.overlay(s.image, s, cfg)[50, 20].tolist() == list(draw.DETECTION_COLORS[1])


def test_what_does_not_fit_is_refused():
    s = blank()
    with pytest.raises(SampleError, match="expected uint8"):
        draw.overlay(s.image.astype(np.float32), s)
    with pytest.raises(SampleError, match=r"lane mask \[4, 4\] on an image of \[96, 160\]"):
        draw.overlay(s.image, dataclasses.replace(s, lane=np.zeros((4, 4), np.uint8)))
    with pytest.raises(SampleError, match="no images"):
        draw.panel([])
    with pytest.raises(SampleError, match="1 titles for 2 columns"):
        draw.panel([[s.image, s.image]], ["one"])


def test_a_panel_shows_all_its_images():
    tones = [[10, 60], [110], [160, 210]]
    rows = [[np.full((*SIZE, 3), t, np.uint8) for t in row] for row in tones]
    rows[2][1] = np.full((48, 80, 3), 210, np.uint8)  # another size
    got = draw.panel(rows, ["labels", "found"], gap=4)
    head = got.shape[0] - (3 * 100 + 4)
    assert got.shape[1] == 2 * 164 + 4 and head > 10
    for i, row in enumerate(tones):
        for j, tone in enumerate(row):
            y, x = head + 4 + i * 100, 4 + j * 164
            assert (got[y : y + 96, x : x + 160] == tone).all()
    assert (got[:head] > 150).any()  # letters
    assert draw.panel(rows, gap=4).shape[0] == 304


def test_a_legend_has_every_colour(tmp_path):
    strip = draw.legend(width=320)
    assert strip.shape[1] == 320
    seen = {tuple(c) for c in strip.reshape(-1, 3).tolist()}
    wanted = [*draw.DETECTION_COLORS[:4], *draw.AREA_COLORS[:2], *draw.LANE_COLORS[:3]]
    assert set(wanted) <= seen
    draw.save_image(tmp_path / "deep/legend.png", strip)
    back = cv2.imread(str(tmp_path / "deep/legend.png"))[..., ::-1]
    np.testing.assert_array_equal(back, strip)
