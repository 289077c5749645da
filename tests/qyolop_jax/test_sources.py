"""Streams: the same whatever the threads, restored to the next batch, not stopped by bad data."""

import dataclasses
import json
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from qyolop_jax.augment import AugmentConfig, letterbox
from qyolop_jax.config import DETECTION, IGNORE
from qyolop_jax.formats import Bdd100kWriter, ReadError
from qyolop_jax.postprocess import boxes_to_original
from qyolop_jax.readers import Bdd100k
from qyolop_jax.samples import Report, make_sample
from qyolop_jax.scenes.generate import Scenes, scene
from qyolop_jax.sources import (
    Cached,
    Feed,
    SourceError,
    batches,
    in_order,
    load_sample,
    per_epoch,
    shrunk,
)

SIZE = (64, 96)


class Numbered:
    """Images whose colour is their number; boxes, or lanes alone, and some that are broken."""

    def __init__(self, count, boxes=True, broken=(), size=SIZE, first=0):
        self.count, self.boxes, self.broken, self.size = count, boxes, set(broken), size
        self.first, self.loads = first, Counter()

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        self.loads[i] += 1
        if i in self.broken:
            raise ReadError(f"number {i} is corrupt")
        image = np.full((*self.size, 3), self.first + i, np.uint8)
        if self.boxes:
            return make_sample(image, [[0, 0, 40, 40]], [1], name=f"n{i}")
        return make_sample(image, lane=np.ones(self.size, np.uint8), name=f"n{i}")


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_array_equal(a[k], b[k], err_msg=k)


MIXED = dict(scenes=Scenes(7, (64, 128)), lanes=Numbered(5, boxes=False))
STRONG = AugmentConfig(mosaic=0.5, rotate=5)


@pytest.mark.slow
def test_threads_change_nothing():
    streams = [
        batches(MIXED, Feed(SIZE, 3, STRONG, seed=2, threads=t)) for t in (0, 1, 4)
    ]  # fmt: skip
    for _ in range(6):
        first, *others = (next(s) for s in streams)
        for other in others:
            same(first, other)
    again = next(batches(MIXED, Feed(SIZE, 3, STRONG, seed=3)))
    assert (again["image"] != next(batches(MIXED, Feed(SIZE, 3, STRONG, seed=2)))["image"]).any()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_restored_stream_goes_on(threads):
    feed = Feed(SIZE, 2, STRONG, threads=threads)
    stream = batches(MIXED, feed, dict(scenes=3, lanes=1))
    for _ in range(5):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))  # as a checkpoint would keep it
    want = [next(stream) for _ in range(4)]
    restored = batches(MIXED, feed, dict(scenes=3, lanes=1))
    next(restored)
    restored.set_state(state)
    started = batches(MIXED, feed, dict(scenes=3, lanes=1), start=5)
    for w in want:
        same(w, next(restored))
        same(w, next(started))


def numbers(batch):
    return batch["image"][:, 0, 0, 0].tolist()


