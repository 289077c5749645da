"""Statistics of a model on text: moments of activations and gradients, layer by layer.

There is one forward pass and, for gradients, one backward pass. Layers are brought to the device
one after another, so memory holds two layers, the inputs of all layers for one batch, and the sums.

Letters: B sequences, T tokens of each, D model, K kv heads, H head size, F = K * H.
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llm_jax.attention import (
    Step,
    along_last,
    attend,
    attention,
    causal_step,
    normed,
    projected,
    qkv_heads,
    rotated,
    windowed,
)
from llm_jax.config import Config
from llm_jax.generation import GenerationError, checked_tokens
from llm_jax.linear import linear
from llm_jax.model import block, embed, normed_input, scaled, unembed
from llm_jax.params import Attention, Params
from llm_jax.stream import Stream, route
from palu_jax.attention import why_not
from palu_jax.identity import Identity, identity, not_finite
from palu_jax.saved_sums import CalibrationError, SavedSums, Sums
from palu_jax.signals import deferred

_HIGHEST = jax.lax.Precision.HIGHEST
_SHARE = 20
"""Sums are saved when computing has taken this many times as long as saving them does."""


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """The moments of one layer, float32 NumPy arrays; x is the normed input of attention."""

    gram_DD: np.ndarray
    """Mean over tokens of x x^T."""
    mean_D: np.ndarray
    """Mean of x."""
    query_KHH: np.ndarray
    """Mean of q q^T for queries before their rotation, summed over the heads that share a kv
    head."""
    grad_k_FF: np.ndarray | None = None
    """Mean over tokens of g g^T, where g is the loss's gradient for a key before norm and
    rotation."""
    grad_v_FF: np.ndarray | None = None
    """The same for values."""
    fisher_k_DF: np.ndarray | None = None
    """Mean over sequences of the squared gradient for the key projection (Fisher information)."""
    fisher_v_DF: np.ndarray | None = None
    """The same for the value projection."""


MOMENTS = tuple(field.name for field in dataclasses.fields(LayerStatistics))


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The moments of all layers, over this many tokens of this many sequences."""

    layers: tuple[LayerStatistics, ...]
    tokens: int
    sequences: int
    model: Identity | None = None
    """The model that they are of; conversion refuses another one. None: not known."""

    @property
    def gradients(self) -> bool:
        """Whether there are moments of gradients."""
        return self.layers[0].grad_k_FF is not None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ProbedAttention:
    """Attention with addends to its keys and values, to differentiate by them; uses no cache."""

    attn: Attention
    dk_BTKH: jax.Array
    dv_BTKH: jax.Array


@attention.register
def _(p: ProbedAttention, x_BTD, cache, step: Step, cfg: Config):
    a = p.attn
    q, k, v = qkv_heads(a, x_BTD, cfg)
    q = rotated(q, a.q_norm, step.position_BT, cfg, a.kind)
    k = rotated(k + p.dk_BTKH, a.k_norm, step.position_BT, cfg, a.kind)
    y_BTNH = attend(q, k, v + p.dv_BTKH, windowed(step, cfg, a.kind), cfg, a.sinks)
    y_BTD = linear(a.o, y_BTNH.reshape(*y_BTNH.shape[:2], -1))
    return (y_BTD if a.o_bias is None else y_BTD + along_last(a.o_bias, y_BTD)), cache


def _probed(layer, x_BTD, dk, dv, cfg):
    T = x_BTD.shape[1]
    layer = dataclasses.replace(layer, attn=ProbedAttention(layer.attn, dk, dv))
    return block(layer, x_BTD, None, causal_step(0, T, T), cfg)[0]


def _zeros(x_BTD, cfg):
    """[B, T, K, H]: an addend that changes nothing."""
    return jnp.zeros((*x_BTD.shape[:2], cfg.kv_heads, cfg.head_dim), x_BTD.dtype)


