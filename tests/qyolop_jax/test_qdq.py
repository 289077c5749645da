"""The form that engines fuse: onnxruntime and OpenVINO give what the integers give."""

import functools
import sys

import jax
import numpy as np
import pytest
from quantcase import SHIPPED, images, off_by, random_params, small_graph, small_model
from test_export import ort

from qyolop_jax.evaluation import evaluate
from qyolop_jax.export import OPSETS, ExportError, float_onnx, integer_onnx
from qyolop_jax.fold import run_folded
from qyolop_jax.forms import symmetric, unrounded, zero_points
from qyolop_jax.integer import load_integer_model, run_integer, run_numpy
from qyolop_jax.network import Network
from qyolop_jax.postprocess import to_predictions
from qyolop_jax.qdq import qdq_onnx
from qyolop_jax.quantize import sqnr
from qyolop_jax.readers import CamVid
from qyolop_jax.scales import DEFAULT, NAIVE, Settings

pytestmark = pytest.mark.usefixtures("quick_compilation")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
SIZE = (64, 96)


@functools.cache
def shipped():
    if not SHIPPED.is_file():
        pytest.skip("the checkpoint is not in this copy")
    return load_integer_model(SHIPPED)


@functools.cache
def shipped_case():
    x = images(3, (1, *SIZE, 3))
    return x, run_numpy(shipped(), x)


@pytest.mark.parametrize("act", ["relu", "silu", "hardswish", "none"])
@pytest.mark.parametrize("settings", [DEFAULT, Settings(per_field=False)], ids=["default", "one"])
def test_small_networks_by_onnxruntime(act, settings):
    """All layers are fused, so at most a tie is rounded otherwise."""
    model = small_model(act, settings)
    found, want = ort(qdq_onnx(model, SIZE), images(5)), run_numpy(model, images(5))
    for name, off in off_by(model, found, want).items():
        assert off.max() < 1.01 and (off > 0.01).mean() < 1e-3, name


def test_a_relu_that_rounding_does_not_do_is_within_steps():
    """With zero points 0, onnxruntime runs `relu` convolutions in float: ties may differ."""
    model = small_model("relu", NAIVE)
    found, want = ort(qdq_onnx(model, SIZE), images(5)), run_numpy(model, images(5))
    for name, off in off_by(model, found, want).items():
        assert off.max() < 3.01 and (off > 0.01).mean() < 0.02, name


def test_the_shipped_network_is_bit_equal_by_onnxruntime():
    x, want = shipped_case()
    found = ort(qdq_onnx(shipped(), SIZE), x)
    for name, off in off_by(shipped(), found, want).items():
        assert not off.any(), name


def test_the_shipped_network_by_openvino(monkeypatch):
    """It rounds a few values otherwise, and the layers behind them make more of that."""
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)  # it forks
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    x, want = shipped_case()
    core = openvino.Core()
    data = qdq_onnx(shipped(), SIZE, batch=1).SerializeToString()
    settings = dict(INFERENCE_PRECISION_HINT="f32", INFERENCE_NUM_THREADS="1")
    found = core.compile_model(core.read_model(data), "CPU", settings)(np.asarray(x))
    for name, a in want.items():
        assert sqnr(a, found[name]) > 15, name


@pytest.mark.parametrize("keep", [(), ("area", "mid", "a")], ids=["all", "kept"])
def test_every_float_operation_is_between_pairs(keep):
    """What engines look for: floats come out of DequantizeLinear and go into QuantizeLinear."""
    model = small_model("relu", Settings(keep=keep))
    made = qdq_onnx(model, SIZE).graph
    by = {node.output[0]: node for node in made.node}
    readers = {name: [n for n in made.node if name in n.input] for name in by}
    ops = ("Conv", "MaxPool", "Resize", "Concat")
    kinds = [node.op_type for node in made.node]
    assert "QLinearConv" not in kinds and kinds.count("Conv") == len(model.graph.convs)
    fused = 0
    for node in (n for n in made.node if n.op_type in ops):
        fed = [by[name].op_type for name in node.input if name in by]
        after = [n.op_type for n in readers[node.output[0]]]
        whole = set(fed) == {"DequantizeLinear"} and after == ["QuantizeLinear"]
        fused += whole and (node.op_type != "Conv" or len(fed) == 3)
    assert fused == sum(kinds.count(op) for op in ops) - len(keep)


