"""Converted models on disk: substitutes and residuals of every layer, in safetensors files.

A folder has manifest.json (source, settings, model), model.safetensors (embedding, last norm, head)
and one file per layer. A file is complete or does not exist. Files are mapped into memory: opening
a model reads only their headers.
"""

import dataclasses
import functools
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.config import Config, Llama3Rope
from llm_jax.extras import need
from llm_jax.files import atomic_file
from llm_jax.params import JoinedAttention, JoinedMLP, Layer, Params, abstract
from pallas_kernels.quantized_matmul import Packed
from pallas_kernels.residual_decode.code import Residual, pad
from subspec_jax import SubspecError
from subspec_jax.residual.split import Split, split_shapes

VERSION = 4
MANIFEST, TABLES, LAYER = "manifest.json", "model.safetensors", "layer-{:05}.safetensors"


class ResidualError(SubspecError):
    """A converted model that cannot be written or used; the message is for the user."""


def checksum(array: Any) -> int:
    """CRC-32 of an array's bytes, row by row."""
    return zlib.crc32(np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8))


def write_tensors(file: Path, tensors: dict[str, np.ndarray], entries: dict[str, Any]) -> None:
    """Writes a safetensors file with `entries` in its metadata, atomically."""
    safetensors = need("safetensors.numpy", "models", "a converted model")
    with atomic_file(file) as scratch:
        metadata = {"entries": json.dumps(entries)}
        safetensors.save_file(tensors, str(scratch), metadata=metadata)


