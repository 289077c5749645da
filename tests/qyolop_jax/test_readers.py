"""Readers on folders made here and on real ones; what is broken is named, what is odd counted."""

import dataclasses
import itertools
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from qyolop_jax.config import DETECTION, IGNORE, UNKNOWN
from qyolop_jax.formats import Bdd100kWriter, ReadError
from qyolop_jax.readers import ApolloScape, Bdd100k, CamVid, TuSimple, TypedLanes
from qyolop_jax.samples import SampleError
from qyolop_jax.scenes.generate import scene

SIZE = (64, 96)


def image_at(path, size=SIZE, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rough = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    cv2.imwrite(str(path), cv2.resize(rough, size[::-1]))


def mask_at(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.asarray(values, np.uint8))


def objects(*found):
    """Per-image JSON as BDD100K had it in 2018."""
    listed = [
        dict(category=c, box2d=dict(zip(("x1", "y1", "x2", "y2"), b, strict=True)))
        for c, b in found
    ]
    return dict(name="x", frames=[dict(timestamp=0, objects=listed)])


def json_at(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def yolop(tmp_path):
    """A folder in YOLOP's layout with three images; b has no label files, c nothing on it."""
    for i, name in enumerate("abc"):
        image_at(tmp_path / "images/train" / f"{name}.jpg", seed=i)
    boxes = objects(("car", (5, 5, 30, 30)), ("rider", (40, 5, 52, 30)), ("bike", (38, 18, 56, 40)))
    json_at(tmp_path / "det_annotations/train/a.json", boxes)
    json_at(tmp_path / "det_annotations/train/c.json", objects())
    ramp = np.where(np.arange(96) < 40, 0, 255) * np.ones((64, 1))
    for name in "ac":
        mask_at(tmp_path / f"da_seg_annotations/train/{name}.png", ramp)
        mask_at(tmp_path / f"ll_seg_annotations/train/{name}.png", ramp[:, ::-1])
    return tmp_path


def test_yolops_layout(yolop):
    reader = Bdd100k(yolop, "train")
    a, b, c = reader
    assert [s.name for s in (a, b, c)] == ["a", "b", "c"]
    np.testing.assert_array_equal(a.boxes, [[5, 5, 30, 30], [38, 5, 56, 40]])
    assert [DETECTION[k] for k in a.classes] == ["vehicle", "bicycle"]  # rider and bike are one
    assert (a.area[:, :40] == 0).all() and (a.area[:, 40:] == UNKNOWN).all()
    assert (a.lane[:, :56] == UNKNOWN).all() and (a.lane[:, 56:] == 0).all()
    assert b.labelled == (False, False, False) and c.labelled == (True, True, True)
    assert c.boxes.shape == (0, 4)  # empty, and known to be
    assert dict(reader.report.counts) == {
        "image without detection labels": 1,
        "image without area labels": 1,
        "image without lane labels": 1,
    }
    np.testing.assert_array_equal(a.image, cv2.imread(str(yolop / "images/train/a.jpg"))[..., ::-1])


def test_labels_written_are_read_back(tmp_path):
    samples = [scene(i, SIZE) for i in range(4)]
    samples[1].area[:9], samples[1].lane[:9] = IGNORE, IGNORE
    samples[1].area[9:12], samples[1].lane[9:12] = UNKNOWN, UNKNOWN
    samples[2].crowd[:1] = True
    bare = dataclasses.replace(
        samples[3], boxes=np.zeros((0, 4), np.float32), classes=np.zeros(0, np.int32),
        crowd=np.zeros(0, bool), labelled=(False, True, False), lane=np.full(SIZE, 255, np.uint8),
    )  # fmt: skip
    samples[3] = bare
    with Bdd100kWriter(tmp_path, "val", DETECTION) as writer:
        for i, s in enumerate(samples):
            writer.add(f"s{i}", s, s.image)
    reader = Bdd100k(tmp_path, "val", tasks=("detection", "area", "lane"))
    assert len(reader) == 4
    for want, got in zip(samples, reader, strict=True):
        for name in ("area", "lane"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
        rows = lambda s: sorted(
            zip(map(tuple, s.boxes.tolist()), s.classes.tolist(), s.crowd.tolist(), strict=True)
        )
        assert rows(got) == rows(want) and got.labelled == want.labelled
        assert np.abs(got.image.astype(int) - want.image).mean() < 12  # JPEG
    assert reader.report.counts == {
        "image without detection labels": 1, "image without lane labels": 1,
    }  # fmt: skip


def test_predictions_have_scores(tmp_path):
    @dataclasses.dataclass
    class Found:
        boxes = np.array([[1, 2, 30, 40]], np.float32)
        scores = np.array([0.75], np.float32)
        classes = np.array([2])
        area = np.zeros(SIZE, np.uint8)
        lane = np.zeros(SIZE, np.uint8)

    with Bdd100kWriter(tmp_path, "val", DETECTION) as writer:
        writer.add("clip/frame.jpg", Found())
    (entry,) = json.loads((tmp_path / "labels/det_20/det_val.json").read_text())
    assert entry["name"] == "frame.jpg" and entry["labels"] == [
        dict(id="0", category="motorcycle", box2d=dict(x1=1, y1=2, x2=30, y2=40), score=0.75)
    ]
    drivable = cv2.imread(str(tmp_path / "labels/drivable/masks/val/frame.png"), -1)
    lanes = cv2.imread(str(tmp_path / "labels/lane/masks/val/frame.png"), -1)
    assert (drivable == 2).all() and (lanes == 255).all()  # BDD100K's backgrounds


@pytest.mark.parametrize(
    ("folder", "tail", "values"),
    [
        ("labels/drivable/masks/train", "", {0: 2, 1: 0, 2: 1}),
        ("drivable_maps/labels/train", "_drivable_id", {0: 0, 1: 1, 2: 2}),
        ("labels/drivable/colormaps/train", "", None),
        ("drivable_maps/color_labels/train", "_drivable_color", None),
    ],
)
@pytest.mark.parametrize("palette", [False, True])
def test_drivable_maps(tmp_path, folder, tail, values, palette):
    want = np.random.default_rng(0).integers(0, 3, SIZE)
    image_at(tmp_path / "images/100k/train/a.jpg")
    path = tmp_path / folder / f"a{tail}.png"
    path.parent.mkdir(parents=True)
    colors = np.array([(0, 0, 0), (219, 94, 86), (86, 211, 219)], np.uint8)
    if palette:  # ids are indices whose colours mean nothing, unless it is a map of colours
        stored = want if values is None else np.vectorize(values.get)(want)
        file = Image.frombytes("P", SIZE[::-1], stored.astype(np.uint8).tobytes())
        file.putpalette(colors.tobytes() + bytes(768 - 9))
    elif values is None:
        file = Image.fromarray(colors[want])
    else:
        file = Image.fromarray(np.vectorize(values.get)(want).astype(np.uint8))
    file.save(path)
    (s,) = Bdd100k(tmp_path)
    assert s.labelled == (False, True, False)
    np.testing.assert_array_equal(s.area, want)


def test_what_is_missing_is_named(yolop, tmp_path):
    with pytest.raises(ReadError, match=r"no images of val in .*images/100k/\{split\}"):
        Bdd100k(yolop, "val")
    (tmp_path / "bare/images/train").mkdir(parents=True)
    with pytest.raises(ReadError, match="has no images"):
        Bdd100k(tmp_path / "bare")
    image_at(tmp_path / "bare/images/train/a.jpg")
    with pytest.raises(ReadError, match=r"no labels of train.*detection in labels/det_20"):
        Bdd100k(tmp_path / "bare")
    mask_at(tmp_path / "bare/ll_seg_annotations/train/a.png", np.zeros(SIZE))
    assert Bdd100k(tmp_path / "bare")[0].labelled == (False, False, True)
    with pytest.raises(ReadError, match="looked for area in labels/drivable"):
        Bdd100k(tmp_path / "bare", tasks=("area", "lane"))
    for make in (TypedLanes, CamVid, ApolloScape):
        with pytest.raises(ReadError, match="there is no folder"):
            make(tmp_path / "nowhere")
    with pytest.raises(ReadError, match=r"expected gt_binary/, label_data"):
        TuSimple(tmp_path)
    with pytest.raises(IndexError, match="image 3 of 3"):
        Bdd100k(yolop)[3]


def whole(path):
    return path.read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: (r / "images/train/a.jpg").write_bytes(b""), "a.jpg is empty"),
        (lambda r: (r / "images/train/a.jpg").write_bytes(b"none of it"), "corrupt, or no image"),
        (
            lambda r: (r / "images/train/a.jpg").write_bytes(
                whole(r / "images/train/a.jpg")[:400]
            ),
            "a.jpg is corrupt, or no image: Truncated",
        ),
        (lambda r: (r / "images/train/a.jpg").unlink(), "a.jpg does not exist"),
        (lambda r: mask_at(r / "da_seg_annotations/train/a.png", np.zeros((60, 96))),
         "a.png is 60x96, its image 64x96"),
        (lambda r: mask_at(r / "ll_seg_annotations/train/a.png", np.zeros((64, 96, 3))),
         "a.png has pixels of mode RGB; expected one byte"),
        (
            lambda r: (r / "ll_seg_annotations/train/a.png").write_bytes(
                whole(r / "ll_seg_annotations/train/a.png")[:90]
            ),
            "a.png is corrupt",
        ),
        (lambda r: (r / "det_annotations/train/a.json").write_text("{"), "a.json is no JSON"),
        (lambda r: json_at(r / "det_annotations/train/a.json",
                           dict(frames=[dict(objects=[dict(category="car", box2d=dict(x1=1))])])),
         "a.jpg: not BDD100K's layout"),
        (lambda r: json_at(r / "det_annotations/train/a.json", [1, 2]), "not BDD100K's layout"),
        (lambda r: json_at(r / "det_annotations/train/a.json",
                           objects(("car", (1, 2, float("nan"), 4)))), "nan"),
    ],
)  # fmt: skip
def test_what_is_broken_is_named(yolop, change, words):
    reader = Bdd100k(yolop)
    change(yolop)
    with pytest.raises((ReadError, SampleError), match=words):
        reader[0]
    assert reader[2].name == "c"  # the others are as good as before


