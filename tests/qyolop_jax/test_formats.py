"""Values of masks, and label files: wrong types are named, none is written over another."""

import dataclasses
import json

import numpy as np
import pytest

from qyolop_jax import formats
from qyolop_jax.config import DETECTION, IGNORE, UNKNOWN
from qyolop_jax.formats import Bdd100kWriter, ReadError, lane_table

SIZE = (64, 96)


def test_lane_bits_as_documented():
    """Bit by bit, from strings."""
    table = lane_table()
    for byte in range(256):
        bits = format(byte, "08b")[::-1]
        what = int(bits[:3][::-1], 2)
        if byte in (248, 249):
            want = {248: IGNORE, 249: UNKNOWN}[byte]
        elif bits[3] == "1" or what in (0, 4):
            want = 0
        elif what in (1, 2, 3):
            want = 2
        else:
            want = 3 if bits[4] == "1" else 1
        assert table[byte] == want, byte


def test_lanes_of_the_fixtures(shared_data):
    """Their foreground is 0.27 % to 0.92 %, of which crosswalks and curbs are background here."""
    files = sorted((shared_data / "driving/bdd100k_fixtures/lane/gts").glob("*.png"))
    assert len(files) == 4
    kinds = set()
    for file in files:
        raw = formats.read_mask(file, (720, 1280))
        assert 0.0025 < (raw & 8 == 0).mean() < 0.0095
        lane = lane_table()[raw]
        assert (lane > 0).sum() == np.isin(raw, (1, 2, 3, 5, 6, 7)).sum()
        kinds |= set(np.unique(lane).tolist())
    assert kinds == {0, 1, 2}  # no dashed pixel in them


def test_boxes_of_the_scalabel_fixture(shared_data):
    content = formats.read_json(shared_data / "driving/bdd100k_fixtures/example_annotation.json")
    found = [formats.objects_of(e, "fixture") for e in content]
    listed = [l for e in content for l in e["labels"]]
    assert sum(map(len, found)) == len(listed) > 0
    first = np.array(listed[0]["poly2d"][0]["vertices"])
    if len(listed[0]["poly2d"]) == 1:
        np.testing.assert_allclose(found[0][0].box, [*first.min(0), *first.max(0)])


LABEL = dict(category="car", box2d=dict(x1=1, y1=2, x2=3, y2=4))


@pytest.mark.parametrize(
    "entry",
    [
        dict(labels={}, frames=[]) | dict(labels={"a": 1}), dict(labels="text"), dict(labels=5),
        dict(labels=[None]), dict(labels=["car"]), dict(labels=[[]]), dict(frames=5),
        dict(frames={"objects": []}), dict(frames=[5]), dict(frames=[dict(objects=3)]),
        *(dict(labels=[LABEL | wrong]) for wrong in (
            dict(category=None), dict(category=7), dict(category=["car"]), dict(box2d=[1, 2, 3, 4]),
            dict(box2d="1 2 3 4"), dict(box2d=dict(x1="1", y1=2, x2=3, y2=4)),
            dict(box2d=dict(x1=True, y1=2, x2=3, y2=4)), dict(box2d=dict(x1=1, y1=2, x2=3)),
            dict(box2d=dict(x1=None, y1=2, x2=3, y2=4)), dict(box2d=dict(x1=1, y1=2, x2=3, y2=1e9)),
            dict(box2d=dict(x1=1, y1=2, x2=3, y2=10**400)), dict(crowd="false"), dict(crowd=[]),
            dict(attributes=[1]), dict(attributes="crowd"), dict(attributes=dict(crowd="no")),
        )),
        *(dict(labels=[dict(category="car", poly2d=wrong)]) for wrong in (
            [5], "text", [[5]], [[[1]]], [dict(vertices=None)], [dict(vertices=[["a", "b"]])],
            [[[1, float("inf")]]], [[]], dict(vertices=[]),
        )),
    ],
    ids=str,
)  # fmt: skip
def test_labels_of_wrong_types_are_named(entry):
    with pytest.raises(ReadError, match=r"where it is: not BDD100K's layout \(.*expected frames"):
        formats.objects_of(entry, "where it is")


def test_json_that_nests_too_deep_is_named(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "latin.json").write_bytes(b'{"name": "\xe9"}')
    for name in ("deep.json", "latin.json"):
        with pytest.raises(ReadError, match=f"{name} is no JSON"):
            formats.read_json(tmp_path / name)


def test_labels_are_not_written_over_others(tmp_path):
    @dataclasses.dataclass
    class Found:
        boxes, classes = np.zeros((0, 4), np.float32), np.zeros(0, int)
        area = lane = np.zeros(SIZE, np.uint8)

    file = tmp_path / "labels/det_20/det_val.json"
    with (
        pytest.raises(ReadError, match=r"a\.jpg: labels of another a are written already"),
        Bdd100kWriter(tmp_path, "val", DETECTION) as writer,
    ):
        writer.add("a.png", Found())
        writer.add("b.png", Found(), stem="b.png")
        writer.add("b.jpg", Found(), stem="b.jpg")
        writer.add("a.jpg", Found())
    names = [entry["name"] for entry in json.loads(file.read_text())]
    assert names == ["a.png", "b.jpg", "b.png"]  # sorted, and also after the error
    masks = sorted(f.name for f in (tmp_path / "labels/lane/masks/val").iterdir())
    assert masks == ["a.png", "b.jpg.png", "b.png.png"]
