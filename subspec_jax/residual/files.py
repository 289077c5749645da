"""Converted models on disk: substitutes and residuals of every layer, in safetensors files.

A folder has manifest.json (source, settings, model), model.safetensors (embedding, last norm, head)
and one file per layer (of experts: `subspec_jax.residual.stacks`), as in
`subspec_jax.residual.tensor_file`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.config import Config
from llm_jax.digest import array_digest
from llm_jax.params import (
    NORMS,
    JoinedAttention,
    JoinedMLP,
    Layer,
    Params,
    abstract,
    filled,
    layer_from,
    named_parameters,
)
from pallas_kernels.quantized_matmul import Packed
from pallas_kernels.residual_decode.code import LANES, Residual, pad
from subspec_jax.residual.split import Split, split_shapes
from subspec_jax.residual.stacks import STACKS, largest, stored_experts
from subspec_jax.residual.tensor_file import (
    LAYER,
    MANIFEST,
    TABLES,
    ResidualError,
    TensorFile,
    read_manifest,
)

VERSION = 6


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted model, opened. Raises ResidualError if it is damaged or not complete.

    Residuals are padded to `kinds` sets of shapes, so `kinds` programs can decode all layers. One
    set pads every layer to the largest: this adds 2.1% to SmolLM2-135M, three sets add 0.8%. All
    experts are padded to the largest.
    """

    path: Path
    kinds: int = 3

    def __post_init__(self):
        _ = self.manifest, self.tables, self.room

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """What was converted, and how."""
        return read_manifest(self.path / MANIFEST, VERSION)

    @functools.cached_property
    def cfg(self) -> Config:
        """The model's configuration."""
        return Config.from_dict(self.manifest["model"])

    @functools.cached_property
    def tables(self) -> dict[str, np.ndarray]:
        """embed_VD, norm and head_DV, mapped. A head that is tied or in two parts is not here."""
        return {name: a for name, a in self._tables.views.items() if "." not in name}

    @functools.cached_property
    def _tables(self) -> TensorFile:
        return TensorFile(self.path / TABLES, self.manifest)

    @functools.cached_property
    def head(self) -> Split | None:
        """The output head in two parts, [D, V] with columns added; None if it is not split."""
        if "head_DV.residual" not in self._tables.views:
            return None
        return self._matrix("head_DV", self._tables)

    @functools.cached_property
    def _layers(self) -> tuple[TensorFile, ...]:
        files = (self.path / LAYER.format(i) for i in range(self.cfg.layers))
        return tuple(TensorFile(file, self.manifest) for file in files)

    @functools.cached_property
    def room(self) -> tuple[dict[str, tuple[int, int]], ...]:
        """For each layer, (rows, patches) of each matrix: the most in any layer of its kind."""
        every, room = range(self.cfg.layers), {}
        if routed := [i for i in every if self.cfg.has_experts(i)]:
            room |= dict.fromkeys(routed, largest([self._layers[i].entries for i in routed]))
        if dense := [i for i in every if i not in room]:
            names, files = list(self.cfg.joined_matrices), [self._layers[i] for i in dense]
            rows = [[f.views[f"{n}.residual"].shape[0] for n in names] for f in files]
            patches = [[f.entries[n]["patches"] for n in names] for f in files]
            need = np.stack([rows, patches], -1)
            for kind in partition(need[..., 0], self.kinds):
                most = need[kind].max(0).tolist()
                room |= {dense[i]: dict(zip(names, map(tuple, most))) for i in kind}
        return tuple(room[i] for i in every)

    @functools.cached_property
    def model(self) -> Params:
        """The model that `load_target` makes of this, as shapes and dtypes, with a whole head."""
        return self.model_with(self.room)

    def model_with(self, room: Sequence[dict[str, tuple[int, int]]]) -> Params:
        """`model`, with room for larger residuals in each layer."""
        code, bits, group = (self.manifest[key] for key in ("code", "bits", "group"))
        split = functools.partial(split_shapes, self.cfg, bits, group, code=code)
        layers = tuple(split(dict(room[i]), index=i) for i in range(self.cfg.layers))
        return dataclasses.replace(abstract(self.cfg), layers=layers)

    @property
    def model_with_split_head(self) -> Params:
        """`model`, but with the head in two parts if it is stored in two parts."""
        shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
        head = self.model.head_DV if self.head is None else jax.tree.map(shape, self.head)
        return dataclasses.replace(self.model, head_DV=head)

    def _matrix(self, name: str, file: TensorFile) -> Split:
        views, entries = file.views, file.entries
        shape = tuple(entries[name]["shape"])
        parts = (views.get(f"{name}.{part}") for part in ("codes", "top", "scale"))
        words, low = views[f"{name}.residual"], views.get(f"{name}.low")
        exact = Residual(words, low, shape, self.cfg.dtype, entries[name]["patches"])
        columns = entries[name].get("columns", shape[1])  # without those that were added
        kind = columns, self.manifest["bits"], self.manifest["group"]
        return Split(Packed(*parts, *kind), exact)

    def layer(self, index: int, room: dict[str, tuple[int, int]] | None = None) -> Layer:
        """A joined layer of `Split` matrices, or a plain one with `SplitExperts`. Its arrays are
        mapped, except the padded streams. `room`: for larger residuals than its own.

        `subspec_jax.offload.offload` moves its residuals to pinned memory.
        """
        file = self._layers[index]
        plain = {name: view for name, view in file.views.items() if "." not in name}
        if self.cfg.has_experts(index):
            kind = self.manifest["bits"], self.manifest["group"], self.cfg.dtype
            experts = stored_experts(file.views, file.entries, self.room[index], *kind)
            named = plain | dict(zip(STACKS, (experts, None), strict=True))
            return layer_from(named, index, self.cfg)

        def matrix(name):
            split = self._matrix(name, file)
            padded = pad(split.residual, *(room or self.room[index])[name])
            return dataclasses.replace(split, residual=padded)

        return self._joined(index, matrix)

    def _joined(self, index: int, matrix: Callable[[str], Split]) -> Layer:
        views = self._layers[index].views
        w = {name: view for name, view in views.items() if "." not in name}
        w |= {name: matrix(name) for name in self.cfg.joined_matrices}
        attn = filled(JoinedAttention, w, kind=self.cfg.kind(index))
        norms = {name: w.get(name) for name in NORMS}
        return Layer(attn=attn, mlp=filled(JoinedMLP, w), **norms)

    def lying(self, index: int) -> Layer:
        """`layer`, with a `DiskArray` for each array that moves; not of one with experts."""
        file, room = self._layers[index], self.room[index]

        def matrix(name):
            split, (rows, patches) = self._matrix(name, file), room[name]
            words = file.array(f"{name}.residual", (rows, LANES))
            low = None if split.residual.low_DF is None else file.array(f"{name}.low")
            exact = dataclasses.replace(split.residual, words=words, low_DF=low, patches=patches)
            return dataclasses.replace(split, residual=exact)

        return self._joined(index, matrix)

    def check(self, index: int | None = None, aside: bool = False) -> None:
        """Raises ResidualError if the file of a layer (None: of the tables) is damaged. `aside`:
        without what moves when the layer is streamed from disk, which is compared then."""
        file = self._tables if index is None else self._layers[index]
        file.check([n for n in file.views if aside and n.endswith((".residual", ".low"))])

    def verify(self, index: int, layer: Layer) -> None:
        """Raises ResidualError with the names of decoded arrays that differ from the model's.

        `layer` is `decode_layer(self.layer(index))`, on host or device; or the plain layer, if it
        has experts.
        """
        self._verify(self._layers[index], named_parameters(layer))

    def verify_tables(self) -> None:
        """Like `verify`, for the embedding, the last norm and a head that is stored whole."""
        self._verify(self._tables, self.tables)

    def verify_head(self, head_DV: jax.Array) -> None:
        """Like `verify`, for the decoded `head`, without the added columns."""
        self._verify(self._tables, {"head_DV": head_DV})

    def _verify(self, file: TensorFile, found: dict) -> None:
        wrong = []
        for name, array in found.items():
            right = file.entries[name]["digest"]
            if isinstance(right, str):
                wrong += [name] if array_digest(array) != right else []
                continue
            bad = [e for e, w in enumerate(array) if array_digest(w) != right[e]]
            wrong += [f"{name} of expert {e}" for e in bad]
        if wrong:
            raise ResidualError(
                f"{file.path}: {', '.join(wrong)} differ from the model that was "
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
