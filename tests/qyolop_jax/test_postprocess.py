"""NMS against a greedy loop, predictions against plain NumPy, and the way back to the original."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qyolop_jax import postprocess
from qyolop_jax.boxes import decode_boxes
from qyolop_jax.config import ModelConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = (64, 96)
CFG = ModelConfig(size=(256, 384))


def iou(a, b):
    w, h = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def greedy(boxes, scores, classes, threshold):
    """Indices kept, best first: the definition."""
    kept = []
    for i in np.argsort(-np.float64(scores), kind="stable"):
        if scores[i] <= 0:
            continue
        if all(classes[i] != classes[j] or iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(int(i))
    return kept


@functools.partial(jax.jit, static_argnames="limit")
def run_nms(boxes, scores, classes, threshold, limit):
    return postprocess.nms(boxes, scores, classes, threshold, limit)


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.25, 0.6]), st.integers(0, 30))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_nms_is_greedy(seed, threshold, real):
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 20, (30, 2))
    boxes = np.float32(np.concatenate([low, low + rng.integers(1, 15, (30, 2))], 1))
    scores = -np.sort(-np.float32(rng.integers(1, 12, 30))) * (np.arange(30) < real)  # with ties
    classes = np.int32(rng.integers(0, 3, 30))
    expected = greedy(np.float64(boxes), scores, classes, threshold)
    order, valid = run_nms(boxes, scores, classes, threshold, 40)
    assert np.asarray(order)[np.asarray(valid)].tolist() == expected
    assert np.flatnonzero(valid).tolist() == list(range(len(expected)))
    order, valid = run_nms(boxes, scores, classes, threshold, 5)
    assert np.asarray(order)[np.asarray(valid)].tolist() == expected[:5]
    for i in set(range(real)) - set(expected):  # each that went has a better one over it
        assert any(
            j < i and classes[j] == classes[i] and iou(boxes[i], boxes[j]) > threshold
            for j in expected
        )


def outputs(seed, samples=2, objects=-2.0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    raw = {f"detect.{s}": normal(samples, 64 // s, 96 // s, 27) for s in CFG.strides}
    raw = {k: v.at[..., 4::9].add(objects) for k, v in raw.items()}
    return raw | {"area": normal(samples, *SIZE, 3), "lane": normal(samples, *SIZE, 4)}


@functools.partial(jax.jit, static_argnames="limit")
def predict(raw, conf, iou, limit):
    return postprocess.to_predictions(raw, CFG, conf, iou, limit)


@pytest.mark.quick_cases("0.3-7", "0.999-100")
@pytest.mark.parametrize(("conf", "limit"), [(0.3, 100), (0.3, 7), (0.999, 100)])
def test_predictions(conf, limit):
    raw = outputs(0)
    got = predict(raw, conf, 0.25, limit)
    decoded = decode_boxes(raw, CFG)
    for b in range(2):
        boxes = np.float64(decoded.boxes_BP4[b])
        p = 1 / (1 + np.exp(-np.float64(decoded.cls_BPC[b])))
        p *= 1 / (1 + np.exp(-np.float64(decoded.obj_BP[b])))[:, None]
        best = p.max(1)
        assert (best >= conf).sum() <= postprocess.CANDIDATES
        kept = greedy(boxes, np.where(best >= conf, best, 0), p.argmax(1), 0.25)[:limit]
        assert (len(kept) > 7) == (conf < 0.9 and limit > 7)
        valid = np.asarray(got.valid[b])
        assert valid.sum() == len(kept) and valid[: len(kept)].all()
        np.testing.assert_allclose(
            got.boxes[b][: len(kept)], np.clip(boxes[kept], 0, [96, 64] * 2), atol=1e-4
        )
        np.testing.assert_allclose(got.scores[b][: len(kept)], best[kept], rtol=1e-5)
        np.testing.assert_array_equal(got.classes[b][: len(kept)], p[kept].argmax(1))
        for array in (got.boxes, got.scores, got.classes):
            assert not np.asarray(array[b])[~valid].any()
    np.testing.assert_array_equal(got.area, np.argmax(raw["area"], -1))
    np.testing.assert_array_equal(got.lane, np.argmax(raw["lane"], -1))
    names = [*CFG.area, *CFG.lane[1:]]
    for area, lane, merged in zip(*(np.ravel(x) for x in (got.area, got.lane, got.merged))):
        assert names[merged] == (CFG.lane[lane] if lane else CFG.area[area])
    assert got.merged.dtype == got.area.dtype == jnp.uint8 and got.classes.dtype == jnp.int32


def test_thresholds_are_not_compiled_in():
    traced = chex.assert_max_traces(
        lambda r, c, i: postprocess.to_predictions(r, CFG, c, i, 400).valid, 1
    )
    program = jax.jit(traced)
    raw = outputs(1)
    counts = [int(program(raw, *t).sum()) for t in ((0.4, 0.25), (0.05, 0.25), (0.05, 0.9))]
    assert counts[0] < counts[1] < counts[2]


def test_nothing_found():
    got = predict(outputs(0, objects=-50.0), 0.05, 0.25, 100)
    assert not got.valid.any() and not got.boxes.any()
    found = postprocess.to_original(got, 0, (1.0, 0, 0, SIZE))
    assert found.boxes.shape == (0, 4) and found.scores.shape == found.classes.shape == (0,)


@pytest.mark.slow
def test_more_boxes_asked_for_than_there_are_predictions():
    small = ModelConfig(size=(32, 32))
    raw = {f"detect.{s}": jnp.ones((1, 32 // s, 32 // s, 27)) for s in small.strides}
    raw |= {"area": jnp.zeros((1, 32, 32, 3)), "lane": jnp.zeros((1, 32, 32, 4))}
    got = postprocess.to_predictions(raw, small, 0.05, 0.9, 80)  # 63 predictions in all
    assert got.boxes.shape == (1, 80, 4) and 0 < got.valid.sum() <= 63
    with pytest.raises(postprocess.PostprocessError, match="at least 1 box"):
        postprocess.to_predictions(raw, small, limit=0)


@pytest.mark.parametrize("size", [(30, 80), (150, 75), (64, 96)])
def test_back_to_the_original(size):
    """A rectangle of the original, drawn in its letterbox by mapping centres, comes back."""
    scale = min(SIZE[0] / size[0], SIZE[1] / size[1])
    dx, dy = (SIZE[1] - size[1] * scale) / 2, (SIZE[0] - size[0] * scale) / 2
    box = np.float64([10, 6, 40, 25])
    inside = box * scale + [dx, dy, dx, dy]
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    mask = (x > inside[0]) & (x < inside[2]) & (y > inside[1]) & (y < inside[3])
    transform = (scale, dx, dy, size)
    np.testing.assert_allclose(postprocess.boxes_to_original(inside, transform), [box], atol=1e-4)
    back = postprocess.mask_to_original(mask, transform)
    assert back.shape == size
    y, x = np.nonzero(back)
    slack = 0.5 / min(scale, 1) + 0.5  # half a pixel of either image
    np.testing.assert_allclose([x.min(), y.min(), x.max() + 1, y.max() + 1], box, atol=slack)


def test_found_on_the_original_image():
    zeros = np.zeros((2, *SIZE), np.uint8)
    padding, inside = [0, 0, 96, 15], [10, 10, 50, 40]
    predictions = postprocess.Predictions(
        boxes=np.float32([[padding, inside, [0] * 4]] * 2),
        scores=np.float32([[0.9, 0.8, 0]] * 2),
        classes=np.int32([[1, 2, 0]] * 2),
        valid=np.array([[True, True, False]] * 2),
        area=zeros + 1,
        lane=zeros + 2,
        merged=zeros + 4,
    )
    found = postprocess.to_original(predictions, 1, (0.5, 0.0, 16.0, (64, 192)))
    np.testing.assert_array_equal(found.boxes, [[20, 0, 100, 48]])  # the other was in the padding
    assert found.scores.tolist() == [np.float32(0.8)] and found.classes.tolist() == [2]
    for mask, value in ((found.area, 1), (found.lane, 2), (found.merged, 4)):
        assert mask.shape == (64, 192) and (mask == value).all()


@pytest.mark.parametrize("transform", [(0.0, 0, 0, (4, 4)), (1.0, 0, 0, (0, 4))])
def test_impossible_letterboxes(transform):
    with pytest.raises(postprocess.PostprocessError, match="scale and size above 0"):
        postprocess.boxes_to_original(np.zeros((1, 4)), transform)
