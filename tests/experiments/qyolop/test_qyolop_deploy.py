"""quantize, export and benchmark of experiments.qyolop on tiny networks."""

import dataclasses
import importlib.util
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from rich.console import Console

from experiments.common.unfinished import Unfinished
from experiments.qyolop import __main__ as qyolop
from experiments.qyolop import benchmark as qyolop_benchmark
from experiments.qyolop import deploy as qyolop_deploy
from experiments.qyolop import exporting as qyolop_exporting
from experiments.qyolop import sensitivity as qyolop_sensitivity
from experiments.qyolop import ways as qyolop_ways
from experiments.qyolop.engines import DeployError
from qyolop_jax import integer, network, quantize, weights
from qyolop_jax.config import ModelConfig
from qyolop_jax.graph import Graph, Node, build_graph, count
from qyolop_jax.model import initial
from qyolop_jax.network import INTEGER_FILE, MODEL_FILE
from qyolop_jax.samples import Report
from qyolop_jax.scales import Settings
from qyolop_jax.scenes import scene

QUIET = Console(quiet=True)
CFG = ModelConfig(0.125, "relu", size=(64, 96))
KEPT = ("stem.2", "detect.8")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def images(count=2, size=CFG.size):
    return np.stack([scene(i, size).image for i in range(count)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as a run leaves it before its last stage, and quantized; the model in memory."""
    path, models, real = tmp_path_factory.mktemp("deploy"), [], network.save_integer_model
    weights.save_weights(path / MODEL_FILE, CFG, initial(CFG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            network, "save_integer_model", lambda model, to: (models.append(model), real(model, to))
        )
        assert qyolop.main(quantize_args(path), QUIET) == 0
    return path, *models


@pytest.fixture(scope="module")
def folder(made):
    return made[0]


def quantize_args(run, **changes):
    return qyolop_deploy.Quantize(run, **(dict(scenes=4, images=3, held_out=2) | changes))


@pytest.mark.slow
def test_what_is_written_is_what_was_computed(made):
    path, model = made
    run, x = jax.jit(integer.run_integer), images()
    want, found = run(model, x), run(integer.load_integer_model(path / INTEGER_FILE), x)
    for name, a in want.items():
        np.testing.assert_array_equal(found[name], a)
        assert len(np.unique(a)) > 10
    assert run._cache_size() == 1  # the same shapes too


@pytest.mark.slow
def test_calibration_takes_as_many_images_as_are_asked_for_or_there(folder):
    for images, want in ((3, [3]), (12, [8, 4]), (99, [8, 8])):
        args = quantize_args(folder, images=images, scenes=16)
        found = list(qyolop_deploy.calibration(args, CFG, Report()))
        assert [b["image"].shape for b in found] == [(n, 64, 96, 3) for n in want]


@pytest.mark.slow
def test_quantize_scores_and_leaves_a_better_model_alone(folder, capsys, monkeypatch):
    monkeypatch.setattr(qyolop_deploy, "latency", lambda *a: 0.5)
    before = (folder / INTEGER_FILE).read_bytes()
    args = quantize_args(folder, observer="absmax", per_tensor=True, symmetric=True, evaluate=True)
    assert qyolop.main(args, Console(width=140)) == 0
    assert (folder / INTEGER_FILE).read_bytes() == before
    said = capsys.readouterr().out
    assert "is there already and stays" in said and "times smaller" in said
    model = integer.load_integer_model(folder / "model-int8-ptq.safetensors")
    assert all(int(p["zero"]) == 0 for p in model.layers.values())
    rows = lines(folder / "model-int8-ptq.jsonl")
    assert [r["model"] for r in rows] == ["float32", "int8"]
    assert rows[1]["bytes"] < 0.4 * rows[0]["bytes"] and rows[1]["seconds"] == 0.5
    assert "area/mIoU" in rows[0]["result"] and rows[0]["settings"]["per_channel"] is False


@pytest.mark.slow
def test_kept_convolutions_are_float_and_can_be_exported(folder, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    out = tmp_path / "new" / "kept.safetensors"
    assert qyolop.main(quantize_args(folder, keep=KEPT, output=out), QUIET) == 0
    for name, layer in integer.load_integer_model(out).layers.items():
        assert (layer["kernel"].dtype == jnp.float32) == (name in KEPT)
    export = qyolop_exporting.Export(out, "onnx", size=CFG.size)
    assert qyolop.main(export, Console(width=140)) == 0
    assert "Checked: onnxruntime on 2 scenes" in capsys.readouterr().out


@pytest.mark.slow
def test_sensitivity_ranks_the_convolution_that_is_hurt_first(tmp_path, capsys):
    """A kernel whose output channels differ a thousandfold, and one scale for it, in one place."""
    conv = lambda name, x, channels: Node(name, "conv", (x,), channels, norm=False)
    nodes = (Node("image", "input", (), 3), conv("good", "image", 8), conv("bad", "good", 8))
    graph = Graph((*nodes, conv("area", "bad", 2)), ("area",))
    rng, params = np.random.default_rng(0), {}
    for node in graph.convs:
        shape = 1, 1, graph.in_channels(node), node.channels
        kernel = rng.uniform(0.5, 1, shape).astype(np.float32)
        params[node.name] = dict(kernel=kernel, bias=np.zeros(node.channels, np.float32))
    spread = np.float32([300, *[0.3] * 7])
    params["bad"]["kernel"] *= spread
    params["area"]["kernel"] /= spread[:, None] * np.float32([1e6, *[1] * 7])[:, None]
    params = jax.tree.map(jnp.asarray, params)
    settings = Settings("absmax", per_channel=False)
    batch = dict(image=images(2, (64, 64)))
    scales = quantize.calibrate_scales(graph, params, [batch], settings)
    case = qyolop_sensitivity.Case(graph, params, scales, settings)
    found = qyolop_sensitivity.measure_sensitivity(
        case, [batch, batch], tmp_path, {}, Console(width=140), Unfinished(None, "")
    )
    assert min(found["alone"], key=found["alone"].get) == "bad"
    assert found["kept"][0] == "bad" and set(found["alone"]) == {"good", "bad", "area"}
    assert found["all"]["area"] <= found["with_kept"]["area"] + 0.1
    (record,) = lines(tmp_path / "sensitivity.jsonl")
    assert record["alone"] == found["alone"]
    assert (tmp_path / "sensitivity.png").stat().st_size > 5000
    assert "8 bits in it alone" in capsys.readouterr().out


def test_sensitivity_tells_how_far_it_is():
    graph = Graph(
        (Node("image", "input", (), 3), Node("area", "conv", ("image",), 2, norm=False)), ("area",)
    )
    params = dict(area=dict(kernel=jnp.ones((1, 1, 3, 2)), bias=jnp.zeros(2)))
    batch, told = images(1, (64, 64)), []
    scales = quantize.calibrate_scales(graph, params, [batch])
    found = quantize.sensitivity(graph, params, scales, [batch, batch], progress=told.append)
    assert told == [1, 2] and math.isfinite(found["area"])
    again = []
    known = {(0, "area"): found["area"] + 6.0}  # another number: it is taken as it is
    keep = lambda *measured: again.append(measured)
    changed = quantize.sensitivity(graph, params, scales, [batch, batch], known=known, keep=keep)
    assert again == [(1, "area", found["area"])] and changed["area"] == found["area"] + 3.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "precision"),
    [
        pytest.param("onnx", "int8", marks=pytest.mark.slow),
        ("onnx", "float32"),
        pytest.param("stablehlo", "int8", marks=pytest.mark.slow),
        ("qdq", "int8"),
        ("tflite", "int8"),
        ("tflite", "float32"),
    ],
)
def test_exports_give_what_the_model_gives(folder, tmp_path, form, precision, capsys):
    if form in ("onnx", "qdq"):
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if form == "tflite":
        pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    out = tmp_path / f"model.{form}"
    args = qyolop_exporting.Export(folder, form, precision, output=out)
    assert qyolop.main(args, Console(width=140)) == 0
    said = capsys.readouterr().out
    assert "Checked" in said and "any batch of 64x96" in said
    if precision == "int8":
        assert "the model's own bits" in said
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


@pytest.mark.slow
def test_a_file_that_says_its_size_is_exported_alone(folder, tmp_path, monkeypatch):
    """As the network for roads is, which has no model.safetensors beside it."""
    alone, sizes = tmp_path / "alone.safetensors", []
    alone.write_bytes((folder / INTEGER_FILE).read_bytes())
    made = lambda forward, size: sizes.append(size) or b"made"
    monkeypatch.setattr(qyolop_exporting.export, "serialize", made)
    monkeypatch.setattr(qyolop_exporting, "check_export", lambda *a: "")
    assert qyolop.main(qyolop_exporting.Export(alone, "stablehlo"), QUIET) == 0
    assert sizes == [CFG.size] and (tmp_path / "alone.stablehlo").read_bytes() == b"made"


@pytest.mark.slow
def test_an_export_that_differs_is_not_written(folder, tmp_path, monkeypatch):
    real = qyolop_exporting.export.integer_onnx

    def wrong(model, *args):
        layer = model.layers["area"]
        layer = layer | dict(bias=layer["bias"] + 10_000)
        return real(dataclasses.replace(model, layers=model.layers | dict(area=layer)), *args)

    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.setattr(qyolop_exporting.export, "integer_onnx", wrong)
    args = qyolop_exporting.Export(folder, "onnx", output=tmp_path / "wrong.onnx")
    with pytest.raises(DeployError, match="computes area otherwise"):
        qyolop.main(args, QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quantize", "--run", "nowhere"], "train a model first"),
        (["quantize", "--run", "RUN", "--keep", "stem.9"], "no convolution 'stem.9'"),
        (["quantize", "--run", "RUN", "--data", "cityscapes"], "no data set 'cityscapes'; there"),
        (["quantize", "--run", "RUN", "--data", "camvid"], "needs --data-dir"),
        (["quantize", "--run", "RUN", "--images", "0"], "--images is 0; expected 1 to"),
        (["quantize", "--run", "RUN", "--output", "RUN/model.safetensors"], "replace the input"),
        (["export", "--run", "RUN", "--format", "onnx", "--output", "RUN"], "there and is no file"),
        (["quantize", "--run", "RUN", "--percentile", "7"], "percentile 7"),
        (["export", "--run", "EMPTY", "--format", "onnx"], "`quantize --run` makes one"),
        (["export", "--run", "TORN", "--format", "onnx"], "make it again with `quantize --run`"),
        (["export", "--run", "TORN", "--format", "onnx", "--precision", "float32"], "not a whole"),
        (["export", "--run", "RUN/model.safetensors", "--format", "onnx"], "make it again"),
        (["export", "--run", "BARE", "--format", "onnx"], "give --size"),
        (["export", "--run", "RUN", "--format", "onnx", "--size", "50", "64"], "multiples of 32"),
        (["export", "--run", "RUN", "--format", "qdq", "--precision", "float32"], "take --format"),
        (
            ["export", "--run", "RUN", "--format", "onnx", "--symmetric"],
            "is for --format qdq",
        ),
        (["export", "--run", "RUN", "--format", "tflite", "--opset", "18"], "onnx or qdq"),
        (["export", "--run", "RUN", "--format", "stablehlo", "--batch", "2"], "--batch is for"),
        (["benchmark", "--run", "BARE"], "does not say its classes"),
        (["benchmark", "--run", "nowhere"], "train a model first"),
        (["benchmark", "--size", "50", "64"], "multiples of 32"),
        (["benchmark", "--repeats", "0"], "--repeats is 0; expected 1 to"),
    ],
)
def test_bad_input_is_named(words, said, folder, tmp_path, capsys):
    data = (folder / INTEGER_FILE).read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(data[: len(data) // 2])
    model = integer.load_integer_model(folder / INTEGER_FILE)
    bare = dataclasses.replace(model, config=None)
    integer.save_integer_model(bare, tmp_path / "bare.safetensors")
    places = dict(
        RUN=folder, EMPTY=tmp_path, TORN=tmp_path / "torn.safetensors",
        BARE=tmp_path / "bare.safetensors",
    )  # fmt: skip
    for name, path in places.items():
        words = [w.replace(name, str(path)) for w in words]
    assert qyolop.cli(words) == 2
    assert said in capsys.readouterr().err


def test_benchmark_times_and_writes(tmp_path, monkeypatch, capsys):
    """The command on ways that do nothing."""
    subject = qyolop_benchmark.Subject(CFG, {}, None, "random", 1000, 10)
    monkeypatch.setattr(qyolop_benchmark, "subject", lambda *args: subject)
    monkeypatch.setitem(qyolop_benchmark.MATMUL_SIDE, "cpu", 64)
    monkeypatch.setattr(qyolop_benchmark, "WARM", 0.0)

    def ways(subject, batch, *_):
        for post in (False, True):
            key = dict(engine="jax", precision="float32", batch=batch, postprocessing=post)
            yield qyolop_benchmark.Way(
                key | dict(task="inference"), lambda: sum(range(999)), batch, 1000, "float32"
            )

    monkeypatch.setattr(qyolop_benchmark, "inference", ways)
    out = tmp_path / "speed.jsonl"
    args = qyolop_benchmark.BenchmarkNetwork(batch=(1, 2), repeats=3, output=out)
    assert qyolop.main(args, Console(width=140)) == 0
    rows = lines(out)
    assert [(r["task"], r["batch"]) for r in rows] == [
        ("matmul", 1), ("inference", 1), ("inference", 1), ("inference", 2), ("inference", 2)
    ]  # fmt: skip
    for r in rows[1:]:
        assert r["repeats"] == 3 and r["macs"] == 1000 and r["weights"] == "random"
        assert math.isclose(r["images_per_second"], r["batch"] / r["seconds"])
        assert r["limit"] == "float32 matmul" and r["times_float32"] == 1
    assert "Best matrix products: float32" in capsys.readouterr().out


@pytest.mark.slow
def test_benchmark_writes_every_way_once(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.setitem(qyolop_benchmark.MATMUL_SIDE, "cpu", 256)
    monkeypatch.setattr(qyolop_benchmark, "WARM", 0.0)
    out = tmp_path / "speed.jsonl"
    args = qyolop_benchmark.BenchmarkNetwork(folder, batch=(2,), repeats=3, output=out)
    assert qyolop.main(args, Console(width=140)) == 0
    rows = lines(out)
    of = lambda r: (r["task"], r["engine"], r["precision"], r.get("postprocessing"))
    ways = [("jax", p) for p in ("float32", "bfloat16", "int8")]
    ways += [("onnxruntime", p) for p in ("float32", "int8")]
    want = {("inference", *w, post) for w in ways for post in (False, True)}
    assert {of(r) for r in rows} == want | {("matmul", "jax", "float32", None)}
    assert len(rows) == len(want) + 1
    macs = count(build_graph(CFG), CFG.size).total()[1]
    for r in rows:
        assert 0 < r["least"] <= r["low"] <= r["seconds"] <= r["high"]
        assert r["repeats"] == 3 and r["size"] == [64, 96] and r["width"] == 0.125
        assert r["weights"] == str(folder) and r["device"] and r["environment"]["packages"]["jax"]
        if r["task"] == "matmul":
            continue
        assert r["batch"] == 2 and r["macs"] == macs
        assert math.isclose(r["images_per_second"], 2 / r["seconds"])
        assert math.isclose(r["gmacs_per_second"], 2 * macs / r["seconds"] / 1e9)
        assert r["share_of_limit"] > 0 and r["limit"] == "float32 matmul"
        assert r["times_float32"] > 0 and (r["precision"] != "float32" or r["times_float32"] == 1)
    shown = capsys.readouterr().out
    assert "onnxruntime int8" in shown and "Best matrix products: float32" in shown


def test_an_engine_that_is_not_installed_is_an_error(tmp_path, monkeypatch, capsys):
    """By the words that install it; nothing is timed."""
    monkeypatch.setitem(qyolop_benchmark.MATMUL_SIDE, "cpu", 64)
    subject = qyolop_benchmark.Subject(CFG, {}, None, "random", 1000, 10, (None, {}))
    monkeypatch.setattr(qyolop_benchmark, "subject", lambda *args: subject)
    makers = dict(float_onnx=qyolop_ways.export, float_tflite=qyolop_ways.tflite)
    for name, module in makers.items():
        monkeypatch.setattr(module, name, lambda *args, **more: onnx.ModelProto())
    for engine, module in (("openvino", "openvino"), ("litert", "ai_edge_litert")):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, f"{module}.interpreter", None)
        words = ["benchmark", "--engines", engine, "--output", str(tmp_path / "speed.jsonl")]
        assert qyolop.cli(words) == 2
        assert f"pip install 'thimble-jax[{engine}]'" in capsys.readouterr().err
    assert not (tmp_path / "speed.jsonl").exists()


@pytest.mark.slow
def test_a_network_without_integers_is_timed_in_float(tmp_path, capsys):
    weights.save_weights(tmp_path / MODEL_FILE, CFG, initial(CFG))
    subject = qyolop_ways.subject(tmp_path, CFG, None, Console(width=200))
    found = list(qyolop_ways.forwards(subject, 1, ["jax"], None))  # nothing runs
    assert [f[:2] for f in found] == [("jax", "float32"), ("jax", "bfloat16")]
    assert "int8 is left out" in capsys.readouterr().out


@pytest.mark.slow
def test_engines_side_by_side_are_timed_and_scored(folder, tmp_path, monkeypatch, capsys):
    """Of a file of integers alone; in integers every engine that keeps the bits has one score."""
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    engines = ["onnxruntime", "litert"]
    if importlib.util.find_spec("openvino"):
        engines.append("openvino")
    monkeypatch.setitem(qyolop_benchmark.MATMUL_SIDE, "cpu", 64)
    monkeypatch.setattr(qyolop_benchmark, "WARM", 0.0)
    out = tmp_path / "speed.jsonl"
    words = ["benchmark", "--run", str(folder / INTEGER_FILE), "--batch", "2", "--repeats", "1"]
    words += ["--engines", "jax", *engines, "--data", "scenes", "--images", "3", "--threads", "1"]
    assert qyolop.cli([*words, "--output", str(out)]) == 0
    rows = [r for r in lines(out) if "scores" in r]
    assert {r["engine"] for r in rows} == {"jax", *engines}
    assert all("area/mIoU" in r["scores"]["scenes"] and r["cpu_least"] > 0 for r in rows)
    exact = [r for r in rows if r["precision"] == "int8" and r["engine"] in ("jax", "litert")]
    assert len(exact) == 2 and exact[0]["scores"] == exact[1]["scores"]
    assert "mAP50" in capsys.readouterr().out
    assert qyolop.cli([*words, "--train-batch", "1"]) == 2
    assert "--train-batch needs a float network" in capsys.readouterr().err


def test_all_take_turns_and_ratios_are_within_an_engine():
    order, clock = [], iter(range(1000))
    key = dict(task="inference", engine="jax", batch=1, postprocessing=False)
    ways = [
        qyolop_benchmark.Way(key | dict(precision=p), lambda p=p: order.append(p), 1, 10, "float32")
        for p in ("float32", "int8")
    ]
    qyolop_benchmark.turns(ways, 2, lambda n: next(clock))
    firsts = [p for i, p in enumerate(order) if i == 0 or order[i - 1] != p]
    assert firsts == ["float32", "int8", "float32"] and next(clock) == 4  # then int8 goes first
    limit = qyolop_benchmark.Way(
        dict(task="matmul", engine="jax", precision="float32", batch=1, side=10), None, 1, 1000
    )
    rows = qyolop_benchmark.speed_rows(
        [limit, *ways],
        [[(2.0, 3.0), (1.0, 4.0)], [(0.2, 0.1), (0.4, 0.5)], [(0.1, 0.3), (0.1, 0.2)]],
    )
    assert [(r["least"], r["cpu_least"]) for r in rows] == [(1.0, 3.0), (0.2, 0.1), (0.1, 0.2)]
    assert [round(r.get("times_float32", 0), 6) for r in rows] == [0, 1, 3]
    assert [round(r.get("share_of_limit", 0), 6) for r in rows] == [0, 0.033333, 0.1]


@pytest.mark.slow
def test_training_steps_are_timed(monkeypatch):
    made = iter(range(9))
    monkeypatch.setattr(
        qyolop_ways.optimization, "make_step",
        lambda loss, config, mesh: lambda state, batch, rate: (state, next(made)),
    )  # fmt: skip
    subject = qyolop_ways.subject(None, CFG, None, QUIET)
    assert subject.weights == "random"
    ways = list(qyolop_ways.training(subject, 2))
    assert [w.key["precision"] for w in ways] == ["float32", "bfloat16"]
    for way in ways:
        way.call(), way.call()
        assert way.images == 2 and way.macs == 3 * subject.macs
    assert next(made) == 4
