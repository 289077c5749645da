"""Samples that cannot be are refused by name; batches hold what was put in, and count the rest."""

import dataclasses
import pickle
import threading

import jax
import numpy as np
import pytest

from qyolop_jax.config import IGNORE
from qyolop_jax.samples import Report, SampleError, check_sample, clip_boxes, collate, make_sample


def one(n=2, size=(64, 96), seed=0, **changed):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 30, (n, 2))
    s = make_sample(
        rng.integers(0, 256, (*size, 3), np.uint8),
        np.concatenate([low, low + rng.uniform(3, 30, (n, 2))], 1),
        rng.integers(0, 4, n),
        rng.random(n) < 0.3,
        rng.integers(0, 3, size).astype(np.uint8),
        rng.choice(np.array([0, 1, 2, 3, 254, 255], np.uint8), size),
        f"s{seed}",
    )
    return dataclasses.replace(s, **changed)


def test_what_is_not_given_is_unlabelled():
    s = check_sample(make_sample(np.zeros((4, 6, 3), np.uint8)))
    assert s.labelled == (False, False, False) and s.boxes.shape == (0, 4)
    assert (s.area == IGNORE).all() and (s.lane == IGNORE).all()
    empty = check_sample(make_sample(np.zeros((4, 6, 3), np.uint8), boxes=[], classes=[]))
    assert empty.labelled == (True, False, False)  # labelled, and nothing there
    assert check_sample(one()) is not None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            dict(image=np.zeros((64, 96, 3), np.float32)),
            r"image float32.*expected uint8\[H, W, 3\]",
        ),
        (dict(image=np.zeros((64, 96), np.uint8)), "image uint8"),
        (dict(image=np.zeros((0, 96, 3), np.uint8)), "not empty"),
        (dict(area=np.zeros((64, 95), np.uint8)), r"area mask uint8\[64, 95\].*\[64, 96\]"),
        (dict(lane=np.zeros((64, 96), np.int32)), "lane mask int32"),
        (dict(area=np.full((64, 96), 3, np.uint8)), r"area mask has values \[3\].*0 to 2"),
        (dict(lane=np.full((64, 96), 4, np.uint8)), r"lane mask has values \[4\].*0 to 3"),
        (dict(labelled=(True, False, True)), "255 alone"),
        (dict(labelled=(False, True, True)), "2 boxes, though detection is not labelled"),
        (dict(boxes=np.array([[0, 0, 97, 4], [0, 0, 4, 4]], np.float32)), r"\[0.0, 0.0, 97.0"),
        (dict(boxes=np.array([[5, 0, 5, 4], [0, 0, 4, 4]], np.float32)), "x1 < x2"),
        (dict(boxes=np.array([[0, 0, np.nan, 4], [0, 0, 4, 4]], np.float32)), "nan"),
        (dict(boxes=np.zeros((2, 4))), "boxes float64"),
        (dict(classes=np.array([0, 4], np.int32)), "class 4; there are 4"),
        (dict(crowd=np.zeros(3, bool)), "2 boxes, 2 classes and 3 crowd"),
    ],
)
def test_what_cannot_be_is_named(changed, words):
    with pytest.raises(SampleError, match=f"(?s)sample s0.*{words}"):
        check_sample(one(**changed))


def test_a_batch_holds_every_sample_in_its_place():
    samples = [one(n, seed=n) for n in (0, 3, 1)]
    batch = collate(samples, max_boxes=3)
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == dict(
        image=("uint8", (3, 64, 96, 3)), boxes=("float32", (3, 3, 4)), classes=("int32", (3, 3)),
        valid=("bool", (3, 3)), crowd=("bool", (3, 3)), area=("uint8", (3, 64, 96)),
        lane=("uint8", (3, 64, 96)), labelled=("bool", (3, 3)),
    )  # fmt: skip
    for i, s in enumerate(samples):
        for j in range(3):
            there = j < len(s.boxes)
            assert batch["valid"][i, j] == there
            assert batch["boxes"][i, j].tolist() == (s.boxes[j].tolist() if there else [0] * 4)
            assert batch["classes"][i, j] == (s.classes[j] if there else 0)
            assert batch["crowd"][i, j] == (s.crowd[j] if there else False)
        for name in ("image", "area", "lane", "labelled"):
            np.testing.assert_array_equal(batch[name][i], getattr(s, name))
    total = jax.jit(lambda b: b["valid"].sum())(batch)
    assert int(total) == 4


def test_boxes_that_do_not_fit_are_counted_and_the_least_go():
    s = one(9, seed=5)
    with pytest.raises(SampleError, match="9 boxes do not fit into 4 places"):
        collate([s], max_boxes=4)
    report = Report()
    batch = collate([s, one(2)], 4, report)
    assert dict(report.counts) == {"box beyond 4 an image": 5} and "s5" in str(report)
    size = lambda b: float((b[2] - b[0]) * (b[3] - b[1]))
    order = sorted(range(9), key=lambda i: (bool(s.crowd[i]), -size(s.boxes[i])))[:4]
    np.testing.assert_array_equal(batch["boxes"][0], s.boxes[sorted(order)])


@pytest.mark.parametrize(
    ("samples", "places", "words"),
    [
        ([], 4, "no samples"),
        ([one(), one(size=(32, 96))], 4, "2 sizes"),
        ([one()], 0, "max_boxes is 0"),
    ],
)
def test_batches_that_cannot_be(samples, places, words):
    with pytest.raises(SampleError, match=words):
        collate(samples, places)


def test_a_report_counts_across_threads_and_survives_pickling():
    report = Report()
    assert not report and str(report) == "nothing was skipped"

    def work(k):
        for i in range(500):
            report.count("late", f"{k}.{i}")
            report.count("never", "x", 0)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    report.count("once")
    back = pickle.loads(pickle.dumps(report))
    back.count("late")
    assert back.counts == {"late": 4001, "once": 1} and report.counts["late"] == 4000
    lines = str(report).splitlines()
    assert lines[0].startswith("4000 x late (") and lines[0].endswith(", …)")
    assert lines[1] == "1 x once" and len(report.names["late"]) == 3


def test_boxes_are_clipped():
    boxes, inside = clip_boxes(
        [[-5, 2, 8, 9], [3, 3, 200, 70], [96, 0, 99, 5], [1, 1, 2, 2]], 64, 96
    )
    assert boxes.tolist() == [[0, 2, 8, 9], [3, 3, 96, 64], [96, 0, 96, 5], [1, 1, 2, 2]]
    assert inside.tolist() == [True, True, False, True] and boxes.dtype == np.float32
