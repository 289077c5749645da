"""Safetensors files of our own, and the manifest of their folder; all have digests.

A file is complete or does not exist. Files are mapped into memory: opening one reads only its
header, which has a digest of itself and of every tensor's bytes.
"""

import dataclasses
import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.digest import array_digest, json_digest
from llm_jax.disk import BLOCK, DiskArray
from llm_jax.files import atomic_file, parse_json
from subspec_jax import SubspecError

MANIFEST, TABLES, LAYER = "manifest.json", "model.safetensors", "layer-{:05}.safetensors"


class ResidualError(SubspecError):
    """A converted model that cannot be written or used; the message is for the user."""


def _header_digest(tensors: dict[str, np.ndarray], **metadata: Any) -> str:
    kinds = {name: [a.dtype.name, list(a.shape)] for name, a in tensors.items()}
    return json_digest([kinds, metadata])


def _place(file: Path, manifest: dict[str, Any]) -> str:
    return json_digest([manifest, file.name])


def write_tensors(
    file: Path, tensors: dict[str, np.ndarray], entries: dict[str, Any], manifest: dict[str, Any]
) -> None:
    """Writes a safetensors file with `entries` and digests in its metadata, atomically.

    It names its folder's manifest and itself, so that it is not taken for another one. Its data
    begins at a whole block (`llm_jax.disk`), which needs spaces behind the header.
    """
    digests = {name: array_digest(array) for name, array in tensors.items()}
    kept = dict(entries=entries, digests=digests, place=_place(file, manifest))
    kept["header"] = _header_digest(tensors, **kept)
    # Whole rows of large arrays first: so all of them begin at multiples of their alignment.
    order = sorted(tensors, key=lambda name: -tensors[name].nbytes)
    header: dict[str, Any] = {"__metadata__": {"contents": json.dumps(kept)}}
    at = 0
    for name in order:
        a = tensors[name]
        header[name] = dict(dtype=_KINDS[a.dtype.name], shape=list(a.shape))
        header[name]["data_offsets"] = [at, at := at + a.nbytes]
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % BLOCK)
    with atomic_file(file) as scratch:
        try:
            with scratch.open("wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                for name in order:
                    out.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
        except OSError as error:  # such as a full disk
            raise ResidualError(f"{file} cannot be written: {error}") from error


_KINDS = dict(uint8="U8", uint16="U16", uint32="U32", float32="F32", float16="F16", bfloat16="BF16")
"""What a safetensors header calls the dtypes."""


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """A safetensors file that `write_tensors` wrote: its tensors, and what its header says of them.

    Raises ResidualError if it is missing, if its header is damaged, or if it belongs elsewhere.
    """

    path: Path
    manifest: dict[str, Any]
    """Of the folder that it belongs to."""
    views: dict[str, np.ndarray] = dataclasses.field(init=False)
    entries: dict[str, Any] = dataclasses.field(init=False)
    digests: dict[str, str] = dataclasses.field(init=False)
    offsets: dict[str, int] = dataclasses.field(init=False)
    """Where each tensor begins in the file."""

    def __post_init__(self):
        try:
            views, offsets, metadata = _mapped(self.path)
            found = parse_json(metadata["contents"])
            if found.pop("header") != _header_digest(views, **found):
                raise ValueError("its header differs from what was written")
            if found.pop("place") != _place(self.path, self.manifest):
                raise ValueError("it is of another layer or another converted model")
            object.__setattr__(self, "views", views)
            object.__setattr__(self, "entries", found["entries"])
            object.__setattr__(self, "digests", found["digests"])
            object.__setattr__(self, "offsets", offsets)
        except FileNotFoundError:
            raise ResidualError(
                f"{self.path} is missing: the conversion was interrupted; run it again to go on"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResidualError(
                f"{self.path} is truncated or damaged ({error}); delete it and convert again"
            ) from error

    def array(self, name: str, shape: tuple[int, ...] | None = None) -> DiskArray:
        """A tensor that stays in the file; with `shape` it has rows of zeros behind its own."""
        view, offset, digest = self.views[name], self.offsets[name], self.digests[name]
        shape = tuple(view.shape if shape is None else shape)
        return DiskArray(self.path, offset, shape, view.dtype, digest, view.nbytes)

    def check(self, aside: Container[str] = ()) -> None:
        """Reads all tensors but those `aside`. Raises ResidualError with the names of those that
        are damaged."""
        names = [name for name in self.views if name not in aside]
        if wrong := [n for n in names if array_digest(self.views[n]) != self.digests[n]]:
            raise ResidualError(
                f"{self.path} is damaged: {', '.join(wrong)} differ from what was written; "
                "delete the file and convert again"
            )


def _mapped(file: Path) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, str]]:
    """(views of a safetensors file's tensors, where they begin, its metadata). Only the header is
    read."""
    types = {kind: name for name, kind in _KINDS.items()}
    _require_ordinary(file)
    whole = np.memmap(file, np.uint8, "r")
    begin = 8 + int(whole[:8].view(np.uint64)[0])
    header = parse_json(bytes(whole[8:begin]))
    metadata = header.pop("__metadata__")
    views, offsets = {}, {}
    for name, tensor in header.items():
        start, stop = (begin + at for at in tensor["data_offsets"])
        offsets[name] = start
        dtype = np.dtype(jax.numpy.dtype(types[tensor["dtype"]]))
        views[name] = whole[start:stop].view(dtype).reshape(tensor["shape"])
    return views, offsets, metadata


