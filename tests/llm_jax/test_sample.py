"""Draws follow the exact law of the filters, and depend on seed and position alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llm_jax import LLMError
from llm_jax.sample import LEAST_TEMPERATURE, Sampler, Samplers, noise

LOGITS = np.array([1.3, -0.4, 2.1, 2.1, 0.6, -3.0, 1.0, 0.9])
SAMPLERS = [
    Sampler(1.0),
    Sampler(0.6),
    Sampler(1.7),
    Sampler(1.0, top_k=3),
    Sampler(0.8, top_k=1),  # two tokens tie for the first place, and both stay
    Sampler(1.0, top_k=100),
    Sampler(1.0, top_p=0.75),
    Sampler(1.0, top_p=1e-6),
    Sampler(1.0, min_p=0.3),
    Sampler(1.0, min_p=1.0),
    Sampler(1.4, top_k=6, top_p=0.9, min_p=0.25),
]


def law(s: Sampler, logits) -> np.ndarray:
    """Probabilities by going through the tokens from the likeliest on, in float64."""
    weights = np.exp(np.asarray(logits, np.float64) / s.temperature)
    order = sorted(range(len(weights)), key=lambda t: -weights[t])
    kept = set(order)
    if s.top_k:
        kept = {t for t in kept if sum(weights[u] > weights[t] for u in kept) < s.top_k}
    if s.top_p < 1:
        total = sum(weights[t] for t in kept)
        kept = {
            t
            for t in kept
            if sum(weights[u] for u in kept if weights[u] > weights[t]) / total < s.top_p
        }
    if s.min_p:
        kept = {t for t in kept if weights[t] >= s.min_p * weights.max() * (1 - 1e-9)}
    p = np.array([weights[t] if t in kept else 0.0 for t in range(len(weights))])
    return p / p.sum()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_scores_are_the_law(sampler):
    scores = np.asarray(sampler.scores(jnp.asarray(LOGITS, jnp.float32)[None])[0], np.float64)
    p = np.exp(scores - scores.max())
    np.testing.assert_allclose(p / p.sum(), law(sampler, LOGITS), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_draws_follow_the_law(sampler):
    n = 20_000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (n, len(LOGITS)))
    draws = sampler.draw(logits, jax.random.key(7), jnp.arange(n))
    assert draws.dtype == jnp.int32
    count, p = np.bincount(draws, minlength=len(LOGITS)), law(sampler, LOGITS)
    assert not count[p == 0].any()
    if (p > 0).sum() > 1:
        assert stats.chisquare(count[p > 0], n * p[p > 0]).pvalue > 1e-3
    # draws at neighbouring positions are independent
    pairs = np.zeros((len(p), len(p)))
    np.add.at(pairs, (draws[0::2], draws[1::2]), 1)
    expected = np.outer(p, p) * n / 2
    usual = expected > 5
    if usual.sum() > 1:
        rest = [pairs[~usual].sum()], [expected[~usual].sum()]
        observed, wanted = (np.r_[a[usual], b] for a, b in zip((pairs, expected), rest))
        some = wanted > 0
        assert stats.chisquare(observed[some], wanted[some]).pvalue > 1e-3


def test_draws_over_seeds_follow_the_law():
    n, sampler = 20_000, Sampler(0.9)
    logits = jnp.asarray(LOGITS, jnp.float32)[None]
    draw = lambda seed: sampler.draw(logits, jax.random.key(seed), jnp.array([12]))[0]
    count = np.bincount(jax.vmap(draw)(jnp.arange(n)), minlength=len(LOGITS))
    assert stats.chisquare(count, n * law(sampler, LOGITS)).pvalue > 1e-3


@pytest.mark.slow
def test_a_draw_depends_on_seed_and_position_alone():
    """The same in any order, any batch shape, and compiled into any program."""
    sampler, key = Sampler(1.3, top_p=0.95), jax.random.key(3)
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 11)), jnp.float32)
    position = jnp.array([40, 41, 42, 43, 41, 40])
    whole = sampler.draw(logits, key, position)
    for i in range(6):
        assert sampler.draw(logits[i : i + 1], key, position[i : i + 1])[0] == whole[i]
    jitted = jax.jit(sampler.draw)
    assert (jitted(logits, key, position) == whole).all()
    assert (jitted(logits[::-1], key, position[::-1])[::-1] == whole).all()
    padded = jitted(jnp.pad(logits, ((3, 0), (0, 0))), key, jnp.pad(position, (3, 0)))
    assert (padded[3:] == whole).all()
    found = noise(key, position, 11)
    assert (found[0] == found[5]).all() and (found[1] == found[4]).all()
    assert len({float(row[0]) for row in found}) == 4


def test_seeds_and_positions_differ():
    sampler, logits = Sampler(1.0), jnp.zeros((64, 50))
    draw = lambda seed, at: sampler.draw(logits, jax.random.key(seed), at + jnp.arange(64))
    assert (draw(0, 0)[1:] == draw(0, 1)[:-1]).all()
    assert (draw(0, 0) != draw(1, 0)).mean() > 0.9
    assert (draw(0, 0) != draw(0, 64)).mean() > 0.9


def test_perturbed_is_scores_plus_noise():
    key, position, logits = jax.random.key(1), jnp.array([5, 9]), jnp.asarray(LOGITS)[None]
    logits = jnp.tile(logits, (2, 1)).astype(jnp.float32)
    sampler = Sampler(0.5, top_k=4)
    got = np.asarray(sampler.perturbed(logits, key, position))
    kept = np.isfinite(got)
    assert (kept.sum(1) == 4).all()
    want = np.asarray(logits) / 0.5 + np.asarray(noise(key, position, 8))
    np.testing.assert_allclose(got[kept], want[kept], rtol=1e-6)
    assert (sampler.draw(logits, key, position) == got.argmax(1)).all()


def test_greedy_takes_the_first_of_the_largest_and_no_noise():
    sampler = Sampler()
    assert sampler.greedy and not Sampler(0.01).greedy
    logits = jnp.asarray(LOGITS, jnp.float32)[None]
    for seed in range(3):
        assert sampler.draw(logits, jax.random.key(seed), jnp.array([seed]))[0] == 2
    assert (sampler.perturbed(logits, jax.random.key(0), jnp.array([0])) == logits).all()
    assert sampler.scores(logits.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(temperature=-0.1), "temperature is -0.1; expected 0 to 100"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature=1e-38), "temperature is 1e-38; expected 0, which is greedy, or at least"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(min_p=1.5), "min_p is 1.5; expected 0 to 1"),
        (dict(min_p=-0.5), "min_p is -0.5"),
        (dict(top_p=0.0), "top_p is 0.0; expected above 0"),
        (dict(top_p=1.01), "top_p is 1.01"),
        (dict(top_p=float("nan")), "top_p is nan"),
    ],
)
def test_values_that_mean_nothing_raise(options, words):
    with pytest.raises(LLMError) as caught:
        Sampler(**options)
    assert words in str(caught.value)


def test_the_least_temperature_draws_the_largest_of_large_logits():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1000, (200, 50)), jnp.float32)
    drawn = Sampler(LEAST_TEMPERATURE).draw(logits, jax.random.key(0), jnp.arange(200))
    assert (drawn == logits.argmax(-1)).all()


def test_samplers_beside_each_other_are_what_each_is_alone():
    """As arrays, in one program, greedy ones among them; rows in any order."""
    some, rng = [Sampler(), *SAMPLERS, Sampler(0.7, top_k=2, top_p=0.5)], np.random.default_rng(0)
    of = Samplers.of(some, range(len(some)))
    of_X = jnp.asarray(rng.integers(0, len(some), 60), jnp.int32)
    logits = jnp.asarray(rng.normal(0, 2, (60, 40)).round(1), jnp.float32)  # with ties
    position = jnp.asarray(rng.integers(0, 100, 60), jnp.int32)
    scores, draws = of.scores(logits, of_X), of.draw(logits, of_X, position)
    for x, n in enumerate(of_X.tolist()):
        np.testing.assert_array_equal(scores[x], some[n].scores(logits[x][None])[0])
        want = some[n].draw(logits[x][None], jax.random.key(n), position[x][None])
        assert draws[x] == want[0]


def test_sorting_for_several_texts_takes_the_memory_of_few_rows():
    """Beside the logits one more array of their size, where sorting all rows at once takes four."""
    samplers, V = Samplers.of([Sampler(1.0, top_k=50, top_p=0.9)] * 2, [0, 1]), 20_000
    rows = jax.ShapeDtypeStruct((128, V), jnp.float32), jax.ShapeDtypeStruct((128,), jnp.int32)
    compiled = jax.jit(lambda s, z, of: s.scores(z, of)).lower(samplers, *rows).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * rows[0].size * 4
