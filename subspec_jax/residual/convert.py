"""Converts a checkpoint once to substitutes and residuals. Later starts map the files."""

import concurrent.futures
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llm_jax.checkpoint import Checkpoint, table_shapes
from llm_jax.config import Config
from llm_jax.digest import array_digest
from llm_jax.files import locked
from llm_jax.packed import packed
from llm_jax.params import joined, named_parameters
from llm_jax.quantize import check_grouping, quantize
from pallas_kernels.quantized_matmul import Packed
from pallas_kernels.residual_decode import residual_decode
from pallas_kernels.residual_decode.code import CODES, FRACTION, LANES, Residual, pad
from subspec_jax.residual.encode import encode
from subspec_jax.residual.files import VERSION, Converted
from subspec_jax.residual.split import head_shape, widened
from subspec_jax.residual.stacks import STACKS, split_fields, stacked
from subspec_jax.residual.tensor_file import (
    LAYER,
    TABLES,
    ResidualError,
    begin,
    is_complete,
    write_tensors,
)

if TYPE_CHECKING:
    from subspec_jax.residual.parts import CardPart


def convert(
    checkpoint: "Checkpoint | CardPart",
    cfg: Config,
    path: str | Path,
    bits: int = 4,
    group: int = 64,
    iterations: int = 20,
    code: str = "levels",
    progress: Callable[[int, int], None] | None = None,
    workers: int = 2,
) -> Converted:
    """The converted model of `checkpoint`, written to the folder `path` and opened.

    Files of layers that already exist are kept. Before a layer's file is written, all its weights
    are decoded on the device and compared. `workers` matrices are encoded at a time.
    Of a `parts.CardPart`, the card's part is written; `cfg` is then that of one card.
    `progress(done, total)` counts layers. Raises ResidualError if the folder belongs to another
    checkpoint or other settings; LockedError if another process converts to it; what
    `check_convertible` raises, and CheckpointError, if the checkpoint cannot be converted.
    """
    path = Path(path)
    check_convertible(checkpoint, cfg, bits, group, code)
    checkpoint.check(cfg)
    settings = dict(version=VERSION, code=code, bits=bits, group=group, iterations=iterations)
    manifest = settings | {"model": dataclasses.asdict(cfg), "source": checkpoint.digest()}
    manifest = json.loads(json.dumps(manifest))
    if is_complete(path, cfg.layers):
        begin(path, manifest)
    else:
        with locked(path):
            begin(path, manifest)
            _write(checkpoint, cfg, path, manifest, progress, workers)
    return Converted(path)


def check_convertible(
    checkpoint: "Checkpoint | CardPart", cfg: Config, bits: int, group: int, code: str = "levels"
) -> None:
    """Raises ResidualError or ValueError for a model that cannot be written in two parts in this
    way. No weights are read."""
    if checkpoint.experts_in_mxfp4(cfg):
        raise ResidualError(
            "the experts are stored in MXFP4, 4.25 bits a weight, and a substitute with a residual "
            "would be larger: --stream raw brings them in their own form"
        )
    if code not in CODES:
        raise ValueError(f"code {code!r} is not one of {', '.join(CODES)}")
    if cfg.experts is not None and code != "levels":
        raise ResidualError(f"experts have no code {code}, because each is one array; take levels")
    if cfg.dtype not in FRACTION:
        raise ResidualError(
            f"the weights are {cfg.dtype}; residuals are of 16-bit weights: choose --dtype bfloat16"
        )
    for layer in range(cfg.layers):
        for name in split_fields(cfg, layer):
            check_grouping(name, cfg.layer_shapes(layer)[name][-2], bits, group)