def mapped(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(views of a safetensors file's tensors, its entries). Only the header is read.

    Raises ResidualError if the file is missing or damaged.
    """
    types = dict(U8=np.uint8, U16=np.uint16, U32=np.uint32, BF16="bfloat16", F16=np.float16)
    try:
        whole = np.memmap(file, np.uint8, "r")
        begin = 8 + int(whole[:8].view(np.uint64)[0])
        header = json.loads(bytes(whole[8:begin]))
        entries = json.loads(header.pop("__metadata__")["entries"])
        views = {}
        for name, tensor in header.items():
            start, stop = (begin + at for at in tensor["data_offsets"])
            dtype = np.dtype(jax.numpy.dtype(types[tensor["dtype"]]))
            views[name] = whole[start:stop].view(dtype).reshape(tensor["shape"])
        return views, entries
    except FileNotFoundError:
        raise ResidualError(
            f"{file} is missing: the conversion was interrupted; run it again to go on"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ResidualError(
            f"{file} is truncated or damaged ({error}); delete it and convert again"
        ) from error


def read_manifest(file: Path) -> dict[str, Any]:
    """The manifest's JSON. Raises ResidualError if the file is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResidualError(f"{file.parent} is not a converted model: no {file.name}") from None
    except ValueError as error:
        raise ResidualError(f"{file} is damaged ({error}); convert again") from error


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted model, opened. Raises ResidualError if it is damaged or not complete.

    Residuals are padded to `kinds` sets of shapes, so `kinds` programs can decode all layers. One
    set pads every layer to the largest: this adds 2.1% to SmolLM2-135M, three sets add 0.8%.
    """

    path: Path
    kinds: int = 3

    def __post_init__(self):
        _ = self.manifest, self.tables, self._room

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest, with its version checked."""
        manifest = read_manifest(self.path / MANIFEST)
        if manifest.get("version") != VERSION:
            raise ResidualError(
                f"{self.path} is of version {manifest.get('version')}, this program reads "
                f"{VERSION}; convert again"
            )
        return manifest

    @functools.cached_property
    def cfg(self) -> Config:
        """The model's configuration."""
        model = self.manifest["model"]
        rope = model["rope_scaling"] and Llama3Rope(**model["rope_scaling"])
        return Config(**model | {"rope_scaling": rope})

    @functools.cached_property
    def tables(self) -> dict[str, np.ndarray]:
        """embed_VD, norm and head_DV, mapped. A head that is tied or in two parts is not here."""
        return {name: a for name, a in self._tables[0].items() if "." not in name}

    @functools.cached_property
    def _tables(self) -> tuple[dict, dict]:
        return mapped(self.path / TABLES)

    @functools.cached_property
    def head(self) -> Split | None:
        """The output head in two parts, [D, V] with columns added; None if it is not split."""
        if "head_DV.residual" not in self._tables[0]:
            return None
        return self._matrix("head_DV", *self._tables)

    @functools.cached_property
    def _layers(self) -> tuple[tuple[dict, dict], ...]:
        return tuple(mapped(self.path / LAYER.format(i)) for i in range(self.cfg.layers))

    @functools.cached_property
    def _room(self) -> tuple[dict[str, tuple[int, int]], ...]:
        """For each layer, (rows, patches) of each matrix: the most in any layer of its kind."""
        names = list(self.cfg.joined_matrices)
        rows = [[views[f"{n}.residual"].shape[0] for n in names] for views, _ in self._layers]
        patches = [[entries[n]["patches"] for n in names] for _, entries in self._layers]
        need = np.stack([rows, patches], -1)
        room = {}
        for kind in partition(need[..., 0], self.kinds):
            most = need[kind].max(0).tolist()
            room |= {i: dict(zip(names, map(tuple, most))) for i in kind}
        return tuple(room[i] for i in range(self.cfg.layers))

    @functools.cached_property
    def model(self) -> Params:
        """The model that `load_target` makes of this, as shapes and dtypes, with a whole head."""
        code, bits, group = (self.manifest[key] for key in ("code", "bits", "group"))
        split = functools.partial(split_shapes, self.cfg, bits, group, code=code)
        layers = tuple(split(dict(self._room[i])) for i in range(self.cfg.layers))
        return dataclasses.replace(abstract(self.cfg), layers=layers)

    @property
    def model_with_split_head(self) -> Params:
        """`model`, but with the head in two parts if it is stored in two parts."""
        shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
        head = self.model.head_DV if self.head is None else jax.tree.map(shape, self.head)
        return dataclasses.replace(self.model, head_DV=head)

    def _matrix(self, name: str, views: dict, entries: dict) -> Split:
        shape = tuple(entries[name]["shape"])
        parts = (views.get(f"{name}.{part}") for part in ("codes", "top", "scale"))
        words, low = views[f"{name}.residual"], views.get(f"{name}.low")
        exact = Residual(words, low, shape, self.cfg.dtype, entries[name]["patches"])
        return Split(Packed(*parts, shape[1], self.manifest["bits"], self.manifest["group"]), exact)

    def layer(self, index: int) -> Layer:
        """A joined layer of `Split` matrices. Its arrays are mapped, except the padded streams.

        `subspec_jax.offload.offload` moves its residuals to pinned memory.
        """
        views, entries = self._layers[index]

        def matrix(name):
            split = self._matrix(name, views, entries)
            padded = pad(split.residual, *self._room[index][name])
            return dataclasses.replace(split, residual=padded)

        w = {name: matrix(name) for name in self.cfg.joined_matrices}
        biases = (views.get(name) for name in ("qkv_bias", "q_norm", "k_norm"))
        attn = JoinedAttention(w["qkv"], w["o"], *biases)
        mlp = JoinedMLP(w["gate_up"], w["down"])
        return Layer(views["attn_norm"], attn, views["mlp_norm"], mlp)

    def verify(self, index: int, layer: Layer) -> None:
        """Raises ResidualError with the names of decoded arrays that differ from the model's.

        `layer` is `decode_layer(self.layer(index))`, on host or device.
        """
        found = {path[-1].name: leaf for path, leaf in jax.tree.leaves_with_path(layer)}
        self._verify(LAYER.format(index), found, self._layers[index][1])

    def verify_tables(self) -> None:
        """Like `verify`, for the embedding, the last norm and a head that is stored whole."""
        self._verify(TABLES, self.tables, self._tables[1])

    def verify_head(self, head_DV: jax.Array) -> None:
        """Like `verify`, for the decoded `head`, without the added columns."""
        self._verify(TABLES, {"head_DV": head_DV}, self._tables[1])

    def _verify(self, file: str, found: dict, entries: dict) -> None:
        wrong = [n for n, array in found.items() if checksum(array) != entries[n]["crc32"]]
        if wrong:
            raise ResidualError(
                f"{self.path / file}: {', '.join(wrong)} differ from the model that was "
                "converted; delete the file and convert again"
            )


def partition(rows: np.ndarray, kinds: int) -> list[list[int]]:
    """The layers in at most `kinds` groups, such that padding costs least.

    `rows` [layer, matrix] are the sizes; each matrix is padded to the largest in its group. Groups
    are runs of the layers sorted by size.
    """
    order = np.argsort(rows.sum(1), kind="stable")
    count = len(order)

    def cost(start, stop):
        return (stop - start) * int(rows[order[start:stop]].max(0).sum())

    # best[stop]: (total rows, the groups) of the first `stop` layers; each round allows one more
    # group.
    best = [(0, [])] + [(cost(0, stop), [(0, stop)]) for stop in range(1, count + 1)]
    for _ in range(kinds - 1):
        best = [
            min(
                [best[stop]]
                + [(best[at][0] + cost(at, stop), [*best[at][1], (at, stop)]) for at in range(stop)]
            )
            for stop in range(count + 1)
        ]
    return [order[start:stop].tolist() for start, stop in best[count][1]]
