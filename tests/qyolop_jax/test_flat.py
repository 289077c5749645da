"""A tree as one vector and back; gradients through it."""

import jax
import jax.numpy as jnp
import numpy as np

from qyolop_jax.flat import flatten


def tree():
    return dict(
        a=dict(kernel=jnp.arange(6.0).reshape(2, 3), bias=jnp.array([7.0, 8.0])),
        b=dict(kernel=-jnp.ones((1, 1, 2, 2)), count=jnp.array(3), scale=jnp.array(0.5)),
    )


def test_there_and_back_on_host_and_device():
    packed = flatten(tree())
    assert packed.layout.kernels == 10 and packed.vector.size == 13
    np.testing.assert_array_equal(packed.vector[:10], [0, 1, 2, 3, 4, 5, -1, -1, -1, -1])
    host = jax.device_get(packed)
    for back in (packed.tree, host.tree, jax.jit(lambda p: p.tree)(packed)):
        same = jax.tree.map(lambda x, y: bool((x == y).all() and x.dtype == y.dtype), back, tree())
        assert all(jax.tree.leaves(same))
    assert isinstance(host.tree["a"]["bias"], np.ndarray)
    assert flatten({}).tree == {} and flatten({}).vector.size == 1


def test_gradients_are_those_of_the_tree():
    weight = jax.tree.map(
        lambda a: jnp.sin(1.0 + jnp.arange(a.size, dtype=jnp.float32).reshape(a.shape)), tree()
    )

    def loss(t):
        return sum(
            (w * x.astype(jnp.float32) ** 2).sum()
            for w, x in zip(jax.tree.leaves(weight), jax.tree.leaves(t))
        )

    packed = flatten(tree())
    by_vector = jax.grad(lambda v: loss(type(packed)(v, packed.beside, packed.layout).tree))
    floats = {k: {n: a for n, a in v.items() if n != "count"} for k, v in tree().items()}

    def of_floats(f):
        return loss({k: v | ({"count": jnp.array(3)} if k == "b" else {}) for k, v in f.items()})

    want = flatten(jax.grad(of_floats)(floats)).vector
    np.testing.assert_allclose(by_vector(packed.vector), want, rtol=1e-6)
