"""Fake quantization: what it rounds to, what its gradients are, what shares a scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantcase import conv, images, random_params, small_graph

from qyolop_jax.graph import Graph, GraphError, Node
from qyolop_jax.observe import ObserveError
from qyolop_jax.quantize import (
    calibrate_scales,
    float_tensors,
    follow,
    qat_forward,
    rounded,
    sensitivity,
    simulated_forward,
    sqnr,
)
from qyolop_jax.scales import (
    NAIVE,
    QuantizeError,
    Settings,
    fields,
    plan_quantization,
    scale_and_zero,
    weight_scale,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def case():
    graph = small_graph("silu")
    params = random_params(graph)
    return graph, params, calibrate_scales(graph, params, [images()])


def single(act="none", k=3):
    """image -> area, nothing else."""
    nodes = (Node("image", "input", (), 3), conv("area", "image", 5, k, 1, act))
    return Graph(nodes, ("area",))


def test_straight_through():
    x = jnp.asarray([-3.0, -2.4, -0.6, 0.2, 1.49, 1.51, 4.0])
    low, high = jnp.float32(-2), jnp.float32(1)
    y, back = jax.vjp(lambda x: rounded(x, low, high), x)
    np.testing.assert_array_equal(y, [-2, -2, -1, 0, 1, 1, 1])
    np.testing.assert_array_equal(back(jnp.full(7, 5.0))[0], [0, 5, 5, 5, 5, 0, 0])


def test_weights_scales_are_per_channel():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype(np.float32)
    kernel[..., 2] *= 100
    kernel[..., 5] = 0
    bias, step = jnp.asarray([0.0, 0, 0, 0, 1e6, 0.0]), jnp.float32(0.5)
    found = weight_scale(jnp.asarray(kernel), bias, step, True)
    want = np.abs(kernel).max((0, 1, 2)) / 127
    np.testing.assert_allclose(found[:4], want[:4], rtol=1e-6)
    assert found[4] > want[4] and 1e6 / (0.5 * found[4]) <= 2.0**22 * 1.001
    assert 0 < found[5] < 1e-6
    whole = weight_scale(jnp.asarray(kernel), jnp.zeros(6), step, False)
    np.testing.assert_allclose(whole, np.full(6, want.max()), rtol=1e-6)


@pytest.mark.parametrize("limits", [(-0.28, 6.0), (0.0, 4.0), (0.5, 3.0), (-9.0, -1.0), (0, 0)])
def test_ranges_are_covered_and_zero_is_exact(limits):
    step, zero = scale_and_zero(jnp.asarray([limits], jnp.float32), False)
    low, high = (np.array([-128, 127]) - float(zero[0])) * float(step[0])
    assert float(zero[0]) == round(float(zero[0])) and -128 <= float(zero[0]) <= 127
    slack = 0.51 * float(step[0])  # the zero point's rounding
    assert low <= min(limits[0], 0) + slack and high >= max(limits[1], 0) - slack
    if limits[0] >= 0:
        assert float(zero[0]) == -128  # twice the resolution of a symmetric one
    step, zero = scale_and_zero(jnp.asarray([limits], jnp.float32), True)
    assert float(zero[0]) == 0
    np.testing.assert_allclose(step[0] * 127, max(map(abs, limits)), rtol=1e-6, atol=1e-9)


def test_one_convolution_against_numpy():
    graph, x = single("relu"), images(2, (1, 32, 32, 3))
    params = random_params(graph)
    scales = {"area": jnp.asarray([[0.0, 3.0]])}
    found = simulated_forward(graph, params, scales, x)["area"]
    w, b = (np.asarray(params["area"][k], np.float64) for k in ("kernel", "bias"))
    sw = np.abs(w).max((0, 1, 2)) / 127
    w, b = np.round(w / sw) * sw, np.round(b / (sw / 64)) * sw / 64
    real = np.pad((np.asarray(x, np.float64) - 128) / 64, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(real, (3, 3), (1, 2))
    y = np.einsum("bhwiyx,yxio->bhwo", windows, w) + b
    step = 3 / 255
    want = np.clip(np.round(y / step), 0, 255) * step
    off = np.abs(found - want) / step
    assert (off > 0.01).mean() < 1e-3 and off.max() < 1.01  # float32 against float64 at ties


def test_against_qwix():
    qwix = pytest.importorskip("qwix", reason="qwix is not installed")
    from qwix._src.core import qarray

    assert qwix.__name__ == "qwix"
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(3, 3, 4, 6)), jnp.float32)
    how = qarray.HowToQuantize(
        qtype=jnp.int8, channelwise_axes=(3,), tiled_axes={}, calibration_method="absmax"
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = qarray.quantize(w, how)
    by = weight_scale(w, jnp.zeros(6), jnp.float32(1), True)
    ours = jnp.round(w / by.reshape(1, 1, 1, -1))
    # theirs spread absmax over 127.5 steps, ours over 127, so that both signs reach it
    ratio = np.asarray(theirs.scale).ravel() / np.asarray(by)
    assert np.allclose(ratio, 127 / 127.5, rtol=1e-5) or np.allclose(ratio, 1, rtol=1e-5)
    assert np.abs(np.asarray(theirs.qvalue, np.float32) - np.asarray(ours)).max() <= 1
    real = np.asarray(theirs.qvalue, np.float32) * np.asarray(theirs.scale)
    steps = np.abs(real - np.asarray(ours * by.reshape(1, 1, 1, -1))) / np.asarray(by)
    assert steps.max() < 1.01


def linear_graph():
    """No activation, no pooling: the gradient of a bias depends on kernels alone."""
    nodes = (
        Node("image", "input", (), 3),
        conv("a", "image", 6, 3, 2),
        conv("b", "a", 5, 3, 2),
        Node("up", "upsample", ("b",), 5),
        Node("cat", "concat", ("up", "a"), 11),
        conv("area", "cat", 3, 3),
    )
    return Graph(nodes, ("area",))


def test_gradients_of_a_linear_network_are_those_of_its_rounded_weights():
    graph, x = linear_graph(), images()
    params = random_params(graph)
    ranges = calibrate_scales(graph, params, [x], Settings("absmax"))
    scales = {k: a * 1.5 for k, a in ranges.items()}  # nothing is cut off
    weigh = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    gradient = lambda run: jax.jit(jax.grad(lambda p: (run(p)["area"] * weigh).sum()))
    ours = gradient(lambda p: qat_forward(graph, p, scales, x)[0])(params)
    near = {}
    for name, p in params.items():
        by = np.abs(np.asarray(p["kernel"])).max((0, 1, 2)) / 127
        kernel = np.round(np.asarray(p["kernel"]) / by) * by
        near[name] = dict(kernel=jnp.asarray(kernel), bias=p["bias"])
    exact = gradient(lambda p: float_tensors(graph, p, x)[0])(near)
    for name in params:
        bias, kernel = (np.asarray(exact[name][k]) for k in ("bias", "kernel"))
        np.testing.assert_allclose(
            ours[name]["bias"], bias, rtol=1e-3, atol=1e-3 * np.abs(bias).max()
        )
        # a kernel's has its input in it, which is rounded
        assert np.abs(ours[name]["kernel"] - kernel).max() < 0.1 * np.abs(kernel).max()


@pytest.mark.slow
def test_gradients_reach_every_kernel_and_bias(case):
    graph, params, scales = case
    loss = lambda p: sum((a**2).mean() for a in qat_forward(graph, p, scales, images())[0].values())
    grads = jax.jit(jax.grad(loss))(params)
    for name in params:
        for leaf in ("kernel", "bias"):
            a = np.asarray(grads[name][leaf])
            assert np.isfinite(a).all() and (a != 0).mean() > 0.8, (name, leaf)


def test_no_gradient_from_outside_the_range():
    graph, x = single(k=1), images(2, (1, 32, 32, 3))
    params = random_params(graph)
    y = np.asarray(float_tensors(graph, params, x)[0]["area"])
    scales = {"area": jnp.asarray([[-0.5, 0.5]])}
    grad = jax.grad(lambda p: qat_forward(graph, p, scales, x)[0]["area"].sum())(params)
    step, zero = 1 / 255, round(-128 + 127.5)
    inside = (y > (-128.5 - zero) * step) & (y < (127.5 - zero) * step)
    assert 0.05 < inside.mean() < 0.95
    found = np.asarray(grad["area"]["bias"])
    np.testing.assert_allclose(found, inside.sum((0, 1, 2)), atol=0.02 * y[..., 0].size)


def test_what_meets_shares(case):
    graph, _, scales = case
    groups = plan_quantization(graph, Settings()).groups
    together = {"stem", "pool", "a", "b", "ab", "mid", "up", "cat"}
    # stem pools into b's input alone: its own group
    assert groups["stem"] == groups["pool"] != groups["b"]
    assert len({groups[n] for n in together - {"stem", "pool"}}) == 1
    assert len({groups[n] for n in ("point", "up0", "pool5", "pool9", "pools")}) == 1
    assert groups["down"] != groups["point"] != groups["mid"]
    assert scales["detect.8"].shape == (4, 2) and scales["area"].shape == (1, 2)
    assert groups["a"] in scales and "b" not in scales and "b:pre" in scales


def test_calibration_sees_all_members_and_fields(case):
    graph, params, _ = case
    batches = [images(1), dict(image=images(2))]
    found = calibrate_scales(graph, params, batches, Settings("absmax"))
    runs = [float_tensors(graph, params, images(i)) for i in (1, 2)]
    for name, members in {"a": ("a", "b", "mid"), "down": ("down",), "b:pre": ("b:pre",)}.items():
        both = np.concatenate([np.asarray(r[1][m]).ravel() for r in runs for m in members])
        np.testing.assert_allclose(found[name], [[both.min(), both.max()]], rtol=1e-6)
    raw = np.concatenate([np.asarray(r[0]["detect.8"]) for r in runs]).reshape(4, -1, 3, 7)
    for k, part in enumerate((raw[..., :2], raw[..., 2:4], raw[..., 4], raw[..., 5:])):
        np.testing.assert_allclose(found["detect.8"][k], [part.min(), part.max()], rtol=1e-6)


@pytest.mark.slow
def test_seen_ranges_and_their_average(case):
    graph, params, scales = case
    x = images(4)
    _, seen = jax.jit(lambda s: qat_forward(graph, params, s, x, Settings("absmax")))(scales)
    assert jax.tree.map(jnp.shape, seen) == jax.tree.map(jnp.shape, scales)
    stem = np.asarray(jax.jit(lambda x: float_tensors(graph, params, x)[1]["stem"])(x))
    np.testing.assert_allclose(seen["stem"], [[stem.min(), stem.max()]], atol=0.05)
    _, cut = jax.jit(lambda s: qat_forward(graph, params, s, x, Settings(percentile=99.0)))(scales)
    np.testing.assert_allclose(cut["stem"][0], np.percentile(stem, [1, 99]), atol=0.15)
    mixed = follow(scales, seen, 0.75)
    np.testing.assert_allclose(
        mixed["stem"],
        0.75 * np.asarray(scales["stem"]) + 0.25 * np.asarray(seen["stem"]),
        rtol=1e-6,
    )
    kept = []
    keep = lambda s: kept.append(qat_forward(graph, params, s, x, Settings("mse"))[1] is s)
    jax.eval_shape(keep, scales)
    assert kept == [True]


@pytest.mark.slow
def test_naive_is_worse(case):
    """One scale for pixels and probabilities, one for all channels: objectness drowns."""
    graph, params, _ = case
    field = fields(graph.node("detect.8").channels)
    kernel = np.asarray(params["detect.8"]["kernel"]) * np.where(field == 1, 40.0, 1)
    uneven = params | {
        "detect.8": params["detect.8"] | dict(kernel=jnp.asarray(kernel, jnp.float32))
    }
    x, found = images(6), {}
    exact = float_tensors(graph, uneven, x)[0]["detect.8"][..., field == 2]
    for name, settings in dict(ours=Settings(), naive=NAIVE).items():
        scales = calibrate_scales(graph, uneven, [images(7)], settings)
        raw = simulated_forward(graph, uneven, scales, x, settings)
        found[name] = sqnr(exact, raw["detect.8"][..., field == 2])
    assert found["ours"] > 20 > 10 > found["naive"]


@pytest.mark.slow
def test_sensitivity_finds_the_layer_that_is_hurt(case):
    graph, params, scales = case
    hurt = dict(scales, down=scales["down"] * 0.02)
    hurt["down:pre"] = scales["down:pre"] * 0.02
    found = sensitivity(graph, params, hurt, [images(3)])
    assert list(found) == [n.name for n in graph.convs]
    assert min(found, key=found.get) == "down" and found["down"] < 10 < found["stem"]
    loss = lambda raw, batch: jnp.square(raw["area"]).mean()
    grown = sensitivity(graph, params, hurt, [dict(image=images(3))], loss=loss)
    assert max(grown, key=lambda k: abs(grown[k])) == "down" and grown["detect.8"] == 0


@pytest.mark.slow
def test_kept_layers_are_float(case):
    graph, params, scales = case
    every = Settings(keep=tuple(n.name for n in graph.convs))
    x = images(3)
    exact = float_tensors(graph, params, x)[0]
    plain = simulated_forward(graph, params, scales, x)
    kept = simulated_forward(graph, params, scales, x, every)
    assert sqnr(exact["area"], kept["area"]) > sqnr(exact["area"], plain["area"])
    assert len(np.unique(plain["area"])) <= 256 < len(np.unique(kept["area"]))


def test_errors_name_what_is_wrong(case):
    graph, params, scales = case
    with pytest.raises(ObserveError, match="percentile 120"):
        Settings(percentile=120)
    with pytest.raises(ObserveError, match="'median'"):
        Settings("median")
    with pytest.raises(QuantizeError, match="no convolution 'nowhere'"):
        plan_quantization(graph, Settings(keep=("nowhere",)))
    with pytest.raises(QuantizeError, match="scales lack stem"):
        simulated_forward(graph, params, {k: v for k, v in scales.items() if k != "stem"}, images())
    with pytest.raises(QuantizeError, match="no batch to calibrate"):
        calibrate_scales(graph, params, [])
    with pytest.raises(QuantizeError, match="no batch to measure"):
        sensitivity(graph, params, scales, [])
    for change in (dict(norm=True), dict(rep=True), dict(implicit=True)):
        nodes = tuple(dataclasses.replace(n, **change) if n.name == "a" else n for n in graph.nodes)
        with pytest.raises(GraphError, match="a is not folded"):
            plan_quantization(Graph(nodes, graph.outputs), Settings())
    nodes = (*graph.nodes, Node("bad", "concat", ("image", "up"), 11))
    with pytest.raises(GraphError, match="shares its scale with the image"):
        plan_quantization(Graph(nodes, graph.outputs), Settings())
    with pytest.raises(GraphError, match="expected 3"):
        fields(16)