def test_every_sample_comes_once_an_epoch_in_another_order():
    data = dict(a=Numbered(12))
    feed = Feed(SIZE, 4)
    assert per_epoch(data, 4) == 3
    stream = batches(data, feed)
    epochs = [[n for _ in range(3) for n in numbers(next(stream))] for _ in range(3)]
    assert all(sorted(e) == list(range(12)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(12))


@pytest.mark.parametrize("weights", [dict(a=3, b=1), dict(a=1, b=0), None])
def test_weights_are_shares(weights):
    data = dict(a=Numbered(30), b=Numbered(10, first=100))
    stream = batches(data, Feed(SIZE, 8), weights)
    found = [n for _ in range(10) for n in numbers(next(stream))]
    share = np.mean([n < 100 for n in found])
    assert share == pytest.approx(1.0 if weights == dict(a=1, b=0) else 0.75, abs=0.02)
    assert per_epoch(data, 8, weights) == (3 if weights == dict(a=1, b=0) else 5)


def test_unlabelled_tasks_stay_so():
    data = dict(a=Numbered(8), b=Numbered(8, boxes=False, first=100))
    stream = batches(data, Feed(SIZE, 8, AugmentConfig(mosaic=1.0, scale=0, translate=0)))
    seen = set()
    for _ in range(3):
        batch = next(stream)
        for i in range(8):
            labelled = tuple(batch["labelled"][i].tolist())
            seen.add(labelled)
            assert labelled in {(True, False, False), (False, False, True)}  # never mixed
            assert (batch["area"][i] == IGNORE).all()
            assert batch["valid"][i].any() <= labelled[0]
            assert (batch["lane"][i] != IGNORE).any() == labelled[2]
    assert len(seen) == 2


def test_broken_samples_are_replaced_and_counted():
    report = Report()
    data = Numbered(10, broken=(3, 4, 9))
    stream = batches(dict(a=data), Feed(SIZE, 10, threads=0), report=report)
    assert sorted(numbers(next(stream))) == sorted([0, 1, 2, 5, 5, 5, 6, 7, 8, 0])
    assert report.counts["broken sample skipped"] == 4  # 3, 4 behind it, 4 and 9
    assert "number" in str(report) and "is corrupt" in str(report)


def test_a_sample_that_cannot_be_counts_as_broken():
    class Wrong(Numbered):
        def __getitem__(self, i):
            s = super().__getitem__(i)
            return dataclasses.replace(s, classes=np.array([9], np.int32)) if i == 1 else s

    report = Report()
    assert load_sample(Wrong(3), 1, report).name == "n2"
    assert "class 9; there are 4 classes" in str(report)


def test_too_many_broken_ones_are_an_error():
    with pytest.raises(SourceError, match=r"5 samples in a row are broken, from 2 on.*corrupt"):
        load_sample(Numbered(5, broken=range(5)), 2, Report())
    stream = batches(dict(a=Numbered(50, broken=range(50))), Feed(SIZE, 2, threads=1))
    with pytest.raises(SourceError, match="20 samples in a row"):
        next(stream)


def test_boxes_that_do_not_fit_are_reported():
    crowded = [make_sample(np.zeros((*SIZE, 3), np.uint8), [[0, 0, 9, 9]] * 5, [1] * 5)] * 4
    report = Report()
    batch = next(batches(dict(a=crowded), Feed(SIZE, 4, max_boxes=3, threads=0), report=report))
    assert batch["valid"].sum() == 12 and report.counts["box beyond 3 an image"] == 8


def test_in_order_is_everything_once():
    report = Report()
    data = Numbered(7, broken=(2,), size=(50, 120))
    feed = Feed(SIZE, 4, STRONG, threads=2)
    found = list(in_order(data, feed, report))
    assert [len(originals) for _, originals in found] == [4, 2]
    assert [s.name for _, some in found for s, _ in some] == ["n0", "n1", "n3", "n4", "n5", "n6"]
    assert all(b["image"].shape == (4, *SIZE, 3) for b, _ in found)
    assert report.counts == {"broken sample left out": 1}
    batch, originals = found[0]
    for i, (s, transform) in enumerate(originals):
        same_again, t = letterbox(s, SIZE)
        np.testing.assert_array_equal(batch["image"][i], same_again.image)
        assert t == transform
        back = boxes_to_original(batch["boxes"][i, :1], transform)
        np.testing.assert_allclose(back, s.boxes, atol=1e-4)
    last = found[1][0]
    assert not last["labelled"][2:].any() and not last["valid"][2:].any()
    assert list(in_order([], feed)) == []
    with pytest.raises(ReadError, match="number 2 is corrupt"):  # no report that could name it
        list(in_order(data, feed))


def test_in_order_keeps_every_box():
    """More than a batch to train on has places for; a box too small for float32 is counted."""
    corners = np.stack(np.meshgrid(np.arange(0, 96, 4), np.arange(0, 64, 4)), -1).reshape(-1, 2)
    boxes = np.concatenate([corners, corners + 3], 1).astype(np.float32)
    image, kinds = np.zeros((*SIZE, 3), np.uint8), np.zeros(len(boxes), np.int32)
    data = [make_sample(image, boxes[:n], kinds[:n]) for n in (300, 0, 65)]
    report, feed = Report(), Feed(SIZE, 2, threads=0)
    first, second = (batch for batch, _ in in_order(data, feed, report))
    assert first["valid"].sum(1).tolist() == [300, 0] and second["valid"].sum(1).tolist() == [65, 0]
    np.testing.assert_allclose(first["boxes"][0], boxes[:300], atol=1e-4)
    assert not report
    small = make_sample(image, [[90, 2, np.nextafter(np.float32(90), np.float32(91)), 8]], [0])
    wide = [dataclasses.replace(small, image=np.zeros((64, 1000, 3), np.uint8), area=np.full(
        (64, 1000), IGNORE, np.uint8), lane=np.full((64, 1000), IGNORE, np.uint8))]  # fmt: skip
    ((batch, _),) = in_order(wide, feed, report)
    assert batch["valid"].sum() == 0 and report.counts == {"box without an area on the grid": 1}


def test_memory_keeps_what_was_loaded():
    data = Numbered(3, broken=(1,), size=(64, 128))
    kept = Cached(data, 64)
    assert len(kept) == 3
    found = []
    threads = [threading.Thread(target=lambda: found.append(kept[0])) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    loads = data.loads[0]
    assert 1 <= loads <= 8 and len({id(s) for s in found}) == 1
    assert kept[0] is found[0] and data.loads[0] == loads
    for _ in range(2):
        with pytest.raises(ReadError):
            kept[1]
    assert data.loads[1] == 2
    assert kept[0].image.shape == (32, 64, 3) and kept[0].boxes.tolist() == [[0, 0, 20, 20]]
    with pytest.raises(SourceError, match="long_side is 8"):
        Cached(data, 8)


def test_shrinking_keeps_labels_in_place():
    s = scene(11, (192, 320))
    small = shrunk(s, 160)
    assert shrunk(s, 320) is s and small.image.shape == (96, 160, 3)
    np.testing.assert_allclose(small.boxes * 2, s.boxes, atol=1e-5)
    corners = np.stack([s.area[i::2, j::2] for i in (0, 1) for j in (0, 1)])
    assert (corners == small.area).any(0).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Feed(SIZE, 0), "batch 0"),
        (lambda: Feed(SIZE, 1, threads=-1), "threads -1"),
        (lambda: Feed((60, 96), 1), "multiples of 32"),
        (lambda: batches({}, Feed(SIZE, 1)), "no data set has a weight"),
        (lambda: batches(MIXED, Feed(SIZE, 1), dict(scene=1)), r"weights for \['scene'\]"),
        (lambda: batches(MIXED, Feed(SIZE, 1), dict(scenes=-1)), "of 0 or more"),
        (lambda: batches(MIXED, Feed(SIZE, 1), dict(scenes=0)), "above 0"),
        (lambda: batches(dict(a=[]), Feed(SIZE, 1), dict(a=1)), r"\['a'\] are empty"),
        (lambda: batches(MIXED, Feed(SIZE, 1), start=-1), "start is -1"),
    ],
)
def test_streams_that_cannot_be(make, words):
    with pytest.raises(SourceError, match=words):
        make()


