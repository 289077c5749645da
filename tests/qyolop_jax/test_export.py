"""Exported networks, run by what they are for, give what ours give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantcase import images, random_params, small_graph

from qyolop_jax.export import ExportError, deserialize, float_onnx, integer_onnx, serialize
from qyolop_jax.fold import run_folded as run_float
from qyolop_jax.graph import Graph, GraphError, Node
from qyolop_jax.integer import run_integer, run_numpy, to_integer
from qyolop_jax.quantize import calibrate_scales, sqnr
from qyolop_jax.scales import DEFAULT, NAIVE, Settings

SIZE = (64, 96)


def prepared(act, settings=DEFAULT):
    graph = small_graph(act)
    params = random_params(graph)
    scales = calibrate_scales(graph, params, [images()], settings)
    return graph, params, to_integer(graph, params, scales, settings)


def ort(model, x):
    """{output: array} by onnxruntime on the CPU."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")  # without VNNI it saturates
    data = model.SerializeToString()
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": np.asarray(x)}), strict=True))


@pytest.mark.quick_cases("relu")
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_stablehlo_round_trip_is_bit_equal_for_any_batch(act):
    _, _, model = prepared(act)
    data = serialize(lambda x: run_integer(model, x), SIZE)
    back = deserialize(data)
    for batch in (1, 3):
        x = images(batch, (batch, *SIZE, 3))
        found, want = back(x), run_numpy(model, x)
        assert set(found) == set(want)
        for name, a in want.items():
            np.testing.assert_array_equal(found[name], a)


@pytest.mark.slow
def test_stablehlo_of_floats():
    graph, params, _ = prepared("hardswish")
    forward = lambda x: run_float(graph, params, x)
    found = deserialize(serialize(forward, SIZE, ["cpu"]))(images(4))
    for name, a in jax.jit(forward)(images(4)).items():
        np.testing.assert_allclose(found[name], a, rtol=1e-5, atol=1e-5)


@pytest.mark.quick_cases("naive relu", "silu")
@pytest.mark.parametrize(
    ("act", "settings"),
    [
        ("relu", Settings()),
        ("relu", NAIVE),
        ("silu", Settings()),
        ("hardswish", Settings(per_field=False)),
        ("none", Settings(symmetric=True)),
    ],
    ids=["relu", "naive relu", "silu", "hardswish", "none"],
)
def test_integer_onnx_by_onnxruntime(act, settings):
    pytest.importorskip("onnx", reason="onnx is not installed")
    _, _, model = prepared(act, settings)
    x = images(5)
    found, want = ort(integer_onnx(model, SIZE), x), run_numpy(model, x)
    assert set(found) == set(want)
    for name, a in want.items():
        off = np.abs(found[name] - a) / np.asarray(model.outputs[name]["step"])
        assert found[name].shape == a.shape and len(np.unique(a)) > 10
        assert off.max() < 1.01, f"{name}: {off.max()} steps"
        assert (off > 0.01).mean() < 1e-3


@pytest.mark.slow
def test_integer_onnx_with_layers_in_float():
    pytest.importorskip("onnx", reason="onnx is not installed")
    _, _, model = prepared("silu", Settings(keep=("area", "mid", "detect.8")))
    found, want = ort(integer_onnx(model, SIZE), images(5)), jax.jit(run_integer)(model, images(5))
    for name, a in want.items():
        assert sqnr(a, found[name]) > 35, name


@pytest.mark.quick_cases("relu", "silu")
@pytest.mark.parametrize("act", ["relu", "silu", "hardswish"])
def test_float_onnx_by_onnxruntime(act):
    pytest.importorskip("onnx", reason="onnx is not installed")
    graph, params, _ = prepared(act)
    found = ort(float_onnx(graph, params, SIZE), images(5))
    for name, a in jax.jit(lambda x: run_float(graph, params, x))(images(5)).items():
        np.testing.assert_allclose(found[name], a, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_errors_name_what_is_wrong():
    graph, params, model = prepared("relu")
    with pytest.raises(ExportError, match="4 bytes are not an exported program"):
        deserialize(b"torn")
    for make in (
        lambda size: serialize(lambda x: run_integer(model, x), size),
        lambda size: integer_onnx(model, size),
        lambda size: float_onnx(graph, params, size),
    ):
        with pytest.raises(GraphError, match="multiples of 32"):
            make((60, 96))
    odd = Graph((*graph.nodes, Node("raw", "conv", ("up",), 3)), graph.outputs)
    with pytest.raises(GraphError, match="not folded"):
        float_onnx(odd, params | dict(raw=jnp.zeros(1)), SIZE)
