"""QAT of somebody's NNX model: the rounding number by number, and a small network on digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qyolop_jax
from llm_jax.rules import RuleError
from qyolop_jax import QatRule, QyolopError
from qyolop_jax.foreign import QuantizedLayer


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.body = nnx.List([nnx.Conv(8, 16, (3, 3), strides=2, use_bias=False, rngs=rngs)])
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        for layer in self.body:
            x = nnx.relu(layer(x))
        return self.head(x.reshape(len(x), -1))


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


@pytest.fixture(scope="module")
def digits():
    """(images [1797, 8, 8, 1], labels): 1,400 to train on, the rest to test with."""
    load = pytest.importorskip("sklearn.datasets").load_digits
    images, labels = load(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], labels[order].astype(np.int32)


def train(model, digits, steps, rate, seed=0):
    images, labels = digits
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    rng = np.random.default_rng(seed)
    with jax.numpy_dtype_promotion("standard"):  # optax's adam mixes int32 and float32
        for _ in range(steps):
            some = rng.integers(0, 1400, 64)
            step(model, optimizer, images[some], labels[some])


def accuracy(model, digits):
    images, labels = digits
    found = nnx.jit(lambda m, x: m(x))(model, images[1400:]).argmax(-1)
    return float((found == labels[1400:]).mean())


@pytest.mark.slow
def test_accuracy_on_digits(digits):
    """float32, PTQ and QAT on 397 test images; 1% are four of them."""
    net = Net(nnx.Rngs(0))
    train(net, digits, 300, 3e-3)
    whole, found = accuracy(net, digits), {}
    for bits in (8, 3, 2):
        model = qyolop_jax.qat(net, [QatRule(".*", bits)])
        qyolop_jax.calibrate_inputs(model, [digits[0][:256]])
        found[bits] = [accuracy(model, digits)]
        train(model, digits, 150, 1e-3)
        qyolop_jax.calibrate_inputs(model, [digits[0][:256]])
        found[bits].append(accuracy(model, digits))
    assert whole > 0.96
    assert min(found[8]) > whole - 0.01
    assert min(found[3]) > whole - 0.02 and found[3][1] >= found[3][0] - 0.005
    assert found[2][0] < whole - 0.03 and found[2][1] > whole - 0.015