def test_a_truncated_png_is_no_image(tmp_path):
    image_at(tmp_path / "images/train/a.png")
    mask_at(tmp_path / "ll_seg_annotations/train/a.png", np.zeros(SIZE))
    reader = Bdd100k(tmp_path)
    assert reader[0].image.shape == (*SIZE, 3)
    path = tmp_path / "images/train/a.png"
    path.write_bytes(whole(path)[:-200])
    with pytest.raises(ReadError, match="truncated"):
        reader[0]


def test_boxes_outside_are_clipped_or_dropped_and_counted(yolop):
    json_at(yolop / "det_annotations/train/a.json", objects(
        ("car", (-9, 50, 20, 90)), ("car", (96, 0, 120, 20)), ("car", (10, 10, 10, 20)),
        ("car", (1, 1, 9, 9)), ("zebra", (1, 1, 9, 9)),
    ))  # fmt: skip
    reader = Bdd100k(yolop)
    assert reader[0].boxes.tolist() == [[0, 50, 20, 64], [1, 1, 9, 9]]
    assert reader.report.counts == {
        "box with nothing inside its image": 2, "box clipped to its image": 1,
        "object of the unknown category 'zebra'": 1,
    }  # fmt: skip


def test_classes_of_the_model_decide(yolop):
    reader = Bdd100k(yolop, classes=("bicycle", "vehicle"))
    assert sorted(reader[0].classes.tolist()) == [0, 1]
    reader = Bdd100k(yolop, classes=("pedestrian",))
    assert len(reader[0].boxes) == 0 and "class 'vehicle'" in str(reader.report)


