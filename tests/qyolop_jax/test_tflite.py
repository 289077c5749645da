""".tflite files, run by LiteRT, give the bits of the integers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantcase import SHIPPED, images, off_by, random_params, small_graph, small_model

from qyolop_jax.export import ExportError
from qyolop_jax.fold import run_folded
from qyolop_jax.graph import Graph, GraphError, Node
from qyolop_jax.integer import load_integer_model, run_integer, run_numpy
from qyolop_jax.quantize import sqnr
from qyolop_jax.scales import NAIVE, Settings
from qyolop_jax.tflite import ALIGNED, float_tflite, integer_tflite

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZE = (64, 96)
WHY = "ai-edge-litert is not installed"
schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason=WHY)
interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason=WHY)


def lite(data, x):
    """{output: array} by LiteRT, through the signature of the file."""
    runner = interpreter.Interpreter(model_content=data, num_threads=1)
    at = runner.get_input_details()[0]["index"]
    runner.resize_tensor_input(at, x.shape)
    runner.allocate_tensors()
    return runner.get_signature_runner()(images=np.asarray(x))


@pytest.mark.parametrize("act", ["relu", "silu", "hardswish", "none"])
@pytest.mark.parametrize(
    "settings",
    [Settings(), NAIVE, Settings(symmetric=True), Settings(per_field=False)],
    ids=["default", "naive", "symmetric", "one field"],
)
def test_small_networks_are_bit_equal_for_any_batch(act, settings):
    model = small_model(act, settings)
    for batch in (1, 2):
        data = integer_tflite(model, SIZE, batch)
        x = images(5)
        found, want = lite(data, x), run_numpy(model, x)
        for name, off in off_by(model, found, want).items():
            assert not off.any(), name


def test_the_shipped_network_is_bit_equal():
    if not SHIPPED.is_file():
        pytest.skip("the checkpoint is not in this copy")
    model, x = load_integer_model(SHIPPED), images(3, (1, *SIZE, 3))
    data = integer_tflite(model, SIZE)
    assert len(data) < 1.1 * model.bytes
    for name, off in off_by(model, lite(data, x), run_numpy(model, x)).items():
        assert not off.any(), name


@pytest.mark.quick_cases("hardswish")
@pytest.mark.parametrize("act", ["hardswish", "silu", "relu"])
def test_layers_kept_in_float_stay_so(act):
    """An output, a layer inside, and one of a concatenation."""
    model = small_model(act, Settings(keep=("area", "mid", "a")))
    found, want = (
        lite(integer_tflite(model, SIZE), images(5)),
        jax.jit(run_integer)(model, images(5)),
    )
    assert "area" not in model.outputs
    for name, a in want.items():
        assert sqnr(a, found[name]) > 35, name


@pytest.mark.quick_cases("silu")
@pytest.mark.parametrize("act", ["relu", "silu", "hardswish", "none"])
def test_floats(act):
    graph = small_graph(act)
    params, x = random_params(graph), images(5)
    found = lite(float_tflite(graph, params, SIZE), x)
    for name, a in jax.jit(lambda p: run_folded(graph, p, x))(params).items():
        np.testing.assert_allclose(found[name], a, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_the_file_says_what_it_takes_and_its_constants_are_aligned():
    data = integer_tflite(small_model("silu"), SIZE, 3)
    file = schema.Model.GetRootAs(data)
    part = file.Subgraphs(0)
    image = part.Tensors(part.Inputs(0))
    assert image.Name() == b"images" and image.Type() == schema.TensorType.UINT8
    assert list(image.ShapeAsNumpy()) == [3, *SIZE, 3]
    names = [part.Tensors(i).Name() for i in part.OutputsAsNumpy()]
    assert names == [b"detect.8", b"area"]
    starts = []
    for i in range(file.BuffersLength()):
        table = file.Buffers(i)._tab
        if at := table.Offset(4):
            starts.append(table.Vector(at))
    assert len(starts) > 30 and not any(start % ALIGNED for start in starts)


def test_what_has_no_form_is_refused_by_name():
    model = small_model("relu")
    layer = model.layers["mid"]
    wide = layer | dict(kernel=layer["kernel"].astype(jnp.int16))
    odd = dataclasses.replace(model, layers=model.layers | dict(mid=wide))
    with pytest.raises(ExportError, match="mid has weights in int16"):
        integer_tflite(odd, SIZE)
    for kernel, stride in ((3, 2), (2, 1), (4, 1)):
        pool = Node("pool", "maxpool", ("image",), 3, kernel, stride)
        graph = Graph((Node("image", "input", (), 3), pool), ("pool",))
        with pytest.raises(ExportError, match=f"pool: pooling {kernel}x{kernel} by {stride} has"):
            float_tflite(graph, {}, SIZE)
    with pytest.raises(GraphError, match="multiples of 32"):
        integer_tflite(model, (60, 96))
    raw = Node("raw", "conv", ("image",), 3)
    with pytest.raises(GraphError, match="not folded"):
        float_tflite(Graph((Node("image", "input", (), 3), raw), ("raw",)), {}, SIZE)


@pytest.mark.slow
def test_the_shipped_network_is_bit_equal_at_its_own_size():
    if not SHIPPED.is_file():
        pytest.skip("the checkpoint is not in this copy")
    model = load_integer_model(SHIPPED)
    x = images(4, (2, *model.config.size, 3))
    found = lite(integer_tflite(model, model.config.size), x)
    for name, off in off_by(model, found, jax.jit(run_integer)(model, x)).items():
        assert not off.any(), name
