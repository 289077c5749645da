"""`low_rank` against a truncated SVD of the whitened weight in float64, and `Moment`."""

import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from palu_jax import LatentFormat, MixedFormat, PaluError, Recipe, factors, to_palu
from palu_jax.factors import FactorError, Moment, low_rank
from palu_jax.format import FormatError

D, F = 20, 12


def reference(w, gram, metric, rank):
    """(down up, error): truncated SVD of L^T W S with gram = L L^T and metric = S S^T."""
    left = np.eye(len(w)) if gram is None else np.linalg.cholesky(gram)
    right = np.eye(w.shape[1]) if metric is None else np.linalg.cholesky(metric)
    u, s, vt = np.linalg.svd(left.T @ w @ right, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    product = np.linalg.solve(left.T, best) @ np.linalg.inv(right)
    return product, float((s[rank:] ** 2).sum())


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    w = [rng.normal(size=(D, F)) for _ in "kv"]
    square = lambda n: (lambda x: x.T @ x / 50)(rng.normal(size=(50, n)) + 0.5)
    return *w, square(D), (square(F), square(F))


FORMATS = [
    LatentFormat(),
    LatentFormat(4, 16),
    LatentFormat(2, 3),
    LatentFormat(4, 4, block=2),
    MixedFormat(classes=((((((2, 8), (4, 3))),), (((6, 4),),)),)),
]


@pytest.mark.parametrize("form", FORMATS, ids=range(len(FORMATS)))
@pytest.mark.parametrize("weighs", ["nothing", "inputs", "outputs", "keys' outputs", "both"])
def test_it_is_a_truncated_whitened_svd(form, weighs):
    """Whatever the format, which rotates latents and changes no product."""
    w_k, w_v, gram, metric = arrays()
    gram = gram if weighs in ("inputs", "both") else None
    metric = dict(both=metric, outputs=metric).get(weighs)
    if weighs == "keys' outputs":
        metric = arrays()[3][0], None
    found = low_rank(w_k, w_v, gram, metric, 6, form)
    for w, m, one in zip((w_k, w_v), metric or (None, None), found, strict=True):
        product, error = reference(w, gram, m, 6)
        assert one.down_DR.dtype == one.up_RF.dtype == np.float64
        np.testing.assert_allclose(one.down_DR @ one.up_RF, product, atol=1e-9)
        np.testing.assert_allclose(one.error, error, rtol=1e-9)


def test_ranks_of_keys_and_values_and_full_rank():
    w_k, w_v, gram, metric = arrays(1)
    k, v = low_rank(w_k, w_v, gram, metric, (F, 1), LatentFormat(4, 4))
    assert (k.down_DR.shape, v.up_RF.shape) == ((D, F), (1, F))
    np.testing.assert_allclose(k.down_DR @ k.up_RF, w_k, atol=1e-9)
    assert k.error == 0 < v.error


@pytest.mark.parametrize("form", [LatentFormat(), LatentFormat(4, 2), LatentFormat(3, 3, block=4)])
def test_the_factors_are_those_of_a_converted_model(tiny, form):
    """All heads in one group; `to_palu` stores them in the model's dtype."""
    recipe = Recipe((3,), (((8,), (12,)),) * 2, "gradient", form)
    palu = to_palu(tiny.params, tiny.cfg, recipe, tiny.statistics)
    for i, layer in enumerate(tiny.params.layers):
        own = tiny.statistics.layers[i]
        metric = own.grad_k_FF, own.grad_v_FF
        found = low_rank(layer.attn.k, layer.attn.v, own.gram_DD, metric, (8, 12), form)
        for name, one in zip("kv", found, strict=True):
            stored = getattr(palu.layers[i].attn, name)
            want = np.asarray(one.down_DR, np.float32), np.asarray(one.up_RF, np.float32)
            np.testing.assert_array_equal(stored.down_DR, want[0])
            np.testing.assert_array_equal(np.asarray(stored.up_gRKH)[0].reshape(-1, 48), want[1])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int8, jnp.bfloat16])