def test_typed_masks(tmp_path):
    values = np.random.default_rng(0).integers(0, 6, SIZE)
    image_at(tmp_path / "images/train/a.jpg")
    mask_at(tmp_path / "masks/train/a.png", values)
    (s,) = TypedLanes(tmp_path)
    assert s.labelled == (False, True, True)
    for v, area, lane in ((0, 0, 0), (1, 1, 0), (2, 2, 0), (3, IGNORE, 2), (4, IGNORE, 3),
                          (5, IGNORE, 1)):  # fmt: skip
        assert (s.area[values == v] == area).all() and (s.lane[values == v] == lane).all()
    json_at(tmp_path / "det/train/a.json", objects(("scooter", (5, 5, 30, 30))))
    assert TypedLanes(tmp_path)[0].classes.tolist() == [2]
    ids = dict(background=5, main=0, alternative=1, double=2, dashed=3, single=4)
    other = TypedLanes(tmp_path, ids=ids)[0]
    np.testing.assert_array_equal(other.lane == 1, values == 4)
    with pytest.raises(ReadError, match="ids name"):
        TypedLanes(tmp_path, ids={"main": 1})


def test_camvid(shared_data):
    reader = CamVid(shared_data / "driving/camvid", "val")
    assert len(reader) == 101 and len(CamVid(shared_data / "driving/camvid", "train")) == 367
    boxes = np.zeros(4, int)
    crowds = 0
    for i in range(0, 101, 10):
        s = reader[i]
        at = lambda folder, suffix, s=s: (
            shared_data / f"driving/camvid/{folder}/val" / f"{s.name}{suffix}"
        )
        semantic = cv2.imread(str(at("semantic", ".png")), -1)
        drivable = cv2.imread(str(at("drivable", ".png")), -1)
        np.testing.assert_array_equal(s.area == IGNORE, semantic == 11)
        np.testing.assert_array_equal(s.area == UNKNOWN, drivable == 1)
        assert set(np.unique(s.lane)) <= {0, UNKNOWN}
        listed = json.loads(at("det", ".json").read_text())["frames"][0]["objects"]
        names = {"car": 1, "pedestrian": 0, "bicyclist": 3}
        assert sorted(s.classes.tolist()) == sorted(names[o["category"]] for o in listed)
        crowds += int(s.crowd.sum()) - sum(o["crowd"] for o in listed)
        boxes += np.bincount(s.classes, minlength=4)
    assert crowds == 0 and boxes[[0, 1, 3]].min() > 0
    assert not reader.report, str(reader.report)


