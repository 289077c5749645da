"""A `Recipe` is what its docstring says, also where spectra come from elsewhere."""

import dataclasses

import numpy as np
import pytest

from palu_jax.convert import ConvertError, Recipe, layer_spectra, to_palu
from palu_jax.format import LatentFormat

GOOD = Recipe((3,), (((8,), (12,)),) * 2, "plain")


def spectra(tiny, groups=(3,), objective="plain", mean=False):
    return [
        layer_spectra(layer.attn, tiny.cfg, groups, objective, own, mean)
        for layer, own in zip(tiny.params.layers, tiny.statistics.layers, strict=True)
    ]


@pytest.mark.parametrize("rotate", [True, False])
def test_plain_factors_minimize_the_weights_error_beside_the_mean(tiny, rotate):
    """With a mean split, what is left of W is P W, where P takes the mean direction away: the
    factors are its truncated SVD, and the mean direction is W's own."""
    form = LatentFormat(4, 4)
    recipe = dataclasses.replace(GOOD, mean_split=True, rotate=rotate, format=form)
    palu = to_palu(tiny.params, tiny.cfg, recipe, tiny.statistics)
    for i, layer in enumerate(tiny.params.layers):
        mu = np.asarray(tiny.statistics.layers[i].mean_D, np.float64)
        rest = np.eye(len(mu)) - np.outer(mu, mu) / (mu @ mu)
        for name, rank in (("k", 8), ("v", 12)):
            w = np.asarray(getattr(layer.attn, name), np.float64)
            u, s, vt = np.linalg.svd(rest @ w, full_matrices=False)
            best = (u[:, :rank] * s[:rank]) @ vt[:rank]
            f = getattr(palu.layers[i].attn, name)
            found = np.asarray(f.down_DR) @ np.asarray(f.up_gRKH)[0].reshape(rank, -1)
            np.testing.assert_allclose(found, best, atol=2e-5 * s[0])
            np.testing.assert_allclose(f.mean_F, mu @ w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (dict(objective="whitened"), "spectra have objective whitened; the recipe has plain"),
        (dict(mean=True), "spectra have mean split True; the recipe has False"),
        (dict(groups=(2, 1)), r"spectra have groups \(2, 1\); the recipe has \(3,\)"),
    ],
)
def test_spectra_of_another_recipe_are_refused(tiny, made, words):
    """Before, factors of another objective, or without the mean split, came out unnoticed."""
    with pytest.raises(ConvertError, match=words):
        to_palu(tiny.params, tiny.cfg, GOOD, tiny.statistics, spectra=spectra(tiny, **made))
    with pytest.raises(ConvertError, match="there are 1 spectra; the model has 2 layers"):
        to_palu(tiny.params, tiny.cfg, GOOD, spectra=spectra(tiny)[:1])


def test_any_sequences_of_whole_numbers_are_one_recipe():
    """So recipes can be compared, hashed and stored as JSON, whoever made them."""
    ranks = np.array([[[8], [12]]] * 2)
    for groups, given in (([3], ranks), (np.array([3]), ranks.tolist()), (iter([3]), GOOD.ranks)):
        made = Recipe(groups, given, "plain")
        assert made == GOOD and hash(made) == hash(GOOD)
        assert {type(r) for layer in made.ranks for side in layer for r in side} == {int}


@pytest.mark.parametrize(
    ("groups", "ranks"),
    [
        ((3.0,), GOOD.ranks),
        ((float("nan"),), GOOD.ranks),
        ((3,), (((8.5,), (12,)),) * 2),
        ((3,), (((float("nan"),), (12,)),) * 2),
        ((3,), (((8,), (12,), (4,)),) * 2),
        ((3,), ((8, 12),) * 2),
        (3, GOOD.ranks),
    ],
)
def test_other_ranks_are_refused(groups, ranks):
    with pytest.raises(ConvertError, match="groups and ranks must be whole numbers"):
        Recipe(groups, ranks)
