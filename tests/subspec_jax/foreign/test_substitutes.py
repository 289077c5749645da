"""Low-bit substitutes in anybody's tree: against the same model over dequantized float64 arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import subspec_jax
from llm_jax import LLMError
from llm_jax.lowbit_array import LowBitArray, dot_general
from llm_jax.params import Params
from llm_jax.quantize import dequantize
from llm_jax.rules import RuleError
from llm_jax.testing import tiny_config, tiny_params
from subspec_jax import Rule, SubspecError
from subspec_jax.foreign.substitutes import hqq, nearest

KINDS = {"4 bits": (4, 16), "3 bits": (3, 32), "int8": (8, 0)}
every_kind = pytest.mark.parametrize("bits, group", KINDS.values(), ids=KINDS)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def low(w, quantizer=nearest, **options):
    options["quantizer"] = quantizer
    return subspec_jax.substitute([w], [Rule("0", **options)])[0]


def wide(w):
    """The numbers of a low-bit array, in float64."""
    return np.asarray(w, np.float64)


def close(found, expected, tolerance=6e-6):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance * scale)


# ---------------------------------------------------------------------- the array


@pytest.mark.parametrize("quantizer", [hqq, nearest])
@pytest.mark.parametrize("bits, group", [(2, 8), (3, 32), (4, 16), (8, 64)])
def test_it_is_what_quantize_gives(bits, group, quantizer):
    w = draw(64, 40)
    expected = dequantize(quantizer(w, bits, group))
    found = low(w, bits=bits, group=group, quantizer=quantizer)
    np.testing.assert_array_equal(found.dense(), expected)
    assert (found.shape, found.ndim, found.dtype) == (w.shape, 2, w.dtype)


@pytest.mark.parametrize(
    "shape, summed",
    [((64, 4, 8), (0,)), ((4, 16, 24), (0, 1)), ((4, 64, 8), (1,)), ((6, 64), (-1,))],
    ids=["DNH", "NHD", "NDH", "FD"],
)
def test_arrays_of_any_layout_keep_it(shape, summed):
    w = draw(*shape)
    found = low(w, bits=8, group=16, summed=summed)
    assert found.shape == shape
    assert np.abs(wide(found) - w).max() < 0.03


@every_kind
@pytest.mark.parametrize("jitted", [False, True])
def test_it_behaves_as_an_array(bits, group, jitted):
    w, x = low(draw(64, 24), bits=bits, group=group), draw(3, 64, seed=1)
    dense, wide_x, one = wide(w), np.asarray(x, np.float64), np.ones((24, 2))
    uses = {
        "x @ w": (lambda w: x @ w, wide_x @ dense),
        "w @ y": (lambda w: w @ jnp.ones((24, 2)), dense @ one),
        "dot": (lambda w: jnp.dot(x, w), wide_x @ dense),
        "einsum": (lambda w: jnp.einsum("bd,df->bf", x, w), wide_x @ dense),
        "take": (lambda w: jnp.take(w, jnp.array([3, 1]), axis=0), dense[[3, 1]]),
        "rows": (lambda w: w[jnp.array([3, 1])], dense[[3, 1]]),
        "turned": (lambda w: x[:, :24] @ w.T, wide_x[:, :24] @ dense.T),
        "reshaped": (lambda w: w.reshape(8, -1), dense.reshape(8, -1)),
        "scaled": (lambda w: 2.0 * w, 2 * dense),
    }
    for name, (use, expected) in uses.items():
        found = (jax.jit(use) if jitted else use)(w)
        assert found.dtype == jnp.float32, name
        close(found, expected)


def test_functions_of_lax_take_arrays_alone():
    """So the page says it; JAX may change its mind."""
    w = low(draw(16, 8), group=16)
    with pytest.raises((TypeError, ValueError)):
        jax.lax.dot_general(draw(2, 16), w, (((1,), (0,)), ((), ())))


SUMS = {
    "x D": ((3, 64), (64, 24), (0,), ((1,), (0,))),
    "in front": ((64, 3), (64, 24), (0,), ((0,), (0,))),
    "heads out": ((2, 3, 64), (64, 4, 8), (0,), ((2,), (0,))),
    "heads in": ((2, 4, 16), (4, 16, 8), (0, 1), ((1, 2), (0, 1))),
    "heads in, turned": ((2, 16, 4), (4, 16, 8), (0, 1), ((2, 1), (0, 1))),
    "not as it is kept": ((3, 24), (64, 24), (0,), ((1,), (1,))),
}


@pytest.mark.parametrize("case", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize("bits, group", [(4, 16), (8, 16)])
def test_dot_general(case, bits, group):
    left, right, summed, axes = case
    x, w = draw(*left), low(draw(*right, seed=1), bits=bits, group=group, summed=summed)
    expected = np.tensordot(np.asarray(x, np.float64), wide(w), axes)
    close(jax.jit(dot_general, static_argnums=2)(x, w, (axes, ((), ()))), expected)


@every_kind
def test_gradient_with_respect_to_the_rest(bits, group):
    w, x = low(draw(64, 24), bits=bits, group=group), draw(3, 64, seed=1)
    numbers = (((1,), (0,)), ((), ()))
    loss = lambda x, b: ((dot_general(x, w, numbers) + b) * draw(3, 24, seed=2)).sum()
    found, of_bias = jax.jit(jax.grad(loss, (0, 1)))(x, jnp.zeros((1, 24)))
    g = np.asarray(draw(3, 24, seed=2), np.float64)
    close(found, g @ wide(w).T)
    close(of_bias, g.sum(0, keepdims=True))
    numbers_too = jax.grad(loss_of_tree, allow_int=True)({"w": w, "b": jnp.zeros(24)}, x)
    assert numbers_too["b"].shape == (24,)
    assert not np.asarray(jax.tree.leaves(numbers_too["w"].matrix)[-1], np.float32).any()


def loss_of_tree(tree, x):
    y = dot_general(x, tree["w"], (((1,), (0,)), ((), ())))
    return (y + tree["b"][None]).sum()


@pytest.mark.parametrize("bits, group", [(4, 16), (8, 0)], ids=["4", "int8"])
@pytest.mark.quick_cases("4")
def test_scan_and_vmap_over_stacked_layers(bits, group):
    stack, x = draw(3, 32, 32), draw(2, 32, seed=1)
    w = low(stack, bits=bits, group=group, stacked=1)
    assert w.shape == stack.shape and w[1].shape == (32, 32)
    np.testing.assert_array_equal(wide(w[1]), wide(low(stack[1], bits=bits, group=group)))

    def body(x, w):
        return jnp.tanh(x @ w), None

    expected = np.asarray(x, np.float64)
    for one in wide(w):
        expected = np.tanh(expected @ one)
    close(jax.jit(lambda x, w: jax.lax.scan(body, x, w)[0])(x, w), expected)
    each = jax.vmap(lambda w: x @ w)(w)
    close(each, np.asarray(x, np.float64)[None] @ wide(w))
    through = jax.vmap(lambda row: row @ w[0])(x)
    close(through, np.asarray(x, np.float64) @ wide(w)[0])


def test_shapes_give_shapes():
    tree = {"a": draw(2, 32, 16), "b": draw(32)}
    rules = [Rule("a", group=32, stacked=1)]
    real = subspec_jax.substitute(tree, rules)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    like = lambda t: jax.tree.map(lambda a: (a.shape, a.dtype), t)
    assert like(subspec_jax.substitute(shapes, rules)) == like(real)
    traced = jax.eval_shape(functools.partial(subspec_jax.substitute, rules=rules), tree)
    assert like(traced) == like(real)


# ---------------------------------------------------------------------- rules

TREE = {"layers": [{"up": {"kernel": draw(32, 16), "bias": draw(16)}} for _ in range(2)]}


def test_the_first_rule_counts_and_the_tree_is_untouched():
    tree = jax.tree.map(lambda a: a, TREE)
    rules = [Rule("layers/0/.*", None), Rule(r"layers/\d+/up/kernel", 8, 32)]
    found = subspec_jax.substitute(tree, rules)
    assert found["layers"][0]["up"]["kernel"] is tree["layers"][0]["up"]["kernel"]
    assert isinstance(found["layers"][1]["up"]["kernel"], LowBitArray)
    assert found["layers"][1]["up"]["bias"] is tree["layers"][1]["up"]["bias"]
    assert isinstance(tree["layers"][1]["up"]["kernel"], jax.Array)


@pytest.mark.parametrize(
    "rules, words",
    [
        ([Rule("layer/.*/kernl")], "'layer/.*/kernl' matches nothing; .*layers/./up/kernel"),
        ([Rule(".*kernel", 8, 16), Rule(".*up/kernel")], "'.*up/kernel' comes too late"),
        ([Rule("layers/0/up/bias")], "matches nothing"),  # no matrix
        ([Rule("(")], "no regular expression"),
        ([Rule(".*", 4, 0)], "group 0 means 8 bits"),
        ([Rule(".*", stacked=1)], "do not leave a matrix"),
        ([Rule(".*", summed=(0, 1))], "do not leave a matrix"),
        ([Rule(".*", 4, 64)], "layers/0/up/kernel has 32 inputs, not a multiple of group 64"),
        ([Rule(".*", 5, 32)], "5 bits"),
    ],
)
def test_wrong_rules_are_named(rules, words):
    with pytest.raises(LLMError, match=words):
        subspec_jax.substitute(TREE, rules)


def test_a_tree_without_matrices():
    with pytest.raises(RuleError, match="no arrays"):
        subspec_jax.substitute({"a": jnp.ones(3)}, [Rule("a")])


def test_a_foreign_tree_needs_rules_and_params_do_not():
    with pytest.raises(SubspecError, match="a dict needs rules"):
        subspec_jax.substitute(TREE)
    with pytest.raises(SubspecError, match="bits is no option beside rules"):
        subspec_jax.substitute(TREE, [Rule(".*", 8, 16)], bits=3)
    cfg = tiny_config()
    assert isinstance(subspec_jax.substitute(tiny_params(cfg), bits=4, group=16), Params)


# ---------------------------------------------------------------------- Flax NNX


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.silu(self.up(x)))


class Einsum(nnx.Module):
    """A layer that knows nothing of `dot_general`, as bonsai's and tunix's."""

    def __init__(self, text, shape, rngs):
        self.text, self.w = text, nnx.Param(jax.random.normal(rngs.params(), shape) / 6)

    def __call__(self, x):
        return jnp.einsum(self.text, x, self.w[...])


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.q = Einsum("bd,dnh->bnh", (32, 4, 8), rngs)
        self.o = Einsum("bnh,nhd->bd", (4, 8, 32), rngs)
        self.heads = nnx.LinearGeneral(32, (4, 8), rngs=rngs)
        self.head = nnx.Linear(32, 32, use_bias=False, rngs=rngs)
        self.tied = self.head.kernel

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        x = self.o(self.q(x)) + self.heads(x).reshape(x.shape)
        return self.head(x) + x @ self.tied


NET_RULES = [
    Rule("o/w", 8, 32, nearest, summed=(0, 1)), Rule("q/w", 8, 16, nearest),
    Rule("heads/kernel", 4, 16), Rule(r"layers/\d/.*/kernel", 4, 32),
    Rule("(head/kernel|tied)", 3, 16),
]  # fmt: skip


def widened(tree):
    """A tree with its low-bit arrays dequantized."""
    plain = lambda a: a.dense() if isinstance(a, LowBitArray) else a
    return jax.tree.map(plain, tree, is_leaf=lambda a: isinstance(a, LowBitArray))


def net_in_float64(state, x):
    w = lambda *path: np.asarray(functools.reduce(lambda t, k: t[k], path, state), np.float64)
    x = np.asarray(x, np.float64)
    for i in range(2):
        up = x @ w("layers", i, "up", "kernel")
        hidden = up / (1 + np.exp(-up))
        x = x + hidden @ w("layers", i, "down", "kernel") + w("layers", i, "down", "bias")
    q = np.einsum("bd,dnh->bnh", x, w("q", "w"))
    heads = np.einsum("bd,dnh->bnh", x, w("heads", "kernel")) + w("heads", "bias")
    x = np.einsum("bnh,nhd->bd", q, w("o", "w")) + heads.reshape(x.shape)
    return 2 * x @ w("head", "kernel")


def test_an_nnx_module():
    net, x = Net(nnx.Rngs(0)), draw(3, 32, seed=1)
    before = nnx.to_pure_dict(nnx.state(net))
    found = subspec_jax.substitute(net, NET_RULES)
    state = widened(nnx.to_pure_dict(nnx.state(found)))
    close(nnx.jit(lambda net, x: net(x))(found, x), net_in_float64(state, x))
    assert found.tied is found.head.kernel and isinstance(found.tied[...], LowBitArray)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(net)), before)

    gradient = nnx.jit(nnx.grad(lambda net, x: net(x).sum()))
    expected = dict(nnx.to_flat_state(gradient(widened_net(net, state), x)))
    trained = dict(nnx.to_flat_state(gradient(found, x)))
    assert {path[-1] for path in trained} == {"bias"}  # low-bit weights are no parameters
    for path, value in trained.items():
        close(value[...], np.asarray(expected[path][...], np.float64), 1e-5)


def widened_net(net, state):
    """The module over dequantized arrays."""
    copy = nnx.clone(net)
    nnx.update(copy, nnx.State(state))
    return copy


def test_a_layer_multiplies_by_the_low_bit_matrix_itself():
    """Nothing of the dense matrix's shape [32, 64] is in the program of an int8 product."""
    net = subspec_jax.substitute(Block(nnx.Rngs(0)), [Rule(".*kernel", 8, 0)])
    text = str(jax.make_jaxpr(lambda x: net(x))(draw(3, 32)))
    assert "f32[32,64]" not in text and "i8[32,64]" in text


