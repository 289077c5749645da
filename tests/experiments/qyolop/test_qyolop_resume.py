"""evaluate, quantize and benchmark after an interrupt: what is done is not done again."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.qyolop import __main__ as qyolop
from experiments.qyolop import benchmark as qyolop_benchmark
from experiments.qyolop import deploy as qyolop_deploy
from experiments.qyolop import evaluate as qyolop_evaluate
from experiments.qyolop.datasets import data_identity
from qyolop_jax import evaluation, network, quantize, weights
from qyolop_jax.config import ModelConfig
from qyolop_jax.formats import ReadError
from qyolop_jax.integer import load_integer_model
from qyolop_jax.model import initial
from qyolop_jax.postprocess import Predictions
from qyolop_jax.scenes import Scenes, scene

CFG = ModelConfig(0.125, "relu", size=(64, 96))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(rows):
    """Records without what the clock says."""
    for r in rows:
        r["environment"].pop("time")
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a float network that was not trained."""
    folder = tmp_path_factory.mktemp("untrained")
    weights.save_weights(folder / "model.safetensors", CFG, initial(CFG))
    return folder


def guesses(images):
    """Predictions that depend on every image, and on nothing else: 20 boxes and masks."""
    B = len(images)
    corners = np.zeros((B, 20, 4), np.float32)
    scores = np.zeros((B, 20), np.float32)
    for b, image in enumerate(np.asarray(images)):
        rng = np.random.default_rng(int(image.sum()))
        corners[b, :, :2] = rng.uniform(0, 50, (20, 2))
        corners[b, :, 2:] = corners[b, :, :2] + rng.uniform(3, 14, (20, 2))
        scores[b] = rng.uniform(0.05, 1, 20)
    mask = np.asarray(images).astype(np.int64).sum(-1)
    classes = (scores * 100).astype(np.int32) % 4
    area, lane = ((mask % n).astype(np.uint8) for n in (3, 4))
    return Predictions(corners, scores, classes, scores > 0.2, area, lane, lane)


class Broken(Scenes):
    """Scenes of which four cannot be read, in the first batch, in a later one and at the end."""

    def __getitem__(self, index):
        if index in (1, 5, 9, 10):
            raise ReadError(f"{index}.jpg is corrupt")
        return super().__getitem__(index)


@pytest.fixture
def evaluated(run, tmp_path, monkeypatch):
    """evaluate(output, stop) -> (status, number of batches run): made-up predictions of scenes.

    With `stop` it is interrupted in that batch.
    """
    batches = []

    def predictor(forward, cfg, conf):
        def predict(values, images):
            batches.append(len(images))
            if len(batches) == stops[0]:
                raise KeyboardInterrupt
            return guesses(images)

        return predict

    stops = [None]
    monkeypatch.setattr(evaluation, "predictor", predictor)
    monkeypatch.setattr(qyolop_evaluate, "load", lambda path: network.Network(CFG, None, None))
    monkeypatch.setattr(qyolop_evaluate, "dataset", lambda *args: Broken(11, CFG.size))

    def evaluate(output, stop=None, *more):
        stops[0], batches[:] = stop, []
        words = ["evaluate", "--run", str(run), "--batch", "2", *more]
        words += [] if output is None else ["--output", str(output)]
        return qyolop.cli(words), len(batches)

    return evaluate


@pytest.mark.parametrize("protocol", ["pooled", "yolop"])
def test_an_interrupted_evaluation_ends_in_the_same_numbers(evaluated, tmp_path, capsys, protocol):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    asked = ("--protocol", protocol)
    assert evaluated(whole, None, *asked) == (1, 4)  # 1: there are broken samples
    told = capsys.readouterr().out
    assert "4 x broken sample left out (1: 1.jpg is corrupt, 5" in told
    assert evaluated(part, 2, *asked) == (130, 2)
    assert "goes on" in capsys.readouterr().err and not part.exists()
    assert evaluated(part, 2, *asked) == (130, 2)  # one more batch
    said = "Evaluating on scenes val: 2 of 11 images were done before"
    assert said in capsys.readouterr().out
    assert evaluated(part, None, *asked) == (1, 2)
    again = capsys.readouterr().out
    assert said.replace("2 of", "4 of") in again
    assert again.splitlines()[-2:] == told.splitlines()[-2:]  # what is broken is told as well
    (want,), (found,) = timeless(lines(whole)), timeless(lines(part))
    assert want == found and want["left_out"] == 4
    assert sum(v not in (None, 0.0, 1.0) for v in want["result"].values()) > 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part.jsonl", "whole.jsonl"]
    assert evaluated(part, None, *asked) == (1, 4) and len(lines(part)) == 2  # all of it, again


