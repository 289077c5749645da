"""A layer's experts in a converted model: stacks of substitutes, and residuals of own lengths.

Of each of the two stacks a file has "NAME.codes", "NAME.scale" (and "NAME.top" with 3 bits), where
the experts are the first axis, and "NAME.residual", the words of all experts one after another. Its
entry says of every expert the rows of words, the patches, and the digest of the exact weights.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.config import Config
from llm_jax.stream import to_device
from pallas_kernels.quantized_matmul import Packed
from pallas_kernels.residual_decode import residual_decode
from pallas_kernels.residual_decode.code import LANES
from subspec_jax.residual.split import SplitExperts

STACKS = ("expert_gate_up", "expert_down")
"""The stacks that are in two parts. All else of a layer with experts is stored as it is."""
Room = Mapping[str, tuple[int, int]]
"""By matrix, (rows of words, patches)."""


def split_fields(cfg: Config, layer: int) -> tuple[str, ...]:
    """The parameters of a layer that are written in two parts."""
    return STACKS if cfg.has_experts(layer) else tuple(cfg.layer_matrices)


def stacked(
    name: str, experts: Sequence[tuple[dict[str, np.ndarray], dict[str, Any]]]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays of a stack, its entry), from (arrays, entry) of each expert's matrix of this name."""
    arrays, entries = zip(*experts, strict=True)
    residual = f"{name}.residual"
    found = {key: np.stack([a[key] for a in arrays]) for key in arrays[0] if key != residual}
    found[residual] = np.concatenate([a[residual] for a in arrays])
    entry = {key: [e[key] for e in entries] for key in ("digest", "patches")}
    entry["rows"] = [a[residual].shape[0] for a in arrays]
    return found, entry | {"shape": [len(experts), *entries[0]["shape"]]}


def largest(entries: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """The room that is enough for any expert of these layers: one program applies all of them."""
    most = lambda name, what: max(max(layer[name][what]) for layer in entries)
    return {name: (most(name, "rows"), most(name, "patches")) for name in STACKS}


def stored_experts(
    views: Mapping[str, np.ndarray],
    entries: Mapping[str, Any],
    room: Room,
    bits: int,
    group: int,
    dtype: str,
) -> SplitExperts:
    """A layer's experts, with residuals padded to `room`. Substitutes are views of the file."""

    def low(name):
        parts = (views.get(f"{name}.{part}") for part in ("codes", "top", "scale"))
        return Packed(*parts, entries[name]["shape"][2], bits, group)

    rows = [room[name][0] for name in STACKS]
    count = entries[STACKS[0]]["shape"][0]
    each = tuple(np.zeros((sum(rows), LANES), np.uint32) for _ in range(count))
    for name, start in zip(STACKS, (0, rows[0]), strict=True):
        own = entries[name]["rows"]
        parts = np.split(views[f"{name}.residual"], np.cumsum(own)[:-1])
        for words, size, part in zip(each, own, parts, strict=True):
            words[start : start + size] = part
    shapes = tuple(tuple(entries[name]["shape"][1:]) for name in STACKS)
    patches = tuple(room[name][1] for name in STACKS)
    return SplitExperts(*map(low, STACKS), each, shapes, dtype, rows[0], patches)


def decoded_experts(experts: SplitExperts) -> tuple[np.ndarray, np.ndarray]:
    """Both stacks as plain NumPy arrays. The device holds the substitutes and one expert."""
    count = len(experts.each)
    stacks = tuple(np.empty((count, *s), np.dtype(experts.dtype)) for s in experts.shapes)
    for number, pair in enumerate(_each_decoded(experts)):
        for stack, w in zip(stacks, pair, strict=True):
            stack[number] = w
    return stacks[0], stacks[1]


def _each_decoded(experts: SplitExperts) -> Iterator[tuple[jax.Array, jax.Array]]:
    rest = to_device(dataclasses.replace(experts, each=()))
    for number, words in enumerate(experts.each):
        yield _decode(rest, *to_device((words, np.int32(number))))


@jax.jit
def _decode(rest: SplitExperts, words: jax.Array, number: jax.Array):
    both = rest.matrices(words, number)
    return tuple(residual_decode(*w.pair) for w in both)
