"""Two classes of bits: codes against those of each class alone, plans against brute force."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_planner import cost_of, energies

from llm_jax.attention import caches_for
from llm_jax.testing import tiny_config, tiny_params
from pallas_kernels.lowrank_attention import why_not
from pallas_kernels.lowrank_attention.latents import block_bytes, dense
from palu_jax import forecast, planner, rank, store
from palu_jax.convert import ConvertError, Recipe, to_palu
from palu_jax.format import FormatError, LatentFormat, MixedFormat
from palu_jax.latent import PaluCache, empty_latents, quantize_latents
from palu_jax.mixed import best_within, options

ONE = ((((8, 4), (4, 2)),), (((6, 3),),))
"""One layer: keys in two classes, values in one."""


def test_blocks_are_those_of_each_number_of_bits_alone():
    bits, blocks = (4, 3, 3, 2), (8, 6, 6, 10)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, sum(blocks))), jnp.float32)
    starts = np.cumsum([0, *blocks])

    @jax.jit
    def both(z):
        found = quantize_latents(z, bits, blocks, None)
        alone = [
            quantize_latents(z[..., a : a + r], b, (r,), LatentFormat(b, b).shares(b))
            for a, r, b in zip(starts, blocks, bits, strict=False)
        ]
        return (found.codes_BSP, dense(found)), [(one.codes_BSP, dense(one)) for one in alone]

    found, alone = both(z)
    for got, *want in zip(found, *alone, strict=True):
        np.testing.assert_array_equal(got, np.concatenate(want, -1))


def test_the_cache_is_packed():
    form = MixedFormat(classes=(ONE,), sinks=2, window=3)
    assert (form.key_bits, form.value_bits, form.keeps_exact) == (4, 3, True)
    cache = PaluCache.empty(form, ((12,), (6,)), False, 1, 16, 0, "bfloat16")
    rows = jax.tree.leaves((cache.k, cache.v))
    wanted = 4 + block_bytes(8, 4) + 4 + block_bytes(4, 2) + 4 + block_bytes(6, 3)
    assert sum(a.nbytes for a in rows) == 16 * wanted == 16 * (4 + 4 + 4 + 1 + 4 + 3)
    assert rank.bytes_per_token((((12,), (6,)),), form) == wanted


def formula(energy, classes):
    """The forecast, written out."""
    total, at = 0.0, 0
    for weight, (r, bits) in zip((1, forecast.SECOND), classes, strict=False):
        total += weight * cost_of([*energy[at : at + r]], r, bits)  # nothing is cut off these
        at += r
    return total + forecast.TRUNCATION * float(sum(energy[at:]))


def price(classes):
    return sum(block_bytes(r, b) + 4 for r, b in classes)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_classes_are_those_of_brute_force(seed):
    """For one price of a byte the hull is exact, and so is a budget of just what it buys."""
    rng, size, bits = np.random.default_rng(seed), 8, (8, 4, 2)
    items = [np.sort(rng.exponential(size=size) ** 3)[::-1] for _ in range(2)]
    every = [[(r, b)] for r in range(1, size + 1) for b in bits]
    for r1, r2 in itertools.product(range(1, size), repeat=2):
        if r1 + r2 <= size:
            every += [[(r1, b1), (r2, b2)] for b1, b2 in itertools.combinations(bits, 2)]
    costs = np.array([price(c) for c in every])
    errors = np.array([[formula(e, c) for c in every] for e in items])
    chosen = [options([e], 1, bits) for e in items]
    for at, item in enumerate(chosen):
        for n, used in enumerate(item.bytes_n):
            assert used == price(item.classes(n))
            np.testing.assert_allclose(item.error_n[n], errors[at][costs <= used].min(), rtol=1e-9)
    price_of_a_byte = 0.02 * errors.min(1).sum() + 0.01
    best = [int(np.argmin(e + price_of_a_byte * costs)) for e in errors]
    budget = int(costs[best].sum())
    error, _ = best_within(chosen, budget)
    np.testing.assert_allclose(error, sum(e[b] for e, b in zip(errors, best)), rtol=1e-9)
    error, found = best_within(chosen, budget + 3)
    assert sum(map(price, found)) <= budget + 3
    np.testing.assert_allclose(
        error, sum(formula(e, c) for e, c in zip(items, found, strict=True)), rtol=1e-9
    )
    assert best_within(chosen, 9) is None


@pytest.mark.parametrize("group, budget", [(2, 40), (1, 48)])
def test_a_plan_is_what_the_arrays_hold(group, budget):
    """Bytes, forecast and factors; one class is never better by forecast where 16 bits are out."""
    cfg = tiny_config("qwen2", kv_heads=2)
    found = {group: energies(np.random.default_rng(1), cfg.layers, 2 // group, 8 * group)}
    plans = planner.plan_cache(found, cfg, budget, bits=(8, 4, 2), multiple=2, classes=2)
    best, *rest = plans
    assert best.classes is not None and all(p.classes is None for p in rest)
    alone = planner.plan_cache(found, cfg, budget, bits=(8, 4, 2), multiple=2)
    assert alone == rest and best.error < alone[0].error
    want = 0.0
    for layer, sides in zip(best.classes, found[group], strict=True):
        for groups, parts in zip(layer, sides, strict=True):
            assert len(set(groups)) == 1  # the groups of a projection agree
            want += sum(formula(e, c) for e, c in zip(parts, groups, strict=True))
    np.testing.assert_allclose(best.error, want, rtol=1e-9)
    params = tiny_params(cfg)
    recipe = Recipe(best.groups, best.ranks, "plain", best.format())
    palu = to_palu(params, cfg, recipe)
    held = sum(a.nbytes for a in jax.tree.leaves(caches_for(palu, cfg, 1, 10)))
    assert held == 10 * best.bytes_per_token <= 10 * budget
    plain = to_palu(params, cfg, dataclasses.replace(recipe, format=LatentFormat()))
    for a, b in zip(palu.layers, plain.layers, strict=True):  # rotations cancel
        for f, g in ((a.attn.k, b.attn.k), (a.attn.v, b.attn.v)):
            at = 0
            for i, r in enumerate(f.ranks):
                own = slice(at, at + r)
                one, two = (
                    np.einsum("DR,RKH->DKH", x.down_DR[:, own], x.up_gRKH[i, :r]) for x in (f, g)
                )
                np.testing.assert_allclose(one, two, atol=2e-6)
                at += r
        assert not np.allclose(a.attn.k.down_DR, b.attn.k.down_DR)


def test_only_the_first_class_turns_with_itself():
    """Each class has a rotation of its own: its latents mix with no others."""
    cfg = tiny_config("llama", layers=1, kv_heads=1)
    form = MixedFormat(classes=(((((4, 4), (4, 2)),), (((4, 4),),)),))
    recipe = Recipe((1,), (((8,), (4,)),), "plain", form)
    params = tiny_params(cfg)
    turned = to_palu(params, cfg, recipe).layers[0].attn.k.down_DR
    plain = to_palu(params, cfg, dataclasses.replace(recipe, rotate=False)).layers[0].attn.k.down_DR
    q = np.linalg.lstsq(np.asarray(plain, np.float64), np.asarray(turned, np.float64))[0]
    np.testing.assert_allclose(q[:4, 4:], 0, atol=1e-4)
    np.testing.assert_allclose(q[4:, :4], 0, atol=1e-4)
    np.testing.assert_allclose(np.abs(q[:4, :4]), 0.5, atol=1e-4)


def test_a_store_holds_it(tmp_path):
    cfg = tiny_config("qwen2")
    params, ranks = tiny_params(cfg), (((12,), (6,)), ((4,), (8,)))
    form = MixedFormat(classes=(ONE, ((((4, 8),),), (((4, 3), (4, 2)),))), window=2)
    recipe = Recipe((cfg.kv_heads,), ranks, "plain", form)
    palu = to_palu(params, cfg, recipe)
    store.save(tmp_path / "x", palu, cfg, recipe, "tiny")
    assert store.describe(tmp_path / "x").recipe == recipe
    back = store.restore(tmp_path / "x", params, cfg)
    assert jax.tree.structure(back) == jax.tree.structure(palu)
    assert [l.attn.format.classes for l in back.layers] == [(c,) for c in form.classes]
    other = dataclasses.replace(recipe, format=LatentFormat(4, 3, window=2))
    with pytest.raises(store.StoreError, match=r"layer 0 .*: its format"):
        store.save(tmp_path / "y", palu, cfg, other, "tiny")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(classes=()), "a group without classes"),
        (dict(classes=(((), (((4, 4),),)),)), "a group without classes"),
        (dict(classes=((((),), (((4, 4),),)),)), "a group without classes"),
        (dict(classes=(((((4, 16),),), (((4, 4),),)),)), "4 latents in 16 bits"),
        (dict(classes=(((((0, 4),),), (((4, 4),),)),)), "0 latents in 4 bits"),
        (dict(classes=(ONE,), block=4), "classes are blocks already"),
    ],
    ids=str,
)
def test_impossible_classes(change, words):
    with pytest.raises(FormatError, match=words):
        MixedFormat(**change)


def test_classes_that_do_not_fit_are_refused():
    cfg = tiny_config("qwen2")
    recipe = lambda ranks, classes: Recipe(
        (cfg.kv_heads,), ranks, "plain", MixedFormat(classes=classes)
    )
    good = ((12,), (6,))
    with pytest.raises(FormatError, match="do not add up to a rank of 10"):
        to_palu(tiny_params(cfg), cfg, recipe((good, ((10,), (6,))), (ONE, ONE)))
    with pytest.raises(ConvertError, match="classes for 1 layers; the model has 2"):
        to_palu(tiny_params(cfg), cfg, recipe((good, good), (ONE,)))
    with pytest.raises(FormatError, match="classes for 1 groups; there are 2"):
        MixedFormat(classes=(ONE,)).layout(0, (12, 4))


def test_the_kernels_say_why_not():
    z = empty_latents(1, 64, (8, 4), (32, 32), "bfloat16")
    q, up = jnp.zeros((1, 1, 2, 32), jnp.bfloat16), jnp.zeros((1, 64, 2, 32))
    same = empty_latents(1, 64, 4, (64,), "bfloat16")
    reason = why_not(q, z, same, up, k_ranks=(64,), v_ranks=(64,))
    assert "k latents of 8 and 4 bits side by side" in reason or "Triton" in reason
    assert "bits side by side" not in str(why_not(q, same, same, up))