def test_other_settings_or_no_output_evaluate_anew(evaluated, tmp_path):
    out = tmp_path / "scores.jsonl"
    assert evaluated(out, 3) == (130, 3)
    assert evaluated(out, None, "--batch", "3") == (1, 3)
    assert evaluated(None, 3) == (130, 3) and evaluated(None) == (1, 4)


def test_a_data_set_that_is_scored_is_written_once(run, evaluated, tmp_path, monkeypatch):
    """Interrupted in the second data set, and between keeping a row and writing it."""
    monkeypatch.setattr(
        qyolop_evaluate, "dataset", lambda name, *rest: Scenes(2 + 2 * (name == "camvid"), CFG.size)
    )
    monkeypatch.setattr(qyolop_evaluate, "data_identity", lambda name, *rest: name)
    out = tmp_path / "scores.jsonl"
    both = ("--data", "scenes", "camvid")
    assert evaluated(out, 2, *both) == (130, 2) and len(lines(out)) == 1
    assert evaluated(out, 2, *both) == (130, 2) and len(lines(out)) == 1
    out.unlink()
    assert evaluated(out, None, *both) == (0, 1)
    assert [r["data"] for r in lines(out)] == ["scenes", "camvid"]


def test_changed_data_is_other_data(tmp_path):
    place = tmp_path / "camvid"
    place.mkdir()
    (place / "a.png").write_bytes(b"one")
    about = lambda: data_identity("camvid", "val", tmp_path, Scenes(2))
    before = about()
    assert before == about()
    (place / "a.png").write_bytes(b"longer")
    changed = about()
    (place / "b.png").write_bytes(b"two")
    assert len({str(a) for a in (before, changed, about())}) == 3
    scenes = [data_identity("scenes", "val", None, Scenes(*a)) for a in ((2,), (3,), (2, (64, 96)))]
    assert len({str(a) for a in scenes}) == 3


@pytest.mark.slow
def test_an_interrupted_quantize_ends_in_the_same_files_and_numbers(run, tmp_path, monkeypatch):
    """Interrupted in the sensitivity and in both evaluations."""
    calls = dict.fromkeys(("calibrate", "sqnr", "predict"), 0)
    stop = {}

    def counting(name, real):
        def call(*args, **kwargs):
            calls[name] += 1
            if calls[name] == stop.get(name):
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    real = evaluation.predictor
    monkeypatch.setattr(evaluation, "predictor", lambda *args: counting("predict", real(*args)))
    monkeypatch.setattr(quantize, "sqnr", counting("sqnr", quantize.sqnr))
    monkeypatch.setattr(
        qyolop_deploy, "calibrate_scales", counting("calibrate", qyolop_deploy.calibrate_scales)
    )
    monkeypatch.setattr(qyolop_deploy, "latency", lambda network: 0.5)

    def quantized(folder, **at):
        calls.update(dict.fromkeys(calls, 0))
        stop.clear()
        stop.update(at)
        model = folder / "model.safetensors"
        folder.mkdir(exist_ok=True)
        if not model.exists():
            model.write_bytes((run / "model.safetensors").read_bytes())
        words = ["quantize", "--run", str(folder), "--scenes", "4", "--images", "3"]
        words += ["--held-out", "10", "--sensitivity", "--evaluate"]
        return qyolop.cli(words), dict(calls)

    whole, part = tmp_path / "whole", tmp_path / "part"
    status, all_calls = quantized(whole)
    assert status == 0 and all_calls["predict"] == 4 and all_calls["calibrate"] == 1
    for at in (dict(sqnr=40), dict(predict=2), dict(predict=2)):
        assert quantized(part, **at)[0] == 130, at
    status, last_calls = quantized(part)
    assert (status, last_calls) == (0, dict(calibrate=0, sqnr=0, predict=2))
    names = {p.name for p in whole.iterdir()}
    assert names == {p.name for p in part.iterdir()} and len(names) == 5
    models = [load_integer_model(folder / "model-int8.safetensors") for folder in (whole, part)]
    for a, b in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("sensitivity.jsonl", "model-int8.jsonl"):
        want, found = timeless(lines(whole / name)), timeless(lines(part / name))
        for r in want + found:
            assert Path(r.pop("run")).parent == tmp_path
        assert want == found


