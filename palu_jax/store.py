"""Converted models on disk: the low-rank factors through orbax, beside a description in JSON.

    save("smollm2-palu", palu, cfg, recipe, source="smollm2-135m")
    palu = restore("smollm2-palu", params, cfg)

Only what conversion made is stored; all else comes from the model's own checkpoint.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.config import Config
from llm_jax.params import Layer, Params
from palu_jax import PaluError
from palu_jax.attention import Factors, PaluAttention
from palu_jax.convert import Recipe, check
from palu_jax.latent import LatentFormat

VERSION = 1
NAME = "palu.json"


class StoreError(PaluError):
    """A stored conversion that cannot be used; the message says why and what to do."""


def save(folder, params: Params, cfg: Config, recipe: Recipe, source: str, replace=False) -> None:
    """Writes the converted parts of `params`; a reader never sees half of them.

    `source` says where the model's own weights come from: a registered name or a path. Raises
    StoreError where the folder exists, unless `replace` and it holds a stored conversion.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not (replace and (folder / NAME).exists()):
        raise StoreError(f"{folder} exists; choose another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with ocp.StandardCheckpointer() as writer:
            writer.save(
                scratch / "factors", {str(i): _made(l) for i, l in enumerate(params.layers)}
            )
        described = dict(
            version=VERSION,
            source=source,
            config=dataclasses.asdict(cfg),
            weights=[_sample(layer) for layer in params.layers],
            recipe=dataclasses.asdict(recipe),
        )
        (scratch / NAME).write_text(json.dumps(described, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _made(layer: Layer) -> dict[str, Any]:
    """The arrays of a layer's attention that are not the model's own."""
    p = layer.attn
    if not isinstance(p, PaluAttention):
        raise StoreError(f"a layer holds {type(p).__name__}; only converted models are stored")
    parts = dict(k_down=p.k.down_DR, k_up=p.k.up_gRKH, v_down=p.v.down_DR, v_up=p.v.up_gRKH)
    parts |= dict(k_mean=p.k.mean_F, v_mean=p.v.mean_F, lead=p.lead_D)
    if p.v.up_gRKH is None:
        parts |= dict(o=p.o, o_bias=p.o_bias)
    return {name: array for name, array in parts.items() if array is not None}


def _sample(layer: Layer) -> list[float]:
    """A few numbers of the query projection, which no conversion changes, to know weights by."""
    return np.asarray(jax.device_get(layer.attn.q[:1, :8]), np.float32)[0].tolist()


def _check_weights(stored, samples, place) -> None:
    """Raises StoreError where the samples of all layers are not those of the stored model."""
    ours, theirs = np.array(samples), np.array(stored.weights)
    # Another dtype rounds to 8 bits.
    if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=0.01, atol=1e-6):
        raise StoreError(
            f"{stored.folder} was made from other weights than {place}; convert these with "
            f"python -m experiments.palu --save, or load those it was made from ({stored.source})"
        )


@dataclasses.dataclass(frozen=True)
class Stored:
    """A stored conversion, before its arrays are read."""

    folder: Path
    source: str
    cfg: Config
    recipe: Recipe
    weights: list[list[float]]


def describe(folder) -> Stored:
    """What a folder written by `save` holds."""
    folder = Path(folder).expanduser().absolute()
    if not (folder / NAME).exists():
        raise StoreError(
            f"{folder} is no stored conversion: it has no {NAME}; make one with "
            "python -m experiments.palu --save FOLDER"
        )
    try:
        found = json.loads((folder / NAME).read_text())
        version = found["version"]
        if version != VERSION:
            raise StoreError(
                f"{folder} was written in format {version}; this program reads {VERSION}: convert "
                "the model again"
            )
        return Stored(
            folder,
            found["source"],
            Config(**found["config"] | dict(rope_scaling=_rope(found["config"]))),
            _recipe(found["recipe"]),
            found["weights"],
        )
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{folder / NAME} is damaged ({error}); convert the model again"
        ) from error


def _rope(config):
    from llm_jax.config import Llama3Rope

    scaling = config["rope_scaling"]
    return scaling and Llama3Rope(**scaling)


def _recipe(found) -> Recipe:
    tuples = lambda value: tuple(map(tuples, value)) if isinstance(value, list) else value
    form = {name: tuples(value) for name, value in found["format"].items()}
    rest = {name: tuples(value) for name, value in found.items() if name != "format"}
    return Recipe(**rest, format=LatentFormat(**form))


def abstract_layers(stored: Stored, model: Params, cfg: Config) -> Params:
    """The converted model as shapes and dtypes, from those of the plain one; reads no arrays."""
    recipe = stored.recipe
    array = lambda *shape: jax.ShapeDtypeStruct(shape, cfg.dtype)
    layers = []
    for layer, ranks in zip(model.layers, recipe.ranks, strict=True):
        a, (k, v) = layer.attn, ranks
        mean = array(cfg.kv_heads * cfg.head_dim) if recipe.mean_split else None
        up = lambda r: array(len(r), max(r), max(recipe.groups), cfg.head_dim)
        made = [
            Factors(array(cfg.d_model, sum(r)), up(r), mean, tuple(r), tuple(recipe.groups))
            for r in (k, v)
        ]
        o, o_bias, v_bias = a.o, None, a.v_bias
        if recipe.fuse_values:
            made[1] = dataclasses.replace(made[1], up_gRKH=None)
            o, v_bias = array(cfg.heads * v[0], cfg.d_model), None
            o_bias = None if a.v_bias is None else array(cfg.d_model)
        lead = array(cfg.d_model) if recipe.mean_split else None
        norms = a.q_norm, a.k_norm, lead, o_bias
        attn = PaluAttention(a.q, *made, o, a.q_bias, a.k_bias, v_bias, *norms, recipe.format)
        layers.append(dataclasses.replace(layer, attn=attn))
    return dataclasses.replace(model, layers=tuple(layers))


def read_factors(stored: Stored, cfg: Config) -> list[dict[str, np.ndarray]]:
    """The stored arrays of every layer, as NumPy arrays in `cfg.dtype`."""
    import orbax.checkpoint as ocp

    folder = stored.folder / "factors"
    with ocp.PyTreeCheckpointer() as reader:
        held = reader.metadata(folder).item_metadata if folder.exists() else None
        if held is None:
            raise StoreError(f"{folder} is missing or damaged; convert the model again")
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), held.tree)
        found = reader.restore(folder, restore_args=as_numpy)
    return [
        {name: np.asarray(a).astype(np.dtype(cfg.dtype)) for name, a in found[str(i)].items()}
        for i in range(cfg.layers)
    ]


