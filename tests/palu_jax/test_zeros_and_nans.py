"""Zeros in weights and activations give finite factors; NaN and infinity have a name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feeding import text, whole

from llm_jax.quantize import quantize
from llm_jax.testing import tiny_config, tiny_params
from palu_jax import Compression, Compressor, LatentFormat, calibrate
from palu_jax.calibration import CalibrationError, LayerStatistics
from palu_jax.convert import ConvertError, Recipe, to_palu
from palu_jax.decompose import spectrum
from palu_jax.rank import group_sizes, uniform_ranks

CFG = tiny_config("llama")
PARAMS = tiny_params(CFG)
OBJECTIVES = ("plain", "whitened", "aware", "gradient")


def changed(name, change, params=PARAMS, layer=1):
    """The parameters with an array of one layer, or of the model itself, replaced."""
    if hasattr(params, name):
        return dataclasses.replace(params, **{name: change(getattr(params, name))})
    one = params.layers[layer]
    if hasattr(one, name):
        one = dataclasses.replace(one, **{name: change(getattr(one, name))})
    else:
        part = "attn" if hasattr(one.attn, name) else "mlp"
        owner = getattr(one, part)
        owner = dataclasses.replace(owner, **{name: change(getattr(owner, name))})
        one = dataclasses.replace(one, **{part: owner})
    layers = (*params.layers[:layer], one, *params.layers[layer + 1 :])
    return dataclasses.replace(params, layers=layers)


zero = jnp.zeros_like
ZEROS = {
    "output projection": changed("o", zero),
    "output projection of one kv head": changed("o", lambda w: w.at[:32].set(0)),
    "some rows of the output projection": changed("o", lambda w: w.at[3:9].set(0)),
    "tiny output projection": changed("o", lambda w: w * 1e-18),
    "keys": changed("k", zero),
    "values": changed("v", zero),
    "keys of one kv head": changed("k", lambda w: w.at[:, :16].set(0)),
    "queries": changed("q", zero),
    "inputs": changed("attn_norm", zero),
    "layer": changed("q", zero, changed("k", zero, changed("v", zero, changed("o", zero)))),
}


@pytest.fixture(scope="module")
def statistics():
    """Of each model in ZEROS, on the same text."""
    tokens = np.random.default_rng(0).integers(0, CFG.vocab, (2, 40))
    return {what: calibrate(params, [tokens], CFG) for what, params in ZEROS.items()}


def all_ranks(group, objective, **changes):
    groups = group_sizes(CFG.kv_heads, group)
    return Recipe(
        groups, uniform_ranks(CFG.layers, groups, CFG.head_dim, 1.0), objective, **changes
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("what", ZEROS)
def test_all_ranks_change_nothing_where_there_are_zeros(statistics, what, objective):
    """The product of the factors is the projection itself, in groups of one and of all heads."""
    params = ZEROS[what]
    for group in (1, 2):
        recipe = all_ranks(group, objective)
        palu = to_palu(params, CFG, recipe, statistics[what])
        for layer, plain in zip(palu.layers, params.layers, strict=True):
            for f, w in ((layer.attn.k, plain.attn.k), (layer.attn.v, plain.attn.v)):
                downs = np.split(np.asarray(f.down_DR, np.float64), len(f.ranks), axis=1)
                ups = np.asarray(f.up_gRKH, np.float64)
                made = [d @ up.reshape(len(up), -1) for d, up in zip(downs, ups, strict=True)]
                np.testing.assert_allclose(np.concatenate(made, 1), w, atol=1e-4)


def test_losses_are_those_of_the_plain_model(statistics):
    tokens = text(CFG)
    for what in ("output projection", "output projection of one kv head"):
        want = whole(ZEROS[what], CFG, tokens)[0]
        for objective in ("aware", "gradient"):
            palu = to_palu(ZEROS[what], CFG, all_ranks(1, objective), statistics[what])
            np.testing.assert_allclose(whole(palu, CFG, tokens)[0], want, atol=1e-4)


@pytest.mark.parametrize("what", ["output projection", "inputs", "layer", "values"])
def test_every_way_to_choose_ranks_stays_finite(statistics, what):
    compressor = Compressor(ZEROS[what], CFG, statistics[what])
    for how in (
        Compression(0.5, objective="gradient", search="error"),
        Compression(0.5, objective="gradient", search="fisher"),
        Compression(0.5, objective="whitened", search="fisher-group", mean_split=True),
        Compression(0.5, LatentFormat(2, 4), objective="aware", search="uniform", mean_split=True),
    ):
        palu, recipe = compressor.compress(how)
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(palu))
        assert min(r for layer in recipe.ranks for side in layer for r in side) >= 4
    if what == "output projection":  # errors that do not count get no ranks
        _, recipe = compressor.compress(Compression(0.5, objective="gradient", search="error"))
        assert sum(map(sum, recipe.ranks[1])) < sum(map(sum, recipe.ranks[0])) / 2


def test_a_metric_of_any_size_gives_factors_of_the_size_of_the_weights():
    rng = np.random.default_rng(0)
    w, m = rng.normal(size=(12, 6)), rng.normal(size=(6, 6))
    want = spectrum(w, None, m @ m.T)
    for size in (2.0**-400, 2.0**-40, 2.0**80):
        found = spectrum(w, None, m @ m.T * size)
        assert 0.1 < np.abs(found.up_FF).max() / np.abs(want.up_FF).max() < 10
        np.testing.assert_allclose(found.down_DF @ found.up_FF, w)
        np.testing.assert_allclose(found.energy_F, want.energy_F * size)


NAMES = ("q", "k", "v", "o", "gate", "up", "down", "attn_norm", "mlp_norm")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [*NAMES, "embed_VD", "norm", "head_DV"])
def test_a_weight_that_is_no_number_stops_calibration(name, bad):
    broken = changed(name, lambda w: w.at[(0,) * w.ndim].set(bad))
    where = "the matrix " if hasattr(PARAMS, name) else "layer 1: the matrix .*"
    with pytest.raises(CalibrationError, match=f"^{where}{name} holds NaN or infinity"):
        calibrate(broken, [np.ones((1, 8), int)], CFG)


@pytest.mark.parametrize("name", ["q", "k", "v", "o"])
def test_a_weight_that_is_no_number_stops_conversion(name):
    broken = changed(name, lambda w: w.at[0, 0].set(jnp.nan))
    with pytest.raises(ConvertError, match=f"^layer 1: the matrix {name} .* NaN or infinity"):
        to_palu(broken, CFG, all_ranks(2, "plain"))
    with pytest.raises(ConvertError, match=f"^layer 1: the matrix {name} "):
        Compressor(broken, CFG).compress(Compression(objective="plain", search="uniform"))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LayerStatistics)])
def test_statistics_that_are_no_numbers_stop_conversion(statistics, name):
    found = statistics["keys"]
    array = getattr(found.layers[1], name).copy()
    array[(0,) * array.ndim] = np.inf
    one = dataclasses.replace(found.layers[1], **{name: array})
    found = dataclasses.replace(found, layers=(found.layers[0], one))
    with pytest.raises(ConvertError, match=f"^layer 1: {name} of the statistics holds NaN"):
        to_palu(ZEROS["keys"], CFG, all_ranks(2, "gradient"), found)


def test_activations_that_overflow_are_named():
    """All weights are finite, and the second layer's queries are not."""
    large = changed("q", lambda w: w * 1e30)
    with pytest.raises(CalibrationError, match=r"layer 1: query_KHH of batch 1 .* overflows"):
        calibrate(large, [np.ones((2, 40), int)], CFG)


