"""How another JAX project lays out the parameters of a model that `llm_jax` has, as a table.

    arrays = llm_jax.layouts.BONSAI_QWEN3.to_hf(nnx.to_pure_dict(nnx.state(model)), cfg)
    params = llm_jax.params_from_hf(arrays, cfg)

A `Layout` is a table: the path of an array, its axes by letters, and the parameters that it holds.
Letters: D model, N query heads, K kv heads, H head size, F ffn, V vocabulary, L layers in a stack,
C the parameters that an array holds along one axis. The tables are in `llm_jax.layouts`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from llm_jax import LLMError, shown
from llm_jax.config import Config
from llm_jax.families import FAMILIES

_LISTED = 10


class LayoutError(LLMError):
    """A tree that does not have the layout; the message lists what is wrong."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """An array of the other project."""

    path: str
    """Its path, keys joined by /; {} is the layer, if the layers are not in a stack."""
    axes: str
    """Its axes and those in a Hugging Face file, such as "DNH->NH,D": out first, in last."""
    fields: tuple[str, ...]
    """Its parameters, as in `Config.layer_shapes`; several lie along the axis C."""
    change: Callable[[np.ndarray, Config, bool], np.ndarray] | None = None
    """f(array in the order of a Hugging Face file before its axes are joined, cfg, whether on its
    way to a Hugging Face file)."""
    when_tied: str = "absent"
    """Of the head, where it is the embedding table: "absent", or "copy" of the table."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of a whole model."""

    name: str
    entries: tuple[Entry, ...]

    def to_hf(self, tree: Any, cfg: Config) -> dict[str, np.ndarray]:
        """The arrays by their Hugging Face names, for `llm_jax.params_from_hf`.

        `tree` is a pytree whose paths are those of the table: nested dicts, lists, an NNX state.
        Raises LayoutError for arrays that are missing, too many, or of another shape.
        """
        arrays = _by_path(tree)
        wanted = {path: (e, layer) for e in self.entries for path, layer in _places(e, cfg)}
        problems = [f"{path} is missing" for path in wanted if path not in arrays]
        problems += [f"{path} has no place" for path in arrays if path not in wanted]
        out: dict[str, np.ndarray] = {}
        for path, (entry, layer) in wanted.items():
            if path not in arrays:
                continue
            shape, expected = tuple(arrays[path].shape), _shape(entry, cfg)
            if shape != expected:
                problems.append(f"{path} has shape {list(shape)}; expected {list(expected)}")
            elif not problems and not (cfg.tied and entry.fields == ("head_DV",)):
                out |= _to_hf(entry, layer, np.asarray(arrays[path]), cfg)
        self._raise(problems, cfg)
        return out

    def from_hf(self, arrays: Mapping[str, Any], cfg: Config) -> dict[Any, Any]:
        """The tree, as nested dicts whose keys are strings, and whole numbers where a path has
        them; of arrays by their Hugging Face names, such as `llm_jax.params_to_hf` gives.

        Raises LayoutError for names that are missing.
        """
        tree: dict[Any, Any] = {}
        problems: list[str] = []
        for entry in self.entries:
            for path, layer in _places(entry, cfg):
                names = _names(entry, layer, cfg)
                if missing := [n for row in names for n in row if n not in arrays]:
                    problems += [f"{name} is missing" for name in missing]
                    continue
                keys = [int(key) if key.isdigit() else key for key in path.split("/")]
                inner = tree
                for key in keys[:-1]:
                    inner = inner.setdefault(key, {})
                inner[keys[-1]] = _from_hf(entry, names, arrays, cfg)
        self._raise(problems, cfg)
        return tree

    def _raise(self, problems: list[str], cfg: Config) -> None:
        if not problems:
            return
        more = len(problems) - _LISTED
        listed = problems[:_LISTED] + ([f"and {more} more"] if more > 0 else [])
        lines = "".join(f"\n  {shown(line)}" for line in listed)
        raise LayoutError(f"this is no {cfg.family} as {self.name} keeps it:{lines}")


def _by_path(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their paths; an NNX state's variables are arrays."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    found = {name(path): a for path, a in jax.tree_util.tree_leaves_with_path(tree)}
    return {path.removesuffix("/value"): a for path, a in found.items()}


def _places(entry: Entry, cfg: Config) -> list[tuple[str, int | None]]:
    """(path, layer) of the arrays that an entry stands for."""
    if cfg.tied and entry.fields == ("head_DV",) and entry.when_tied == "absent":
        return []
    if "{}" not in entry.path:
        return [(entry.path, None)]
    return [(entry.path.format(i), i) for i in range(cfg.layers)]


def _sizes(entry: Entry, cfg: Config) -> dict[str, int]:
    return dict(
        D=cfg.d_model, N=cfg.heads, K=cfg.kv_heads, H=cfg.head_dim, F=cfg.d_ff, V=cfg.vocab,
        L=cfg.layers, C=len(entry.fields),
    )  # fmt: skip


def _shape(entry: Entry, cfg: Config) -> tuple[int, ...]:
    sizes = _sizes(entry, cfg)
    return tuple(sizes[letter] for letter in entry.axes.split("->")[0])


def _names(entry: Entry, layer: int | None, cfg: Config) -> list[list[str]]:
    """Hugging Face's names, by layer of a stack (or for the one layer) and by parameter."""
    names = FAMILIES[cfg.family].hf_names
    tied = cfg.tied and entry.fields == ("head_DV",)
    fields = ("embed_VD",) if tied else entry.fields
    layers = range(cfg.layers) if "L" in entry.axes else [layer]
    return [[names[field].format(i) for field in fields] for i in layers]


def _orders(entry: Entry) -> tuple[str, list[str], str]:
    """(the array's axes, the groups of a Hugging Face file's, "LC" and those in its order)."""
    own, stored = entry.axes.split("->")
    groups = stored.split(",")
    lead = "".join(letter for letter in "LC" if letter in own)
    return own, groups, lead + "".join(groups)


def _to_hf(entry: Entry, layer: int | None, array: np.ndarray, cfg: Config):
    own, groups, order = _orders(entry)
    sizes, names = _sizes(entry, cfg), _names(entry, layer, cfg)
    turned = array.transpose([own.index(letter) for letter in order])
    turned = turned.reshape(len(names), len(names[0]), *(sizes[c] for g in groups for c in g))
    joined = [int(np.prod([sizes[c] for c in g])) for g in groups]
    out = {}
    for of_layer, row in zip(turned, names, strict=True):
        for part, name in zip(of_layer, row, strict=True):
            changed = part if entry.change is None else entry.change(part, cfg, True)
            out[name] = np.ascontiguousarray(changed.reshape(joined))
    return out


def _from_hf(entry: Entry, names: list[list[str]], arrays: Mapping[str, Any], cfg: Config):
    own, groups, order = _orders(entry)
    sizes = _sizes(entry, cfg)
    apart = [sizes[c] for g in groups for c in g]

    def one(name):
        part = np.asarray(arrays[name]).reshape(apart)
        return part if entry.change is None else entry.change(part, cfg, False)

    stacked = np.stack([np.stack([one(name) for name in row]) for row in names])
    whole = stacked.reshape([sizes[letter] for letter in order])
    return np.ascontiguousarray(whole.transpose([order.index(letter) for letter in own]))
