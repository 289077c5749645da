"""Statistics of a model on text: moments of activations and gradients, layer by layer.

There is one forward pass and, for gradients, one backward pass. Layers are brought to the device
one after another, so memory holds two layers, the inputs of all layers for one batch, and the sums.

Letters: B sequences, T tokens of each, D model, K kv heads, H head size, F = K * H.
"""

import dataclasses
import functools
import hashlib
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from llm_jax.attention import (
    Step,
    attend,
    attention,
    causal_step,
    normed,
    projected,
    qkv_heads,
    rms_norm,
    rotated,
)
from llm_jax.config import Config
from llm_jax.files import atomic_file
from llm_jax.linear import linear
from llm_jax.model import block, embed, unembed
from llm_jax.params import Attention, Params
from llm_jax.stream import Stream, route
from palu_jax import PaluError

_HIGHEST = jax.lax.Precision.HIGHEST
_VERSION = 1


class CalibrationError(PaluError):
    """Statistics of another model or text, or no text; the message says what differs."""


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


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The moments of all layers, over this many tokens of this many sequences."""

    layers: tuple[LayerStatistics, ...]
    tokens: int
    sequences: int

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
    q = rotated(q, a.q_norm, step.position_BT, cfg)
    k = rotated(k + p.dk_BTKH, a.k_norm, step.position_BT, cfg)
    y_BTNH = attend(q, k, v + p.dv_BTKH, step.mask_BTS)
    return linear(a.o, y_BTNH.reshape(*y_BTNH.shape[:2], -1)), cache


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
    h = rms_norm(x_BTD, layer.attn_norm, cfg.norm_eps)
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
    h = rms_norm(x_BTD, layer.attn_norm, cfg.norm_eps).astype(jnp.float32)
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
    every_s: float = 60.0,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """`Statistics` over batches of token sequences, int [B, T].

    Layers may be in host memory. The loss of a sequence is the sum of -log p(next token). Labels
    are shifted by one position; the official code shifts twice, and so predicts the token after the
    next one. With `path`, sums are saved there every `every_s` seconds and at the end. An
    interrupted run continues after the batches that it has done; it must get the same text again.
    `progress` gets the number of sequences done. Raises CalibrationError.
    """
    path = None if path is None else Path(path).expanduser()
    key = _key(params, cfg, gradients)
    sums, done, text = _resume(path, key) if path is not None and path.exists() else (None, 0, "")
    counted, sequences, tokens, digest = 0, 0, 0, hashlib.sha256()
    saved = time.monotonic()
    for batch in batches:
        batch = np.asarray(batch, np.int32)
        if batch.ndim != 2 or batch.shape[1] < 2:
            raise CalibrationError(f"a batch has shape {batch.shape}; expected [sequences, tokens]")
        digest.update(batch.tobytes())
        counted, sequences, tokens = counted + 1, sequences + len(batch), tokens + batch.size
        if counted == done and digest.hexdigest() != text:
            raise CalibrationError(
                f"{path} was made from other text; give the same corpus, or another file"
            )
        if counted > done:
            new = _sums(params, batch, cfg, gradients)
            if sums is None:
                sums = [[np.asarray(a, np.float64) for a in layer] for layer in new]
            else:
                for old, layer in zip(sums, new, strict=True):
                    for total, a in zip(old, layer, strict=True):
                        total += np.asarray(a)
            if path is not None and time.monotonic() - saved > every_s:
                _save(path, key, sums, counted, digest.hexdigest())
                saved = time.monotonic()
        if progress:
            progress(sequences)
    if not counted:
        raise CalibrationError("there is no text to calibrate on; give at least one batch")
    if counted < done:
        raise CalibrationError(f"{path} holds {done} batches; the text given has only {counted}")
    if path is not None and counted > done:
        _save(path, key, sums, counted, digest.hexdigest())
    per = [tokens] * 3 + [tokens] * 2 + [sequences] * 2
    layers = tuple(
        LayerStatistics(*((a / n).astype(np.float32) for a, n in zip(layer, per, strict=False)))
        for layer in sums
    )
    return Statistics(layers, tokens, sequences)


def _sums(params: Params, tokens_BT, cfg: Config, gradients: bool) -> list[tuple]:
    """The sums of one batch for each layer: those of `_forward`, then those of `_backward`."""
    top = dataclasses.replace(params, layers=())
    if isinstance(params.embed_VD, np.ndarray):  # a table kept on the host
        x = jnp.asarray(params.embed_VD[tokens_BT]).astype(cfg.dtype)
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
    if gradients:
        grad = _loss_gradient(top, x, jnp.asarray(tokens_BT), cfg)
        last = len(inputs) - 1
        stream = Stream(route(params.layers[::-1]))
        for i in range(len(params.layers)):
            grad, found = _backward(next(stream), inputs.pop(), grad, cfg)
            stream.used(grad)
            sums[last - i] = (*sums[last - i], *jax.device_get(found))
    return sums


def _key(params: Params, cfg: Config, gradients: bool) -> str:
    """A hash of what saved sums depend on: sizes, some weights, and gradients or not."""
    rows = [np.asarray(jax.device_get(l.attn.k[:1]), np.float32) for l in params.layers]
    digest = hashlib.sha256(np.concatenate(rows).tobytes())
    digest.update(repr((_VERSION, cfg, gradients)).encode())
    return digest.hexdigest()


def _save(path: Path, key: str, sums, batches: int, text: str) -> None:
    arrays = {f"{i}/{j}": a for i, layer in enumerate(sums) for j, a in enumerate(layer)}
    with atomic_file(path) as scratch, scratch.open("wb") as file:
        np.savez(file, key=key, batches=batches, text=text, **arrays)


def _resume(path: Path, key: str):
    """(saved sums, number of batches done, hash of their text)."""
    try:
        with path.open("rb") as file, np.load(file) as found:
            if str(found["key"]) != key:
                raise CalibrationError(
                    f"{path} holds statistics of another model, or of another kind (with or "
                    "without gradients); give another file or remove it"
                )
            sums = {tuple(map(int, n.split("/"))): found[n] for n in found.files if "/" in n}
            batches, text = int(found["batches"]), str(found["text"])
    except (OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path} is damaged ({error}); remove it and run again") from error
    layers = max(i for i, _ in sums) + 1
    per = max(j for _, j in sums) + 1
    return [[sums[i, j] for j in range(per)] for i in range(layers)], batches, text