def test_camvid_without_derived_lanes(shared_data):
    assert CamVid(shared_data / "driving/camvid", "val", lanes=False)[0].labelled == (
        True, True, False,
    )  # fmt: skip


def test_apolloscape(shared_data, tmp_path):
    """Class ids through our table give the set's own derived masks."""
    root = shared_data / "driving/apollo_lane100"
    reader = ApolloScape(root, "val")
    assert len(reader) == 20 and len(ApolloScape(root)) == 80
    (tmp_path / "images").symlink_to(root / "images")
    (tmp_path / "label").symlink_to(root / "label")
    by_id = ApolloScape(tmp_path, "val")
    for i in (0, 7, 19):
        s = reader[i]
        assert s.labelled == (False, False, True) and (s.area == IGNORE).all()
        assert set(np.unique(s.lane)) <= {0, 1, 2, 3, IGNORE}
        np.testing.assert_array_equal(by_id[i].lane, s.lane)
    assert (reader[0].lane == IGNORE).any() or (reader[7].lane == IGNORE).any()
    (tmp_path / "empty/images").mkdir(parents=True)
    (tmp_path / "empty/images/val").symlink_to(root / "images/val")
    with pytest.raises(ReadError, match="no lanes of val"):
        ApolloScape(tmp_path / "empty", "val")


@pytest.mark.parametrize("width", [3, 8])
def test_polylines_have_their_width(tmp_path, width):
    """Against the distance of every pixel's centre to the segments."""
    image_at(tmp_path / "clips/1/20.jpg")
    rows, x = list(range(10, 60, 10)), [-2, 30, 40, 60, 62]
    entry = dict(h_samples=rows, lanes=[x, [-2] * 5], raw_file="clips/1/20.jpg")
    (tmp_path / "label_data_0313.json").write_text(json.dumps(entry) + "\n\n")
    (s,) = TuSimple(tmp_path, width=width)
    assert s.labelled == (False, False, True) and set(np.unique(s.lane)) == {0, UNKNOWN}
    points = np.array([(a, b) for a, b in zip(x, rows, strict=True) if a >= 0], float)
    grid = np.stack(np.meshgrid(np.arange(96), np.arange(64)), -1).astype(float)
    distance = np.full(SIZE, np.inf)
    for a, b in itertools.pairwise(points):
        t = np.clip(((grid - a) @ (b - a)) / ((b - a) @ (b - a)), 0, 1)
        distance = np.minimum(
            distance, np.linalg.norm(grid - (a + t[..., None] * (b - a)), axis=-1)
        )
    assert (s.lane[distance < width / 2 - 1] == UNKNOWN).all()
    assert (s.lane[distance > width / 2 + 1] == 0).all()