@functools.partial(jax.jit, static_argnames="cfg")
def _forward(layer, x_BTD, cfg):
    """(the layer's output, sums over tokens of x x^T, x and q q^T)."""
    zero = _zeros(x_BTD, cfg)
    h = normed_input(x_BTD, layer.attn_norm, cfg)
    q = projected(layer.attn.q, layer.attn.q_bias, h, cfg.head_dim)
    q = normed(q, layer.attn.q_norm, cfg)
    h, q = h.astype(jnp.float32), q.astype(jnp.float32)
    q_BTKGH = q.reshape(*q.shape[:2], cfg.kv_heads, -1, cfg.head_dim)
    gram = jnp.einsum("BTD,BTE->DE", h, h, precision=_HIGHEST)
    query = jnp.einsum("BTKGH,BTKGI->KHI", q_BTKGH, q_BTKGH, precision=_HIGHEST)
    return _probed(layer, x_BTD, zero, zero, cfg), (gram, h.sum((0, 1)), query)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="grad_BTD")
def _backward(layer, x_BTD, grad_BTD, cfg):
    """(gradient for the layer's input; for k and v the sums of g g^T over tokens; for k and v the
    sums of (x^T g)^2 over sequences)."""
    zero = _zeros(x_BTD, cfg)
    _, vjp = jax.vjp(lambda x, dk, dv: _probed(layer, x, dk, dv, cfg), x_BTD, zero, zero)
    grad, *changes = vjp(grad_BTD)
    h = normed_input(x_BTD, layer.attn_norm, cfg).astype(jnp.float32)
    sums = []
    for change in changes:
        g = change.astype(jnp.float32).reshape(*change.shape[:2], -1)
        weight_gradient = jnp.einsum("BTD,BTF->BDF", h, g, precision=_HIGHEST)
        sums.append(jnp.einsum("BTF,BTE->FE", g, g, precision=_HIGHEST))
        sums.append((weight_gradient**2).sum(0))
    return grad, tuple(sums[0::2] + sums[1::2])


@functools.partial(jax.jit, static_argnames="cfg")
def _loss_gradient(top, x_BTD, tokens_BT, cfg):
    """The summed loss's gradient for the last layer's output; position t predicts token t + 1."""

    def loss(x_TD, tokens_T):
        logp = jax.nn.log_softmax(unembed(top, x_TD[None, :-1], cfg)[0], axis=-1)
        return -jnp.take_along_axis(logp, tokens_T[1:, None], axis=-1).sum()

    return jax.lax.map(lambda args: jax.grad(loss)(*args), (x_BTD, tokens_BT))


