"""What the target's softmax says of emitted tokens, for the texts that ask.

The softmax is that of the logits as they are: temperature, filters, noise and whatever else shapes
a draw have no part in it. Nothing here changes a draw. A round in which no text asks pays nothing.

Letters: B texts, T places of a pass, X rows, D model, V vocabulary, K likeliest tokens.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.cards import on_each
from llm_jax.config import Config
from llm_jax.model import unembed
from llm_jax.params import Params
from llm_jax.stream import to_device
from subspec_jax.prefix_cache import Text
from subspec_jax.propose import Round

MOST = 20
"""The likeliest tokens that are told; fewer where the vocabulary has fewer."""
ROWS = 16
"""Rows of logits computed at a time, always as many, so that there is one program."""


class Logprob(NamedTuple):
    """What the target's softmax says of a token and of the place where it stands."""

    token: int
    logprob: float
    """Natural logarithm of the token's probability."""
    top: tuple[tuple[int, float], ...]
    """(token, its logprob) of the `MOST` likeliest tokens there, the likeliest first."""


def tell(
    top: Params,
    x_BTD: jax.Array,
    where: Iterable[tuple[int, int]],
    tokens: Sequence[int],
    cfg: Config,
) -> tuple[Logprob, ...]:
    """Of each token, which follows a place (text, place) of a pass; x_BTD is after all layers."""
    found = []
    places = np.array(list(where), np.int32).reshape(-1, 2)
    for at in range(0, len(tokens), ROWS):
        some, of = np.zeros(ROWS, np.int32), np.zeros((ROWS, 2), np.int32)
        n = len(tokens[at : at + ROWS])
        some[:n], of[:n] = tokens[at : at + ROWS], places[at : at + ROWS]
        some_X, of_X2 = to_device((some, of), cfg.cards)
        host = jax.device_get(_of_rows(top, _rows(x_BTD, of_X2), some_X, cfg))
        found += _listed(some[:n], *host)
    return tuple(found)


def tell_logits(logits_XV: jax.Array, tokens: Sequence[int]) -> tuple[Logprob, ...]:
    """The same of logits that are there, one row for each token."""
    tokens_X = np.array(tokens, np.int32)
    return tuple(_listed(tokens_X, *jax.device_get(_of_logits(logits_XV, tokens_X))))


def told(
    results: list[tuple[Text, Round]],
    x_BTD: jax.Array,
    places: Sequence[Sequence[int]],
    top: Params,
    cfg: Config,
) -> list[tuple[Text, Round]]:
    """The results of a pass, with `Round.logprobs` for the texts that ask.

    `places` are those whose draws each text's tokens are, in order. The time that it takes counts
    in all rounds of the pass.
    """
    began = time.perf_counter()
    asked = [
        (b, place, token)
        for b, ((text, result), own) in enumerate(zip(results, places, strict=True))
        for token, place in zip(result.tokens, own, strict=False)
        if text.logprobs
    ]
    if not asked:
        return results
    of, place, tokens = zip(*asked, strict=True)
    found = iter(tell(top, x_BTD, zip(of, place, strict=True), tokens, cfg))
    own = [tuple(next(found) for _ in r.tokens) if t.logprobs else () for t, r in results]
    seconds = time.perf_counter() - began
    return [
        (text, dataclasses.replace(result, logprobs=some, other_s=result.other_s + seconds))
        for (text, result), some in zip(results, own, strict=True)
    ]


@jax.jit
def _rows(x_BTD: jax.Array, of_X2: jax.Array) -> jax.Array:
    return x_BTD[of_X2[:, 0], of_X2[:, 1]]


@functools.partial(jax.jit, static_argnames="cfg")
def _of_rows(top: Params, x_XD: jax.Array, token_X: jax.Array, cfg: Config):
    head = on_each(lambda *args: unembed(*args, cfg), cfg.cards)
    return _of_logits(head(top, x_XD[None])[0], token_X)


@jax.jit
def _of_logits(logits_XV: jax.Array, token_X: jax.Array) -> tuple[jax.Array, ...]:
    """(logprob [X] of the tokens, the likeliest tokens [X, K], their logprobs [X, K])."""
    z_XV = logits_XV.astype(jnp.float32)
    norm_X1 = jax.nn.logsumexp(z_XV, axis=-1, keepdims=True)
    own_X1 = jnp.take_along_axis(z_XV, token_X[:, None], axis=-1) - norm_X1
    most_XK, token_XK = jax.lax.top_k(z_XV, min(MOST, z_XV.shape[-1]))
    return own_X1[:, 0], token_XK, most_XK - norm_X1


def _listed(tokens: Sequence[int], own_X, token_XK, most_XK) -> list[Logprob]:
    rows = zip(tokens, own_X.tolist(), token_XK.tolist(), most_XK.tolist(), strict=False)
    return [
        Logprob(int(token), own, tuple(zip(likely, most, strict=True)))
        for token, own, likely, most in rows
    ]