def converted(layer: Layer, parts: dict, recipe: Recipe, ranks) -> Layer:
    """The plain layer with a `PaluAttention` of stored arrays; they stay where they are."""
    a, groups = layer.attn, tuple(recipe.groups)
    k, v = (
        Factors(parts[f"{n}_down"], parts.get(f"{n}_up"), parts.get(f"{n}_mean"), tuple(r), groups)
        for n, r in zip("kv", ranks, strict=True)
    )
    attn = PaluAttention(
        a.q,
        k,
        v,
        parts.get("o", a.o),
        a.q_bias,
        a.k_bias,
        None if recipe.fuse_values else a.v_bias,
        a.q_norm,
        a.k_norm,
        parts.get("lead"),
        parts.get("o_bias"),
        recipe.format,
    )
    return dataclasses.replace(layer, attn=attn)


def restore(folder, params: Params, cfg: Config) -> Params:
    """The converted model, from a folder that `save` wrote and the model's own parameters."""
    stored = describe(folder)
    check_fits(stored, cfg)
    _check_weights(stored, [_sample(layer) for layer in params.layers], "these")
    parts = jax.device_put(read_factors(stored, cfg))
    layers = [
        converted(layer, p, stored.recipe, r)
        for layer, p, r in zip(params.layers, parts, stored.recipe.ranks, strict=True)
    ]
    return dataclasses.replace(params, layers=tuple(layers))


def check_fits(stored: Stored, cfg: Config) -> None:
    """Raises StoreError where the stored conversion is of a model of other sizes."""
    ours, theirs = (
        dataclasses.asdict(c) | dict(dtype=None, max_length=None) for c in (cfg, stored.cfg)
    )
    if different := [name for name in ours if ours[name] != theirs[name]]:
        name = different[0]
        raise StoreError(
            f"{stored.folder} was made for another model ({stored.source}): its {name} is "
            f"{theirs[name]}, here it is {ours[name]}"
        )
    check(cfg, stored.recipe)


@dataclasses.dataclass(frozen=True)
class PaluCheckpoint:
    """A model's checkpoint seen through a stored conversion: loads as the converted model does."""

    base: Any
    stored: Stored

    @property
    def path(self):
        return self.base.path

    def config(self, dtype: str | None = None) -> Config:
        return self.base.config(dtype)

    def tokenizer(self):
        return self.base.tokenizer()

    def check(self, cfg: Config) -> None:
        self.base.check(cfg)
        check_fits(self.stored, cfg)

    def load(self, cfg: Config, place_layer=None, place=None, progress=None) -> Params:
        """As `llm_jax.checkpoint.Checkpoint.load`, layer by layer, with converted attention."""
        place_layer = place_layer or (lambda index, layer: jax.device_put(layer))
        parts, ranks = read_factors(self.stored, cfg), self.stored.recipe.ranks
        seen = []

        def convert(index, layer):
            seen.append(_sample(layer))
            return place_layer(
                index, converted(layer, parts[index], self.stored.recipe, ranks[index])
            )

        params = self.base.load(cfg, convert, place, progress)
        _check_weights(self.stored, seen, self.base.path)
        return params
