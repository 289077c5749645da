"""Arrays of qwix as low-bit arrays and back: numbers against qwix's own dequantization."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import subspec_jax
from llm_jax.int8 import Int8
from llm_jax.linear import linear
from llm_jax.lowbit_array import LowBitArray
from subspec_jax import Rule, from_qwix, to_qwix
from subspec_jax.foreign.qarrays import QwixError
from subspec_jax.foreign.substitutes import hqq, symmetric

qwix = pytest.importorskip("qwix", reason="qwix is not installed")
SHORT = jnp.bfloat16


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def same(low, theirs):
    """Checks that both stand for the same numbers, bit for bit."""
    expected = qwix.dequantize(theirs)
    assert (low.shape, low.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(low.dense(), expected)


FORMS = {  # shape, axes summed, stacked, qtype, one scale along, tiles, bytes of group or None
    "int8 per output": ((64, 24), (0,), 0, jnp.int8, (1,), {}, None),
    "int8 of a whole array": ((64, 24), (0,), 0, jnp.int8, (), {}, None),
    "int8 in tiles": ((64, 24), (0,), 0, jnp.int8, (1,), {0: 16}, 16),
    "int4 per output": ((64, 24), (0,), 0, jnp.int4, (1,), {}, 64),
    "int4 in tiles": ((64, 24), (0,), 0, jnp.int4, (1,), {0: 16}, 16),
    "int4, tiles of outputs": ((64, 24), (0,), 0, jnp.int4, (), {0: 32, 1: 6}, 32),
    "int4 per output, many inputs": ((512, 8), (0,), 0, jnp.int4, (1,), {}, 128),
    "int3": ((64, 24), (0,), 0, "int3", (1,), {0: 32}, 32),
    "int2": ((64, 24), (0,), 0, "int2", (1,), {0: 8}, 8),
    "turned": ((24, 64), (1,), 0, jnp.int4, (0,), {1: 16}, 16),
    "DNH": ((64, 4, 8), (0,), 0, jnp.int4, (1, 2), {0: 16}, 16),
    "NHD, of each head": ((4, 16, 24), (0, 1), 0, jnp.int4, (0, 2), {}, 16),
    "NHD, tiles of heads": ((4, 16, 24), (0, 1), 0, jnp.int4, (2,), {0: 2}, 32),
    "NHD, tiles of both": ((4, 16, 24), (0, 1), 0, jnp.int4, (2,), {0: 2, 1: 8}, 8),
    "stacked": ((3, 64, 24), (0,), 1, jnp.int4, (0, 2), {1: 16}, 16),
    "stacked int8": ((3, 64, 24), (0,), 1, jnp.int8, (2,), {}, None),
}


QUICK = (
    "int8 per output",
    "int4 in tiles",
    "int4, tiles of outputs",
    "NHD, tiles of heads",
    "stacked",
)


@pytest.mark.parametrize("form", [
    pytest.param(form, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
    for name, form in FORMS.items()
])  # fmt: skip
def test_numbers_are_those_of_qwix_both_ways(form):
    shape, summed, stacked, qtype, channels, tiles, group = form
    w = draw(*shape).at[(0,) * len(shape)].set(-4.0)  # code -128, which `int8` itself never gives
    theirs = qwix.quantize(
        w.astype(SHORT), qtype, channelwise_axes=channels, tiled_axes=tiles, scale_dtype=SHORT
    )
    low = from_qwix(theirs, summed, stacked)
    same(low, theirs)
    assert isinstance(low.matrix, Int8) if group is None else low.matrix.group == group
    back = to_qwix(low)
    assert jnp.dtype(theirs.qvalue.dtype) == back.qvalue.dtype
    assert str(back.qtype) == str(theirs.qtype if isinstance(qtype, str) else jnp.dtype(qtype))
    np.testing.assert_array_equal(back.qvalue, theirs.qvalue)
    np.testing.assert_array_equal(qwix.dequantize(back), qwix.dequantize(theirs))


def test_scales_of_float32():
    int8 = qwix.quantize(draw(64, 24), jnp.int8, channelwise_axes=(1,))
    same(from_qwix(int8), int8)
    int4 = qwix.quantize(draw(64, 24), jnp.int4, channelwise_axes=(1,))
    with pytest.raises(QwixError, match=r"bfloat16 does not hold; .*round_scales=True"):
        from_qwix(int4)
    rounded, exact = from_qwix(int4, round_scales=True).dense(), qwix.dequantize(int4)
    assert np.abs(rounded - exact).max() > 0
    np.testing.assert_allclose(rounded, exact, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("bits", [2, pytest.param(3, marks=pytest.mark.slow), 4, 8])
def test_our_arrays_are_theirs(bits):
    w, x = draw(64, 24), draw(3, 64, seed=1)
    (low,) = subspec_jax.substitute([w], [Rule("0", bits, 16, symmetric)])
    theirs = to_qwix(low)
    same(low, theirs)
    assert theirs.scale_tile_shape == (16, 1)
    step = np.abs(np.asarray(w).reshape(4, 16, 24)).max(1) / (2 ** (bits - 1) - 0.5)
    error = np.abs(np.asarray(low) - w).reshape(4, 16, 24).max(1)
    assert (error <= 0.52 * step + 2.0**-7 * np.abs(w).max()).all()
    np.testing.assert_allclose(qwix.dot(x, theirs), linear(low, x), atol=1e-5)


@pytest.mark.parametrize("qtype, method, axes, said", [
    (jnp.int8, "minmax", (1,), "zero points; quantize it with absmax"),
    (jnp.float8_e4m3fn, "absmax", (1,), "codes of float8_e4m3fn; possible are int2"),
    ("nf4", "absmax", (1,), "codes of nf4"),
    ("int6", "absmax", (1,), "codes of int6"),
    (jnp.int4, "absmax", (0, 1), "1 inputs share a scale"),
])  # fmt: skip
def test_what_has_no_form_here_is_named(qtype, method, axes, said):
    theirs = qwix.quantize(draw(64, 24), qtype, channelwise_axes=axes, calibration_method=method)
    with pytest.raises(QwixError, match=said):
        from_qwix(theirs)


def test_what_has_no_form_there_is_named():
    low = subspec_jax.substitute([draw(64, 24)], [Rule("0", 4, 16, hqq)])[0]
    with pytest.raises(QwixError, match=r"have offsets.*quantizer=symmetric"):
        to_qwix(low)
    rule = Rule("0", 4, 24, symmetric, summed=(0, 1))
    low = subspec_jax.substitute([draw(6, 16, 8)], [rule])[0]
    with pytest.raises(QwixError, match=r"groups of 24 inputs are no tiles of axes of \[6, 16\]"):
        to_qwix(low)
    with pytest.raises(QwixError, match=r"a dict is no qwix\.QArray"):
        from_qwix({})
    with pytest.raises(QwixError, match="do not leave a matrix"):
        from_qwix(qwix.quantize(draw(64, 24), jnp.int8), summed=(0, 1))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, param_dtype=SHORT)
        return dense(16, name="down")(nn.silu(dense(64, name="up")(x)))


def test_rules_choose_them_in_a_tree():
    quantize = lambda i: qwix.quantize(draw(64, 24, seed=i), jnp.int8, channelwise_axes=(1,))
    tree = {"layers": [quantize(0), quantize(1)], "head": draw(24, 64)}
    rules = [Rule("layers/1", None), Rule("layers/.*"), Rule("head", 4, 8, symmetric)]
    low = subspec_jax.substitute(tree, rules)
    same(low["layers"][0], tree["layers"][0])
    assert low["layers"][1] is tree["layers"][1]
    assert low["head"].matrix.group == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
def test_variables_that_qwix_quantized_are_substitutes():
    """qwix quantizes the variables of a Linen model; the model itself decodes with ours."""
    model, x = Net(), draw(4, 32, seed=1).astype(SHORT)
    variables = model.init(jax.random.key(0), x)
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int4, tile_size=16)]
    theirs = qwix.quantize_model(model, qwix.PtqProvider(rules))
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), x)["params"]
    quantized = {"params": qwix.quantize_params(variables["params"], shapes)}
    low = subspec_jax.substitute(quantized, [Rule("params/.*/kernel")])
    for name in ("up", "down"):
        found = low["params"][name]["kernel"]
        assert isinstance(found, LowBitArray) and found.matrix.group == 16
        same(found, quantized["params"][name]["kernel"].array)
    with subspec_jax.linen():
        y = model.apply(low, x)
    np.testing.assert_allclose(
        np.float32(y), np.float32(theirs.apply(quantized, x)), rtol=0, atol=0.02
    )
    kept = subspec_jax.substitute(
        quantized, [Rule("params/up/kernel", None), Rule("params/.*/kernel")]
    )
    assert kept["params"]["up"]["kernel"].array is quantized["params"]["up"]["kernel"].array