def test_moments_are_exact_whatever_the_batches(dtype):
    """Sums of small integers are exact in float64; in float32 they would not be."""
    x = np.random.default_rng(0).integers(-9, 9, (30, 7, 5)).astype(dtype)
    seen = Moment()
    big = np.full((1, 5), 2.0**13)
    seen.add(big)
    for part in (x[:1], x[1:20], x[20:20], x[20], x[21, 0], x[21, 1:], x[22:]):
        seen.add(part)
    every = np.concatenate([big, np.asarray(x, np.float64).reshape(-1, 5)])
    assert seen.count == len(every) == 211
    np.testing.assert_array_equal(seen.moment_DD, every.T @ every / 211)
    np.testing.assert_array_equal(seen.mean_D, every.sum(0) / 211)


def test_an_array_that_changes_later_changes_no_moment():
    seen, x = Moment(), np.ones((3, 2))
    seen.add(x)
    kept = seen.moment_DD
    x[:] = 7
    seen.add(np.zeros((3, 2)))
    np.testing.assert_array_equal(kept, np.ones((2, 2)))
    np.testing.assert_array_equal(seen.moment_DD, np.full((2, 2), 0.5))


def test_the_example_at_the_top_of_the_module_runs():
    lines = factors.__doc__.splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
    w_k, w_v, *_ = arrays()
    x = np.random.default_rng(0).normal(size=(3, 2, 7, D))
    names = vars(factors) | dict(inputs=x, w_k_DF=w_k, w_v_DF=w_v)
    exec(code.replace("96", "5"), names)
    rows = x.reshape(-1, D)
    product, _ = reference(w_k, rows.T @ rows / len(rows), None, 5)
    np.testing.assert_allclose(names["latents_BTR"] @ names["k"].up_RF, x[-1] @ product, atol=1e-9)


def changed(**given):
    w_k, w_v, gram, metric = arrays()
    return dict(w_k_DF=w_k, w_v_DF=w_v, gram_DD=gram, metric=metric, rank=4) | given


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(w_k_DF=np.full((D, F), np.nan)), "w_k_DF holds NaN or infinity"),
        (dict(w_v_DF=np.full((D, F), np.inf)), "w_v_DF holds NaN or infinity"),
        (dict(w_v_DF=np.ones(F)), "w_v_DF has shape"),
        (dict(w_v_DF=np.ones((D - 1, F))), "gram_DD is .* w_v_DF"),
        (dict(gram_DD=np.ones((D, F))), "gram_DD has shape"),
        (dict(gram_DD=np.full((D, D), -np.inf)), "gram_DD holds NaN"),
        (dict(metric=(np.eye(F), np.eye(F + 1))), "metric is .* w_v_DF"),
        (dict(metric=(np.full((F, F), np.nan), None)), r"metric\[0\] holds NaN"),
        (dict(rank=0), "rank 0 of w_k_DF; expected 1 to 12"),
        (dict(rank=-1), "rank -1 of w_k_DF"),
        (dict(rank=(4, F + 1)), "rank 13 of w_v_DF"),
        (dict(rank=float("nan")), "rank nan of w_k_DF"),
        (dict(rank=2.5), "rank 2.5 of w_k_DF"),
    ],
)
def test_what_does_not_fit_has_a_name(given, words):
    with pytest.raises(FactorError, match=words) as caught:
        low_rank(**changed(**given))
    assert isinstance(caught.value, PaluError)
    with pytest.raises(FormatError, match="do not divide a rank of 4"):
        low_rank(**changed(), format=LatentFormat(4, 4, block=3))


def test_a_moment_refuses_and_keeps_what_it_has():
    seen = Moment()
    for what in ("moment_DD", "mean_D"):
        with pytest.raises(FactorError, match="no vectors were added"):
            getattr(seen, what)
    seen.add(np.ones((2, 3)))
    for x, words in (
        (np.ones((2, 4)), "width 4; those before had 3"),
        (np.array([1, np.nan, 2]), "x holds NaN"),
        (np.float64(3), "x has shape"),
        (np.ones((2, 0)), "x has shape"),
    ):
        with pytest.raises(FactorError, match=words):
            seen.add(x)
    assert seen.count == 2
    np.testing.assert_array_equal(seen.moment_DD, np.ones((3, 3)))
