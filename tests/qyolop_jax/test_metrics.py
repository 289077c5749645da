"""Metrics against loops, scipy and the numbers that BDD100K's own tool gives for its fixtures."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.extras import MissingPackage
from qyolop_jax import metrics
from qyolop_jax.config import IGNORE, LANE, UNKNOWN
from qyolop_jax.metrics import Boxes, Confusion, LaneF1

NAMES = ("background", "main", "alternative")


def masks(seed, shape=(4, 12, 17), classes=3, special=True):
    rng = np.random.default_rng(seed)
    extra = [UNKNOWN, IGNORE] if special else []
    truth = rng.choice([*range(classes), *extra], shape).astype(np.uint8)
    return truth, rng.integers(0, classes, shape).astype(np.uint8)


def count(truth, predicted, what):
    return sum(bool(what(t, p)) for t, p in zip(truth.ravel(), predicted.ravel(), strict=True))


def test_iou_pools_the_data_set():
    confusion = Confusion(NAMES)
    truth, predicted = masks(0)
    for b in range(4):
        confusion.add(truth[b], predicted[b])
    got = confusion.result()
    known = lambda t: t not in (IGNORE, UNKNOWN)
    for c, name in enumerate(NAMES):
        both = count(truth, predicted, lambda t, p, c=c: t == p == c)
        some = count(truth, predicted, lambda t, p, c=c: known(t) and c in (t, p))
        assert got[f"IoU {name}"] == pytest.approx(both / some)
    assert got["mIoU"] == pytest.approx(np.mean([got[f"IoU {n}"] for n in NAMES]))
    seen = truth != IGNORE  # and UNKNOWN is foreground
    both = count(truth[seen], predicted[seen], lambda t, p: t and p)
    some = count(truth[seen], predicted[seen], lambda t, p: t or p)
    assert got["foreground IoU"] == pytest.approx(both / some)
    assert got["foreground recall"] == pytest.approx(both / (truth[seen] > 0).sum())


def test_yolop_averages_batches():
    truth, predicted = masks(1, special=False, classes=2)
    truth[3] = 0  # a batch without foreground counts 0 there
    predicted[3] = 0
    whole = Confusion(("background", "lane"), "yolop")
    whole.add(truth[:3], predicted[:3])
    whole.add(truth[3:], predicted[3:])
    whole.add(np.full_like(truth, IGNORE), predicted)  # no batch at all
    both = (truth[:3] & predicted[:3]).sum()
    lane = 3 * (both / (truth[:3] | predicted[:3]).sum()) / 4
    assert whole.result()["foreground IoU"] == pytest.approx(lane)
    assert whole.result()["foreground recall"] == pytest.approx(3 * both / truth[:3].sum() / 4)
    pooled = Confusion(("background", "lane"))
    pooled.add(truth, predicted)
    assert pooled.result()["foreground IoU"] > lane  # which is why it is only for comparison
    assert np.isnan(Confusion(NAMES, "yolop").result()["mIoU"])


def test_classes_that_nobody_has():
    confusion = Confusion(NAMES)
    assert np.isnan(list(confusion.result().values())).all()
    confusion.add(np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.uint8))
    confusion.add(np.zeros((0, 3), np.uint8), np.zeros((0, 3), np.uint8))
    got = confusion.result()
    assert got["IoU background"] == got["mIoU"] == 1
    assert np.isnan([got["IoU main"], got["foreground IoU"], got["foreground recall"]]).all()


@pytest.mark.parametrize(
    ("truth", "predicted", "words"),
    [
        (np.full((2, 2), 3), np.zeros((2, 2)), r"mask values \[3\]; expected 0 to 2"),
        (np.zeros((2, 2)), np.full((2, 2), 7), "class 7 predicted"),
        (np.zeros((2, 2)), np.zeros((2, 3)), "a predicted mask"),
    ],
)
def test_impossible_masks(truth, predicted, words):
    with pytest.raises(metrics.MetricError, match=words):
        Confusion(NAMES).add(truth.astype(np.uint8), predicted.astype(np.uint8))


def test_impossible_settings():
    with pytest.raises(metrics.MetricError, match="expected 'pooled' or 'yolop'"):
        Confusion(NAMES, "mean")
    with pytest.raises(metrics.MetricError, match="a background and"):
        Confusion(("background",))
    with pytest.raises(metrics.MetricError, match="expected 'one' or 'skip'"):
        LaneF1("zero")


def reference_ap(truths, found, kind, threshold):
    """101-point interpolated AP of one class, without crowds, and recall; straight from COCO."""
    rows, total = [], 0
    for truth, image in zip(truths, found, strict=True):
        boxes = truth.boxes[truth.classes == kind]
        total += len(boxes)
        free = np.ones(len(boxes), bool)
        mine = np.flatnonzero(image.classes == kind)
        for i in mine[np.argsort(-image.scores[mine], kind="stable")]:
            a, best = image.boxes[i], -1
            overlap = []
            for b in boxes:
                w, h = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
                union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - w * h
                overlap.append(w * h / union)
            overlap = np.where(free, overlap, -1)
            if len(boxes) and overlap.max() >= threshold:
                best = int(overlap.argmax())
                free[best] = False
            rows.append((image.scores[i], best >= 0))
    if not total:
        return np.nan, np.nan
    hits = np.array([hit for _, hit in sorted(rows, key=lambda r: -r[0])], bool)
    tp = hits.cumsum()
    recall, precision = tp / total, tp / np.arange(1, len(hits) + 1)
    curve = [precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 101)]
    return np.mean(curve), (recall[-1] if len(hits) else 0.0)


def detections(seed, images=4):
    rng = np.random.default_rng(seed)
    truths, found = [], []
    for _ in range(images):
        n = rng.integers(0, 6)
        low = rng.uniform(0, 60, (n, 2))
        boxes = np.concatenate([low, low + rng.uniform(8, 40, (n, 2))], 1)
        classes = rng.integers(0, 2, n)  # the third class has no true box
        truths.append(Boxes(boxes, classes))
        near = boxes.repeat(2, 0) + rng.uniform(-4, 4, (2 * n, 4))
        wrong = rng.random(2 * n) < 0.2
        kinds = np.where(wrong, rng.integers(0, 3, 2 * n), classes.repeat(2))
        found.append(Boxes(near, kinds, rng.permutation(2 * n) / 16 + rng.random()))
    return truths, found


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_average_precision(seed):
    truths, found = detections(seed)
    names = ("pedestrian", "vehicle", "scooter")
    got = metrics.average_precision(truths, found, names)
    table = [[reference_ap(truths, found, c, t) for c in range(3)]
             for t in np.arange(0.5, 1, 0.05)]  # fmt: skip
    ap, recall = np.moveaxis(np.array(table), -1, 0)
    for c, name in enumerate(names):
        np.testing.assert_allclose(got[f"AP50 {name}"], ap[0, c], atol=1e-9)
    mean = lambda x: np.mean(x[~np.isnan(x)]) if (~np.isnan(x)).any() else np.nan
    np.testing.assert_allclose(got["AP50"], mean(ap[0]), atol=1e-9)
    np.testing.assert_allclose(got["AP"], mean(ap), atol=1e-9)
    np.testing.assert_allclose(got["recall50"], mean(recall[0]), atol=1e-9)


def test_average_precision_of_little(capsys):
    box = np.array([[0.0, 0, 10, 10]])
    one, none = Boxes(box, [0], [0.9]), Boxes(np.zeros((0, 4)), [])
    perfect = metrics.average_precision([one], [one], ("car",))
    np.testing.assert_allclose(
        list(perfect.values()), 1
    )  # the first annotation too, which an id of 0 would lose
    assert metrics.average_precision([one], [none], ("car",))["AP50"] == 0
    assert np.isnan(metrics.average_precision([none], [one], ("car",))["AP50"])
    assert np.isnan(metrics.average_precision([none], [none], ("car",))["AP"])
    assert np.isnan(metrics.average_precision([], [], ("car",))["recall50"])
    assert capsys.readouterr() == ("", "")


def test_crowds_neither_count_nor_cost():
    car, crowd = [0.0, 0, 10, 10], [20.0, 0, 60, 40]
    truth = Boxes([car, crowd], [0, 0], crowd=[False, True])
    parts = [[20.0, 0, 30, 10], [40.0, 20, 60, 40], [35.0, 5, 45, 15]]  # all inside the crowd
    found = Boxes([*parts, car], [0] * 4, [0.9, 0.8, 0.7, 0.6])
    assert metrics.average_precision([truth], [found], ("car",))["AP"] == pytest.approx(1)
    plain = truth._replace(crowd=None)
    assert metrics.average_precision([plain], [found], ("car",))["AP50"] < 0.3
    alone = Boxes([car], [0], [0.5])
    assert metrics.average_precision([truth], [alone], ("car",))["recall50"] == 1


@pytest.mark.parametrize(
    ("truths", "found", "words"),
    [
        ([Boxes(np.zeros((2, 4)), [0])], [Boxes(np.zeros((0, 4)), [])], "2 boxes, 1 classes"),
        ([Boxes(np.zeros((1, 4)), [2])], [Boxes(np.zeros((0, 4)), [])], "outside 0 to 1"),
        (
            [Boxes([[9, 0, 5, 5]], [0])],
            [Boxes(np.zeros((0, 4)), [])],
            "image 0 has a box inside out",
        ),
        ([Boxes(np.zeros((1, 4)), [0])], [], "predictions of 0 images for 1"),
    ],
)
def test_impossible_boxes(truths, found, words):
    with pytest.raises(metrics.MetricError, match=words):
        metrics.average_precision(truths, found, ("a", "b"))


def test_missing_packages_are_named(monkeypatch):
    for name in ("pycocotools.coco", "pycocotools.cocoeval", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackage, match=r"precision needs pycocotools.*thimble-jax\[vision\]"):
        metrics.average_precision([], [], ("a",))
    with pytest.raises(MissingPackage, match=r"lane boundaries needs cv2.*\[vision\]"):
        metrics.boundary_f1(np.ones((2, 2)), np.ones((2, 2)))


def reference_f1(truth, predicted, radius):
    from scipy.ndimage import distance_transform_edt

    to_truth, to_predicted = distance_transform_edt(~truth), distance_transform_edt(~predicted)
    precision = (to_truth[predicted] <= radius).mean()
    recall = (to_predicted[truth] <= radius).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_boundary_f1_is_a_matter_of_distance(seed):
    rng = np.random.default_rng(seed)
    truth, predicted = rng.random((2, 31, 23)) < 0.02
    truth[rng.integers(31), rng.integers(23)] = predicted[rng.integers(31), 3] = True
    expected = [reference_f1(truth, predicted, r) for r in (1, 2, 5)]
    np.testing.assert_allclose(metrics.boundary_f1(truth, predicted), expected, rtol=1e-12)


def test_boundary_f1_of_empty_masks():
    some, none = np.eye(5, dtype=bool), np.zeros((5, 5), bool)
    assert metrics.boundary_f1(some, none).tolist() == [0, 0, 0]
    assert metrics.boundary_f1(none, some).tolist() == [0, 0, 0]
    assert np.isnan(metrics.boundary_f1(none, none)).all()
    with pytest.raises(metrics.MetricError, match=r"expected two \[H, W\]"):
        metrics.boundary_f1(some, none[:4])


def test_typed_lane_f1():
    truth = np.zeros((20, 20), np.uint8)
    truth[:, 3], truth[:, 10], truth[:4] = 1, 3, IGNORE
    predicted = np.zeros_like(truth)
    predicted[:, 4], predicted[:, 10], predicted[0] = 1, 2, 3  # 1 px off, of a wrong kind, ignored
    for absent, double in (("one", 0.5), ("skip", 0.0)):
        f1 = LaneF1(absent)
        f1.add(truth, predicted, LANE)
        f1.add(np.zeros_like(truth), np.zeros_like(truth), LANE)
        unknown = np.where(truth == 1, UNKNOWN, truth)
        f1.add(unknown, np.zeros_like(truth), LANE)  # missed; counts for "any" alone
        got = f1.result()
        np.testing.assert_allclose(got["kind/double"], double)
        np.testing.assert_allclose(got["kind/dashed"], double)
        np.testing.assert_allclose(got["kind/single"], [1, 1, 1])
        np.testing.assert_allclose(got["kind"], (1 + 2 * double) / 3)
        np.testing.assert_allclose(got["any"], 2 / 3 if absent == "one" else 1 / 2)


def test_lane_bytes():
    byte = np.arange(64, dtype=np.uint8)[None]
    got = metrics.bdd100k_lanes(byte)
    assert len(got) == 12
    for value in range(64):
        names = {name for name, mask in got.items() if mask[0, value]}
        if value & 8:
            assert not names
        else:
            assert names == {
                f"direction/{'vertical' if value & 32 else 'parallel'}",
                f"style/{'dashed' if value & 16 else 'solid'}",
                f"category/{metrics.LANE_BITS['category'][1][value & 7]}",
            }
    with pytest.raises(metrics.MetricError, match="expected uint8"):
        metrics.bdd100k_lanes(byte.astype(int))


def test_lane_f1_on_the_fixtures_of_bdd100k(shared_data):
    """The numbers that bdd100k/eval/lane_test.py expects of these eight files, in per cent."""
    import cv2

    folder = shared_data / "driving" / "bdd100k_fixtures" / "lane"
    f1 = LaneF1()
    for path in sorted((folder / "gts").glob("*.png")):
        read = lambda p: cv2.imread(str(p), cv2.IMREAD_UNCHANGED)
        f1.add_bdd100k(read(path), read(folder / "res" / path.name))
    got = f1.result()
    expected = {
        "direction/parallel": (70.53328267, 80.9831119, 100),
        "direction/vertical": (100, 100, 100),
        "style/solid": (70.53328267, 80.9831119, 100),
        "style/dashed": (100, 100, 100),
        "category/crosswalk": (99.82147748, 100, 100),
        "category/double other": (100, 100, 100),
        "category/double white": (100, 100, 100),
        "category/double yellow": (75.33066961, 79.34917317, 100),
        "category/road curb": (71.02916505, 86.25984707, 100),
        "category/single other": (100, 100, 100),
        "category/single white": (96.43828133, 100, 100),
        "category/single yellow": (94.79621737, 100, 100),
        "direction": (85.26664133, 90.49155595, 100),
        "style": (85.26664133, 90.49155595, 100),
        "category": (92.17697636, 95.70112753, 100),
    }
    assert got.keys() == expected.keys()
    for name, row in expected.items():
        np.testing.assert_allclose(100 * got[name], row, rtol=1e-7, err_msg=name)
