"""Which programs the loop compiles, and how much of the caches they look at."""

import jax
import jax.numpy as jnp
import pytest
from proposers import LENGTH, PROMPT, PROPOSERS, SAMPLERS, STEPS

from llm_jax.sample import Sampler
from subspec_jax import bitwise, draft, propose, verify
from subspec_jax import tree as tree_module
from subspec_jax.decoder import Decoder


@pytest.mark.quick_cases("beam", "lookup")
@pytest.mark.parametrize("name", ["vanilla", "beam", "auto", "post beam", "own cache", "lookup"])
def test_nothing_is_compiled_after_the_first_rounds(tiny, target, name):
    """One set of programs serves all rounds, and all prompts of the same padded length."""
    decoder = Decoder(target, PROPOSERS[name](tiny), Sampler(0.9), max_length=LENGTH)
    decoder.generate(PROMPT, STEPS)
    compiled = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jitted = [
        *(draft.grow, draft.extend_once),
        *(verify.finish_round, verify.lay_out, verify.jit_block, verify.jit_embed),
        *(propose._only_root, propose._move, propose._remember),
    ]
    sizes = [f._cache_size() for f in jitted]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        decoder.generate([7] * 13, STEPS, seed=4)
        decoder.generate([8, 9], STEPS, seed=5, eos=[3])
        assert [f._cache_size() for f in jitted] == sizes
        assert not compiled
        jax.jit(lambda x: x * 3 - 1)(jnp.float32(len(compiled)))
        assert compiled  # the listener does hear compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vanilla", "beam", "own cache", "lookup"])
def test_nothing_is_compiled_after_a_warm_up(tiny, target, monkeypatch, name):
    """Whatever numbers of slots a text of that length will look at."""
    monkeypatch.setattr(tree_module, "SHORTEST", 8)
    seen = []
    exact = verify.lay_out
    monkeypatch.setattr(bitwise, "lay_out", lambda *a: (seen.append(a[-1]), exact(*a))[1])
    decoder = Decoder(target, PROPOSERS[name](tiny), max_length=LENGTH)
    sizes, replay = list(decoder.sizes), lambda: iter(lambda: 0, None)
    decoder.warm_up(PROMPT, STEPS, replay)
    warm = set(seen)
    jitted = draft.grow, draft.grow_along, verify.finish_round, verify.lay_out, verify.jit_block
    programs = [f._cache_size() for f in jitted]
    seen.clear()
    list(decoder.rounds(PROMPT, STEPS, replay=replay()))
    assert len(set(seen)) > 1 and set(seen) <= warm < set(sizes)
    assert [f._cache_size() for f in jitted] == programs and decoder.sizes == sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vanilla", "beam", "own cache", "post best-first"])
def test_only_the_live_slots_are_looked_at(tiny, target, plain, monkeypatch, name):
    """NaN behind them is never read; 0 x NaN of a slot that is only masked would be seen."""
    monkeypatch.setattr(tree_module, "SHORTEST", 8)
    seen = []
    exact = verify.lay_out
    monkeypatch.setattr(bitwise, "lay_out", lambda *a: (seen.append(a[-1]), exact(*a))[1])
    decoder = Decoder(target, PROPOSERS[name](tiny), max_length=LENGTH)
    assert decoder.slots == 128
    rounds = decoder.rounds(PROMPT, STEPS)
    got = list(next(rounds).tokens)  # the prompt's pass looks at all slots
    dead = lambda a: a.at[:, 64:].set(jnp.nan)
    decoder.caches[:] = [jax.tree.map(dead, cache) for cache in decoder.caches]
    got += [token for r in rounds for token in r.tokens]
    assert got == plain(PROMPT, SAMPLERS["greedy"])
    assert seen == sorted(seen) and len(set(seen)) > 1 and max(seen) <= 64
