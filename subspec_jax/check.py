"""Checks of what is decoded: losslessness, and where numbers are not finite."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.attention import caches_for, causal_step
from llm_jax.cache import KV
from llm_jax.cards import empty
from llm_jax.config import Config
from llm_jax.generation import chunks
from subspec_jax import SubspecError
from subspec_jax.verify import Target, embedded, last_logits, next_block, row, streamed_prefill


class NotFiniteError(SubspecError):
    """The target computed NaN or infinity, so its tokens mean nothing."""


EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Distance from 1 to the next larger number, by dtype."""

ROUNDINGS = 2
"""Two orders of adding the same numbers may differ by this many roundings of the largest logit."""


def compare_with_plain(
    target: Target,
    prompt: Sequence[int],
    tokens: Sequence[int],
    plain: Sequence[int],
    caches: list[Any] | None = None,
    chunk: int = 512,
) -> dict[str, Any]:
    """Whether `tokens` equal those of plain decoding; if not, how near a tie the difference was.

    Matrix products of two shapes may add in different orders. So in 16 bits two nearly equal logits
    can change their order. At the first difference, `logit_gap` is the target's logit of the plain
    token minus its logit of the other token, from one pass over the common text. `tolerance` is
    ROUNDINGS roundings of the largest logit in the model's dtype. This is for greedy tokens:
    sampling adds noise to the logits, and the gap does not contain it. `caches` may be those of a
    decoder between two prompts.

    A quantizing cache can turn a difference in the last bit into a different code, and later layers
    carry this on. The logits of such a model depend on the order of adding. There the tolerance is
    at least the largest change of a logit between prefill in chunks of `chunk` and of 16.
    """
    same = list(tokens) == list(plain)
    result = dict(identical=same, first_difference=None, logit_gap=None, tolerance=None)
    if same:
        return result
    at = next(
        (i for i, (a, b) in enumerate(zip(tokens, plain, strict=False)) if a != b),
        min(len(tokens), len(plain)),
    )
    result["first_difference"] = at
    if at < min(len(tokens), len(plain)):
        text = [*prompt, *plain[:at]]
        if caches is None:
            slots = -(-len(text) // 128) * 128
            given = target.params, target.cfg, 1, slots
            caches = list(empty(functools.partial(caches_for, *given), target.cfg.cards))
        logits, _ = streamed_prefill(target, text, caches, chunk)
        logits_V = np.asarray(logits[0].astype(jnp.float32))
        result["logit_gap"] = float(logits_V[plain[at]] - logits_V[tokens[at]])
        largest = float(np.abs(logits_V).max())
        result["tolerance"] = ROUNDINGS * EPSILON[target.cfg.dtype] * largest
        if not isinstance(caches[0], KV):
            again, _ = streamed_prefill(target, text, caches, 16)
            moved = float(jnp.abs(again - logits).max())
            result["tolerance"] = max(result["tolerance"], moved)
    return result


def no_numbers(where: str, cfg: Config) -> str:
    """What is said of a model that computes NaN or infinity there."""
    return (
        f"the model computes NaN or infinity {where}; its weights are damaged, or their numbers do "
        f"not fit into {cfg.dtype}: take bfloat16 or float32"
    )


def not_finite(target: Target, tokens: Sequence[int], caches: list[Any], chunk: int) -> str:
    """Where the target's numbers stop being finite on this text, in words.

    Decodes the text again, layer by layer, and overwrites the caches.
    """
    cfg, slots = target.cfg, caches[0].slots
    finite = jax.jit(lambda x: jnp.isfinite(x).all())
    for part, at, real in chunks(list(tokens), slots, chunk):
        step = causal_step(at, part.shape[1], slots, real)
        x = embedded(target, jnp.asarray(part))
        if not finite(x[:, :real]):
            return "in the embedding"
        stream = target.stream()
        if target.experts is not None:
            target.experts.begin()
        for i in range(cfg.layers):
            given = x, caches[i], step, step.real
            x, caches[i], done = next_block(target, stream, i, *given)
            stream.used(done)
            if not finite(x[:, :real]):
                return f"in layer {i}"
        if not finite(last_logits(target.top, row(x, jnp.int32(real - 1)), cfg)):
            return "in the last norm or the output head"
    return "for a drafted token, though not for the text"  # 0 x NaN: it spoils the whole tree
