"""predict on folders and videos, some broken: what is good is written, the rest is named."""

import json
import os
import signal

import cv2
import numpy as np
import pytest
from PIL import Image

from experiments.qyolop import __main__ as qyolop
from experiments.qyolop import predict as qyolop_predict
from llm_jax.files import locked
from qyolop_jax.config import ModelConfig
from qyolop_jax.postprocess import Found


class Network:
    """Finds one box, an area on the left and a line on top; reads `batch` images ahead."""

    cfg = ModelConfig(0.125, "relu", size=(64, 96))

    def __init__(self, at=None):
        self.at, self.seen = at, 0

    def stream(self, images, conf, batch):
        for n, image in enumerate(images):
            if n == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            self.seen += 1
            mask = np.zeros(image.shape[:2], np.uint8)
            mask[:, :9] = 1
            box = np.array([[1, 2, 9, 12]], np.float32)
            yield Found(box, np.float32([0.5]), np.array([1]), mask, mask, mask)


@pytest.fixture(autouse=True)
def network(monkeypatch):
    made = Network()
    monkeypatch.setattr(qyolop_predict, "load", lambda path: made)
    return made


@pytest.fixture
def folder(tmp_path):
    """Nine images, JPEG and PNG."""
    (tmp_path / "in").mkdir()
    for i in range(9):
        pixels = np.random.default_rng(i).integers(0, 255, (60, 96, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"in/{i}.{'jpg' if i % 2 else 'png'}")
    return tmp_path / "in"


def predicted(source, out, *more):
    return qyolop.cli(["predict", "--input", str(source), "--output", str(out), *more])


def entries(out):
    return json.loads((out / "labels/det_20/det_val.json").read_text())


def test_one_bad_image_is_named_and_the_others_are_done(folder, tmp_path, capsys):
    data = (folder / "5.jpg").read_bytes()
    (folder / "5.jpg").write_bytes(data[: len(data) // 3])
    (folder / "7.jpg").write_text("no image")
    (folder / "folder.jpg").mkdir()
    out = tmp_path / "out"
    assert predicted(folder, out) == 1
    told = capsys.readouterr()
    assert "left out: " in told.err and "5.jpg is corrupt" in told.err and "7.jpg is" in told.err
    assert "2 of 9 images are left out" in told.err and "Written: 7 images" in told.out
    want = [f"{i}.{'jpg' if i % 2 else 'png'}" for i in (0, 1, 2, 3, 4, 6, 8)]
    assert [e["name"] for e in entries(out)] == want  # as the input is called
    stems = [name[:1] for name in want]
    for place in (out, out / "labels/lane/masks/val", out / "labels/drivable/masks/val"):
        assert sorted(f.stem for f in place.glob("*.png")) == stems


def test_equal_stems_have_their_own_outputs(tmp_path):
    (tmp_path / "in").mkdir()
    for n, name in enumerate(("a.jpg", "a.png", "a.jpg.png", "b.png")):
        Image.fromarray(np.full((60, 96, 3), 60 * n, np.uint8)).save(tmp_path / "in" / name)
    assert predicted(tmp_path / "in", tmp_path / "out", "--no-tidy") == 0
    names = ["a.jpg", "a.jpg.png", "a.png", "b.png"]
    assert [e["name"] for e in entries(tmp_path / "out")] == names
    for place in (tmp_path / "out", tmp_path / "out/labels/lane/masks/val"):
        assert sorted(f.name for f in place.glob("*.png")) == [f"{name}.png" for name in names]
    corner = lambda name: cv2.imread(str(tmp_path / "out" / f"{name}.png"))[-1, -1].tolist()
    assert [corner(n)[0] // 60 for n in ("a.jpg", "a.png", "a.jpg.png")] == [0, 1, 2]


def test_exif_is_honoured(tmp_path):
    """The image of a telephone that was held upright: stored on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.zeros((72, 128, 3), np.uint8)
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "phone.jpg", exif=exif)
    assert predicted(tmp_path / "phone.jpg", tmp_path / "out") == 0
    for name in ("phone.png", "labels/drivable/masks/val/phone.png"):
        assert cv2.imread(str(tmp_path / "out" / name)).shape[:2] == (72, 128)


def test_two_at_once_are_refused(folder, tmp_path, capsys):
    with locked(tmp_path / "out"):
        assert predicted(folder, tmp_path / "out") == 2
    assert "another process writes to" in capsys.readouterr().err


@pytest.mark.parametrize("labels", ["--labels", "--no-labels"])
def test_an_interrupt_keeps_what_is_done(folder, tmp_path, network, labels, capsys):
    network.at = 4
    assert predicted(folder, tmp_path / "out", labels) == 130
    assert "interrupted; what is written stays" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    if labels == "--labels":
        assert [e["name"][0] for e in entries(tmp_path / "out")] == list("0123")
    (folder / "1.jpg").write_bytes((folder / "3.jpg").read_bytes())  # another image by now
    (tmp_path / "out/2.png").unlink()
    network.at = None
    assert predicted(folder, tmp_path / "out", labels) == 0  # 1, 2 and those from 4 on
    assert "9 images" in (told := capsys.readouterr().out) and "2 of them before" in told
    assert network.seen == 4 + 7
    assert predicted(folder, tmp_path / "whole", labels) == 0
    of = lambda name: {f.relative_to(tmp_path / name): f.read_bytes()
                       for f in (tmp_path / name).rglob("*") if f.is_file()}  # fmt: skip
    assert of("out") == of("whole") and len(of("out")) == (28 if labels == "--labels" else 9)


@pytest.mark.parametrize("more", [["--conf", "0.5"], ["--no-tidy"], ["--no-labels"]], ids=str)
def test_other_settings_begin_anew(folder, tmp_path, network, more):
    network.at = 4
    assert predicted(folder, tmp_path / "out") == 130
    network.at = None
    assert predicted(folder, tmp_path / "out", *more) == 0
    assert network.seen == 4 + 9


def video(path, frames=5):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (160, 96))
    for i in range(frames):
        writer.write(np.full((96, 160, 3), 40 * i, np.uint8))
    writer.release()
    return path


def test_an_interrupted_video_has_the_frames_so_far(tmp_path, network, capsys):
    network.at = 3
    assert predicted(video(tmp_path / "drive.mp4"), tmp_path / "seen.mp4") == 130
    assert "Written: 3 frames" in capsys.readouterr().out
    reader = cv2.VideoCapture(str(tmp_path / "seen.mp4"))
    assert reader.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    network.at = 0
    assert predicted(tmp_path / "drive.mp4", tmp_path / "none.mp4") == 130
    assert sorted(f.name for f in tmp_path.iterdir()) == ["drive.mp4", "seen.mp4"]


@pytest.mark.parametrize(
    ("source", "more", "said"),
    [
        ("in", ["--batch", "0"], "--batch is 0; expected 1 to 4096"),
        ("in", ["--batch", "-1"], "--batch is -1"),
        ("in", ["--batch", "5000"], "--batch is 5000"),
        ("in", ["--conf", "1.5"], "--conf is 1.5; expected 0 to 1"),
        ("in", ["--conf", "-0.1"], "--conf is -0.1"),
        ("in", ["--conf", "nan"], "--conf is nan"),
        ("in", ["--output", "file.txt"], "file.txt cannot be written as a folder"),
        ("in", ["--output", "file.txt/out"], "cannot be written as a folder"),
        ("in", ["--output", "seen.png"], "is the name of a file; expected a folder"),
        ("in", ["--output", "in"], "has the images, which would be replaced"),
        ("in/1.jpg", ["--output", "in"], "has the images, which would be replaced"),
        ("drive.mp4", ["--output", "x.avi"], "videos are written as .mp4"),
        ("drive.mp4", ["--output", "x.png"], "videos are written as .mp4"),
        ("drive.mp4", ["--output", "drive.mp4"], "would replace the input"),
        ("drive.mp4", ["--output", "."], "would replace the input"),
        ("drive.mp4", ["--output", "file.txt"], "cannot be written"),
        ("drive.mp4", ["--output", "folder.mp4"], "is there and is no file"),
        ("torn.mp4", [], "torn.mp4 cannot be read as a video"),
        ("bad.jpg", [], "none of 1 images could be read"),
        ("pipe.jpg", [], "or a folder of images"),
        ("file.txt", [], "or a folder of images"),
        ("empty", [], "or a folder of images"),
        ("nowhere", [], "there is no nowhere"),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(folder, tmp_path, source, more, said, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "bad.jpg").write_text("x")
    (tmp_path / "torn.mp4").write_text("x")
    for name in ("empty", "folder.mp4"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    video(tmp_path / "drive.mp4", 1)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    assert qyolop.cli(["predict", "--input", source, *more]) == 2
    assert said in capsys.readouterr().err
    assert all(f.read_bytes() == data for f, data in before.items())
