"""Plain decoding of a model that fits on the device: chunked prefill and one jitted loop."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import LLMError
from llm_jax.attention import caches_for, causal_step, empty_cache
from llm_jax.cards import ALIKE, CACHES, on_each
from llm_jax.config import Config
from llm_jax.model import block, embed, forward, hidden, unembed
from llm_jax.params import Params
from llm_jax.sample import Sampler


class GenerationError(LLMError):
    """Tokens, steps or a cache that decoding cannot use; the message says what is possible."""


def checked_tokens(tokens: Any, vocab: int) -> np.ndarray:
    """The token ids as int32, of any shape.

    Raises GenerationError where they are not whole numbers from 0 to vocab - 1. JAX would take
    the nearest row of the table for an id that the model does not have.
    """
    try:
        ids = np.asarray(tokens)
    except ValueError as error:
        raise GenerationError(f"rows of token ids differ in length ({error}); pad them") from error
    if ids.size and ids.dtype.kind not in "iu":
        raise GenerationError(
            f"token ids are of type {ids.dtype}; expected whole numbers from 0 to {vocab - 1}"
        )
    if bad := ids[(ids < 0) | (ids >= vocab)][:1].tolist():
        raise GenerationError(
            f"the token id {bad[0]} is outside the vocabulary; this model has ids from 0 to "
            f"{vocab - 1}: encode the text with the model's own tokenizer"
        )
    return ids.astype(np.int32)


def checked_prompt(prompt: Any, vocab: int) -> np.ndarray:
    """One row of token ids, int32 [T], not empty. Raises GenerationError for anything else."""
    prompt = checked_tokens(prompt, vocab)
    if prompt.ndim != 1:
        raise GenerationError(f"a prompt has shape {prompt.shape}; expected one row of token ids")
    if not len(prompt):
        raise GenerationError("the prompt is empty; at least one token is needed")
    return prompt


def checked_seed(seed: Any) -> int:
    """The seed. Raises GenerationError for one that JAX's 32-bit keys would take for another."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise GenerationError(
            f"the seed is {seed!r}; expected a whole number from 0 to {2**32 - 1}"
        )
    return seed


def chunk_sizes(chunk: int) -> list[int]:
    """Lengths of the programs that prefill takes: 16, 64, 256, … and `chunk`, ascending."""
    return [4**n for n in range(2, 16) if 4**n < chunk] + [chunk]