def test_tusimple_entries_that_are_broken(tmp_path):
    image_at(tmp_path / "a.jpg")
    file = tmp_path / "label_data.json"
    file.write_text(json.dumps(dict(h_samples=[1, 2], lanes=[[1]], raw_file="a.jpg")))
    with pytest.raises(
        ReadError, match=r"line 1: not a TuSimple entry .lanes and h_samples differ"
    ):
        TuSimple(tmp_path)
    file.write_text("{}")
    with pytest.raises(ReadError, match="line 1: not a TuSimple entry"):
        TuSimple(tmp_path)
    with pytest.raises(ReadError, match="at least 1"):
        TuSimple(tmp_path, width=0)


def test_tusimple_of_both_kinds(shared_data):
    root = shared_data / "driving/tusimple16"
    lines = TuSimple(root / "tusimple_sample_512x288", width=4)
    masks = TuSimple(root / "lanenet6")
    assert (len(lines), len(masks)) == (10, 6)
    for s in (lines[0], masks[0]):
        assert s.labelled == (False, False, True) and 0.002 < (s.lane == UNKNOWN).mean() < 0.1


def test_tusimple_entries_out_of_place_are_named(tmp_path):
    image_at(tmp_path / "a.jpg")
    file = tmp_path / "label_data.json"
    good = dict(h_samples=[1, 2], lanes=[[1, 3]], raw_file="a.jpg")
    for changed, words in [
        (dict(raw_file="../a.jpg"), "outside of the data set"),
        (dict(raw_file="/etc/a.jpg"), "outside of the data set"),
        (dict(raw_file=5), "line 1: not a TuSimple entry"),
        (dict(lanes=[[1, float("inf")]]), "no place in an image"),
        (dict(h_samples=[1, float("nan")]), "no place in an image"),
        (dict(h_samples=[1, 10**400]), "line 1: not a TuSimple entry"),
        (dict(h_samples=[[1]], lanes=[[[1]]]), "differ in length"),
    ]:
        file.write_text(json.dumps(good | changed))
        with pytest.raises(ReadError, match=words):
            TuSimple(tmp_path)
    file.write_text("\n".join([json.dumps(good)] * 2))
    with pytest.raises(ReadError, match=r"two entries for .*a\.jpg"):
        TuSimple(tmp_path)
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ReadError, match="is no text"):
        TuSimple(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2], [None], [{"name": None, "labels": []}], [{"labels": []}], [{"name": 3}],
        [{"name": ""}], ["a.jpg"], [[]], 3, "text", {}, {"frames": 1}, {"frames": [1]}, None,
    ],
    ids=str,
)  # fmt: skip
def test_lists_of_wrong_types_are_named(tmp_path, content):
    image_at(tmp_path / "images/100k/train/a.jpg")
    json_at(tmp_path / "labels/det_20/det_train.json", content)
    with pytest.raises(ReadError, match=r"det_train\.json.*(expected a list|expected an object)"):
        Bdd100k(tmp_path)


def test_one_image_has_one_entry_and_one_stem_one_image(tmp_path):
    image_at(tmp_path / "images/100k/train/a.jpg")
    entry = dict(name="a.jpg", labels=[])
    json_at(tmp_path / "labels/det_20/det_train.json", [entry, dict(name="clip/a.png", labels=[])])
    with pytest.raises(ReadError, match="two entries for a; remove one"):
        Bdd100k(tmp_path)
    json_at(tmp_path / "labels/det_20/det_train.json", [entry])
    assert len(Bdd100k(tmp_path)) == 1
    image_at(tmp_path / "images/100k/train/a.PNG")
    with pytest.raises(ReadError, match=r"a\.PNG and a\.jpg, whose labels would be the same"):
        Bdd100k(tmp_path)
