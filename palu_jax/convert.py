"""`to_palu`: parameters in, parameters out, with low-rank key and value projections.

    groups = group_sizes(cfg.kv_heads, 2)
    ranks = uniform_ranks(cfg.layers, groups, cfg.head_dim, keep=0.7)
    statistics = calibrate(params, batches, cfg)
    palu = to_palu(params, cfg, Recipe(groups, ranks), statistics)

`palu_jax.compress` does all of it in one call.

Letters: D model, F outputs of a projection, K kv heads (K' in a group), N query heads, H head size,
R rank, g groups.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import SLIDING, Config
from llm_jax.params import Attention, Layer, Params
from palu_jax import PaluError
from palu_jax.attention import Factors, PaluAttention, frequencies_of, why_not
from palu_jax.calibration import LayerStatistics, Statistics
from palu_jax.decompose import Spectrum, block_diagonal, key_metric, spectrum, value_metric
from palu_jax.factors import stored_factors
from palu_jax.format import LatentFormat, MixedFormat
from palu_jax.identity import identity, not_finite
from palu_jax.rank import Ranks

Objective = Literal["plain", "whitened", "aware", "gradient"]
DISTANCES = np.unique(np.geomspace(1, 2048, 48).astype(int))
"""Distances between query and key; the cost of a key's error is averaged over them."""


class ConvertError(PaluError):
    """An impossible conversion; the message says what does not fit."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a converted model looks like: ranks, objective and format."""

    groups: tuple[int, ...]
    """The number of kv heads in each group, from `palu_jax.rank.group_sizes`."""
    ranks: Ranks
    """From `palu_jax.rank`."""
    objective: Objective = "whitened"
    """What the factors minimize. plain: the error of the weight (an SVD). whitened: the error of
    the outputs (Palu). aware: errors of keys weighted by the queries that they meet, errors of
    values by the output projection. gradient: both weighted by the gradient of the loss."""
    format: LatentFormat = dataclasses.field(default_factory=LatentFormat)
    """How latents are stored."""
    rotate: bool = True
    """Latents of fewer than 16 bits are rotated, each block of them by a Hadamard matrix (where
    there is none of its size, by another orthogonal one), which is multiplied into the factors."""
    mean_split: bool = False
    """Each token's coefficient of the mean direction of the inputs is kept apart, in the dtype of
    16-bit latents, and the factors minimize the error of what is left of the inputs. Not with
    `fuse_values`."""
    fuse_values: bool = False
    """The value factors are multiplied into the output projection; worth it for ranks up to H.
    Groups must be of one size, and value ranks of a layer all the same."""

    def __post_init__(self):
        """Sequences become tuples; raises ConvertError for ranks that are not whole numbers."""
        whole = lambda numbers: tuple(map(operator.index, numbers))
        try:
            groups = whole(self.groups)
            ranks = tuple((whole(k), whole(v)) for k, v in self.ranks)
        except (TypeError, ValueError) as error:
            raise ConvertError(
                f"groups and ranks must be whole numbers, as of `group_sizes` and a search: {error}"
            ) from error
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "ranks", ranks)


@dataclasses.dataclass(frozen=True)
class Spectra:
    """The spectra of all groups of one layer, and what is needed to make factors from them."""

    k: tuple[Spectrum, ...]
    v: tuple[Spectrum, ...]
    mean_D: np.ndarray | None
    """The mean direction that was split off."""
    w_k_DF: np.ndarray
    w_v_DF: np.ndarray
    groups: tuple[int, ...]
    objective: Objective