def calibrate(
    params: Params,
    batches: Iterable[np.ndarray],
    cfg: Config,
    *,
    gradients: bool = True,
    path: str | Path | None = None,
    every_s: float = 5.0,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """`Statistics` over batches of token sequences, int [B, T].

    Layers may be in host memory. The loss of a sequence is the sum of -log p(next token). Labels
    are shifted by one position; the official code shifts twice, and so predicts the token after the
    next one. With `path`, sums are saved there every `every_s` seconds (less often where saving
    would take more than a twentieth of the time), at the end, and when an error, SIGINT or SIGTERM
    stops the work. An interrupted run continues after the batches that it has done; it must get the
    same model and text again. `progress` gets the number of sequences done. Raises
    CalibrationError, also for NaN or infinity in weights or sums, and for a model that cannot be
    converted.
    """
    if reason := why_not(cfg):
        raise CalibrationError(f"{reason}, which Palu's attention has not; it cannot be converted")
    _check_weights(params)
    model = identity(params, cfg.dtype)
    store = None if path is None else SavedSums(path, model, cfg, gradients)
    sums = (store and store.read()) or Sums()
    done, text, whole = sums.batches, sums.text, True
    counted, sequences, tokens, digest = 0, 0, 0, hashlib.sha256()
    saved, took = time.monotonic(), 0.0
    try:
        with deferred() as stop:
            for batch in batches:
                batch = checked_batch(batch, counted, cfg)
                digest.update(repr(batch.shape).encode() + batch.tobytes())
                counted, sequences, tokens = (
                    counted + 1,
                    sequences + len(batch),
                    tokens + batch.size,
                )
                if counted == done and digest.hexdigest() != text:
                    raise CalibrationError(
                        f"{path} was made from other text; give the same corpus, or another file"
                    )
                if counted > done:
                    new = _sums(params, batch, cfg, gradients, stop)
                    check_sums(new, counted, cfg)
                    whole = False
                    sums.add(new, digest.hexdigest())
                    whole = True
                if store and time.monotonic() - saved > max(every_s, _SHARE * took):
                    began = time.monotonic()
                    store.write(sums)
                    saved = time.monotonic()
                    took = saved - began
                if progress:
                    progress(sequences)
                stop()
        if not counted:
            raise CalibrationError("there is no text to calibrate on; give at least one batch")
        if counted < done:
            raise CalibrationError(
                f"{path} holds {done} batches; the text given has only {counted}"
            )
    finally:
        if store and whole:
            store.write(sums)
    per = [tokens] * 3 + [tokens] * 2 + [sequences] * 2
    layers = tuple(
        LayerStatistics(*((a / n).astype(np.float32) for a, n in zip(layer, per, strict=False)))
        for layer in sums.layers
    )
    return Statistics(layers, tokens, sequences, model)


def _check_weights(params: Params) -> None:
    """Raises CalibrationError for attention that cannot be measured, and for NaN or infinity."""
    if odd := [type(l.attn).__name__ for l in params.layers if not isinstance(l.attn, Attention)]:
        raise CalibrationError(f"only ordinary attention can be calibrated, not {odd[0]}")
    top = dataclasses.replace(params, layers=())
    for where, part in (("", top), *((f"layer {i}: ", l) for i, l in enumerate(params.layers))):
        if bad := not_finite(part):
            raise CalibrationError(
                f"{where}the matrix {bad} holds NaN or infinity; the checkpoint is broken, or it "
                "overflows this dtype"
            )


def checked_batch(batch: Any, number: int, cfg: Config) -> np.ndarray:
    """The batch as int32 [B, T]; raises CalibrationError."""
    try:
        batch = checked_tokens(batch, cfg.vocab)
    except GenerationError as error:
        raise CalibrationError(f"batch {number + 1}: {error}") from error
    if batch.ndim != 2 or len(batch) < 1 or batch.shape[1] < 2:
        raise CalibrationError(
            f"batch {number + 1} has shape {batch.shape}; expected [sequences, tokens], at least "
            "one sequence of two tokens"
        )
    return batch


def check_sums(sums: list[tuple], number: int, cfg: Config) -> None:
    """Raises CalibrationError where activations or gradients overflowed."""
    for i, layer in enumerate(sums):
        for name, found in zip(MOMENTS, layer, strict=False):
            if not np.isfinite(found).all():
                raise CalibrationError(
                    f"layer {i}: {name} of batch {number} holds NaN or infinity, though all "
                    f"weights are finite; {cfg.dtype} overflows: calibrate in bfloat16 or float32"
                )


def _sums(
    params: Params, tokens_BT, cfg: Config, gradients: bool, stop: Callable[[], None]
) -> list[tuple]:
    """The sums of one batch for each layer: those of `_forward`, then those of `_backward`.

    `stop` is called after each layer; it may raise.
    """
    top = dataclasses.replace(params, layers=())
    if isinstance(params.embed_VD, np.ndarray):  # a table kept on the host
        x = scaled(jnp.asarray(params.embed_VD[tokens_BT]).astype(cfg.dtype), cfg.embed_scale)
        top = dataclasses.replace(top, embed_VD=None)
    else:
        x = jax.jit(embed, static_argnames="cfg")(top, jnp.asarray(tokens_BT), cfg=cfg)
    inputs, sums = [], []
    stream = Stream(route(params.layers))
    for _ in params.layers:
        inputs.append(x)
        x, found = _forward(next(stream), x, cfg)
        stream.used(x)
        sums.append(jax.device_get(found))
        stop()
    if gradients:
        grad = _loss_gradient(top, x, jnp.asarray(tokens_BT), cfg)
        last = len(inputs) - 1
        stream = Stream(route(params.layers[::-1]))
        for i in range(len(params.layers)):
            grad, found = _backward(next(stream), inputs.pop(), grad, cfg)
            stream.used(grad)
            sums[last - i] = (*sums[last - i], *jax.device_get(found))
            stop()
    return sums