@pytest.mark.slow
def test_stacked_nnx_layers_in_a_scan():
    @nnx.vmap(in_axes=0)
    def make(key):
        return Block(nnx.Rngs(key))

    stack, x = make(jax.random.split(jax.random.key(0), 3)), draw(2, 32)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, block):
        return block(x)

    found = subspec_jax.substitute(stack, [Rule(".*kernel", 8, 32, stacked=1)])
    dense = widened(nnx.to_pure_dict(nnx.state(found)))
    close(run(x, found), np.asarray(run(x, widened_net(stack, dense)), np.float64))


# ---------------------------------------------------------------------- Flax Linen


class Own(nn.Module):
    """Somebody's layer, which asks for its matrix alone."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.normal(0.3), (32, 32))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="dense")(x)
        x = nn.DenseGeneral((4, 8), name="heads")(x)
        x = nn.DenseGeneral(32, axis=(-2, -1), use_bias=False, name="out")(x)
        return Own(name="own")(x)


LINEN_RULES = [
    Rule("params/(dense|heads)/kernel", 4, 32), Rule("params/own/w", 3, 16),
    Rule("params/out/kernel", 8, 16, summed=(0, 1)),
]  # fmt: skip


def test_a_linen_module():
    model, x = Linen(), draw(3, 32, seed=1)
    variables = model.init(jax.random.key(0), x)
    found = subspec_jax.substitute(variables, LINEN_RULES)
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), widened(found))["params"]
    expected = np.asarray(x, np.float64) @ w["dense"]["kernel"] + w["dense"]["bias"]
    expected = np.einsum("bd,dnh->bnh", expected, w["heads"]["kernel"]) + w["heads"]["bias"]
    expected = np.einsum("bnh,nhd->bd", expected, w["out"]["kernel"]) @ w["own"]["w"]
    with subspec_jax.linen():
        close(model.apply(found, x), expected)
        jitted = jax.jit(model.apply)
        close(jitted(found, x), expected)
    close(jitted(found, x), expected)  # compiled inside, it stays so


def test_a_dense_layer_multiplies_by_the_low_bit_matrix_itself():
    model, x = nn.Dense(64), draw(3, 32)
    variables = subspec_jax.substitute(model.init(jax.random.key(0), x), [Rule(".*kernel", 8, 0)])
    with subspec_jax.linen():
        text = str(jax.make_jaxpr(model.apply)(variables, x))
    assert "f32[32,64]" not in text and "i8[32,64]" in text


def test_stacked_linen_layers_in_a_scan():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers(name="layers")(x, None)[0]

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(32, name="dense")(x)), None

    model, x = Stack(), draw(2, 32)
    variables = model.init(jax.random.key(0), x)
    found = subspec_jax.substitute(variables, [Rule(".*kernel", 8, 32, stacked=1)])
    with subspec_jax.linen():
        y = model.apply(found, x)
    close(y, np.asarray(model.apply(widened(found), x), np.float64))