def layer_spectra(
    attn: Attention,
    cfg: Config,
    groups: Sequence[int],
    objective: Objective,
    statistics: LayerStatistics | None = None,
    mean: bool = False,
) -> Spectra:
    """The `Spectra` of a layer; they serve any ranks and any format.

    `mean` splits off the mean direction. Only the plain objective without a mean split needs no
    `statistics`. Raises ConvertError where something does not fit.
    """
    _check_ordinary(attn)
    check_groups(cfg, groups)
    if objective not in get_args(Objective):
        known = ", ".join(get_args(Objective))
        raise ConvertError(f"objective {objective!r} is not one of {known}")
    if statistics is None and (objective != "plain" or mean):
        raise ConvertError(f"the objective {objective} and a mean split need statistics; calibrate")
    if objective == "gradient" and statistics.grad_k_FF is None:
        raise ConvertError(
            "these statistics hold no gradients; calibrate with gradients=True, or choose the "
            "objective whitened or aware"
        )
    w_k, w_v = (np.asarray(w, np.float64) for w in (attn.k, attn.v))
    gram = None
    if statistics is not None:
        gram = np.asarray(statistics.gram_DD, np.float64)
        if len(gram) != cfg.d_model:
            raise ConvertError(
                f"the statistics belong to a model of width {len(gram)}; this one has {cfg.d_model}"
            )
        theirs = np.shape(statistics.query_KHH)[:2]
        if theirs != (cfg.kv_heads, cfg.head_dim):
            raise ConvertError(
                f"the statistics belong to a model with kv heads and head size {theirs}; this one "
                f"has {(cfg.kv_heads, cfg.head_dim)}"
            )
    mu = None
    if mean:
        mu = np.asarray(statistics.mean_D, np.float64)
        project = np.eye(len(mu)) - np.outer(mu, mu) / _square(mu)
        gram = project if objective == "plain" else project @ gram @ project
    elif objective == "plain":
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
    return Spectra(tuple(out[0]), tuple(out[1]), mu, w_k, w_v, tuple(groups), objective)


def _square(mean_D) -> float:
    """The squared length of the mean input; 1 where there is none, so that nothing is split off."""
    return float(mean_D @ mean_D) or 1.0


def _metrics(attn, cfg, objective, statistics):
    """The metrics [F, F] for errors of keys and of values; None for the identity."""
    if objective == "aware":
        frequencies = frequencies_of(cfg, attn.kind).astype(np.float64)
        distances = DISTANCES
        if attn.kind == SLIDING:
            distances = distances[distances < max(cfg.window, 2)]
        k = key_metric(statistics.query_KHH, frequencies, distances)
        v = value_metric(attn.o, cfg.heads, cfg.kv_heads)
        return block_diagonal(k), block_diagonal(v)
    if objective == "gradient":
        return statistics.grad_k_FF, statistics.grad_v_FF
    return None, None


def to_palu(
    params: Params,
    cfg: Config,
    recipe: Recipe,
    statistics: Statistics | None = None,
    progress: Callable[[int], None] | None = None,
    spectra: Sequence[Spectra] | None = None,
) -> Params:
    """The parameters with the attention of every layer converted; all other arrays are shared.

    Only the plain objective needs no `statistics`. `progress` gets the number of layers done.
    `spectra` are those of all layers where they exist already (`palu_jax.Compressor` keeps them).
    Raises ConvertError where the recipe does not fit the model or the spectra, where the statistics
    are of other parameters, and where numbers are not finite.
    """
    check_recipe(cfg, recipe, statistics)
    if spectra is None:
        check_model(params, cfg, statistics)
    else:
        _check_spectra(cfg, recipe, spectra)
    layers = []
    for i, layer in enumerate(params.layers):
        if spectra is not None:
            found = spectra[i]
        else:
            own = None if statistics is None else statistics.layers[i]
            check_finite(i, layer.attn, own)
            found = layer_spectra(
                layer.attn, cfg, recipe.groups, recipe.objective, own, recipe.mean_split
            )
        with np.errstate(over="ignore"):  # what overflows is named below
            own = dataclasses.replace(recipe, format=recipe.format.layer(i))
            made = convert_layer(layer, cfg, own, recipe.ranks[i], found)
        if bad := not_finite(made.attn):
            raise ConvertError(
                f"layer {i}: the converted {bad} overflows {cfg.dtype}; convert the model in "
                "bfloat16 or float32"
            )
        layers.append(made)
        if progress:
            progress(i + 1)
    return dataclasses.replace(params, layers=tuple(layers))


