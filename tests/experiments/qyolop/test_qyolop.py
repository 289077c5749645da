"""experiments.qyolop on a tiny network: what it writes, that it resumes, what it says."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import cv2
import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.qyolop import __main__ as qyolop
from experiments.qyolop import evaluate as qyolop_evaluate
from experiments.qyolop import predict as qyolop_predict
from experiments.qyolop import train as qyolop_train
from qyolop_jax import recipe, weights
from qyolop_jax.config import ModelConfig
from qyolop_jax.formats import ReadError
from qyolop_jax.model import initial
from qyolop_jax.network import load
from qyolop_jax.readers import Bdd100k
from qyolop_jax.scenes import Scenes, scene
from qyolop_jax.sources import Feed, in_order
from qyolop_jax.stages import TrainError


def arguments(output, **changes):
    base = dict(
        scenes=8, held_out=3, width=0.125, size=(64, 96), epochs=(0.5, 0.5, 1, 0.5), batch=4,
        rate=1e-3, save_every=1, output=output,
    )  # fmt: skip
    return qyolop.Train(**(base | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that the whole command has written."""
    folder = tmp_path_factory.mktemp("run") / "out"
    assert qyolop.main(arguments(folder), Console(quiet=True)) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a float network that was not trained."""
    folder = tmp_path_factory.mktemp("untrained")
    cfg = ModelConfig(0.125, "relu", size=(64, 96))
    weights.save_weights(folder / "model.safetensors", cfg, initial(cfg))
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_leaves_a_model_scores_and_panels(trained):
    cfg, _ = weights.load_weights(trained / "model.safetensors")
    assert cfg.size == (64, 96) and cfg.width == 0.125
    rows = lines(trained / "records.jsonl")
    assert [r["model"] for r in rows] == ["float32", "naive PTQ", "PTQ", "QAT", "int8"]
    record = rows[0]
    assert record["data"] == "scenes" and 0 <= record["result"]["area/mIoU"] <= 1
    assert rows[4]["result"] == rows[3]["result"]  # integers give what was simulated
    assert rows[4]["bytes"] < 0.4 * rows[0]["bytes"] and rows[4]["seconds"] > 0
    assert {"detection/AP50", "lane/IoU dashed", "lane/F1@2 any"} <= set(record["result"])
    log = lines(trained / "log.jsonl")
    assert {r["name"] for r in log} == {"pretrain", "mosaic", "finetune", "qat"}
    assert [r["stage"] for r in log if "validation" in r] == [0, 1, 2, 3]
    for stage in ("pretrain", "mosaic", "finetune", "qat", "int8"):
        panel = cv2.imread(str(trained / f"panel-{stage}-scenes.png"))
        assert panel.shape[1] > 1280 and panel.std() > 10


@pytest.mark.slow
def test_the_same_folder_goes_on(trained, capsys):
    before = (trained / "log.jsonl").read_text()
    assert qyolop.main(arguments(trained), Console(width=120)) == 0
    assert (trained / "log.jsonl").read_text() == before  # nothing was trained again
    assert "scenes val" in capsys.readouterr().out
    with pytest.raises(TrainError, match="other settings"):
        qyolop.main(arguments(trained, rate=2e-3), Console(quiet=True))


@pytest.mark.slow
def test_train_compares_five_networks(tmp_path, monkeypatch, capsys):
    """The command with no step of training and no score computed: what it passes on and writes."""
    found = {}

    def fit(folder, phases, config, save_every, identity, progress):
        found.update(identity=identity, save_every=save_every)
        variables = None
        for n, phase in enumerate(phases):
            variables = phase.begin(variables)
            phase.validate(variables, phase.steps, True)
            progress(n, phase.steps, phase.steps, dict(loss=0.5))
        return variables

    def scores(network, data, report, progress, look):
        batch, _ = next(in_order(data, Feed(network.cfg.size, 3)))
        none = np.zeros((3, 0))
        look(batch, SimpleNamespace(
            valid=none.astype(bool), boxes=np.zeros((3, 0, 4)), classes=none, scores=none,
            area=np.zeros((3, 64, 96), np.uint8), lane=np.zeros((3, 64, 96), np.uint8),
        ))  # fmt: skip
        return {"area/mIoU": 0.5}

    monkeypatch.setattr(recipe, "fit", fit)
    monkeypatch.setattr(qyolop_train, "evaluate", scores)
    monkeypatch.setattr(qyolop_train, "latency", lambda network: 0.25)
    args = arguments(tmp_path / "out", dtype="float32")
    assert qyolop.main(args, Console(width=140)) == 0
    assert found == dict(
        identity=repr(dataclasses.replace(args, output=None, save_every=0)), save_every=1
    )
    rows = lines(tmp_path / "out/records.jsonl")
    assert [r["model"] for r in rows] == ["float32", "naive PTQ", "PTQ", "QAT", "int8"]
    assert [r["seconds"] for r in rows] == [0.25, None, None, None, 0.25]
    assert all(r["settings"] == found["identity"] for r in rows)
    said = capsys.readouterr().out
    assert "multiply-adds" in said and "0.500" in said
    for title in ("pretrain", "mosaic", "finetune", "qat", "naive-PTQ", "int8"):
        assert (tmp_path / f"out/panel-{title}-scenes.png").stat().st_size > 1000
    kinds = [type(load(tmp_path / "out" / n).values).__name__
             for n in ("model.safetensors", "model-int8.safetensors")]  # fmt: skip
    assert kinds == ["dict", "IntegerModel"]


@pytest.mark.slow
def test_evaluate_gives_the_scores_of_the_run(trained, tmp_path):
    out = tmp_path / "scores.jsonl"
    args = qyolop.Evaluate(trained, scenes=3, output=out)
    assert qyolop.main(args, Console(quiet=True)) == 0
    (found,), first = lines(out), lines(trained / "records.jsonl")[0]["result"]
    for key, value in first.items():
        assert found["result"][key] == value or value is None or np.isnan(value), key


@pytest.mark.slow
def test_evaluate(run, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    args = qyolop.Evaluate(run, scenes=2, batch=2, output=out)
    assert qyolop.main(args, Console(width=140)) == 0
    (found,) = lines(out)
    assert (found["data"], found["split"], found["protocol"]) == ("scenes", "val", "pooled")
    assert {"detection/AP50", "area/mIoU", "lane/F1@2 any"} <= set(found["result"])
    assert "scenes val" in capsys.readouterr().out


@pytest.fixture
def scored(run, monkeypatch):
    """Evaluation whose scores are made up; `calls` are the data sets that were scored."""
    calls = []

    def scores(network, data, batch, **others):
        calls.append(len(data))
        return {"detection/AP50": 0.625, "area/mIoU": 0.5}

    monkeypatch.setattr(qyolop_evaluate, "evaluate", scores)
    return calls


def test_scores_are_printed_where_they_cannot_be_written(
    run, scored, tmp_path, monkeypatch, capsys
):
    """A disk that was full only after the scoring."""

    def full(path, record):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(qyolop_evaluate.records, "append", full)
    words = ["evaluate", "--run", str(run), "--output", str(tmp_path / "scores.jsonl")]
    assert qyolop.cli(words) == 2
    told = capsys.readouterr()
    assert "0.625" in told.out and "'area/mIoU': 0.5" in told.out and "No space left" in told.err
    assert scored == [64] and not list(tmp_path.iterdir())


def test_outputs_are_tried_before_the_scoring(run, scored, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "file/scores.jsonl", tmp_path / "pipe"):
        assert qyolop.cli(["evaluate", "--run", str(run), "--output", str(place)]) == 2
        assert f"--output {place}" in capsys.readouterr().err
    assert not scored


def test_an_interrupt_keeps_what_was_scored(run, scored, tmp_path, monkeypatch, capsys):
    def second(name, *rest):
        return [None] * 3 if name == "scenes" else Interrupted()

    class Interrupted(list):
        def __len__(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(qyolop_evaluate, "dataset", second)
    monkeypatch.setattr(qyolop_evaluate, "data_identity", lambda name, *rest: name)
    out = tmp_path / "scores.jsonl"
    words = ["evaluate", "--run", str(run), "--data", "scenes", "camvid", "--output", str(out)]
    assert qyolop.cli(words) == 130
    told = capsys.readouterr()
    assert "interrupted; what is written stays" in told.err and "0.625" in told.out
    assert [r["data"] for r in lines(out)] == ["scenes"]


@pytest.mark.slow
def test_broken_samples_are_named_and_change_the_status(run, tmp_path, monkeypatch, capsys):
    def broken(*args):
        class Some(Scenes):
            def __getitem__(self, index):
                if index == 1:
                    raise ReadError("one.jpg is corrupt")
                return super().__getitem__(index)

        return Some(3, (64, 96))

    monkeypatch.setattr(qyolop_evaluate, "dataset", broken)
    out = tmp_path / "scores.jsonl"
    args = qyolop.Evaluate(run, batch=2, output=out)
    assert qyolop.main(args, Console(width=140)) == 1
    assert "1: one.jpg is corrupt" in capsys.readouterr().out
    assert lines(out)[0]["left_out"] == 1


def test_lanes_alone_can_be_trained():
    """YOLOP#107 asks for it: data without boxes is used in all four stages."""
    stages = qyolop_train.stages_of(qyolop.Train(data=("apollo", "tusimple")))
    assert [s.data for s in stages] == [("apollo", "tusimple")] * 4
    stages = qyolop_train.stages_of(qyolop.Train(data=("apollo", "camvid")))
    assert [s.data for s in stages] == [("camvid",)] * 2 + [("apollo", "camvid")] * 2