def test_an_interrupted_benchmark_keeps_whole_rounds(tmp_path, monkeypatch, capsys):
    """The command on ways that do nothing: rounds that are done keep their times."""
    subject = qyolop_benchmark.Subject(CFG, {}, None, "random", 1000, 10)
    monkeypatch.setattr(qyolop_benchmark, "subject", lambda *args: subject)
    monkeypatch.setattr(qyolop_benchmark, "WARM", 0.0)
    calls, stop = [], [None]

    def way(key):
        def call():
            calls.append(key["precision"])
            if len(calls) == stop[0]:
                raise KeyboardInterrupt

        return qyolop_benchmark.Way(key, call, 1, 1000)

    def ways(subject, batch, *_):
        for precision in ("float32", "int8"):
            key = dict(task="inference", engine="jax", precision=precision, batch=batch)
            yield way(key | dict(postprocessing=False))

    matmul = dict(task="matmul", engine="jax", precision="float32", batch=1, side=64)
    monkeypatch.setattr(qyolop_benchmark, "products", lambda: [way(matmul)])
    monkeypatch.setattr(qyolop_benchmark, "inference", ways)
    out = tmp_path / "speed.jsonl"
    args = ["benchmark", "--batch", "1", "--repeats", "4", "--output", str(out)]
    stop[0] = 3 + 6 + 6 + 2  # compiled, two rounds of an untimed and a timed call, and in the third
    assert qyolop.cli(args) == 130 and not out.exists()
    kept = lines(tmp_path / "speed.jsonl.unfinished/records.jsonl")
    assert [len(r["value"]) for r in kept] == [3, 3]
    calls.clear()
    assert qyolop.cli(args) == 0 and len(calls) == 3 + 2 * 6
    assert "2 of 4 rounds were done before" in capsys.readouterr().out
    rows = lines(out)
    assert [(r["task"], r["repeats"]) for r in rows] == [("matmul", 4)] + [("inference", 4)] * 2
    for n, r in enumerate(rows):
        for k in kept:
            wall, cpu = k["value"][n]
            assert r["least"] <= wall and r["cpu_least"] <= cpu
    assert [p.name for p in tmp_path.iterdir()] == ["speed.jsonl"]


def test_rounds_from_before_are_part_of_the_times():
    way = qyolop_benchmark.Way({}, lambda: None, 1, 1)
    kept = []
    took = qyolop_benchmark.turns(
        [way, way], 3, lambda n: None, [[[7.0, 1.0], [8.0, 2.0]], [[9.0, 3.0], [6.0, 4.0]]],
        kept.append,
    )  # fmt: skip
    assert [t[:2] for t in took] == [[(7.0, 1.0), (9.0, 3.0)], [(8.0, 2.0), (6.0, 4.0)]]
    assert [len(t) for t in took] == [3, 3] and kept == [[took[0][2], took[1][2]]]
    before = [[[7.0, 1.0]], [[9.0, 3.0]]]
    assert qyolop_benchmark.turns([way], 1, lambda n: None, before) == [[(7.0, 1.0)]]


def test_parts_of_an_evaluation_are_the_whole(monkeypatch):
    """All ways to cut five batches in two, as JSON keeps them."""
    monkeypatch.setattr(
        evaluation, "predictor", lambda *args: lambda values, images: guesses(images)
    )
    net, data, parts = network.Network(CFG, None, None), [scene(i, CFG.size) for i in range(9)], []
    whole = evaluation.evaluate(net, data, 2, keep=parts.append)
    assert [(p["start"], p["end"]) for p in parts] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
    for n in range(6):
        known, heard = json.loads(json.dumps(parts[:n])), []
        found = evaluation.evaluate(net, data, 2, known=known, progress=heard.append)
        assert list(found) == list(whole)
        np.testing.assert_array_equal(list(found.values()), list(whole.values()))
        assert heard[-1] == 9 and len(heard) == 5 - n + (n > 0)
    assert np.isfinite(list(whole.values())).sum() > 10