def convert_layer(
    layer: Layer,
    cfg: Config,
    recipe: Recipe,
    ranks: tuple[tuple[int, ...], tuple[int, ...]],
    found: Spectra,
) -> Layer:
    """The layer with a `PaluAttention` of these ranks, made from the layer's spectra.

    The recipe's format is that of this layer.
    """
    attn, dtype = layer.attn, cfg.dtype
    made = []
    pairs = ((found.k, found.w_k_DF), (found.v, found.w_v_DF))
    for which, (spectra, w_DF) in enumerate(pairs):
        down, up = _factors(spectra, ranks[which], recipe, cfg, which)
        mean_F = None
        if found.mean_D is not None:
            mu = found.mean_D
            down = down - np.outer(mu, mu @ down) / _square(mu)
            mean_F = jnp.asarray(mu @ w_DF, dtype)
        down, up = jnp.asarray(down, dtype), jnp.asarray(up, dtype)
        made.append(Factors(down, up, mean_F, tuple(ranks[which]), tuple(recipe.groups)))
    k, v = made
    mean_probe_D = None
    if found.mean_D is not None:
        mean_probe_D = jnp.asarray(found.mean_D / _square(found.mean_D), dtype)
    o, o_bias = attn.o, attn.o_bias
    if recipe.fuse_values:
        o, o_bias = _fused_output(attn, v, cfg)
        v = dataclasses.replace(v, up_gRKH=None)
    palu = PaluAttention(
        q=attn.q,
        k=k,
        v=v,
        o=o,
        q_bias=attn.q_bias,
        k_bias=attn.k_bias,
        v_bias=None if recipe.fuse_values else attn.v_bias,
        q_norm=attn.q_norm,
        k_norm=attn.k_norm,
        mean_probe_D=mean_probe_D,
        o_bias=o_bias,
        format=recipe.format,
        kind=attn.kind,
    )
    return dataclasses.replace(layer, attn=palu)


def _factors(spectra, ranks, recipe, cfg, side):
    """(down [D, sum of ranks], up [g, largest rank, K', H]) in float64."""
    downs = []
    up_gRKH = np.zeros((len(ranks), max(ranks), max(recipe.groups), cfg.head_dim))
    for i, (s, rank, heads) in enumerate(zip(spectra, ranks, recipe.groups, strict=True)):
        down, up = stored_factors(s, rank, recipe.format, side, i, recipe.rotate)
        downs.append(down)
        up_gRKH[i, :rank, :heads] = up.reshape(rank, heads, cfg.head_dim)
    return np.concatenate(downs, axis=1), up_gRKH