def test_the_symmetric_form_is_what_tensorrt_takes():
    """No zero points but 0, no uint8 behind the image, no biases in integers."""
    made = qdq_onnx(shipped(), SIZE, symmetric=True).graph
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in made.initializer}
    pairs = [n for n in made.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 100
    for node in pairs:
        zero = constants[node.input[2]]
        assert zero.dtype == np.int8 and not zero.any()
    assert {c.dtype for c in constants.values()} <= {np.dtype("int8"), np.dtype("float32")}
    assert [n.op_type for n in made.node if "images" in n.input] == ["Transpose"]


def test_symmetric_networks_are_near_and_have_no_zero_points():
    x, want = shipped_case()
    model = symmetric(shipped())
    assert set(zero_points(model).values()) == {0}
    found = run_numpy(model, x)
    for name, a in want.items():
        assert sqnr(a, found[name]) > 12, name
    by_onnx = ort(qdq_onnx(shipped(), SIZE, symmetric=True), x)
    for name, a in found.items():
        assert sqnr(a, by_onnx[name]) > 15, name
    for name, a in run_numpy(small_model("relu", NAIVE), images(5)).items():  # it is symmetric
        np.testing.assert_array_equal(
            run_numpy(symmetric(small_model("relu", NAIVE)), images(5))[name], a
        )


@pytest.mark.parametrize("keep", [(), ("area", "mid", "a")], ids=["all", "kept"])
def test_floats_with_the_weights_of_integers(keep):
    """Nearer to the trained floats than a step is to nothing."""
    graph = small_graph("relu")
    params, x = random_params(graph), images(5)
    run = jax.jit(lambda p: run_folded(graph, p, x))
    found = run(unrounded(small_model("relu", Settings(keep=keep)))[1])
    for name, a in run(params).items():
        assert sqnr(a, found[name]) > 30, name


@pytest.mark.quick_cases("13", "27")
@pytest.mark.parametrize("opset", range(OPSETS[0], OPSETS[1] + 1), ids=str)
def test_opsets_compute_the_same(opset):
    """hardswish has an operation of its own from 14 on."""
    if opset > onnx.defs.onnx_opset_version():
        pytest.skip(f"this onnx has no opset {opset}")
    model, x = small_model("hardswish"), images(5)
    want = run_numpy(model, x)
    for make in (integer_onnx, qdq_onnx):
        for name, off in off_by(model, ort(make(model, SIZE, opset=opset), x), want).items():
            assert off.max() < 1.01 and (off > 0.01).mean() < 1e-3, name
    graph = small_graph("hardswish")
    params = random_params(graph)
    made = float_onnx(graph, params, SIZE, opset, batch=2)
    assert made.opset_import[0].version == opset
    assert made.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    for name, a in jax.jit(lambda p: run_folded(graph, p, x))(params).items():
        np.testing.assert_allclose(ort(made, x)[name], a, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_layers_kept_in_float():
    model = small_model("silu", Settings(keep=("area", "mid", "a")))
    found, want = ort(qdq_onnx(model, SIZE), images(5)), jax.jit(run_integer)(model, images(5))
    for name, a in want.items():
        assert sqnr(a, found[name]) > 35, name


def test_what_has_no_form_is_refused_by_name():
    with pytest.raises(ExportError, match="stem has a table for silu"):
        qdq_onnx(small_model("silu"), SIZE, symmetric=True)
    with pytest.raises(ExportError, match="stem has hardswish, whose steps"):
        unrounded(small_model("hardswish"))
    for opset in (12, 99):
        with pytest.raises(ExportError, match=f"opset {opset}; expected 13 to"):
            qdq_onnx(small_model("relu"), SIZE, opset=opset)


@pytest.mark.slow
def test_engines_find_what_the_integers_find(shared_data):
    """mAP50 and road IoU on real validation images, within half a point of the integers'."""
    data = CamVid(shared_data / "driving/camvid", "val", lanes=False)
    few, model = [data[i] for i in range(0, len(data), 9)], shipped()
    cfg = model.config
    network = Network(cfg, run_integer, model)
    finish = jax.jit(lambda raw: to_predictions(raw, cfg, 0.01))
    by_onnx = lambda made: lambda _, x: jax.tree.map(np.asarray, finish(ort(made, x)))
    want = evaluate(network, few, batch=4)
    found = evaluate(network, few, batch=4, run=by_onnx(qdq_onnx(model, cfg.size)))
    assert want["detection/AP50"] > 0.4
    for name in ("detection/AP50", "area/binary mIoU"):
        assert abs(found[name] - want[name]) < 0.005, name
