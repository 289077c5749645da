"""Converted models on disk: the low-rank factors through orbax, beside a description in JSON.

    save("smollm2-palu", palu, cfg, recipe, source="smollm2-135m")
    palu = restore("smollm2-palu", params, cfg)

Only the arrays that the conversion made are stored; all others come from the model's own
checkpoint.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.config import Config
from llm_jax.digest import array_digest, json_digest
from llm_jax.extras import need
from llm_jax.files import atomic_folder
from llm_jax.params import Attention, Layer, Params
from palu_jax.attention import Factors, PaluAttention
from palu_jax.convert import Recipe, check_recipe
from palu_jax.description import NAME, StoredModel, StoreError, describe, write_description
from palu_jax.identity import Identifier, Identity, not_finite, tensors


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
    StoreError where the parameters were not made with this recipe or cannot be written, where the
    folder exists, unless `replace` is set and it holds a stored conversion, and MissingPackage
    without orbax.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not (replace and (folder / NAME).is_file()):
        raise StoreError(f"{folder} exists; choose another folder or remove it")
    _check_made(params, cfg, recipe)
    old = folder.with_name(f".{folder.name}-{os.getpid()}-old") if folder.exists() else None
    fresh = folder.with_name(f".{folder.name}-{os.getpid()}") if old else folder
    with _named(folder, "cannot be written"):
        with atomic_folder(fresh) as scratch:
            _write(scratch, params, cfg, recipe, source)
        if old:
            os.replace(folder, old)
            os.replace(fresh, folder)
            shutil.rmtree(old)


@contextlib.contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """Turns what orbax and the system raise into a StoreError; they fail in many ways."""
    try:
        yield
    except (StoreError, ImportError):
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise StoreError(f"{path} {what} ({type(error).__name__}: {first})") from error


def _check_made(params: Params, cfg: Config, recipe: Recipe) -> None:
    """Raises StoreError where the parameters were not made with this config and recipe."""
    with _named(Path("the recipe"), "does not fit the model"):
        check_recipe(cfg, recipe)
    if len(params.layers) != cfg.layers:
        raise StoreError(f"the model has {len(params.layers)} layers, its config {cfg.layers}")
    for i, (layer, ranks) in enumerate(zip(params.layers, recipe.ranks, strict=True)):
        p, made = layer.attn, _made(layer)
        shapes = {n: (a.shape, str(a.dtype)) for n, a in made.items()}
        wanted = {n: (a.shape, str(a.dtype)) for n, a in _shapes(cfg, recipe, ranks).items()}
        for what, ours, theirs in (
            ("format", p.format, recipe.format.layer(i)),
            ("ranks", (p.k.ranks, p.v.ranks), tuple(map(tuple, ranks))),
            ("groups", (p.k.heads, p.v.heads), (tuple(recipe.groups),) * 2),
            ("arrays", shapes, wanted),
        ):
            if ours != theirs:
                raise StoreError(
                    f"layer {i} was made with another recipe: its {what} are {ours}, the recipe's "
                    f"{theirs}; give the recipe that Compressor.compress returned with it"
                )
        if bad := not_finite(made):
            raise StoreError(f"layer {i}: {bad} holds NaN or infinity; it is not stored")


def _orbax() -> Any:
    return need("orbax.checkpoint", "palu", "a stored Palu conversion")


def _write(folder: Path, params: Params, cfg: Config, recipe: Recipe, source: str) -> None:
    with _orbax().StandardCheckpointer() as writer:
        writer.save(folder / "factors", {str(i): _made(l) for i, l in enumerate(params.layers)})
    base = Identifier(cfg.dtype)
    for name, tensor in tensors(params).items():
        base.add(name, tensor)
    for i, layer in enumerate(params.layers):
        base.add_layer(i, _kept(layer, recipe))
    files = _digests(folder / "factors")
    write_description(StoredModel(folder, str(source), cfg, recipe, base.identity(), files))


def _digests(folder: Path) -> dict[str, str]:
    """The digest of every file in the folder, by its name there."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {p.relative_to(folder).as_posix(): array_digest(np.fromfile(p, np.uint8)) for p in found}


def _kept(layer: Layer, recipe: Recipe) -> dict[str, Any]:
    """What a conversion leaves of a layer, plain or converted: name -> tensor."""
    made = {"k", "v", "sinks", "kind"}
    if recipe.fuse_values:
        made |= {"o", "v_bias", "o_bias"}
    names = [f.name for f in dataclasses.fields(Attention) if f.name not in made]
    own = {name: getattr(layer.attn, name) for name in names}
    return tensors(layer, layer.mlp) | {n: w for n, w in own.items() if w is not None}


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


def _check_base(stored: StoredModel, base: Identity, place: Any) -> None:
    """Raises StoreError where the base has other tensors than the one that was converted."""
    if different := stored.base.difference(base):
        raise StoreError(
            f"{stored.folder} was made from other weights than {place} (different: {different}); "
            "convert these with python -m experiments.palu --save, or load those it was made from "
            f"({stored.source})"
        )


def abstract_layers(stored: StoredModel, model: Params, cfg: Config) -> Params:
    """The converted model as shapes and dtypes, from those of the plain model; reads no arrays."""
    recipe = stored.recipe
    layers = tuple(
        _converted(layer, _shapes(cfg, recipe, ranks), recipe, i)
        for i, (layer, ranks) in enumerate(zip(model.layers, recipe.ranks, strict=True))
    )
    return dataclasses.replace(model, layers=layers)


