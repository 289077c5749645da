"""`to_palu`: parameters in, parameters out, with low-rank key and value projections.

    statistics = calibrate(params, batches, cfg)
    palu = to_palu(params, cfg, Recipe(ranks=uniform(...)), statistics)
    tokens = generate(palu, prompt, cfg, steps=64)

Letters: D model, F outputs of a projection, K kv heads (K' in a group), N query heads, H head size,
R rank, g groups.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from llm_jax.attention import rope_frequencies
from llm_jax.config import Config
from llm_jax.params import Attention, Layer, Params
from palu_jax import PaluError
from palu_jax.attention import Factors, PaluAttention
from palu_jax.decompose import Spectrum, block_diagonal, key_metric, spectrum, value_metric
from palu_jax.latent import LatentFormat, rotation

Objective = Literal["plain", "whitened", "aware", "gradient"]
DISTANCES = np.unique(np.geomspace(1, 2048, 48).astype(int))
"""Between query and key, over which the cost of a key's error is averaged."""


class ConvertError(PaluError):
    """A conversion that cannot be; the message says what does not fit."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a converted model looks like.

    `objective`: plain SVD of the weight; whitened by the inputs (Palu); aware, which weights errors
    of keys by the queries they meet and errors of values by the output projection; gradient, which
    weights both by the gradient of the loss.
    """

    groups: tuple[int, ...]
    """kv heads of each group, from `palu_jax.rank.group_sizes`."""
    ranks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """For each layer the ranks of K's groups and of V's, from `palu_jax.rank`."""
    objective: Objective = "whitened"
    format: LatentFormat = dataclasses.field(default_factory=LatentFormat)
    rotate: bool = True
    """Latents are turned by a Hadamard matrix, folded into the factors; for fewer than 16 bits."""
    mean_split: bool = False
    """The mean direction of the inputs has a 16-bit coefficient of its own, one a token."""
    fuse_values: bool = False
    """The value factor is multiplied into the output projection; pays for ranks up to H."""


@dataclasses.dataclass(frozen=True)
class Spectra:
    """The spectra of all groups of one layer, and the mean direction that was split off."""

    k: tuple[Spectrum, ...]
    v: tuple[Spectrum, ...]
    mean_D: np.ndarray | None
    w_k_DF: np.ndarray
    w_v_DF: np.ndarray


def layer_spectra(attn: Attention, cfg: Config, groups, objective, statistics=None, mean=False):
    """The `Spectra` of a layer: everything about a conversion but the ranks.

    `statistics` is the layer's `palu_jax.calibrate.LayerStatistics`; the plain objective and no
    mean split need none.
    """
    if not isinstance(attn, Attention):
        raise ConvertError(f"only ordinary attention can be converted, not {type(attn).__name__}")
    check_groups(cfg, groups)
    if objective not in get_args(Objective):
        known = ", ".join(get_args(Objective))
        raise ConvertError(f"objective {objective!r} is not one of {known}")
    if statistics is None and (objective != "plain" or mean):
        raise ConvertError(f"the objective {objective} and a mean split need statistics; calibrate")
    if objective == "gradient" and statistics.grad_k_FF is None:
        raise ConvertError("these statistics hold no gradients; calibrate with gradients=True")
    w_k, w_v = (np.asarray(w, np.float64) for w in (attn.k, attn.v))
    gram = None
    if statistics is not None:
        gram = np.asarray(statistics.gram_DD, np.float64)
        if len(gram) != cfg.d_model:
            raise ConvertError(
                f"the statistics are of a model of width {len(gram)}; this one has {cfg.d_model}"
            )
        theirs = np.shape(statistics.query_KHH)[:2]
        if theirs != (cfg.kv_heads, cfg.head_dim):
            raise ConvertError(
                f"the statistics are of a model with kv heads and head size {theirs}; this one has "
                f"{(cfg.kv_heads, cfg.head_dim)}"
            )
    mu = None
    if mean:
        mu = np.asarray(statistics.mean_D, np.float64)
        project = np.eye(len(mu)) - np.outer(mu, mu) / (mu @ mu)
        gram = project @ gram @ project
    if objective == "plain":
        gram = None
    metric_k, metric_v = _metrics(attn, cfg, objective, statistics)
    out, size = ([], []), cfg.head_dim
    for parts, w, metric in ((out[0], w_k, metric_k), (out[1], w_v, metric_v)):
        at = 0
        for heads in groups:
            rows = slice(at * size, (at + heads) * size)
            at += heads
            block = None if metric is None else metric[rows, rows]
            parts.append(spectrum(w[:, rows], gram, block))
    return Spectra(tuple(out[0]), tuple(out[1]), mu, w_k, w_v)