def _write(checkpoint, cfg, path, manifest, progress, workers) -> None:
    """Writes the files that are missing."""
    bits, group, iterations, code = (manifest[k] for k in ("bits", "group", "iterations", "code"))
    quantizer = bits, group, iterations
    if not (path / TABLES).exists():
        tables, entries = {}, {}
        names = sorted(table_shapes(cfg), key="head_DV".__ne__)  # while no other table is held
        for field in names:
            table = checkpoint.read(field, cfg)
            entries[field] = _entry(table)
            shape = head_shape(cfg, bits, group) if field == "head_DV" else None
            if shape is None:
                tables[field] = table
                continue
            if more := shape[1] - table.shape[1]:
                table = np.pad(table, ((0, 0), (0, more)))
            arrays, entry = _encoded(field, table, quantizer, code, "the output head")
            del table
            tables |= arrays
            entries[field] |= entry | {"shape": list(shape)}
        write_tensors(path / TABLES, tables, entries, manifest)
    for index in range(cfg.layers):
        if not (path / LAYER.format(index)).exists():
            make = _expert_layer if cfg.has_experts(index) else _layer
            tensors, entries = make(checkpoint, index, cfg, quantizer, code, workers)
            write_tensors(path / LAYER.format(index), tensors, entries, manifest)
        if progress:
            progress(index + 1, cfg.layers)


def _layer(checkpoint, index, cfg, quantizer, code, workers) -> tuple[dict, dict]:
    """(arrays of a layer, their entries)."""

    def one(field, w):
        w, name = np.asarray(w), f"{field} of layer {index}"
        if w.ndim == 1:
            return {field: w}, {field: _entry(w)}
        wide = widened(w, quantizer[0])
        arrays, entry = _encoded(field, wide, quantizer, code, name)
        return arrays, {field: _entry(w) | entry | {"columns": w.shape[1]}}

    layer = joined(checkpoint.layer(index, cfg), lambda *w: np.concatenate(w, axis=-1))
    named = [(path[-1].name, leaf) for path, leaf in jax.tree.leaves_with_path(layer)]
    tensors, entries = {}, {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for arrays, entry in pool.map(one, *zip(*named, strict=True)):
            tensors |= arrays
            entries |= entry
    return tensors, entries


def _expert_layer(checkpoint, index, cfg, quantizer, code, workers) -> tuple[dict, dict]:
    """`_layer` of a layer with experts: they alone are in two parts."""
    named = named_parameters(checkpoint.layer(index, cfg))
    stacks = {name: named.pop(name) for name in STACKS}
    tensors = {field: np.asarray(w) for field, w in named.items()}
    entries = {field: _entry(w) for field, w in tensors.items()}

    def one(field, number):
        w = np.asarray(stacks[field][number])
        name = f"{field} of expert {number} of layer {index}"
        arrays, entry = _encoded(field, w, quantizer, code, name)
        return arrays, _entry(w) | entry

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for field, stack in stacks.items():
            found = list(pool.map(one, [field] * len(stack), range(len(stack))))
            arrays, entries[field] = stacked(field, found)
            tensors |= arrays
    return tensors, entries


def _encoded(field: str, w: np.ndarray, quantizer, code: str, name: str):
    """(arrays of a matrix in two parts, their entry for the file); every weight is checked."""
    # A copy, because the device may use the host array's own memory.
    q = jax.tree.map(np.array, jax.block_until_ready(quantize(jax.device_put(w), *quantizer)))
    r, substitute = encode(w, q, code, name), packed(q)
    wrong = sum(
        np.count_nonzero(a != b)
        for a, b in zip(_decoded(r, substitute).view(np.uint16), w.view(np.uint16), strict=True)
    )
    if wrong:
        raise ResidualError(f"{name}: {wrong} of {w.size} weights decode to other bits")
    parts = dict(codes=substitute.words_BNSc, top=substitute.top_BNSc, scale=substitute.scale_BQSK)
    parts |= dict(residual=r.words, low=r.low_DF)
    arrays = {f"{field}.{part}": np.asarray(a) for part, a in parts.items() if a is not None}
    return arrays, dict(shape=list(w.shape), patches=r.patches)


def _entry(array: np.ndarray) -> dict[str, Any]:
    return {"digest": array_digest(array)}


def _decoded(residual: Residual, substitute: Packed) -> np.ndarray:
    """The weights from the device's decoder. Room is rounded up, so few programs are compiled."""
    raw = residual.shape[0] * residual.shape[1] // (2 * LANES)
    step, rows = max(32, raw // 32), residual.words.shape[0]
    padded = pad(residual, rows + -rows % step, 1 << max(10, residual.patches.bit_length()))
    return np.asarray(_decode(padded, substitute))


_decode = jax.jit(residual_decode)