def test_tensorflow_datasets_without_tensorflow(tmp_path, capsys):
    """What the builder stored is what the reader reads, and a stream runs from it."""
    pytest.importorskip("tensorflow_datasets", reason="pip install -e '.[eval]'")
    pytest.importorskip("importlib_resources", reason="pip install -e '.[eval]'")
    pytest.importorskip("array_record", reason="pip install -e '.[eval]'")
    from qyolop_jax.tfds_builder import StoredSamples, prepare

    had = "tensorflow" in sys.modules
    for split, count in (("train", 4), ("val", 2)):
        with Bdd100kWriter(tmp_path / "bdd", split, DETECTION) as writer:
            for i in range(count):
                s = scene((count, i), SIZE)
                writer.add(f"{split}{i}", s, s.image)
    broken = tmp_path / "bdd/images/100k/train/train3.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    builder = prepare(tmp_path / "bdd", tmp_path / "tfds")
    assert ("tensorflow" in sys.modules) == had
    assert builder.report.counts == {"broken sample left out": 1}
    reader = Bdd100k(tmp_path / "bdd")
    by_name = {reader[i].name: reader[i] for i in range(3)}
    stored = StoredSamples(builder.as_data_source("train"))
    assert len(stored) == 3 and len(builder.as_data_source("val")) == 2
    for s in stored:
        want = by_name.pop(s.name)
        for field in dataclasses.fields(s):
            np.testing.assert_array_equal(getattr(s, field.name), getattr(want, field.name))
    batch = next(batches(dict(stored=stored), Feed(SIZE, 3, threads=1)))
    assert batch["labelled"].all() and batch["image"].shape == (3, *SIZE, 3)
    with pytest.raises(IndexError, match="sample 3 of 3"):
        stored[3]
    with pytest.raises(ReadError, match="there is no folder"):
        prepare(tmp_path / "nowhere", tmp_path / "other")
    with pytest.raises(ReadError, match="no set 'kitti'"):
        prepare(tmp_path, tmp_path, "kitti")
    (tmp_path / "bare/images").mkdir(parents=True)
    with pytest.raises(ReadError, match="no images of train"):
        prepare(tmp_path / "bare", tmp_path / "third")
    capsys.readouterr()  # progress bars