def _shapes(cfg: Config, recipe: Recipe, ranks) -> dict[str, Any]:
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
        if cfg.qkv_bias or cfg.o_bias:
            parts["o_bias"] = array(cfg.d_model)
    return parts


def read_factors(
    stored: StoredModel, cfg: Config, verify: bool = True
) -> list[dict[str, np.ndarray]]:
    """The stored arrays of every layer by name, as NumPy arrays in `cfg.dtype`.

    Every file is checked against its digest before orbax reads it; `verify` False leaves that out.
    Raises StoreError where files are missing or damaged, and MissingPackage without orbax.
    """
    ocp = _orbax()
    folder = stored.folder / "factors"
    again = "or damaged; convert the model again"
    with _named(folder, f"is missing {again}"):
        if verify:
            found = _digests(folder)
            for name, digest in stored.files.items() or {"factors": ""}.items():
                if found.get(name) != digest:
                    raise StoreError(f"{folder / name} is missing {again}")
        with ocp.PyTreeCheckpointer() as reader:
            held = reader.metadata(folder).item_metadata
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), held.tree)
            found = reader.restore(folder, restore_args=as_numpy)
        layers = [found[str(i)] for i in range(cfg.layers)]
    for i, (parts, ranks) in enumerate(zip(layers, stored.recipe.ranks, strict=True)):
        ours = {name: np.shape(a) for name, a in parts.items()}
        theirs = {name: a.shape for name, a in _shapes(cfg, stored.recipe, ranks).items()}
        if ours != theirs:
            raise StoreError(
                f"{folder}: layer {i} has the arrays {ours}; {NAME} says {theirs}: convert the "
                "model again"
            )
    dtype = np.dtype(cfg.dtype)
    return [{n: np.asarray(a).astype(dtype) for n, a in parts.items()} for parts in layers]


def _converted(layer: Layer, parts: dict[str, Any], recipe: Recipe, index: int) -> Layer:
    """The plain layer with a `PaluAttention` of these parts, which stay where they are."""
    a, groups, ranks = layer.attn, tuple(recipe.groups), recipe.ranks[index]
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
        o_bias=parts.get("o_bias") if recipe.fuse_values else a.o_bias,
        format=recipe.format.layer(index),
        kind=a.kind,
    )
    return dataclasses.replace(layer, attn=attn)


def restore(folder: str | Path, params: Params, cfg: Config, *, verify: bool = True) -> Params:
    """The converted model, from a folder that `save` wrote and the model's own parameters.

    Raises StoreError where the folder is damaged or belongs to other weights, and MissingPackage
    without orbax. `verify` False compares neither checksums nor weights.
    """
    stored = describe(folder, verify)
    check_fits(stored, cfg)
    if verify:
        base = Identifier(cfg.dtype, (stored.base.dtype,))
        for name, tensor in tensors(params).items():
            base.add(name, tensor)
        for i, layer in enumerate(params.layers):
            base.add_layer(i, _kept(layer, stored.recipe))
        _check_base(stored, base.identity(), "these")
    parts = jax.device_put(read_factors(stored, cfg, verify))
    layers = [
        _converted(layer, p, stored.recipe, i)
        for i, (layer, p) in enumerate(zip(params.layers, parts, strict=True))
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
    with _named(stored.folder, "does not fit this model"):
        check_recipe(cfg, stored.recipe)


@dataclasses.dataclass(frozen=True)
class PaluCheckpoint:
    """A model's checkpoint together with a stored conversion of it: loads the converted model.

    It has the methods of `llm_jax.checkpoint.Checkpoint`.
    """

    base: Any
    """The model's own checkpoint."""
    stored: StoredModel
    verify: bool = True
    """Whether checksums and the base's weights are compared while loading."""

    @property
    def path(self) -> Path:
        """Where the model's own checkpoint is."""
        return self.base.path

    def digest(self) -> str:
        """What identifies the weights: those of the base, and the conversion."""
        return json_digest([self.base.digest(), self.stored.checksum])

    def identity(self) -> str:
        """What identifies all that is read."""
        return json_digest([self.base.identity(), self.stored.checksum])

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

    def notices(self, cfg: Config) -> tuple[str, ...]:
        """What a user should know about the model's own checkpoint."""
        return self.base.notices(cfg)

    def experts_in_mxfp4(self, cfg: Config) -> bool:
        """False: experts are kept as they dequantize, in layers of `model_shapes`."""
        return False

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
        place = place or (lambda name, array: jax.device_put(array))
        parts, recipe = read_factors(self.stored, cfg, self.verify), self.stored.recipe
        seen = Identifier(cfg.dtype, (self.stored.base.dtype,))

        def keep(name, array):
            if self.verify:
                seen.add(name, array)
            return place(name, array)

        def convert(index, layer):
            if self.verify:
                seen.add_layer(index, _kept(layer, recipe))
            return place_layer(index, _converted(layer, parts[index], recipe, index))

        params = self.base.load(cfg, convert, keep, progress)
        if self.verify:
            _check_base(self.stored, seen.identity(), self.base.path)
        return params