def _metrics(attn, cfg, objective, statistics):
    """The metrics [F, F] of the errors of keys and of values, None for the identity."""
    if objective == "aware":
        frequencies = rope_frequencies(cfg).astype(np.float64)
        k = key_metric(statistics.query_KHH, frequencies, DISTANCES)
        v = value_metric(attn.o, cfg.heads, cfg.kv_heads)
        return block_diagonal(k), block_diagonal(v)
    if objective == "gradient":
        return statistics.grad_k_FF, statistics.grad_v_FF
    return None, None


def to_palu(
    params: Params,
    cfg: Config,
    recipe: Recipe,
    statistics=None,
    progress: Callable[[int], None] | None = None,
) -> Params:
    """The parameters with every layer's attention converted; everything else is shared.

    `statistics` are `palu_jax.calibrate.Statistics`, not needed by the plain objective.
    """
    check(cfg, recipe, statistics)
    layers = []
    for i, layer in enumerate(params.layers):
        of_layer = None if statistics is None else statistics.layers[i]
        found = layer_spectra(
            layer.attn, cfg, recipe.groups, recipe.objective, of_layer, recipe.mean_split
        )
        layers.append(convert_layer(layer, cfg, recipe, recipe.ranks[i], found))
        if progress:
            progress(i + 1)
    return dataclasses.replace(params, layers=tuple(layers))


def convert_layer(layer: Layer, cfg: Config, recipe: Recipe, ranks, found: Spectra) -> Layer:
    """The layer with a `PaluAttention`, from spectra that serve any ranks and format."""
    attn, dtype = layer.attn, cfg.dtype
    bits = recipe.format.key_bits, recipe.format.value_bits
    made = []
    pairs = ((found.k, found.w_k_DF), (found.v, found.w_v_DF))
    for which, (spectra, w_DF) in enumerate(pairs):
        rotate = recipe.rotate and bits[which] < 16
        down, up = _factors(spectra, ranks[which], recipe, cfg, rotate)
        mean_F = None
        if found.mean_D is not None:
            mu = found.mean_D
            down = down - np.outer(mu, mu @ down) / (mu @ mu)
            mean_F = jnp.asarray(mu @ w_DF, dtype)
        down, up = jnp.asarray(down, dtype), jnp.asarray(up, dtype)
        made.append(Factors(down, up, mean_F, tuple(ranks[which]), tuple(recipe.groups)))
    k, v = made
    lead = None
    if found.mean_D is not None:
        lead = jnp.asarray(found.mean_D / (found.mean_D @ found.mean_D), dtype)
    o, o_bias = attn.o, None
    if recipe.fuse_values:
        o, o_bias = _fused_output(attn, v, cfg)
        v = dataclasses.replace(v, up_gRKH=None)
    palu = PaluAttention(
        attn.q,
        k,
        v,
        o,
        attn.q_bias,
        attn.k_bias,
        None if recipe.fuse_values else attn.v_bias,
        attn.q_norm,
        attn.k_norm,
        lead,
        o_bias,
        recipe.format,
    )
    return dataclasses.replace(layer, attn=palu)


