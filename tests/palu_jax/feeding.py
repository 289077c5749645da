"""Ways to feed a text to a model: at once, or a few tokens at a time."""

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.attention import caches_for, causal_step
from llm_jax.model import forward


def whole(params, cfg, tokens_BT, slots=32):
    """(logits of one pass over all tokens, the caches behind it)."""
    step = causal_step(0, tokens_BT.shape[1], slots)
    caches = caches_for(params, cfg, tokens_BT.shape[0], slots)
    return jax.jit(forward, static_argnames="cfg")(params, tokens_BT, caches, step, cfg=cfg)


def one_by_one(params, cfg, tokens_BT, slots=32, chunk=1):
    """The same, `chunk` tokens at a time."""
    caches, logits = caches_for(params, cfg, tokens_BT.shape[0], slots), []
    run = jax.jit(forward, static_argnames="cfg")
    for at in range(0, tokens_BT.shape[1], chunk):
        part = tokens_BT[:, at : at + chunk]
        found, caches = run(params, part, caches, causal_step(at, part.shape[1], slots), cfg=cfg)
        logits.append(found)
    return jnp.concatenate(logits, axis=1), caches


def text(cfg, batch=2, length=20, seed=3):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, cfg.vocab, (batch, length)), jnp.int32)
