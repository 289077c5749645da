"""Plain decoding, against recomputing the whole text for every token."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.attention import causal_step
from llm_jax.cache import empty_caches
from llm_jax.generation import GenerationError, _prefill, chunks, decode_loop, generate, prefill
from llm_jax.model import forward
from llm_jax.sample import Sampler, noise
from llm_jax.testing import tiny_config, tiny_params

CFG = tiny_config("qwen2", d_model=32, head_dim=8, d_ff=48, vocab=61)
PROMPT = [3, 14, 15, 9, 26, 5, 35]
STEPS = 12
LENGTH = len(PROMPT) + STEPS
jit_forward = jax.jit(forward, static_argnames="cfg")


@pytest.fixture(scope="module")
def params():
    return tiny_params(CFG)


def logits_behind(params, tokens):
    """[V] of the next token, by one causal pass over everything, padded to one program."""
    padded = jnp.asarray(np.pad(tokens, (0, LENGTH - len(tokens)))[None])
    caches, step = empty_caches(CFG, 1, LENGTH), causal_step(0, LENGTH, LENGTH)
    return np.asarray(jit_forward(params, padded, caches, step, CFG)[0][0, len(tokens) - 1])


def recomputed(params, sampler, seed):
    """Greedy by argmax; sampling by argmax of tempered logits and the position's noise."""
    tokens = list(PROMPT)
    for _ in range(STEPS):
        scores = logits_behind(params, tokens)
        if not sampler.greedy:
            gumbel = noise(jax.random.key(seed), jnp.array([len(tokens)]), CFG.vocab)[0]
            scores = np.asarray(sampler.scores(jnp.asarray(scores)[None])[0] + gumbel)
        tokens.append(int(scores.argmax()))
    return tokens[len(PROMPT) :]


@pytest.mark.quick_cases("Sampler(temperature=0.9, top_k=0, top_p=0.95, min_p=0.0)")
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.9, top_p=0.95)], ids=repr)
def test_tokens_are_those_of_recomputing_everything(params, sampler):
    want = recomputed(params, sampler, seed=5)
    got = generate(params, PROMPT, CFG, STEPS, sampler, seed=5)
    assert got == want and all(isinstance(t, int) for t in got)
    assert len(set(want)) > 3  # or the comparison would mean little
    if sampler.greedy:
        assert generate(params, PROMPT, CFG, STEPS, sampler, seed=6) == want
    else:
        assert generate(params, PROMPT, CFG, STEPS, sampler, seed=6) != want


@pytest.mark.slow
def test_number_of_tokens_is_the_one_asked_for(params):
    whole = generate(params, PROMPT, CFG, STEPS)
    for steps in (0, 1, 2):
        assert generate(params, PROMPT, CFG, steps) == whole[:steps]


@pytest.mark.slow
def test_generation_stops_behind_an_end_token(params):
    whole = generate(params, PROMPT, CFG, STEPS)
    for at in (0, 1, 5):
        first = whole.index(whole[at])
        assert generate(params, PROMPT, CFG, STEPS, eos=[whole[at]]) == whole[: first + 1]
    several = [whole[6], whole[3]]
    stop = min(whole.index(t) for t in several)
    assert generate(params, PROMPT, CFG, STEPS, eos=several) == whole[: stop + 1]
    unused = next(t for t in range(CFG.vocab) if t not in whole)
    assert generate(params, PROMPT, CFG, STEPS, eos=[unused]) == whole


@pytest.mark.parametrize("chunk", [2, 7, 512])
def test_prefill_in_any_chunks(params, chunk):
    logits, caches = prefill(params, PROMPT, empty_caches(CFG, 1, 32), CFG, chunk)
    np.testing.assert_allclose(logits[0], logits_behind(params, PROMPT), rtol=1e-4, atol=1e-5)
    want = jit_forward(
        params, jnp.array([PROMPT]), empty_caches(CFG, 1, 32), causal_step(0, 7, 32), CFG
    )[1]
    head = lambda caches: jax.tree.map(lambda a: a[:, :7], caches)
    chex.assert_trees_all_close(head(caches), head(want), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_decode_goes_on_from_its_caches(params):
    """Decoding 4 tokens and then 5 is decoding 9; the count says how many are valid."""
    key, whole = jax.random.key(0), generate(params, PROMPT, CFG, 10)
    _, caches = prefill(params, PROMPT, empty_caches(CFG, 1, 32), CFG)
    token, at = jnp.array(whole[:1]), jnp.int32(len(PROMPT))
    out, count, caches = decode_loop(params, token, caches, at, key, CFG, 4)
    assert int(count) == 4 and out.tolist() == whole[1:5]
    out, count, _ = decode_loop(
        params, out[-1:], caches, at + 4, key, CFG, 5, Sampler(), eos=(whole[7],)
    )
    stop = whole[5:].index(whole[7]) + 1
    assert int(count) == stop and out[:stop].tolist() == whole[5 : 5 + stop]


@given(
    length=st.integers(1, 200),
    chunk=st.integers(1, 64),
    spare=st.integers(0, 40),
    start=st.integers(0, 60),
)
def test_chunks_cover_the_prompt_once(length, chunk, spare, start):
    tokens, slots = np.arange(1000, 1000 + length), length + spare
    seen, here, sizes = [], start, set()
    for piece, at, real in chunks(tokens, slots, chunk, start):
        assert at == here and piece.dtype == np.int32 and piece.shape[0] == 1
        assert 0 < real <= piece.shape[1] <= chunk and at + piece.shape[1] <= slots
        assert not piece[0, real:].any()
        seen += piece[0, :real].tolist()
        here += real
        sizes.add(piece.shape[1])
        if piece.shape[1] < slots - at:
            assert piece.shape[1] == chunk or piece.shape[1] in (16, 64)
    assert seen == tokens[start:].tolist()


def test_a_few_programs_serve_every_prompt(params):
    """Only padded lengths reach the compiler."""
    _prefill.clear_cache()
    for length in (1, 5, 9, 16):
        prefill(params, [1] * length, empty_caches(CFG, 1, 64), CFG)
    assert _prefill._cache_size() == 1
    for length in (17, 30, 32):
        prefill(params, [1] * length, empty_caches(CFG, 1, 64), CFG)
    assert _prefill._cache_size() == 2


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "the prompt is empty"),
        ([1] * 5, "5 tokens and the cache 4 slots"),
        ([1, CFG.vocab], "token id 61 is outside the vocabulary; .* 0 to 60"),
        ([-1, 2], "token id -1 is outside"),
        (np.array([2**40]), "token id 1099511627776 is outside"),
        ([10**30], "of type object; expected whole numbers from 0 to 60"),
        ([0.5, 1.0], "of type float64"),
        ([True, False], "of type bool"),
        (["one"], "of type <U3"),
        ([[1], [2, 3]], "differ in length"),
        ([[1, 2]], r"has shape \(1, 2\)"),
        (np.zeros((0, 3), int), r"has shape \(0, 3\)"),
    ],
)
def test_prompts_that_cannot_be_used(params, prompt, words):
    with pytest.raises(GenerationError, match=words):
        prefill(params, prompt, empty_caches(CFG, 1, 4), CFG)
    if "cache 4" not in words:  # generate makes the cache as long as it has to be
        with pytest.raises(GenerationError, match=words):
            generate(params, prompt, CFG, 2)