def _factors(spectra, ranks, recipe, cfg, rotate):
    """(down [D, sum of ranks], up [g, largest rank, K', H]) in float64."""
    downs = []
    up_gRKH = np.zeros((len(ranks), max(ranks), max(recipe.groups), cfg.head_dim))
    for i, (s, rank, heads) in enumerate(zip(spectra, ranks, recipe.groups, strict=True)):
        down, up = s.factors(rank)
        if rotate:
            down, up = turned(down, up, recipe.format.block or rank)
        downs.append(down)
        up_gRKH[i, :rank, :heads] = up.reshape(rank, heads, cfg.head_dim)
    return np.concatenate(downs, axis=1), up_gRKH


def turned(down_DR, up_RF, block: int):
    """The factors with their latents rotated, `block` latents at a time.

    Blocks take every n-th latent, so that each has its share of the large ones.
    """
    count = down_DR.shape[1] // block
    order = np.arange(count * block).reshape(block, count).T.reshape(-1)
    q = rotation(block)
    down, up = down_DR[:, order], up_RF[order]
    down = (down.reshape(-1, count, block) @ q).reshape(down.shape)
    return down, (q.T @ up.reshape(count, block, -1)).reshape(up.shape)


def _fused_output(attn, v: Factors, cfg):
    """(W_o with each head's value factor in front [N * R_v, D], W_o^T of the value bias [D])."""
    o = np.asarray(attn.o, np.float64).reshape(cfg.heads, cfg.head_dim, -1)
    up = np.asarray(v.up_gRKH, np.float64)
    shared = cfg.heads // cfg.kv_heads
    parts = []
    for n in range(cfg.heads):
        g, k = divmod(n // shared, v.heads[0])
        parts.append(up[g, :, k] @ o[n])
    fused = jnp.asarray(np.concatenate(parts), cfg.dtype)
    if attn.v_bias is None:
        return fused, None
    bias = np.asarray(attn.v_bias, np.float64).reshape(cfg.kv_heads, cfg.head_dim)
    spread = np.repeat(bias, shared, axis=0)
    return fused, jnp.asarray(np.einsum("nh,nhd->d", spread, o), cfg.dtype)


def check_groups(cfg: Config, groups) -> None:
    if sum(groups) != cfg.kv_heads or any(size < 1 for size in groups):
        raise ConvertError(
            f"groups {tuple(groups)} do not add up to the {cfg.kv_heads} kv heads of this model"
        )
    if len(set(groups[:-1])) > 1 or groups[-1] > groups[0]:
        raise ConvertError(f"groups {tuple(groups)}: only the last one may be smaller")


def check(cfg: Config, recipe: Recipe, statistics=None) -> None:
    """Raises ConvertError for the first thing about a recipe that does not fit the model."""
    check_groups(cfg, recipe.groups)
    if len(recipe.ranks) != cfg.layers:
        raise ConvertError(
            f"the recipe has ranks for {len(recipe.ranks)} layers; the model has {cfg.layers}"
        )
    if statistics is not None and len(statistics.layers) != cfg.layers:
        raise ConvertError(
            f"the statistics are of {len(statistics.layers)} layers; the model has {cfg.layers}"
        )
    for i, layer in enumerate(recipe.ranks):
        for name, ranks in zip(("key", "value"), layer, strict=True):
            if len(ranks) != len(recipe.groups):
                raise ConvertError(
                    f"layer {i}: {len(ranks)} {name} ranks for {len(recipe.groups)} groups"
                )
            for rank, heads in zip(ranks, recipe.groups, strict=True):
                full = heads * cfg.head_dim
                if not 1 <= rank <= full:
                    raise ConvertError(
                        f"layer {i}: {name} rank {rank} of a group of {heads} heads; expected 1 to "
                        f"{full}, the group's outputs"
                    )
            recipe.format.blocks(ranks)  # raises where blocks do not divide
    if recipe.fuse_values:
        if recipe.mean_split:
            raise ConvertError("fused values leave no place for a mean split; choose one")
        uneven = len(set(recipe.groups)) > 1 or any(len(set(v)) > 1 for _, v in recipe.ranks)
        if uneven:
            raise ConvertError("fused values need groups of one size and one rank a layer")
