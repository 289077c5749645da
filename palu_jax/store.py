"""Converted models on disk: the low-rank factors through orbax, beside a description in JSON.

    save("smollm2-palu", palu, cfg, recipe, source="smollm2-135m")
    palu = restore("smollm2-palu", params, cfg)

Only the arrays that the conversion made are stored; all others come from the model's own
checkpoint.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.config import Config, Llama3Rope
from llm_jax.extras import need
from llm_jax.files import atomic_folder
from llm_jax.params import Layer, Params
from palu_jax import PaluError
from palu_jax.attention import Factors, PaluAttention
from palu_jax.convert import Recipe, check_recipe
from palu_jax.latent import LatentFormat

_VERSION = 1
NAME = "palu.json"
"""The file with the description."""


class StoreError(PaluError):
    """A stored conversion that cannot be used or written; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """The description of a stored conversion; its arrays are not read yet."""

    folder: Path
    source: str
    cfg: Config
    recipe: Recipe
    weights: list[list[float]]
    """A few numbers of every layer, which identify the model's weights."""


def save(
    folder: str | Path,
    params: Params,
    cfg: Config,
    recipe: Recipe,
    source: str,
    replace: bool = False,
) -> None:
    """Writes the converted parts of `params`; a reader never sees half of them.

    `source` says where the model's own weights come from: a registered name or a path. Raises
    StoreError where the folder exists, unless `replace` is set and it holds a stored conversion,
    and MissingPackage without orbax.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not (replace and (folder / NAME).exists()):
        raise StoreError(f"{folder} exists; choose another folder or remove it")
    fresh = folder.with_name(f".{folder.name}-{os.getpid()}") if folder.exists() else folder
    with atomic_folder(fresh) as scratch:
        _write(scratch, params, cfg, recipe, source)
    if fresh != folder:
        shutil.rmtree(folder)
        os.replace(fresh, folder)


def _orbax() -> Any:
    return need("orbax.checkpoint", "palu", "a stored Palu conversion")


def _write(folder: Path, params: Params, cfg: Config, recipe: Recipe, source: str) -> None:
    with _orbax().StandardCheckpointer() as writer:
        writer.save(folder / "factors", {str(i): _made(l) for i, l in enumerate(params.layers)})
    described = dict(
        version=_VERSION,
        source=source,
        config=dataclasses.asdict(cfg),
        weights=[_sample(layer) for layer in params.layers],
        recipe=dataclasses.asdict(recipe),
    )
    (folder / NAME).write_text(json.dumps(described, indent=1))


def _made(layer: Layer) -> dict[str, Any]:
    """The arrays of a layer's attention that the conversion made, by their names on disk."""
    p = layer.attn
    if not isinstance(p, PaluAttention):
        raise StoreError(f"a layer holds {type(p).__name__}; only converted models are stored")
    parts = dict(k_down=p.k.down_DR, k_up=p.k.up_gRKH, v_down=p.v.down_DR, v_up=p.v.up_gRKH)
    parts |= dict(
        k_mean=p.k.mean_F, v_mean=p.v.mean_F, lead=p.mean_probe_D
    )  # an old name, which stores keep
    if p.v.up_gRKH is None:
        parts |= dict(o=p.o, o_bias=p.o_bias)
    return {name: array for name, array in parts.items() if array is not None}


def _sample(layer: Layer) -> list[float]:
    """A few numbers of the query projection, which no conversion changes: they identify weights."""
    return np.asarray(jax.device_get(layer.attn.q[:1, :8]), np.float32)[0].tolist()


def _check_weights(stored: StoredModel, samples: list[list[float]], place: Any) -> None:
    """Raises StoreError where these samples of all layers are not those of the stored model."""
    ours, theirs = np.array(samples), np.array(stored.weights)
    # A sample in another dtype has perhaps 8 bits.
    if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=0.01, atol=1e-6):
        raise StoreError(
            f"{stored.folder} was made from other weights than {place}; convert these with "
            f"python -m experiments.palu --save, or load those it was made from ({stored.source})"
        )


