"""Moments of somebody's Flax NNX model on text, through its own forward pass.

    statistics = palu_jax.calibrate_nnx(
        model, batches, cfg, inputs="layers/.*/k_proj", queries="layers/.*/q_norm"
    )
    palu = palu_jax.compress(params, cfg, objective="aware", statistics=statistics)

A clone of the model carries the sums as variables of the modules that are watched, so they come out
of `nnx.jit`, `nnx.remat` and the like as the model's other state does.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import Config
from llm_jax.extras import need
from llm_jax.rules import chosen
from palu_jax.attention import why_not
from palu_jax.calibration import (
    LayerStatistics,
    Statistics,
    check_sums,
    checked_batch,
)
from palu_jax.saved_sums import CalibrationError, Sums

_HIGHEST = jax.lax.Precision.HIGHEST
_INPUTS, _QUERIES = "palu_inputs", "palu_queries"


@dataclasses.dataclass(frozen=True)
class _Site:
    """What `llm_jax.rules` asks of a rule."""

    path: str


def calibrate_nnx(
    model: Any,
    batches: Iterable[np.ndarray],
    cfg: Config,
    *,
    inputs: str,
    queries: str,
    forward: Callable[[Any, jax.Array], Any] | None = None,
) -> Statistics:
    """`Statistics` over batches of token ids, int [B, T], of an NNX model; without gradients.

    `inputs` and `queries` are regular expressions for whole paths of modules, such as
    `layers/.*/k_proj`, one of each a layer. The first argument of an `inputs` module, say the key
    projection, is the normed input of attention, [B, T, D]. What a `queries` module gives are
    queries before their rotation, [B, T, N, H] or [B, T, N * H]: the query norm, or without one the
    query projection. `forward(model, tokens)` runs the model, and must call each of them once;
    None: `model(tokens)`. It is compiled by `nnx.jit`, and must not put the model through
    `jax.jit`, which loses what a module keeps. `cfg` has the model's sizes. The model stays as it
    is.

    They serve the objectives "whitened" and "aware" and the searches "uniform" and "error";
    `compress` refuses the others, which need gradients. They know nothing of the parameters that
    they are of, so it cannot refuse them for others.

    Raises CalibrationError, RuleError for paths that match nothing, and MissingPackage without
    Flax.
    """
    nnx = need("flax.nnx", "flax", "a model of Flax NNX")
    if reason := why_not(cfg):
        raise CalibrationError(f"{reason}, which Palu's attention has not; it cannot be converted")
    if not isinstance(model, nnx.Module):
        raise CalibrationError(f"a {type(model).__name__} is no Flax NNX module")
    model = nnx.clone(model)
    seen = _watched(model, inputs, _INPUTS, functools.partial(_of_inputs, cfg), cfg)
    asked = _watched(model, queries, _QUERIES, functools.partial(_of_queries, cfg), cfg)
    run = nnx.jit(lambda model, tokens: (forward or type(model).__call__)(model, tokens))
    sums, tokens, sequences = Sums(), 0, 0
    for batch in batches:
        batch = checked_batch(batch, sums.batches, cfg)
        for module, name, _ in (*seen, *asked):
            held = getattr(module, name)
            held.set_value(jax.tree.map(jnp.zeros_like, held.get_value()))
        run(model, jnp.asarray(batch))
        new = [
            (*_taken(one, batch.size), *_taken(two, batch.size))
            for one, two in zip(seen, asked, strict=True)
        ]
        check_sums(new, sums.batches + 1, cfg)
        sums.add(new, "")
        tokens, sequences = tokens + batch.size, sequences + len(batch)
    if not sums.batches:
        raise CalibrationError("there is no text to calibrate on; give at least one batch")
    mean = lambda layer: [(a / tokens).astype(np.float32) for a in layer]
    layers = tuple(LayerStatistics(*mean(layer)) for layer in sums.layers)
    return Statistics(layers, tokens, sequences)


def _watched(model: Any, pattern: str, name: str, sums: Callable, cfg: Config) -> list[tuple]:
    """(module, name of its variable, path) of each layer, in the order of the layers.

    The modules become of a class that calls theirs and adds to the variable.
    """
    from flax import nnx

    modules = {
        "/".join(map(str, keys)): (keys, node)
        for keys, node in nnx.iter_graph(model)
        if keys and isinstance(node, nnx.Module) and callable(node)
    }
    found = of_layers(pattern, {path: keys for path, (keys, _) in modules.items()}, cfg)
    for path in found:
        node = modules[path][1]
        setattr(node, name, nnx.Variable(jax.tree.map(jnp.zeros_like, sums(None))))
        node.__class__ = _watching(type(node), name, path, sums)
    return [(modules[path][1], name, path) for path in found]


def of_layers(pattern: str, keys: Mapping[str, tuple], cfg: Config) -> list[str]:
    """The paths that the pattern chooses, one a layer, in the order of the layers.

    `keys` are the parts of each path. Raises RuleError, and CalibrationError for another number.
    """
    order = lambda path: [(isinstance(key, str), key) for key in keys[path]]
    found = sorted(chosen([_Site(pattern)], keys), key=order)
    if len(found) != cfg.layers:
        raise CalibrationError(
            f"{pattern!r} chooses {len(found)} parts of a model of {cfg.layers} layers: "
            f"{', '.join(found[:3])} …"
        )
    return found


def _watching(cls: type, name: str, path: str, sums: Callable) -> type:
    """The class with a call that adds `sums` of its input and output to the variable `name`."""

    def call(self, *args, **kwargs):
        y = cls.__call__(self, *args, **kwargs)
        held = getattr(self, name)
        x = args[0] if args else next(iter(kwargs.values()))
        held.set_value(jax.tree.map(jnp.add, held.get_value(), sums((path, x, y))))
        return y

    return type(cls.__name__, (cls,), {"__call__": call})


def _of_inputs(cfg: Config, used: tuple[str, jax.Array, jax.Array] | None) -> tuple:
    """(sums over tokens of x x^T and x, how many tokens); without a use, their shapes."""
    D = cfg.d_model
    if used is None:
        return jnp.zeros((D, D)), jnp.zeros(D), jnp.int32(0)
    path, x, _ = used
    if x.shape[-1] != D:
        raise CalibrationError(f"{path} gets {x.shape}; expected [B, T, {D}], attention's input")
    x_XD = x.reshape(-1, D).astype(jnp.float32)
    gram = jnp.einsum("XD,XE->DE", x_XD, x_XD, precision=_HIGHEST)
    return gram, x_XD.sum(0), jnp.int32(len(x_XD))


def _of_queries(cfg: Config, used: tuple[str, jax.Array, jax.Array] | None) -> tuple:
    """(sums over tokens and the heads of a kv head of q q^T, how many tokens)."""
    K, N, H = cfg.kv_heads, cfg.heads, cfg.head_dim
    if used is None:
        return jnp.zeros((K, H, H)), jnp.int32(0)
    path, _, q = used
    if q.shape[-2:] != (N, H) and q.shape[-1] != N * H:
        raise CalibrationError(f"{path} gives {q.shape}; expected queries [B, T, {N}, {H}]")
    q_XKGH = q.reshape(-1, K, N // K, H).astype(jnp.float32)
    return jnp.einsum("XKGH,XKGI->KHI", q_XKGH, q_XKGH, precision=_HIGHEST), jnp.int32(len(q_XKGH))


def _taken(watched: tuple, tokens: int) -> list[np.ndarray]:
    """The sums of one batch; raises CalibrationError where they are not of each token once."""
    module, name, path = watched
    *found, count = jax.device_get(getattr(module, name).get_value())
    if count != tokens:
        raise CalibrationError(
            f"{path} was called with {count} tokens for a batch of {tokens}; the forward pass must "
            "call it once, and keep the model's state (nnx.jit, not jax.jit)"
        )
    return found
