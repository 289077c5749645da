"""A model's layers and tables in a folder, as they are used, so that layers can stay on disk.

A checkpoint's own files hold matrices transposed, in other dtypes or low-bit. So a model is written
once, layer by layer; a run that was killed goes on where it was.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.disk import DiskArray
from llm_jax.files import LockedError, locked
from llm_jax.params import Layer, Params
from subspec_jax.memory import return_free_memory
from subspec_jax.offload import moving
from subspec_jax.residual.tensor_file import (
    LAYER,
    MANIFEST,
    TABLES,
    TensorFile,
    begin,
    is_complete,
    read_manifest,
    write_tensors,
)

VERSION = 1
PATIENCE_S = 0.5
"""Seconds until a folder that another process writes is looked at again."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A model in such a folder. Raises ResidualError if it is damaged or not complete."""

    path: Path
    model: Params = dataclasses.field(repr=False)
    """As shapes and dtypes."""

    @functools.cached_property
    def _manifest(self) -> dict[str, Any]:
        return read_manifest(self.path / MANIFEST, VERSION)

    @functools.cached_property
    def _layers(self) -> tuple[TensorFile, ...]:
        names = (LAYER.format(i) for i in range(len(self.model.layers)))
        return tuple(TensorFile(self.path / name, self._manifest) for name in names)

    def tables(self) -> dict[str, DiskArray]:
        """embed_VD, norm and, if it is not tied, head_DV, in the file."""
        file = TensorFile(self.path / TABLES, self._manifest)
        return {name: file.array(name) for name in file.views}

    def layer(self, index: int) -> Layer:
        """The layer, with a `DiskArray` for each array that moves; the others are NumPy arrays."""
        shapes, file = self.model.layers[index], self._layers[index]
        take = lambda name, moves: file.array(name) if moves else np.array(file.views[name])
        leaves = map(take, _names(shapes), jax.tree.leaves(moving(shapes)))
        return jax.tree.unflatten(jax.tree.structure(shapes), list(leaves))


def _names(layer: Layer) -> list[str]:
    """The names of a layer's arrays in its file."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(layer)]


def store(
    path: str | Path,
    identity: Any,
    model: Params,
    tables: Callable[[], dict[str, np.ndarray]],
    layer: Callable[[int], Layer],
    progress: Callable[[int], None] | None = None,
) -> Stored:
    """The model in the folder `path`, which is written if it is not complete.

    `identity`, a JSON value, is what the model is made of. `model` are its shapes. `tables()` and
    `layer(i)` give NumPy arrays, one layer at a time. `progress` hears how many layers are there.
    Waits for another process that writes the same folder. Raises ResidualError if the folder holds
    another model, or cannot be written.
    """
    path, count = Path(path), len(model.layers)
    manifest = json.loads(json.dumps({"version": VERSION, "source": identity}))
    while not is_complete(path, count):
        try:
            with locked(path):
                _write(path, manifest, count, tables, layer, progress)
        except LockedError:
            time.sleep(PATIENCE_S)
    begin(path, manifest)
    return Stored(path, model)


def _write(path, manifest, count, tables, layer, progress) -> None:
    begin(path, manifest)
    if not (path / TABLES).exists():
        write_tensors(path / TABLES, tables(), {}, manifest)
    for index in range(count):
        if not (file := path / LAYER.format(index)).exists():
            made = layer(index)
            arrays = map(np.asarray, jax.tree.leaves(made))
            write_tensors(file, dict(zip(_names(made), arrays, strict=True)), {}, manifest)
            del made
            return_free_memory()
        if progress:
            progress(index + 1)
