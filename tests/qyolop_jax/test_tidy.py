"""Masks made calm: what goes, what stays, and that scores never see it."""

import numpy as np

from qyolop_jax.postprocess import Found
from qyolop_jax.tidy import one_kind, smoothed, tidy


def found(area, lane):
    nothing = np.zeros(0)
    return Found(np.zeros((0, 4)), nothing, nothing, area, lane, area.copy())


def test_specks_and_holes_take_what_is_around_them():
    area = np.zeros((240, 480), np.uint8)
    area[120:, :240], area[120:, 240:] = 1, 2
    noisy = area.copy()
    noisy[180:184, 100:104] = 0  # a hole in one
    noisy[200:210, 300:312] = 1  # a patch of the other
    noisy[20:24, 50:60] = 2  # in the sky
    calm = smoothed(noisy, 20)
    for y, x in ((182, 102), (205, 306), (22, 55)):
        assert calm[y, x] == area[y, x]
    assert (calm != area).mean() < 0.02 and set(np.unique(calm)) == {0, 1, 2}
    np.testing.assert_array_equal(calm[:100], 0)


def test_a_line_has_one_kind():
    lane = np.zeros((240, 480), np.uint8)
    lane[100:200, 50:54] = 1
    lane[150:160, 51:53] = 3  # most of it is 1
    lane[100:130, 300:304] = 3
    lane[5, 5] = 2  # a speck
    calm = one_kind(lane)
    assert set(np.unique(calm[:, :200])) == {0, 1} and (calm[100:200, 50:54] == 1).all()
    assert (calm[100:130, 300:304] == 3).all() and calm[5, 5] == 0


def test_empty_masks_stay_and_the_rest_is_untouched():
    empty = np.zeros((64, 96), np.uint8)
    before = found(empty, empty.copy())
    after = tidy(before)
    assert not after.area.any() and not after.lane.any() and after.area.dtype == np.uint8
    assert after.merged is before.merged and after.boxes is before.boxes
    tiny = tidy(found(np.ones((8, 8), np.uint8), np.ones((8, 8), np.uint8)))
    assert (tiny.area == 1).all() and (tiny.lane == 1).all()
