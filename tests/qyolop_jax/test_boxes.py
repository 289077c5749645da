"""Decoding and overlaps against plain loops in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qyolop_jax import boxes
from qyolop_jax.config import ModelConfig, ModelConfigError

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = ModelConfig(size=(64, 96))


def raw_outputs(seed, batch=2, size=(64, 96), cfg=CFG):
    rng = np.random.default_rng(seed)
    fields = 3 * (5 + len(cfg.detection))
    return {
        f"detect.{s}": jnp.asarray(
            rng.normal(size=(batch, size[0] // s, size[1] // s, fields)), jnp.float32
        )
        for s in cfg.strides
    }


def random_boxes(rng, count, low=2, high=40):
    centre = rng.uniform(0, [96, 64], (count, 2))
    half = rng.uniform(low, high, (count, 2)) / 2
    return np.concatenate([centre - half, centre + half], 1)


def reference_iou(a, b):
    w = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    h = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if union > 0 else 0.0


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_decode_is_the_formula_cell_by_cell(size):
    raw = raw_outputs(0, size=size)
    got = jax.jit(lambda r: boxes.decode_boxes(r, CFG))(raw)
    sigmoid = lambda x: 1 / (1 + np.exp(-np.float64(x)))
    at = 0
    for level, stride in enumerate(CFG.strides):
        rows, columns = size[0] // stride, size[1] // stride
        array = np.asarray(raw[f"detect.{stride}"])
        for y, x, a in itertools.product(range(rows), range(columns), range(3)):
            t = array[1, y, x, 9 * a : 9 * a + 9]
            anchor = (
                np.array(CFG.anchors[level][a]) * 96 / 640
            )  # the model's width, not the image's
            middle = (2 * sigmoid(t[:2]) - 0.5 + [x, y]) * stride
            wh = (2 * sigmoid(t[2:4])) ** 2 * anchor
            box = np.concatenate([middle - wh / 2, middle + wh / 2])
            np.testing.assert_allclose(got.boxes_BP4[1, at], box, rtol=1e-5, atol=1e-4)
            np.testing.assert_array_equal(got.obj_BP[1, at], t[4])
            np.testing.assert_array_equal(got.cls_BPC[1, at], t[5:])
            at += 1
    assert got.boxes_BP4.shape == (2, at, 4)
    assert boxes.cells(CFG, size).starts[-1] == at


def test_anchors_follow_the_width_of_the_model():
    np.testing.assert_array_equal(boxes.anchors(ModelConfig()), np.float32(ModelConfig().anchors))
    half = boxes.anchors(ModelConfig(size=(192, 320)))
    np.testing.assert_array_equal(half[0, 0], [6, 8])


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_iou_counts_pixels(seed):
    rng = np.random.default_rng(seed)
    some = rng.integers(0, 12, (7, 2, 2))
    some = np.concatenate([some.min(1), some.max(1)], 1)  # corners in order; some are empty
    grid = np.zeros((7, 12, 12), bool)
    for mask, (x1, y1, x2, y2) in zip(grid, some, strict=True):
        mask[y1:y2, x1:x2] = True
    got = np.asarray(boxes.pairwise_iou(jnp.float32(some), jnp.float32(some)))
    for i, j in itertools.product(range(7), repeat=2):
        union = (grid[i] | grid[j]).sum()
        expected = (grid[i] & grid[j]).sum() / union if union else 0
        np.testing.assert_allclose(got[i, j], expected, rtol=1e-6)


def reference_ciou(a, b):
    a, b = np.float64(a), np.float64(b)
    hull = np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])
    apart = (a[:2] + a[2:]) / 2 - (b[:2] + b[2:]) / 2
    angle = lambda box: np.arctan((box[2] - box[0]) / (box[3] - box[1]))
    v = 4 / np.pi**2 * (angle(a) - angle(b)) ** 2
    overlap = reference_iou(a, b)
    alpha = v / (1 - overlap + v) if v else 0.0
    return overlap - (apart**2).sum() / (hull**2).sum() - alpha * v, alpha


def test_ciou_and_its_gradient():
    rng = np.random.default_rng(1)
    a, b = random_boxes(rng, 40), random_boxes(rng, 40)
    b[:20] = a[:20] + rng.normal(size=(20, 4))  # half of them overlap well
    got = boxes.ciou(jnp.float32(a), jnp.float32(b))
    np.testing.assert_allclose(
        got, [reference_ciou(*pair)[0] for pair in zip(a, b, strict=True)], rtol=1e-4, atol=1e-5
    )
    gradient = jax.grad(lambda x: boxes.ciou(x, jnp.float32(b)).sum())(jnp.float32(a))

    def fixed_alpha(x, y, alpha):  # the gradient takes alpha as a constant
        value, own = reference_ciou(x, y)
        angle = lambda box: np.arctan((box[2] - box[0]) / (box[3] - box[1]))
        return value + (own - alpha) * 4 / np.pi**2 * (angle(x) - angle(y)) ** 2

    for i, axis in itertools.product(range(40), range(4)):
        h = np.eye(4)[axis] * 1e-5
        alpha = reference_ciou(a[i], b[i])[1]
        expected = (fixed_alpha(a[i] + h, b[i], alpha) - fixed_alpha(a[i] - h, b[i], alpha)) / 2e-5
        np.testing.assert_allclose(gradient[i, axis], expected, rtol=2e-3, atol=2e-5)


def test_ciou_of_equal_and_of_empty_boxes():
    box = jnp.array([[3.0, 4.0, 9.0, 8.0]])
    np.testing.assert_allclose(boxes.ciou(box, box), [1], rtol=1e-6)
    flat = jnp.zeros((1, 4))
    for a, b in ((box, flat), (flat, box), (flat, flat)):
        assert np.isfinite(jax.grad(lambda x, y=b: boxes.ciou(x, y).sum())(a)).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.pop("detect.16"), "lack detect.16"),
        (lambda raw: raw.update({"detect.32": raw["detect.16"]}), r"detect.32 has shape"),
        (lambda raw: raw.update({"detect.8": raw["detect.8"][..., :-1]}), r"expected \[B, \(8, 12"),
    ],
)
def test_raw_outputs_that_do_not_fit(change, words):
    raw = raw_outputs(0)
    change(raw)
    with pytest.raises(boxes.BoxError, match=words):
        boxes.decode_boxes(raw, CFG)


def test_sizes_and_anchors_that_do_not_fit():
    with pytest.raises(boxes.BoxError, match="multiples of 32"):
        boxes.cells(CFG, (64, 90))
    with pytest.raises(ModelConfigError, match="three anchors"):
        ModelConfig(size=(64, 96), anchors=(((1, 1), (2, 0), (3, 3)),) * 3)
