"""experiments.qyolop on a tiny network: what it writes, that it resumes, what it says."""

import dataclasses
import json
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.qyolop import __main__ as qyolop
from experiments.qyolop import predict as qyolop_predict
from qyolop_jax import weights
from qyolop_jax.network import load
from qyolop_jax.readers import Bdd100k
from qyolop_jax.scenes import scene
from qyolop_jax.stages import TrainError


def arguments(output, **changes):
    base = dict(
        scenes=8, held_out=3, width=0.125, size=(64, 96), epochs=(0.5, 0.5, 1, 0.5), batch=4,
        rate=1e-3, save_every=1, output=output,
    )  # fmt: skip
    return qyolop.Train(**(base | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    assert qyolop.main(arguments(folder), Console(quiet=True)) == 0
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_a_model_scores_and_panels(run):
    cfg, _ = weights.load_weights(run / "model.safetensors")
    assert cfg.size == (64, 96) and cfg.width == 0.125
    rows = lines(run / "records.jsonl")
    assert [r["model"] for r in rows] == ["float32", "naive PTQ", "PTQ", "QAT", "int8"]
    record = rows[0]
    assert record["data"] == "scenes" and 0 <= record["result"]["area/mIoU"] <= 1
    assert rows[4]["result"] == rows[3]["result"]  # integers give what was simulated
    assert rows[4]["bytes"] < 0.4 * rows[0]["bytes"] and rows[4]["seconds"] > 0
    assert {"detection/AP50", "lane/IoU dashed", "lane/F1@2 any"} <= set(record["result"])
    log = lines(run / "log.jsonl")
    assert {r["name"] for r in log} == {"pretrain", "mosaic", "finetune", "qat"}
    assert [r["stage"] for r in log if "validation" in r] == [0, 1, 2, 3]
    for stage in ("pretrain", "mosaic", "finetune", "qat", "int8"):
        panel = cv2.imread(str(run / f"panel-{stage}-scenes.png"))
        assert panel.shape[1] > 1280 and panel.std() > 10


def test_the_same_folder_goes_on(run, capsys):
    before = (run / "log.jsonl").read_text()
    assert qyolop.main(arguments(run), Console(width=120)) == 0
    assert (run / "log.jsonl").read_text() == before  # nothing was trained again
    assert "scenes val" in capsys.readouterr().out
    with pytest.raises(TrainError, match="other settings"):
        qyolop.main(arguments(run, rate=2e-3), Console(quiet=True))


def test_evaluate(run, tmp_path):
    out = tmp_path / "scores.jsonl"
    args = qyolop.Evaluate(run, scenes=3, output=out)
    assert qyolop.main(args, Console(quiet=True)) == 0
    (found,), first = lines(out), lines(run / "records.jsonl")[0]["result"]
    for key, value in first.items():
        assert found["result"][key] == value or value is None or np.isnan(value), key


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


def test_predict_a_video(run, tmp_path):
    path = tmp_path / "drive.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (160, 96))
    for i in range(5):
        writer.write(np.ascontiguousarray(scene(i, (96, 160)).image[..., ::-1]))
    writer.release()
    args = qyolop_predict.Predict(
        path, run / "model-int8.safetensors", tmp_path / "seen.mp4", batch=2
    )
    assert qyolop.main(args, Console(quiet=True)) == 0
    reader = cv2.VideoCapture(str(tmp_path / "seen.mp4"))
    assert reader.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert (reader.get(cv2.CAP_PROP_FRAME_WIDTH), reader.get(cv2.CAP_PROP_FPS)) == (160, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drive.mp4", "seen.mp4"]


def test_the_network_for_roads_is_in_the_repository_alone(run, monkeypatch, capsys, tmp_path):
    """From a wheel, which holds no checkpoint, the message says where the network is."""
    monkeypatch.setattr(qyolop_predict, "ROADS", tmp_path / "roads.safetensors")
    args = qyolop_predict.Predict(tmp_path, qyolop_predict.ROADS)
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
    monkeypatch.setitem(qyolop.COMMANDS, qyolop.Train, keep)
    assert qyolop.cli(words) == 0 and seen == [dataclasses.replace(qyolop.Train(), **changed)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--data", "apollo", "--data-dir", "nowhere"], "apollo: none of nowhere"),
        (["train", "--data", "camvid"], "needs --data-dir"),
        (["train", "--size", "100", "320"], "multiples of 32"),
        (["evaluate", "--run", "nowhere"], "there is no file nowhere"),
        (["predict", "--run", "RUN", "--input", "nowhere"], "there is no nowhere"),
        (["predict", "--run", "RUN", "--input", "RUN/log.jsonl"], "or a folder of images"),
    ],
)
def test_bad_input_is_named(words, said, run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [w.replace("RUN", str(run)) for w in words]
    assert qyolop.cli(words) == 2
    assert said in capsys.readouterr().err