def chunks(
    tokens: Sequence[int] | np.ndarray, slots: int, chunk: int, start: int = 0
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Pieces of a prompt for prefill: yields (tokens_1T, at, how many of the T are real).

    T is `chunk`, and for the last piece the smallest of `chunk_sizes` that holds it, so that a few
    programs serve every prompt. What a piece writes behind the prompt is overwritten later.
    """
    tokens = np.asarray(tokens, np.int32)
    for at in range(start, len(tokens), chunk):
        piece = tokens[at : at + chunk]
        size = min(next(s for s in chunk_sizes(chunk) if s >= len(piece)), slots - at)
        yield np.pad(piece, (0, size - len(piece)))[None], at, len(piece)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="caches")
def _prefill(params, tokens_1T, caches, at, real, cfg):
    step = causal_step(at, tokens_1T.shape[1], caches[0].slots, real)
    run = on_each(lambda *args: hidden(*args, cfg), cfg.cards, (ALIKE, CACHES))
    x, caches = run(params, tokens_1T, caches, step)
    last = jax.lax.dynamic_slice_in_dim(x, real - 1, 1, axis=1)
    head = on_each(lambda *args: unembed(*args, cfg), cfg.cards)
    return head(params, last)[:, 0], caches


def prefill(
    params: Params, prompt: Sequence[int] | np.ndarray, caches: Any, cfg: Config, chunk: int = 512
) -> tuple[jax.Array, Any]:
    """(logits_1V behind the prompt, caches holding it in slots 0 … len(prompt)-1).

    Raises GenerationError for a prompt that is empty, has unknown ids or does not fit.
    """
    prompt = checked_prompt(prompt, cfg.vocab)
    slots = caches[0].slots
    if len(prompt) > slots:
        raise GenerationError(f"the prompt has {len(prompt)} tokens and the cache {slots} slots")
    for tokens, at, real in chunks(prompt, slots, chunk):
        logits, caches = _prefill(params, tokens, caches, jnp.int32(at), jnp.int32(real), cfg)
    return logits, caches


def decode_loop(
    params: Params,
    token: jax.Array,
    caches: Any,
    at: jax.Array,
    key: jax.Array,
    cfg: Config,
    steps: int,
    sampler: Sampler = Sampler(),
    eos: tuple[int, ...] = (),
) -> tuple[jax.Array, jax.Array, Any]:
    """Up to `steps` tokens behind `token`, in one program that stays on the device.

    `token` [1] stands at position `at` and is not in the caches yet. Returns (tokens [steps], how
    many are valid, caches) and stops after the first token that is in `eos`. Caches are donated.
    Raises GenerationError where the caches have no slots for all steps, where the token is unknown,
    and where a logit is NaN or infinite: the likeliest token would be 0 for ever. Inside `jax.jit`
    values are not known, so nothing is checked.
    """
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((token, at, caches, params))):
        return _decode(params, token, caches, at, key, cfg, steps, sampler, eos)[:3]
    first, slots = int(at), caches[0].slots
    if steps < 0 or not 0 <= first <= slots - steps:
        raise GenerationError(
            f"{steps} steps from position {first} do not fit into a cache of {slots} slots; make "
            f"caches of at least {max(first, 0) + max(steps, 0)} slots"
        )
    checked_tokens(token, cfg.vocab)
    out, count, caches, finite = _decode(params, token, caches, at, key, cfg, steps, sampler, eos)
    if not finite:
        raise GenerationError(
            f"a logit at position {first + int(count) - 1} is NaN or infinite: the weights are "
            f"damaged, or their numbers do not fit into {cfg.dtype}; take bfloat16 or float32"
        )
    return out, count, caches


@functools.partial(
    jax.jit, static_argnames=("cfg", "steps", "sampler", "eos"), donate_argnames="caches"
)
def _decode(params, token, caches, at, key, cfg, steps, sampler, eos):
    """`decode_loop` as one program; also gives whether all logits were finite."""
    slots = caches[0].slots
    stop = jnp.asarray(eos or (-1,), jnp.int32)

    def unfinished(carry):
        count, token, _, _, finite = carry
        return (count < steps) & ((count == 0) | ~jnp.any(token == stop)) & finite

    def body(carry):
        count, token, out, caches, _ = carry
        step = causal_step(at + count, 1, slots)
        logits, caches = forward(params, token[None], caches, step, cfg)
        token = sampler.draw(logits[0], key, step.position_BT[0] + 1)
        return count + 1, token, out.at[count].set(token[0]), caches, jnp.isfinite(logits).all()

    start = (jnp.int32(0), token, jnp.zeros(steps, jnp.int32), caches, jnp.bool_(True))
    count, _, out, caches, finite = jax.lax.while_loop(unfinished, body, start)
    return out, count, caches, finite


def generate(
    params: Params,
    prompt: Sequence[int] | np.ndarray,
    cfg: Config,
    steps: int,
    sampler: Sampler = Sampler(),
    seed: int = 0,
    eos: Sequence[int] = (),
) -> list[int]:
    """Up to `steps` new tokens after the prompt, as a list of ints; one sequence.

    Stops after the first token that is in `eos`. Sampling depends on `seed` and the tokens alone.
    Raises GenerationError for an empty prompt, unknown ids, a number of steps or a seed that cannot
    be, and where the model computes NaN or infinity.
    """
    if steps < 0:
        raise GenerationError(f"the number of steps is {steps}; expected 0 or more")
    prompt = checked_prompt(prompt, cfg.vocab)
    key = jax.random.key(checked_seed(seed))
    caches = caches_for(params, cfg, 1, len(prompt) + steps)
    logits, caches = prefill(params, prompt, caches, cfg)
    if not np.isfinite(logits).all():
        raise GenerationError(_where(params, prompt, cfg))
    first = sampler.draw(logits, key, jnp.array([len(prompt)], jnp.int32))
    if steps <= 1 or int(first[0]) in eos:
        return [int(first[0])][:steps]
    at = jnp.int32(len(prompt))
    out, count, _ = decode_loop(params, first, caches, at, key, cfg, steps - 1, sampler, tuple(eos))
    return [int(first[0])] + [int(t) for t in out[: int(count)]]


def _where(params: Params, prompt: np.ndarray, cfg: Config) -> str:
    """Where a prompt first gives NaN or infinity, computed layer by layer."""
    step, where = causal_step(0, len(prompt), len(prompt)), "behind the last layer"
    x, one = embed(params, prompt[None], cfg), jax.jit(block, static_argnames="cfg")
    if not np.isfinite(x).all():
        where, layers = "in the embedding table", ()
    else:
        layers = params.layers
    for i, layer in enumerate(layers):
        x, _ = one(layer, x, empty_cache(layer.attn, cfg, 1, len(prompt)), step, cfg)
        if not np.isfinite(x).all():
            where = f"in layer {i}"
            break
    return (
        f"the model computes NaN or infinity {where}: its weights are damaged, or their numbers do "
        f"not fit into {cfg.dtype}; take bfloat16 or float32"
    )