@pytest.mark.slow
def test_decoding_ends_where_the_cache_ends(params):
    """A write behind the last slot would replace the last slot."""
    key, length = jax.random.key(0), len(PROMPT)
    want = generate(params, PROMPT, CFG, 6)
    token, at = jnp.array(want[:1]), jnp.int32(length)
    filled = lambda slots: prefill(params, PROMPT, empty_caches(CFG, 1, slots), CFG)[1]
    exact, _, _ = decode_loop(params, token, filled(length + 5), at, key, CFG, 5)
    assert exact.tolist() == want[1:]
    with pytest.raises(GenerationError, match=r"5 steps from position 7 .* 11 slots; .* least 12"):
        decode_loop(params, token, filled(length + 4), at, key, CFG, 5)
    for steps, start in ((-1, 7), (1, -1), (0, 12), (2**40, 7)):
        with pytest.raises(GenerationError, match=f"{steps} steps from position {start}"):
            decode_loop(params, token, filled(length + 4), jnp.int32(start), key, CFG, steps)
    with pytest.raises(GenerationError, match="token id 61"):
        decode_loop(params, jnp.array([61]), filled(length + 4), at, key, CFG, 1)
    with pytest.raises(GenerationError, match="number of steps is -1"):
        generate(params, PROMPT, CFG, -1)


def test_models_that_compute_no_numbers_are_named(params):
    """The likeliest of logits that are all NaN would be token 0, for ever."""
    one = params.layers[1]
    bad = dataclasses.replace(one.mlp, down=one.mlp.down.at[0, 0].set(jnp.inf))
    layers = (params.layers[0], dataclasses.replace(one, mlp=bad))
    broken = dataclasses.replace(params, layers=layers)
    with pytest.raises(GenerationError, match=r"NaN or infinity in layer 1: .* float32"):
        generate(broken, PROMPT, CFG, 4)
    head = dataclasses.replace(params, head_DV=params.head_DV.at[0, 0].set(jnp.nan))
    with pytest.raises(GenerationError, match="behind the last layer"):
        generate(head, PROMPT, CFG, 4)
    table = dataclasses.replace(params, embed_VD=params.embed_VD.at[3].set(jnp.nan))
    with pytest.raises(GenerationError, match="in the embedding table"):
        generate(table, PROMPT, CFG, 4)
    _, caches = prefill(params, PROMPT, empty_caches(CFG, 1, 32), CFG)
    token, at, key = jnp.array([3]), jnp.int32(len(PROMPT)), jax.random.key(0)
    with pytest.raises(GenerationError, match="logit at position 7 is NaN"):
        decode_loop(table, token, caches, at, key, CFG, 4)


def test_seeds_that_would_mean_another_are_refused(params):
    for seed in (-1, 2**32, 10**20, 1.0, True, None):
        with pytest.raises(
            GenerationError, match=f"seed is {seed}; expected a whole number from 0"
        ):
            generate(params, PROMPT, CFG, 4, seed=seed)


def test_decoding_inside_a_compiled_function(params):
    """Nothing is checked there, because values are not known; the tokens are the same."""
    logits, caches = prefill(params, PROMPT, empty_caches(CFG, 1, 32), CFG)
    token = jnp.argmax(logits, -1).astype(jnp.int32)
    at, key = jnp.int32(len(PROMPT)), jax.random.key(0)

    @jax.jit
    def run(params, caches, token, at, key):
        return decode_loop(params, token, caches, at, key, CFG, 5)[0]

    inside = run(params, jax.tree.map(jnp.copy, caches), token, at, key)
    outside = decode_loop(params, token, caches, at, key, CFG, 5)[0]
    assert inside.tolist() == outside.tolist()
