"""One warp for image, boxes and masks: all three stay on the same pixels, whatever is done."""

import dataclasses

import chex
import numpy as np
import pytest
from scipy import ndimage

from qyolop_jax import augment as aug
from qyolop_jax.augment import AugmentConfig, AugmentError
from qyolop_jax.config import IGNORE
from qyolop_jax.postprocess import boxes_to_original, mask_to_original
from qyolop_jax.samples import SampleError, check_sample, make_sample

SIZE = (96, 160)
STILL = AugmentConfig(0, 0, 0, 0, 0, 0, 0, 0, 0)
WILD = AugmentConfig(0.25, 0.1, 12, 6, 0.0012, 0, 0, 0, 0)


def marked(size=(120, 170), box=(40, 50, 90, 85), value=1, color=(250, 20, 20), name=""):
    """Black, with a filled rectangle in image and masks, and its box."""
    image = np.zeros((*size, 3), np.uint8)
    area, lane = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = color
    area[y1:y2, x1:x2] = value
    lane[y1:y2, x1:x2] = value + 1
    return make_sample(image, [box], [value], None, area, lane, name)


def extent(mask):
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])


def same(a, b):
    for name in ("image", "boxes", "classes", "crowd", "area", "lane", "labelled"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("mosaic", [False, True])
def test_a_box_stays_around_its_rectangle(seed, mosaic):
    """Its extent in image and masks is its box, to a pixel; the same after a flip and colours.

    Where the image's edge cuts a turned rectangle, the box may be wider than what is left of it.
    """
    rng = np.random.default_rng(seed)
    if mosaic:
        sources = [marked(value=1), *(marked(value=2, color=(0, 0, 0)) for _ in range(3))]
    else:
        sources = [marked()]
    cfg = dataclasses.replace(WILD, flip=0.5, value=0.2)
    s = check_sample(aug.augment(sources, SIZE, rng, cfg))
    found = np.flatnonzero(s.classes == 1)
    if not len(found):
        assert (s.area == 1).sum() < 0.2 * 50 * 35
        return
    box = s.boxes[found[0]]
    for part in (s.area == 1, s.lane == 2, s.image[..., 0].astype(int) - s.image[..., 1] > 90):
        seen = extent(part)
        if (box[:2] > 0).all() and box[2] < SIZE[1] and box[3] < SIZE[0]:
            np.testing.assert_allclose(seen, box, atol=1.51)
        else:
            assert (seen[:2] >= box[:2] - 1.51).all() and (seen[2:] <= box[2:] + 1.51).all()
            assert (seen[2:] - seen[:2]).prod() > 0.6 * (box[2:] - box[:2]).prod()


@pytest.mark.parametrize("seed", range(6))
def test_masks_are_the_value_under_each_centre(seed):
    """Through the inverse homography, pixel by pixel."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 4, (7, 9)).astype(np.uint8).repeat(9, 0).repeat(9, 1)
    matrix = aug.perspective_matrix(rng, WILD, mask.shape, SIZE)
    got = aug.warp_mask(mask, matrix, SIZE)
    back = np.linalg.inv(matrix)
    wrong = 0
    for v in range(SIZE[0]):
        for u in range(SIZE[1]):
            x, y, w = back @ (u + 0.5, v + 0.5, 1)
            x, y = x / w, y / w
            inside = 0 <= x < 81 and 0 <= y < 63
            wrong += got[v, u] != (mask[int(y), int(x)] if inside else IGNORE)
    assert wrong <= 0.004 * got.size  # OpenCV's fixed point, at edges


def test_images_are_bilinear():
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.uniform(0, 255, (80, 90)), 2) * 3 % 255
    image = image.astype(np.uint8)
    matrix = aug.moved(20.3, 11.7) @ aug.scaled(1.1, 0.95)
    got = aug.warp_image(np.stack([image] * 3, -1), matrix, SIZE)[..., 1].astype(float)
    v, u = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    x, y = (u - 20.3) / 1.1 - 0.5, (v - 11.7) / 0.95 - 0.5
    want = ndimage.map_coordinates(image.astype(float), [y, x], order=1, cval=np.nan)
    inner = np.isfinite(want) & (x > 0) & (x < 89) & (y > 0) & (y < 79)
    assert inner.sum() > 5000 and np.abs(got - want)[inner].max() < 8
    assert np.abs(got - want)[inner].mean() < 0.6
    assert (got[:10] == aug.GREY).all()


def test_shrinking_averages():
    """A chequerboard of single pixels becomes grey, not one of its colours."""
    board = (np.indices((400, 400)).sum(0) % 2 * 255).astype(np.uint8)
    small = aug.warp_image(np.stack([board] * 3, -1), aug.scaled(0.25, 0.25), (100, 100))
    assert abs(small[2:-2, 2:-2].astype(float) - 127.5).max() < 3


def test_still_is_the_identity():
    rng = np.random.default_rng(1)
    s = marked(SIZE)
    s.image[:] = rng.integers(0, 256, s.image.shape)
    same(aug.augment([s], SIZE, rng, STILL), s)
    same(aug.letterbox(s, SIZE)[0], s)


def test_a_flip_twice_is_the_identity():
    s = marked()
    once = aug.flip(s)
    assert once.boxes.tolist() == [[80, 50, 130, 85]]
    np.testing.assert_array_equal(extent(once.area == 1), once.boxes[0])
    same(aug.flip(once), s)


def test_letterbox_of_bdd100k():
    s = marked((720, 1280), (400, 200, 900, 700))
    boxed, transform = aug.letterbox(s, (384, 640))
    assert transform == (0.5, 0.0, 12.0, (720, 1280))
    assert boxed.boxes.tolist() == [[200, 112, 450, 362]]
    for mask in (boxed.area, boxed.lane):
        assert (mask[:12] == IGNORE).all() and (mask[372:] == IGNORE).all()
        assert (mask[12:372] != IGNORE).all()
    assert (boxed.image[:11] == aug.GREY).all() and (boxed.image[373:] == aug.GREY).all()
    np.testing.assert_array_equal(extent(boxed.area == 1), boxed.boxes[0])
    image, again = aug.letterbox_image(s.image, (384, 640))
    np.testing.assert_array_equal(image, boxed.image)
    assert again == transform


@pytest.mark.parametrize("size", [(100, 100), (90, 333), (500, 70), (96, 160)])
def test_letterbox_and_back(size):
    s = marked(size, (20, 30, 60, 80))
    boxed, transform = aug.letterbox(s, SIZE)
    np.testing.assert_allclose(boxes_to_original(boxed.boxes, transform), s.boxes, atol=1e-3)
    back = mask_to_original(boxed.area, transform)
    assert back.shape == size and (back != s.area).mean() < 0.02
    x1, y1, x2, y2 = boxed.boxes[0]
    scale = min(SIZE[0] / size[0], SIZE[1] / size[1])
    np.testing.assert_allclose([x2 - x1, y2 - y1], [40 * scale, 50 * scale], rtol=1e-5)


def test_letterbox_keeps_small_boxes_and_augmentation_drops_them():
    s = marked((960, 1600), (100, 100, 110, 108))
    boxed, _ = aug.letterbox(s, SIZE)
    np.testing.assert_allclose(boxed.boxes, [[10, 10, 11, 10.8]], atol=1e-5)
    assert len(aug.augment([s], SIZE, np.random.default_rng(0), STILL).boxes) == 0


@pytest.mark.parametrize(
    ("box", "stays"),
    [
        ((10, 10, 20, 20), True),
        ((10, 10, 12, 20), False),  # 2 wide
        ((10, 10, 12.1, 20), True),
        ((-91, 10, 9, 60), False),  # 9 % inside
        ((-89, 10, 11, 60), True),
        ((10, 10, 153.5, 17), False),  # 20.5 times as long as high
        ((10, 10, 143.5, 17), True),
        ((170, 10, 190, 20), False),
        ((np.nan, 10, 190, 20), False),
    ],
)
def test_which_boxes_stay(box, stays):
    kept, cut = aug.keep_boxes(np.array([box]), SIZE, AugmentConfig())
    assert kept.tolist() == [stays]
    if stays:
        assert (cut >= 0).all() and cut[0, 2] <= 160


def test_it_is_the_generators_seed_that_decides():
    sources = [marked(value=v) for v in (1, 2, 1, 2)]
    cfg = AugmentConfig()
    make = lambda seed: aug.augment(sources, SIZE, np.random.default_rng(seed), cfg)
    same(make(5), make(5))
    assert (make(5).image != make(6).image).any()


def test_mosaic_is_four_images_around_a_point():
    """Without a warp the canvas is drawn by hand: each scaled image touches the point."""
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    solid = [make_sample(np.full((*SIZE, 3), c, np.uint8), area=np.full(SIZE, v, np.uint8))
             for c, v in zip(colors, (0, 1, 2, 0), strict=True)]  # fmt: skip
    canvas_size = (2 * SIZE[0], 2 * SIZE[1])
    points = set()
    for seed in range(8):
        parts = aug.mosaic_parts(solid, SIZE, np.random.default_rng(seed))
        canvas = aug.compose(parts, canvas_size)
        rng = np.random.default_rng(seed)
        y, x = rng.uniform(48, 144), rng.uniform(80, 240)
        points.add((round(y), round(x)))
        want = np.full((*canvas_size, 3), aug.GREY)
        v, u = np.mgrid[: canvas_size[0], : canvas_size[1]] + 0.5
        quadrants = [(v < y) & (u < x), (v < y) & (u >= x), (v >= y) & (u < x), (v >= y) & (u >= x)]
        near = (np.abs(v - y) < SIZE[0]) & (np.abs(u - x) < SIZE[1])
        for q, c in zip(quadrants, colors, strict=True):
            want[q & near] = c
        assert (np.abs(canvas.image - want).max(-1) > 40).mean() < 0.003
        assert ((canvas.area == IGNORE) == ~near).mean() > 0.997
    assert len(points) == 8


def test_mosaic_of_partly_labelled_images():
    """Unlabelled quarters are ignored; boxes count only where all four have them."""
    full = marked()
    no_area = dataclasses.replace(
        full, area=np.full(full.area.shape, IGNORE, np.uint8), labelled=(True, False, True)
    )
    no_boxes = dataclasses.replace(
        full, boxes=np.zeros((0, 4), np.float32), classes=np.zeros(0, np.int32),
        crowd=np.zeros(0, bool), labelled=(False, True, True),
    )  # fmt: skip
    make = lambda some: aug.compose(
        aug.mosaic_parts(some, SIZE, np.random.default_rng(0)), (192, 320)
    )
    mixed = check_sample(make([full, no_area, full, full]))
    assert mixed.labelled == (True, True, True) and len(mixed.boxes) == 4
    assert (mixed.area != IGNORE).sum() < 0.8 * (mixed.lane != IGNORE).sum()
    assert check_sample(make([no_area] * 4)).labelled == (True, False, True)
    blind = check_sample(make([full, full, no_boxes, full]))
    assert blind.labelled == (False, True, True) and len(blind.boxes) == 0
    with pytest.raises(SampleError, match="mosaic of 3"):
        aug.mosaic_parts([full] * 3, SIZE, np.random.default_rng(0))


def test_behind_the_horizon_is_nowhere():
    matrix = np.eye(3)
    matrix[2] = (-0.02, 0, 1)  # the horizon at x = 50
    points = aug.map_points(matrix, [(10, 10), (60, 10)])
    np.testing.assert_allclose(points[0], [10 / 0.8, 10 / 0.8])
    assert np.isnan(points[1]).all()
    s = aug.compose([(marked(SIZE), matrix)], SIZE, AugmentConfig())
    assert len(s.boxes) == 0


def test_colours_change_the_image_alone():
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (40, 50, 3), np.uint8)
    np.testing.assert_array_equal(aug.recolour(image, rng, STILL), image)
    import colorsys

    cfg = dataclasses.replace(STILL, hue=0.2, saturation=0.7, value=0.4)
    got = aug.recolour(image, np.random.default_rng(9), cfg)
    gain = 1 + np.random.default_rng(9).uniform(-1, 1, 3) * (0.2, 0.7, 0.4)
    for y, x in rng.integers(0, 40, (60, 2)):
        h, s, v = colorsys.rgb_to_hsv(*(image[y, x] / 255))
        h, s, v = (h * gain[0]) % 1, min(s * gain[1], 1), min(v * gain[2], 1)
        want = np.array(colorsys.hsv_to_rgb(h, s, v)) * 255
        assert np.abs(got[y, x] - want).max() <= 255 * v * 6 / 180 + 4  # hue in steps of 2 degrees


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(flip=1.2), "flip 1.2"),
        (dict(mosaic=-0.1), "mosaic -0.1"),
        (dict(scale=1.0), "scale 1.0; expected"),
        (dict(perspective=0.5), "perspective 0.5"),
        (dict(rotate=90), "rotate 90"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(AugmentError, match=words):
        AugmentConfig(**settings)


def test_empty_images_pass():
    s = make_sample(np.zeros((50, 60, 3), np.uint8), [], [], None, np.zeros((50, 60), np.uint8))
    for sources in ([s], [s] * 4):
        out = check_sample(
            aug.augment(sources, SIZE, np.random.default_rng(0), AugmentConfig(rotate=5))
        )
        chex.assert_shape(out.boxes, (0, 4))
        assert out.labelled == (True, True, False)
    assert aug.flip(s).boxes.shape == (0, 4)
