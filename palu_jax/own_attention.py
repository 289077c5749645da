"""Palu for the attention of somebody's Flax NNX model, which `llm_jax` need not know.

latents = palu_jax.compress_nnx(
    model, cfg, batches, keep=0.7,
    arrays={n: f"layers/.*/attn/{n}_proj/kernel" for n in "qkvo"},
    inputs="layers/.*/k_proj", queries="layers/.*/q_proj",
)
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from llm_jax.config import Config
from llm_jax.extras import need
from llm_jax.params import Attention, Layer, Params
from palu_jax.attention import PaluAttention
from palu_jax.compression import Search, compress
from palu_jax.convert import ConvertError, Objective
from palu_jax.own_forward import calibrate_nnx, of_layers

_NAMES = tuple(f.name for f in dataclasses.fields(Attention) if f.name not in ("kind", "sinks"))


def compress_nnx(
    model: Any,
    cfg: Config,
    batches: Iterable[np.ndarray],
    *,
    arrays: Mapping[str, str],
    inputs: str,
    queries: str,
    forward: Callable[[Any, jax.Array], Any] | None = None,
    objective: Objective = "aware",
    search: Search = "error",
    **options: Any,
) -> tuple[PaluAttention, ...]:
    """The low-rank attention of each layer of an NNX model, calibrated through its own forward.

    `arrays` are regular expressions for whole paths, one array of each a layer, by the names of
    `llm_jax.params.Attention`: q, k and v [D, N, H] or [D, N * H], o [N, H, D] or [N * H, D], and
    the q_bias, k_bias, v_bias, o_bias, q_norm and k_norm that there are. Norms multiply by their
    array. `inputs`, `queries` and `forward` are those of `calibrate_nnx`, `options` those of
    `compress`. `cfg` has the sizes, the rotation and the scores of the attention. What comes back
    is for `llm_jax.attention.attention`, and its cache for `empty_cache`.

    Raises ConvertError, also for what needs gradients, which are not taken here, and what
    `calibrate_nnx` and `compress` raise.
    """
    nnx = need("flax.nnx", "flax", "a model of Flax NNX")
    if objective == "gradient" or search.startswith("fisher"):
        raise ConvertError(
            f"objective {objective}, search {search}: gradients are not taken through a foreign "
            "forward; choose whitened or aware, and uniform or error"
        )
    if missing := [name for name in "qkvo" if name not in arrays]:
        raise ConvertError(f"no pattern for the matrices {', '.join(missing)}")
    if unknown := [name for name in arrays if name not in _NAMES]:
        raise ConvertError(f"{unknown[0]!r} is no part of attention; known: {', '.join(_NAMES)}")
    statistics = calibrate_nnx(
        model, batches, cfg, inputs=inputs, queries=queries, forward=forward
    )  # fmt: skip
    held = {
        "/".join(map(str, keys)): (keys, node)
        for keys, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable)
    }
    found = {
        name: [
            shaped(name, path, held[path][1].get_value(), cfg)
            for path in of_layers(pattern, {path: keys for path, (keys, _) in held.items()}, cfg)
        ]
        for name, pattern in arrays.items()
    }
    layers = tuple(
        Layer(
            None,
            Attention(**{n: each[i] for n, each in found.items()}, kind=cfg.kind(i)),
            None,
            None,
        )
        for i in range(cfg.layers)
    )
    palu = compress(
        Params(None, layers, None), cfg, statistics=statistics, objective=objective, search=search,
        **options,
    )  # fmt: skip
    return tuple(layer.attn for layer in palu.layers)


def shaped(name: str, path: str, array: Any, cfg: Config) -> jax.Array:
    """The array in the shape that `Attention` has it in; raises ConvertError."""
    D, H = cfg.d_model, cfg.head_dim
    F = (cfg.heads if name[0] in "qo" else cfg.kv_heads) * H
    shape = {
        "q": (D, F), "k": (D, F), "v": (D, F), "o": (F, D), "q_norm": (H,), "k_norm": (H,),
        "o_bias": (D,),
    }.get(name, (F,))  # fmt: skip
    own = tuple(getattr(array, "shape", ()))
    fits = own == shape
    if name in "qkv" and len(own) == 3:
        fits = own == (D, F // H, H)
    elif name == "o" and len(own) == 3:
        fits = own == (F // H, H, D)
    elif name.endswith("_bias") and len(own) == 2:
        fits = own == (F // H, H) and name != "o_bias"
    if not fits:
        raise ConvertError(f"{path} has shape {own}; expected {shape}, heads apart or together")
    return array.reshape(shape)