def _fused_output(attn, v: Factors, cfg):
    """(W_o times each head's value factor [N * R_v, D]; the output's own bias and W_o times the
    value bias [D])."""
    o = np.asarray(attn.o, np.float64).reshape(cfg.heads, cfg.head_dim, -1)
    up = np.asarray(v.up_gRKH, np.float64)
    shared = cfg.heads // cfg.kv_heads
    parts = []
    for n in range(cfg.heads):
        g, k = divmod(n // shared, v.heads[0])
        parts.append(up[g, :, k] @ o[n])
    fused = jnp.asarray(np.concatenate(parts), cfg.dtype)
    if attn.v_bias is None:
        return fused, attn.o_bias
    bias = np.asarray(attn.v_bias, np.float64).reshape(cfg.kv_heads, cfg.head_dim)
    spread = np.repeat(bias, shared, axis=0)
    total = np.einsum("nh,nhd->d", spread, o)
    if attn.o_bias is not None:
        total = total + np.asarray(attn.o_bias, np.float64)
    return fused, jnp.asarray(total, cfg.dtype)


def _check_ordinary(attn: Any) -> None:
    if not isinstance(attn, Attention):
        raise ConvertError(f"only ordinary attention can be converted, not {type(attn).__name__}")
    for name in "kvo":
        if not isinstance(w := getattr(attn, name), jax.Array | np.ndarray):
            raise ConvertError(
                f"the matrix {name} of an attention is {type(w).__name__}; only arrays can be "
                "converted: convert the 16-bit model"
            )


def check_family(cfg: Config) -> None:
    """Raises ConvertError for a model whose attention Palu's cannot replace."""
    if reason := why_not(cfg):
        raise ConvertError(f"{reason}, which Palu's attention has not; keep its ordinary cache")


def check_model(params: Params, cfg: Config, statistics: Statistics | None) -> None:
    """Raises ConvertError for a model that cannot be converted, and where the statistics are known
    to be of other parameters."""
    check_family(cfg)
    for layer in params.layers:
        _check_ordinary(layer.attn)
    if statistics is None or (theirs := statistics.model) is None:
        return
    if different := theirs.difference(identity(params, cfg.dtype, (theirs.dtype,))):
        raise ConvertError(
            f"the statistics are of another model (different: {different}); calibrate this one"
        )


def check_finite(index: int, attn: Any, statistics: LayerStatistics | None) -> None:
    """Raises ConvertError where a layer's attention or its statistics hold NaN or infinity."""
    if bad := not_finite(attn):
        raise ConvertError(
            f"layer {index}: the matrix {bad} of its attention holds NaN or infinity; the "
            "checkpoint is broken, or it overflows this dtype"
        )
    if statistics is not None and (bad := not_finite(vars(statistics))):
        raise ConvertError(
            f"layer {index}: {bad} of the statistics holds NaN or infinity; calibrate again, in "
            "bfloat16 or float32"
        )


def _check_spectra(cfg: Config, recipe: Recipe, spectra: Sequence[Spectra]) -> None:
    """Raises ConvertError where factors from these spectra are not those of the recipe."""
    if len(spectra) != cfg.layers:
        raise ConvertError(f"there are {len(spectra)} spectra; the model has {cfg.layers} layers")
    want = tuple(recipe.groups), recipe.objective, recipe.mean_split
    for i, s in enumerate(spectra):
        have = s.groups, s.objective, s.mean_D is not None
        for name, a, b in zip(("groups", "objective", "mean split"), have, want, strict=True):
            if a != b:
                raise ConvertError(f"layer {i}: the spectra have {name} {a}; the recipe has {b}")


def check_groups(cfg: Config, groups: Sequence[int]) -> None:
    """Raises ConvertError where groups do not make up the model's kv heads."""
    if sum(groups) != cfg.kv_heads or any(size < 1 for size in groups):
        raise ConvertError(
            f"groups {tuple(groups)} do not add up to the {cfg.kv_heads} kv heads of this model"
        )
    if len(set(groups[:-1])) > 1 or groups[-1] > groups[0]:
        raise ConvertError(f"groups {tuple(groups)}: only the last one may be smaller")


def check_recipe(cfg: Config, recipe: Recipe, statistics: Statistics | None = None) -> None:
    """Raises ConvertError for the first thing in a recipe that does not fit the model."""
    check_groups(cfg, recipe.groups)
    check_family(cfg)
    if len(recipe.ranks) != cfg.layers:
        raise ConvertError(
            f"the recipe has ranks for {len(recipe.ranks)} layers; the model has {cfg.layers}"
        )
    if isinstance(recipe.format, MixedFormat) and len(recipe.format.classes) != cfg.layers:
        raise ConvertError(
            f"the format has classes for {len(recipe.format.classes)} layers; the model has "
            f"{cfg.layers}"
        )
    if statistics is not None and len(statistics.layers) != cfg.layers:
        raise ConvertError(
            f"the statistics have {len(statistics.layers)} layers; the model has {cfg.layers}"
        )
    for i, layer in enumerate(recipe.ranks):
        for side, (name, ranks) in enumerate(zip(("key", "value"), layer, strict=True)):
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
            recipe.format.layer(i).layout(side, ranks)  # raises where blocks do not fit
    if recipe.fuse_values:
        if recipe.mean_split:
            raise ConvertError("fused values leave no place for a mean split; choose one")
        uneven = len(set(recipe.groups)) > 1 or any(len(set(v)) > 1 for _, v in recipe.ranks)
        if uneven:
            raise ConvertError("fused values need groups of one size and one rank a layer")
