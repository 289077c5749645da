"""The quality of a model: perplexity through its real cache, key-value retrieval, bytes a token.

Letters: B windows at a time, T tokens of a window, D model, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.cli import UserError
from llm_jax.attention import causal_step, empty_cache
from llm_jax.config import Config
from llm_jax.generation import generate
from llm_jax.model import block, embed, unembed
from llm_jax.params import Params

_ROWS = 512
"""Positions whose logits are computed at a time."""

_embedded = jax.jit(embed, static_argnames="cfg")


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames=("x", "cache"))
def _block(layer, x, cache, step, cfg):
    """`block` as a program of its own: layers of one shape share it, also in several models."""
    return block(layer, x, cache, step, cfg)


@functools.partial(jax.jit, static_argnames="cfg")
def _scores(top, x_BTD, tokens_BT, cfg):
    """(-log p in float32, whether it is the likeliest token) for tokens 1 … T-1 of each window."""
    B, T, D = x_BTD.shape
    count = -(-(T - 1) // _ROWS)
    padded = count * _ROWS - (T - 1)
    x = jnp.pad(x_BTD[:, :-1], ((0, 0), (0, padded), (0, 0))).reshape(B * count, _ROWS, D)
    label = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, padded))).reshape(B * count, _ROWS)

    def some(args):
        x_RD, label_R = args
        logits_RV = unembed(top, x_RD[None], cfg)[0]
        picked = jnp.take_along_axis(logits_RV, label_R[:, None], axis=-1)[:, 0]
        greedy = jnp.argmax(logits_RV, axis=-1) == label_R
        return jax.nn.logsumexp(logits_RV, axis=-1) - picked, greedy

    return tuple(a.reshape(B, -1)[:, : T - 1] for a in jax.lax.map(some, (x, label)))


def token_losses(params: Params, tokens_BT: Any, cfg: Config) -> tuple[jax.Array, int]:
    """(-log p of tokens 1 … T-1 of each window [B, T-1], bytes of the caches that were filled)."""
    (found, _), held = _pass(params, tokens_BT, cfg)
    return found, held


def token_scores(params: Params, tokens_BT: Any, cfg: Config) -> tuple[jax.Array, jax.Array]:
    """(-log p, whether it is the likeliest token) for tokens 1 … T-1 of each window, [B, T-1]."""
    return _pass(params, tokens_BT, cfg)[0]


def _pass(params: Params, tokens_BT, cfg: Config):
    """(the result of `_scores`, bytes of the caches that were filled).

    One pass over all T tokens: every layer writes its cache and attends to what the cache holds,
    packed codes included. A layer's cache is dropped when the next layer begins.
    """
    tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
    B, T = tokens_BT.shape
    top = Params(params.embed_VD, (), params.norm, params.head_DV)
    x, step, held = _embedded(top, tokens_BT, cfg=cfg), causal_step(0, T, T), 0
    for layer in params.layers:
        cache = empty_cache(layer.attn, cfg, B, T)
        x, cache = _block(layer, x, cache, step, cfg=cfg)
        held += sum(a.nbytes for a in jax.tree.leaves(cache))
    return _scores(top, x, tokens_BT, cfg), held


def perplexity(
    params: Params,
    windows_nT: np.ndarray,
    cfg: Config,
    batch: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Perplexity over windows, each scored on its own (the usual way), and cache bytes a token.

    The bytes are those of the live arrays of a window's caches, divided by its tokens. Raises
    UserError where the loss is not finite.
    """
    total, count, held = 0.0, 0, 0
    batch = min(batch, len(windows_nT))
    for start in range(0, len(windows_nT), batch):
        part = windows_nT[start : start + batch]
        real = len(part)
        if real < batch:  # so that the last windows need no other program
            part = np.concatenate([part, np.repeat(part[-1:], batch - real, 0)])
        found, held = token_losses(params, part, cfg)
        found = np.asarray(found[:real], np.float64)
        total, count = total + found.sum(), count + found.size
        if progress:
            progress(start + real)
    mean = total / count
    if not math.isfinite(mean):
        raise UserError(
            f"the loss is {mean}: activations overflow {cfg.dtype}, or the model is broken; try "
            "--dtype bfloat16 or float32"
        )
    return dict(
        nll=mean,
        perplexity=math.exp(min(mean, 700)),
        tokens=count,
        windows=len(windows_nT),
        context=windows_nT.shape[1],
        cache_bytes_per_token=held / (batch * windows_nT.shape[1]),
    )


def retrieval(
    params: Params,
    cfg: Config,
    tokenizer: Any,
    records: Sequence[dict[str, Any]],
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Key-value retrieval: how often the greedy answer has the value, and the value's mean -log p.

    Small models rarely answer right, but the value's probability still ranks cache formats.
    """
    hits, likelihood = 0, []
    for n, record in enumerate(records):
        prompt, answer = retrieval_prompt(tokenizer, record)
        text = np.asarray(prompt + answer, np.int32)
        length = -(-len(text) // 256) * 256  # few program lengths
        padded = np.pad(text, (0, length - len(text)))[None]
        found = np.asarray(token_losses(params, padded, cfg)[0])[0]
        likelihood.append(float(found[len(prompt) - 1 : len(text) - 1].mean()))
        said = tokenizer.decode(generate(params, prompt, cfg, len(answer) + 4))
        hits += record["value"] in said
        if progress:
            progress(n + 1)
    return dict(accuracy=hits / len(records), answer_nll=float(np.mean(likelihood)), n=len(records))


def retrieval_prompt(tokenizer: Any, record: dict[str, Any]) -> tuple[list[int], list[int]]:
    """(tokens of the prompt, tokens of the value) in the layout of Lost in the Middle."""
    rows = ",\n ".join(f'"{key}": "{value}"' for key, value in record["pairs"])
    prompt = (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f'JSON data:\n{{{rows}}}\n\nKey: "{record["key"]}"\nCorresponding value: "'
    )
    whole = tokenizer.encode(prompt + record["value"])
    start = tokenizer.encode(prompt)
    same = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), None)
    cut = min(len(start), len(whole) - 1) if same is None else same
    return whole[:cut], whole[cut:]
