"""What the loop draws follows the model's exact law, counted over many seeds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llm_jax.attention import causal_step
from llm_jax.cache import empty_caches
from llm_jax.config import Config
from llm_jax.generation import generate, prefill
from llm_jax.model import forward, hidden
from llm_jax.params import init
from llm_jax.sample import Sampler
from subspec_jax.decoder import Decoder
from subspec_jax.draft import Drafting, extend, grow
from subspec_jax.draft_model import substitute
from subspec_jax.offload import place
from subspec_jax.propose import ModelDraft
from subspec_jax.tree import TreeSpec, seedling
from subspec_jax.verify import Target, Verified, finish_round, lay_out


def small():
    cfg = Config(2, 16, 2, 1, 8, 16, 5, dtype="float32")
    params = init(jax.random.key(1), cfg)
    # a head of moderate size, so that every token has a chance
    return cfg, dataclasses.replace(params, head_DV=params.head_DV * 0.4)


LAW = Sampler(1.2, top_p=0.97)
LAW_PROMPT = [3, 1, 4]
NEVER = jnp.full(4, -jnp.inf)


def exact_law(params, cfg, emitted):
    """Probability of every sequence of `emitted` tokens behind the prompt, by enumeration."""
    law = {(): 1.0}
    for _ in range(emitted):
        texts = jnp.array([[*LAW_PROMPT, *path] for path in law])
        step = causal_step(0, texts.shape[1], texts.shape[1])
        caches = empty_caches(cfg, len(texts), texts.shape[1])
        logits, _ = forward(params, texts, caches, step, cfg)
        p = np.exp(np.asarray(LAW.scores(logits[:, -1]), np.float64))
        p /= p.sum(-1, keepdims=True)
        law = {(*path, t): q * p[i, t] for i, (path, q) in enumerate(law.items()) for t in range(5)}
    return law


@pytest.mark.slow
def test_first_tokens_follow_the_exact_law():
    """Chi-square over 5,000 seeds, the loop's own pieces under `vmap`, three kinds of trees."""
    cfg, params = small()
    guess = substitute(params, 2, 8)
    emitted, seeds, slots = 3, 5_000, 24
    law = exact_law(params, cfg, emitted)
    _, caches = prefill(params, LAW_PROMPT, empty_caches(cfg, 1, slots), cfg)
    logits, _ = forward(
        params, jnp.array([LAW_PROMPT]), caches, causal_step(0, len(LAW_PROMPT), slots), cfg
    )

    def one(seed, spec):
        key, at = jax.random.key(seed), jnp.int32(len(LAW_PROMPT))
        first = LAW.draw(logits[0, -1:], key, jnp.array([len(LAW_PROMPT)]))
        out, count = jnp.full(16, -1, jnp.int32).at[0].set(first[0]), jnp.int32(1)

        def round_(_, carry):
            tree, kept, at, out, count = carry
            common = dict(at=at, key=key, cfg=cfg, spec=spec, sampler=LAW)
            given = Drafting(params=guess, tree=tree, caches=kept, least_L=NEVER, **common)
            tree, kept = grow(given)
            cut, tokens, step = lay_out(tree, at, spec, slots)
            x, kept = hidden(params, tokens, kept, step, cfg)
            for _ in range(spec.extra):
                tree, kept = extend(dataclasses.replace(given, tree=tree, caches=kept))
            accept = jnp.int32(-1)
            trees = dict(x_1ED=x, tree=cut, extended=tree, caches=kept)
            end = finish_round(Verified(top=params, accepted=accept, **trees, **common))
            out = jax.lax.dynamic_update_slice(out, end.emitted_P, (count,))
            return end.tree, end.caches, end.at, out, count + end.length

        start = seedling(first[0], spec), caches, at, out, count
        # every round emits a token at least
        out = jax.lax.fori_loop(0, emitted - 1, round_, start)[3]
        return out[:emitted]

    for spec in (
        TreeSpec("beam", 2, 2),
        TreeSpec("chain", 1, extra=2),
        TreeSpec("best-first", 3, 2, budget=4, extra=1, coupled=False),
    ):
        run = jax.jit(jax.vmap(functools.partial(one, spec=spec)))
        drawn = np.asarray(run(jnp.arange(seeds)))
        assert (drawn >= 0).all()
        count = {path: 0 for path in law}
        for path, n in zip(*np.unique(drawn, axis=0, return_counts=True)):
            count[tuple(path.tolist())] = int(n)
        expected = np.array(list(law.values())) * seeds
        observed = np.array(list(count.values()))
        usual = expected >= 5
        assert usual.sum() > 60 and not observed[expected == 0].any()
        rare = observed[~usual].sum(), expected[~usual].sum()
        observed, expected = (np.r_[a[usual], b] for a, b in zip((observed, expected), rare))
        some = expected > 0
        assert stats.chisquare(observed[some], expected[some]).pvalue > 1e-3, spec


@pytest.mark.slow
def test_the_decoder_draws_the_same_over_many_seeds():
    """Ties the law above to the real loop: the very same tokens as plain sampling, seed by seed."""
    cfg, params = small()
    target = Target(dataclasses.replace(params, layers=place(params.layers, 1)), cfg)
    spec = TreeSpec("beam", 1, 2, extra=1)
    decoder = Decoder(
        target, ModelDraft(substitute(target.params, 2, 8), cfg, spec), LAW, max_length=16
    )
    texts = [decoder.generate(LAW_PROMPT, 8, seed=seed) for seed in range(25)]
    assert texts == [generate(params, LAW_PROMPT, cfg, 8, LAW, seed) for seed in range(25)]
    assert len({tuple(text) for text in texts}) > 20
