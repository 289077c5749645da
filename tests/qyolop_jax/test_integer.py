"""Integers: JAX, the NumPy reference and fake quantization give the same steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantcase import conv, images, random_params, small_graph

from qyolop_jax import arrays, integer
from qyolop_jax.config import ModelConfig
from qyolop_jax.fold import fold
from qyolop_jax.graph import Graph, GraphError, Node
from qyolop_jax.integer import (
    IntegerError,
    load_integer_model,
    run_integer,
    run_numpy,
    save_integer_model,
    to_integer,
)
from qyolop_jax.model import initial
from qyolop_jax.quantize import calibrate_scales, float_tensors, simulated_forward, sqnr
from qyolop_jax.scales import NAIVE, QuantizeError, Settings, plan_quantization

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASES = {
    "default": Settings(),
    "symmetric": Settings(symmetric=True),
    "naive": NAIVE,
    "mse": Settings("mse", per_field=False),
}


def prepared(act, settings, seed=0):
    graph = small_graph(act)
    params = random_params(graph, seed)
    return graph, params, calibrate_scales(graph, params, [images(seed)], settings)


@pytest.mark.quick_cases("relu-default")
@pytest.mark.parametrize(
    ("act", "case"),
    [("relu", "default"), ("silu", "default"), ("hardswish", "mse")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("hardswish", "default"), ("relu", "symmetric"), ("silu", "naive"))
    ],
)
def test_jax_numpy_and_fake_quantization_agree(act, case):
    settings = CASES[case]
    graph, params, scales = prepared(act, settings)
    model, x = to_integer(graph, params, scales, settings), images(5)
    found, want = jax.jit(run_integer)(model, x), run_numpy(model, x)
    fake = jax.jit(lambda p, s, x: simulated_forward(graph, p, s, x, settings))(params, scales, x)
    for name, a in want.items():
        np.testing.assert_array_equal(found[name], a)
        assert len(np.unique(a)) > 10  # something flows
        step = np.asarray(model.outputs[name]["step"])
        off = np.abs(np.asarray(fake[name]) - a) / step
        assert off.max() < 1.01, f"{name}: {off.max()} steps"
        assert (off > 0.01).mean() < 1e-3


@pytest.mark.slow
def test_the_whole_network():
    cfg = ModelConfig(0.125, "relu", size=(64, 96))
    graph, params = fold(cfg, initial(cfg))
    x = images(1, (1, 64, 96, 3))
    scales = calibrate_scales(graph, params, [x])
    model = to_integer(graph, params, scales)
    found, want = jax.jit(run_integer)(model, x), run_numpy(model, x)
    # (as arguments: the compiler folds constants in another precision of its own)
    fake = jax.jit(lambda p, s, x: simulated_forward(graph, p, s, x))(params, scales, x)
    for name, a in want.items():
        np.testing.assert_array_equal(found[name], a)
        off = np.abs(np.asarray(fake[name]) - a) / np.asarray(model.outputs[name]["step"])
        assert off.max() < 1.01 and (off > 0.01).mean() < 0.01


def test_patches_are_the_convolution():
    rng = np.random.default_rng(0)
    for k, stride, I, O in [(1, 1, 5, 3), (1, 2, 4, 7), (3, 1, 3, 9), (3, 2, 7, 5)]:
        x = rng.integers(-128, 128, (2, 9, 12, I)).astype(np.int8)
        w = rng.integers(-127, 128, (k, k, I, O)).astype(np.int8)
        found = integer._patches_dot(jnp.asarray(x), jnp.asarray(w), stride)
        windows = np.lib.stride_tricks.sliding_window_view(x.astype(int), (k, k), (1, 2))
        want = np.einsum("bhwiyx,yxio->bhwo", windows[:, ::stride, ::stride], w.astype(int))
        np.testing.assert_array_equal(found, want)


def test_a_single_convolution_by_hand():
    """One pixel, numbers small enough for a pencil."""
    graph = Graph((Node("image", "input", (), 3), conv("area", "image", 1, 1, 1)), ("area",))
    params = {
        "area": dict(
            kernel=jnp.asarray([1.27, -0.5, 0.254], jnp.float32).reshape(1, 1, 3, 1),
            bias=jnp.asarray([0.1], jnp.float32),
        )
    }
    scales = {"area": jnp.asarray([[-1.0, 1.55]], jnp.float32)}  # step .01, zero point -28
    model = to_integer(graph, params, scales)
    x = jnp.broadcast_to(jnp.asarray([148, 120, 131], jnp.uint8), (1, 32, 32, 3))
    # kernel 127, -50, 25 of .01; bias .1 / (.01 / 64) = 640; 20*127 + 8*50 + 3*25 + 640 = 3655
    p = model.layers["area"]
    np.testing.assert_array_equal(p["kernel"].ravel(), [127, -50, 25])
    assert int(p["bias"][0]) == 640 and int(p["zero"]) == -28
    want = round(3655 / 64) * 0.01  # 57 steps
    np.testing.assert_allclose(
        run_integer(model, x)["area"], np.full((1, 32, 32, 1), want), rtol=1e-5
    )


@pytest.mark.slow
def test_kept_in_float():
    """A kept output has no step; a kept one inside passes on 8 bits."""
    settings = Settings(keep=("area", "mid"))
    graph, params, scales = prepared("silu", settings)
    model, x = to_integer(graph, params, scales, settings), images(3)
    assert "area" not in model.outputs and model.layers["mid"]["kernel"].dtype == jnp.float32
    found = jax.jit(run_integer)(model, x)
    fake = jax.jit(lambda x: simulated_forward(graph, params, scales, x, settings))(x)
    exact = float_tensors(graph, params, x)[0]
    plain = run_numpy(to_integer(graph, params, scales), x)
    spread = float(jnp.abs(exact["area"]).max())
    assert np.abs(np.asarray(found["area"] - fake["area"])).max() < 0.03 * spread
    assert sqnr(fake["area"], found["area"]) > 35
    assert sqnr(exact["area"], found["area"]) > sqnr(exact["area"], plain["area"])
    with pytest.raises(IntegerError, match="mid is kept in float"):
        run_numpy(model, x)


def test_round_trip_through_a_file(tmp_path):
    graph, params, scales = prepared("silu", Settings())
    model = to_integer(graph, params, scales)
    save_integer_model(model, tmp_path / "small.safetensors")
    back = load_integer_model(tmp_path / "small.safetensors")
    assert back.graph == model.graph
    assert jax.tree.structure(back) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype and a.shape == b.shape
    x = images(1)
    for name, a in run_numpy(model, x).items():
        np.testing.assert_array_equal(run_numpy(back, x)[name], a)
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]


def test_a_byte_a_weight(tmp_path):
    nodes = [Node("image", "input", (), 3), conv("c0", "image", 128, 3, 1, "silu")]
    nodes += [conv(f"c{i + 1}", f"c{i}", 128, 3, 1, "silu") for i in range(3)]
    graph = Graph(tuple(nodes), ("c3",))
    params = random_params(graph)
    names = plan_quantization(graph, Settings()).names(graph)
    scales = {name: jnp.asarray([[-1.0, 1.0]]) for name in names}
    save_integer_model(to_integer(graph, params, scales), tmp_path / "q.safetensors")
    weights = sum(p["kernel"].size for p in params.values())
    assert weights < (tmp_path / "q.safetensors").stat().st_size < 1.03 * weights


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    graph, params, scales = prepared("relu", Settings())
    model, path = to_integer(graph, params, scales), tmp_path / "q.safetensors"
    save_integer_model(model, path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(arrays, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_integer_model(model, path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_errors_name_what_is_wrong(tmp_path):
    graph, params, scales = prepared("silu", Settings())
    model = to_integer(graph, params, scales)
    with pytest.raises(GraphError, match="multiples of 32"):
        run_integer(model, jnp.zeros((1, 33, 64, 3), jnp.uint8))
    lacking = {k: v for k, v in scales.items() if k != "mid:pre"}
    with pytest.raises(QuantizeError, match="scales lack mid:pre"):
        to_integer(graph, params, lacking)
    with pytest.raises(QuantizeError, match=r"detect\.8 have shape \(4, 2\)"):
        to_integer(graph, params, scales, Settings(per_field=False))
    raw = dataclasses.replace(graph.node("a"), norm=True)
    nodes = tuple(raw if n.name == "a" else n for n in graph.nodes)
    with pytest.raises(GraphError, match="a is not folded"):
        to_integer(Graph(nodes, graph.outputs), params, scales)
    (tmp_path / "torn").write_bytes(b"torn")
    with pytest.raises(IntegerError, match="not a whole safetensors file"):
        load_integer_model(tmp_path / "torn")
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(1)}, tmp_path / "other")
    with pytest.raises(IntegerError, match="holds no Q-YOLOP model"):
        load_integer_model(tmp_path / "other")