def test_factors_that_overflow_are_named(statistics):
    cfg = dataclasses.replace(CFG, dtype="float16")
    half = jax.tree.map(lambda a: a.astype("float16"), ZEROS["keys"])
    found = statistics["keys"]
    small = dataclasses.replace(
        found.layers[1], gram_DD=found.layers[1].gram_DD * np.float32(1e-30)
    )
    found = dataclasses.replace(found, layers=(found.layers[0], small), model=None)
    with pytest.raises(ConvertError, match=r"layer 1: the converted v\.down_DR overflows float16"):
        to_palu(half, cfg, all_ranks(2, "whitened"), found)


def test_statistics_of_another_model_are_refused(statistics):
    """Of one that differs in a single number, anywhere."""
    for name in (*NAMES, "embed_VD", "norm", "head_DV"):
        other = changed(name, lambda w: w.at[(-1,) * w.ndim].add(1e-3), ZEROS["keys"])
        with pytest.raises(ConvertError, match=f"another model .*{name}"):
            Compressor(other, CFG, statistics["keys"])
    with pytest.raises(ConvertError, match="another model"):
        to_palu(PARAMS, CFG, all_ranks(2, "whitened"), statistics["keys"])


def test_low_bit_weights_are_refused_by_name():
    low = changed("k", lambda w: quantize(w, 4, 32))
    with pytest.raises(ConvertError, match="the matrix k of an attention is Quantized"):
        to_palu(low, CFG, all_ranks(2, "plain"))
    with pytest.raises(ConvertError, match="the matrix k"):
        Compressor(low, CFG)
    palu = to_palu(PARAMS, CFG, all_ranks(2, "plain"))
    with pytest.raises(CalibrationError, match=r"only ordinary attention .* not PaluAttention"):
        calibrate(palu, [np.ones((1, 8), int)], CFG)