def test_predict_images_and_labels(run, tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    for i in range(3):
        image = scene(i, (90, 170)).image
        cv2.imwrite(str(source / f"{i}.png"), image[..., ::-1])
    args = qyolop_predict.Predict(source, run, tmp_path / "out", conf=0.01, batch=2)
    assert qyolop.main(args, Console(quiet=True)) == 0
    for i in range(3):
        drawn = cv2.imread(str(tmp_path / f"out/{i}.png"))
        assert drawn.shape == (90, 170, 3)
        (tmp_path / "out/images/100k/val").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / f"out/images/100k/val/{i}.jpg"), drawn)
    back = Bdd100k(tmp_path / "out", "val")
    assert len(back) == 3 and back[0].labelled == (True, True, True)


def test_the_checkpoint_that_comes_along_is_whole():
    network = load(qyolop_predict.ROADS)
    cfg = network.cfg
    assert (cfg.width, cfg.size) == (0.25, (384, 640))
    raw = jax.eval_shape(
        network.forward, network.values, jax.ShapeDtypeStruct((1, *cfg.size, 3), "uint8")
    )
    assert raw["lane"].shape == (1, *cfg.size, 4) and raw["area"].shape == (1, *cfg.size, 3)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("run", "model.safetensors"),
        pytest.param("trained", "model-int8.safetensors", marks=pytest.mark.slow),
    ],
)
def test_predict_a_video(folder, name, request, tmp_path):
    file, path = request.getfixturevalue(folder) / name, tmp_path / "drive.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (160, 96))
    for i in range(5):
        writer.write(np.ascontiguousarray(scene(i, (96, 160)).image[..., ::-1]))
    writer.release()
    args = qyolop_predict.Predict(path, file, tmp_path / "seen.mp4", conf=0.01, batch=2)
    assert qyolop.main(args, Console(quiet=True)) == 0
    reader = cv2.VideoCapture(str(tmp_path / "seen.mp4"))
    assert reader.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert (reader.get(cv2.CAP_PROP_FRAME_WIDTH), reader.get(cv2.CAP_PROP_FPS)) == (160, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drive.mp4", "seen.mp4"]


def test_the_network_for_roads_is_in_the_repository_alone(run, monkeypatch, capsys, tmp_path):
    """From a wheel, which holds no checkpoint, the message says where the network is."""
    monkeypatch.setattr(qyolop_predict, "ROADS", tmp_path / "roads.safetensors")
    args = qyolop_predict.Predict(tmp_path)
    with pytest.raises(qyolop_predict.PredictError, match=r"experiments/checkpoints.*commercial"):
        qyolop.main(args, Console(quiet=True))
    terms = (Path(qyolop.__file__).parents[1] / "checkpoints/README.md").read_text()
    assert "Apache License 2.0" in terms and "non-commercial purposes only" in terms


def test_help_calls_no_subcommand_required(capsys):
    with pytest.raises(SystemExit) as status:
        qyolop.cli(["--help"])
    said = capsys.readouterr().out
    assert status.value.code == 0 and "required" not in said and "(default: train)" in said
    assert "[{train,evaluate,quantize,export,benchmark,predict}]" in "".join(said.split("\n"))


@pytest.mark.parametrize(
    ("words", "changed"),
    [([], {}), (["train"], {}), (["train", "--epochs", "1", "2", "3", "4", "--loss.box", "ciou"],
                                dict(epochs=(1, 2, 3, 4)))],
)  # fmt: skip
def test_no_words_are_train(words, changed, monkeypatch):
    seen = []
    keep = lambda args, console: seen.append(args) or 0
    monkeypatch.setitem(qyolop.SUBCOMMANDS, qyolop.Train, keep)
    assert qyolop.cli(words) == 0 and seen == [dataclasses.replace(qyolop.Train(), **changed)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--data", "apollo", "--data-dir", "nowhere"], "apollo: none of nowhere"),
        (["train", "--data", "camvid"], "needs --data-dir"),
        (["train", "--size", "100", "320"], "multiples of 32"),
        (["evaluate", "--run", "nowhere"], "there is no file nowhere"),
        (["predict", "--run", "RUN", "--input", "nowhere"], "there is no nowhere"),
        (["predict", "--run", "RUN", "--input", "RUN/model.safetensors"], "or a folder of images"),
    ],
)
def test_bad_input_is_named(words, said, run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [w.replace("RUN", str(run)) for w in words]
    assert qyolop.cli(words) == 2
    assert said in capsys.readouterr().err