def describe(folder: str | Path) -> StoredModel:
    """The description in a folder that `save` wrote; raises StoreError."""
    folder = Path(folder).expanduser().absolute()
    if not (folder / NAME).exists():
        raise StoreError(
            f"{folder} is not a stored conversion: it has no {NAME}; make one with "
            "python -m experiments.palu --save FOLDER"
        )
    try:
        found = json.loads((folder / NAME).read_text())
        version = found["version"]
        if version != _VERSION:
            raise StoreError(
                f"{folder} was written in format {version}; this program reads {_VERSION}: convert "
                "the model again"
            )
        return StoredModel(
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
    scaling = config["rope_scaling"]
    return scaling and Llama3Rope(**scaling)


def _recipe(found) -> Recipe:
    tuples = lambda value: tuple(map(tuples, value)) if isinstance(value, list) else value
    form = {name: tuples(value) for name, value in found["format"].items()}
    rest = {name: tuples(value) for name, value in found.items() if name != "format"}
    return Recipe(**rest, format=LatentFormat(**form))


def abstract_layers(stored: StoredModel, model: Params, cfg: Config) -> Params:
    """The converted model as shapes and dtypes, from those of the plain model; reads no arrays."""
    recipe = stored.recipe
    layers = tuple(
        _converted(layer, _shapes(layer, cfg, recipe, ranks), recipe, ranks)
        for layer, ranks in zip(model.layers, recipe.ranks, strict=True)
    )
    return dataclasses.replace(model, layers=layers)


def _shapes(layer: Layer, cfg: Config, recipe: Recipe, ranks) -> dict[str, Any]:
    """What `_made` gives for a layer, as shapes and dtypes."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, cfg.dtype)
    parts = {}
    for name, r in zip("kv", ranks, strict=True):
        parts[f"{name}_down"] = array(cfg.d_model, sum(r))
        parts[f"{name}_up"] = array(len(r), max(r), max(recipe.groups), cfg.head_dim)
        if recipe.mean_split:
            parts[f"{name}_mean"] = array(cfg.kv_heads * cfg.head_dim)
    if recipe.mean_split:
        parts["lead"] = array(cfg.d_model)
    if recipe.fuse_values:
        del parts["v_up"]
        parts["o"] = array(cfg.heads * ranks[1][0], cfg.d_model)
        if layer.attn.v_bias is not None:
            parts["o_bias"] = array(cfg.d_model)
    return parts


def read_factors(stored: StoredModel, cfg: Config) -> list[dict[str, np.ndarray]]:
    """The stored arrays of every layer by name, as NumPy arrays in `cfg.dtype`.

    Raises StoreError where they are missing, and MissingPackage without orbax.
    """
    ocp = _orbax()
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


def _converted(layer: Layer, parts: dict[str, Any], recipe: Recipe, ranks) -> Layer:
    """The plain layer with a `PaluAttention` of these parts, which stay where they are."""
    a, groups = layer.attn, tuple(recipe.groups)
    k, v = (
        Factors(parts[f"{n}_down"], parts.get(f"{n}_up"), parts.get(f"{n}_mean"), tuple(r), groups)
        for n, r in zip("kv", ranks, strict=True)
    )
    attn = PaluAttention(
        q=a.q,
        k=k,
        v=v,
        o=parts.get("o", a.o),
        q_bias=a.q_bias,
        k_bias=a.k_bias,
        v_bias=None if recipe.fuse_values else a.v_bias,
        q_norm=a.q_norm,
        k_norm=a.k_norm,
        mean_probe_D=parts.get("lead"),
        o_bias=parts.get("o_bias"),
        format=recipe.format,
    )
    return dataclasses.replace(layer, attn=attn)


def restore(folder: str | Path, params: Params, cfg: Config) -> Params:
    """The converted model, from a folder that `save` wrote and the model's own parameters.

    Raises StoreError where the folder is damaged or belongs to other weights, and MissingPackage
    without orbax.
    """
    stored = describe(folder)
    check_fits(stored, cfg)
    _check_weights(stored, [_sample(layer) for layer in params.layers], "these")
    parts = jax.device_put(read_factors(stored, cfg))
    layers = [
        _converted(layer, p, stored.recipe, r)
        for layer, p, r in zip(params.layers, parts, stored.recipe.ranks, strict=True)
    ]
    return dataclasses.replace(params, layers=tuple(layers))


def check_fits(stored: StoredModel, cfg: Config) -> None:
    """Raises StoreError where the stored conversion belongs to a model of other sizes."""
    ours, theirs = (
        dataclasses.asdict(c) | dict(dtype=None, max_length=None) for c in (cfg, stored.cfg)
    )
    if different := [name for name in ours if ours[name] != theirs[name]]:
        name = different[0]
        raise StoreError(
            f"{stored.folder} was made for another model ({stored.source}): its {name} is "
            f"{theirs[name]}, here it is {ours[name]}"
        )
    check_recipe(cfg, stored.recipe)


@dataclasses.dataclass(frozen=True)
class PaluCheckpoint:
    """A model's checkpoint together with a stored conversion of it: loads the converted model.

    It has the methods of `llm_jax.checkpoint.Checkpoint`.
    """

    base: Any
    """The model's own checkpoint."""
    stored: StoredModel

    @property
    def path(self) -> Path:
        """Where the model's own checkpoint is."""
        return self.base.path

    def config(self, dtype: str | None = None) -> Config:
        """The model's `Config`."""
        return self.base.config(dtype)

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.base.tokenizer()

    def check(self, cfg: Config) -> None:
        """Raises an error where the checkpoint or the conversion does not fit the config."""
        self.base.check(cfg)
        check_fits(self.stored, cfg)

    def model_shapes(self, cfg: Config) -> Params:
        """What `load` gives, as shapes and dtypes; reads no arrays."""
        return abstract_layers(self.stored, self.base.model_shapes(cfg), cfg)

    def load(
        self,
        cfg: Config,
        place_layer: Callable[[int, Layer], Layer] | None = None,
        place: Callable[..., Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Params:
        """As `llm_jax.checkpoint.Checkpoint.load`, layer by layer, with converted attention."""
        place_layer = place_layer or (lambda index, layer: jax.device_put(layer))
        parts, ranks = read_factors(self.stored, cfg), self.stored.recipe.ranks
        seen = []

        def convert(index, layer):
            seen.append(_sample(layer))
            return place_layer(
                index, _converted(layer, parts[index], self.stored.recipe, ranks[index])
            )

        params = self.base.load(cfg, convert, place, progress)
        _check_weights(self.stored, seen, self.base.path)
        return params
