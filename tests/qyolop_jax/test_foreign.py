"""QAT of somebody's NNX model: the rounding number by number, and a small network on digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qyolop_jax
from experiments.measure.qat import DigitsQat, Net, measure
from llm_jax.rules import RuleError
from qyolop_jax import QatRule, QyolopError
from qyolop_jax.foreign import QuantizedLayer

RULES = [QatRule("conv|body/.*"), QatRule("head", bits=4, observer="absmax")]


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.fixture(scope="module")
def model():
    found = qyolop_jax.qat(Net(nnx.Rngs(0)), RULES)
    qyolop_jax.calibrate_inputs(found, [draw(16, 8, 8, 1, seed=i) for i in range(2)])
    return found


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_layer_is_its_integers(bits):
    layer, x = nnx.Linear(32, 8, rngs=nnx.Rngs(0)), draw(20, 32) + 1
    quantized = qyolop_jax.qat(layer, [QatRule("", bits, "absmax")])
    qyolop_jax.calibrate_inputs(quantized, [x])
    (found,) = qyolop_jax.integers(quantized).values()
    low, high = min(float(x.min()), 0), max(float(x.max()), 0)
    assert found.step_in == pytest.approx((high - low) / 255)
    assert np.abs(found.codes).max() == 2 ** (bits - 1) - 1
    q = np.round(np.asarray(x, np.float64) / found.step_in) + found.zero_in
    sums = (np.clip(q, -128, 127).astype(np.int64) - found.zero_in) @ found.codes.astype(np.int64)
    expected = sums * (found.step_in * found.scale_O.astype(np.float64)) + found.bias_O
    np.testing.assert_allclose(quantized(x), expected, atol=2e-5)
    kernel, most = np.asarray(layer.kernel[...]), 2 ** (bits - 1) - 1
    error = np.abs(found.codes * found.scale_O - kernel)
    if bits > 3:
        assert (error <= found.scale_O / 2 * 1.0001).all()
    else:  # the best of the scales that were tried, by squared error
        for cut in np.linspace(0.2, 1, 33):
            step = cut * np.abs(kernel).max(0) / most
            other = np.clip(np.round(kernel / step), -most, most) * step
            assert ((error**2).sum(0) <= ((other - kernel) ** 2).sum(0) * 1.0001).all()


def test_the_model_is_a_changed_clone(model):
    net = Net(nnx.Rngs(0))
    assert [type(m) for m in (model.conv, model.body[0], model.head)] == [QuantizedLayer] * 3
    assert set(qyolop_jax.integers(model)) == {"conv", "body/0", "head"}
    np.testing.assert_array_equal(model.head.layer.kernel[...], net.head.kernel[...])
    x = draw(4, 8, 8, 1)
    y, whole = nnx.jit(lambda m, x: m(x))(model, x), net(x)
    np.testing.assert_allclose(model(x), y, atol=1e-5)
    for name in ("conv", "head"):  # whatever ran: parameters are not what they are rounded to
        kernel = getattr(model, name).layer.kernel[...]
        np.testing.assert_array_equal(kernel, getattr(net, name).kernel[...])
    assert 1e-4 < np.abs(y - whole).max() < 0.3 * np.abs(whole).max()


def test_gradients_go_straight_through(model):
    """Of a linear loss, the gradient is that of the layer over the rounded input and weights."""
    layer, x = model.head, draw(4, 256)
    g = draw(4, 10, seed=3)
    found = nnx.grad(lambda layer: (layer(x) * g).sum())(layer)
    step, zero = (float(a) for a in layer.input_scale())
    q = np.clip(np.round(np.asarray(x, np.float64) / step), -128 - zero, 127 - zero) * step
    np.testing.assert_allclose(found["layer"]["kernel"][...], q.T @ g, atol=1e-4)
    np.testing.assert_allclose(found["layer"]["bias"][...], np.asarray(g).sum(0), atol=1e-5)
    assert "range" not in found


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda: qyolop_jax.qat(Net(nnx.Rngs(0)), [QatRule("cnv")]), "nearest paths are conv"),
        (lambda: QatRule("conv", bits=9), "9 bits"),
        (lambda: qyolop_jax.integers(Net(nnx.Rngs(0))), "no quantized layers"),
        (lambda: qyolop_jax.integers(qyolop_jax.qat(Net(nnx.Rngs(0)), RULES)), "no range yet"),
        (lambda: qyolop_jax.calibrate_inputs(
            qyolop_jax.qat(Net(nnx.Rngs(0)), RULES), []), "nothing was observed"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(act, words):
    with pytest.raises((RuleError, QyolopError), match=words):
        act()


@pytest.mark.slow
def test_accuracy_on_digits():
    """float32, PTQ and QAT on 397 test images; 1% are four of them."""
    lines = []
    measure(DigitsQat(bits=(8, 3, 2)), lines.append)
    whole, *rest = lines
    found = {line["weights"]: (line["ptq"], line["qat"]) for line in rest}
    assert (whole := whole["accuracy"]) > 0.96
    assert min(found["8 bits"]) > whole - 0.01
    ptq, qat = found["3 bits"]
    assert min(ptq, qat) > whole - 0.02 and qat >= ptq - 0.005
    ptq, qat = found["2 bits"]
    assert ptq < whole - 0.03 and qat > whole - 0.015