def _require_ordinary(file: Path) -> None:
    """Raises ValueError for what is there and no file: reading a pipe might never end."""
    if file.exists() and not file.is_file():
        raise ValueError("it is no ordinary file")


def write_manifest(file: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest, with a digest of itself, atomically."""
    with atomic_file(file) as scratch:
        kept = manifest | {"digest": json_digest(manifest)}
        scratch.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def read_manifest(file: Path, reads: int) -> dict[str, Any]:
    """The manifest. Raises ResidualError if it is missing, damaged or of another version than
    this program `reads`."""
    try:
        _require_ordinary(file)
        manifest = parse_json(file.read_text(encoding="utf-8"))
        version = manifest.get("version")
        digest = manifest.pop("digest", None)
    except FileNotFoundError:
        raise ResidualError(f"{file.parent} is not a converted model: no {file.name}") from None
    except (ValueError, AttributeError) as error:
        raise ResidualError(f"{file} is damaged ({error}); convert again") from error
    if digest is None and version != reads:
        raise ResidualError(
            f"{file.parent} is of version {version}, this program reads {reads}; convert again"
        )
    if digest != json_digest(manifest):
        raise ResidualError(f"{file} is damaged (it differs from what was written); convert again")
    return manifest


def is_complete(path: Path, layers: int) -> bool:
    """Whether the folder has all files of a model with so many layers. They are not read."""
    names = [MANIFEST, TABLES, *map(LAYER.format, range(layers))]
    return all((path / name).exists() for name in names)


def begin(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, or compares it with an existing one; ResidualError if they differ."""
    path.mkdir(parents=True, exist_ok=True)
    file = path / MANIFEST
    if not file.exists():
        if any(path.glob("*.safetensors")):
            raise ResidualError(f"{path} holds other safetensors files; choose an empty folder")
        write_manifest(file, manifest)
        return
    there = read_manifest(file, manifest["version"])
    differences = [
        f"{key} is {there.get(key)!r}, asked for is {manifest.get(key)!r}"
        for key in sorted({*there, *manifest})
        if there.get(key) != manifest.get(key)
    ]
    if differences:
        raise ResidualError(
            f"{path} was converted otherwise: {'; '.join(differences)}. "
            "Choose another folder, or delete this one"
        )
