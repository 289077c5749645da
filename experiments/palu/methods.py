"""The configurations `experiments.palu` compares: what each is, and how it is made."""

import dataclasses
import hashlib
from typing import Literal

from llm_jax.config import Config
from llm_jax.params import Params
from palu_jax import planner, rank
from palu_jax.convert import ConvertError, Recipe, convert_layer, layer_spectra
from palu_jax.latent import LatentFormat
from palu_jax.rival import KVFormat, kivi, to_quantized_cache

Search = Literal["uniform", "fisher", "fisher-group", "error"]
PLANNED = "planned"
"""The search of a method whose group size, bits and ranks the planner chooses."""
Granularity = Literal["M", "G", "J"]
RIVALS = ("int8", "int4", "int3", "int2", "kivi4", "kivi2")


@dataclasses.dataclass(frozen=True)
class Method:
    """One configuration. `kind` is dense, palu, or one of RIVALS."""

    kind: str
    keep: float = 1.0
    """Share of the ranks that is kept; Palu-30% is 0.7."""
    key_bits: int = 16
    value_bits: int = 16
    granularity: str = "J"
    group: int = 0
    """kv heads of a group."""
    objective: str = "gradient"
    search: str = "uniform"
    split: tuple[float, float] = (1, 1)
    """R_k : R_v of the uniform search."""
    rotate: bool = True
    mean_split: bool = False
    fuse_values: bool = False
    multiple: int = 4
    sinks: int = 0
    window: int = 0
    budget: float = 0.0
    """Bytes a token, for a planned one."""
    slowest: float | None = None
    """Seconds a step's attention may take over `context` tokens, for a planned one."""
    context: int = 0

    @property
    def name(self) -> str:
        if self.kind != "palu":
            return self.kind
        if self.search == PLANNED:
            within = "" if self.slowest is None else f", {self.slowest * 1e6:g} µs a step"
            return f"palu planned for {self.budget:g} B{within}, {self.objective}"
        bits = str(self.key_bits) if self.key_bits == self.value_bits else (
            f"{self.key_bits}/{self.value_bits}"
        )  # fmt: skip
        parts = [f"palu {self.keep:g} {self.granularity} {bits} bit", self.objective]
        if self.search != "uniform":
            parts.append(self.search)
        if self.split != (1, 1):
            parts.append(f"k:v {self.split[0]:g}:{self.split[1]:g}")
        if not self.rotate and min(self.key_bits, self.value_bits) < 16:
            parts.append("unrotated")
        for name in ("mean_split", "fuse_values"):
            if getattr(self, name):
                parts.append(name.replace("_", " "))
        if self.sinks or self.window:
            parts.append(f"{self.sinks}+{self.window} exact")
        return ", ".join(parts)

    @property
    def needs_gradients(self) -> bool:
        return self.kind == "palu" and (
            self.objective == "gradient" or self.search.startswith("fisher")
        )

    @property
    def needs_statistics(self) -> bool:
        plain = self.objective == "plain" and not self.mean_split
        return self.kind == "palu" and not (plain and not self.search.startswith("fisher"))


class Maker:
    """Makes methods of one model; spectra are kept, because ranks and formats share them."""

    def __init__(self, params: Params, cfg: Config, statistics, progress):
        self.params, self.cfg, self.statistics = params, cfg, statistics
        self.progress = progress
        """A function (title, total) to a context manager that gives a function of the count."""
        self.key, self.spectra = None, None
        self.energies = {}

    def make(self, m: Method) -> tuple[Params, Recipe | None]:
        """(the parameters as the method has them, its recipe where it is a conversion)."""
        short = "bfloat16" if self.cfg.dtype == "float32" else None
        if m.kind == "dense":
            return to_quantized_cache(self.params, self.cfg, KVFormat(16, dtype=short)), None
        if m.kind in RIVALS:
            bits = int(m.kind[-1])
            form = kivi(bits, short) if m.kind.startswith("kivi") else KVFormat(bits, dtype=short)
            return to_quantized_cache(self.params, self.cfg, form), None
        recipe = self.recipe(m, short)
        spectra = self.spectra_of(m, recipe.groups)
        layers = []
        for layer, ranks, found in zip(self.params.layers, recipe.ranks, spectra, strict=True):
            layers.append(convert_layer(layer, self.cfg, recipe, ranks, found))
        return dataclasses.replace(self.params, layers=tuple(layers)), recipe

    def recipe(self, m: Method, short: str | None) -> Recipe:
        if m.search == PLANNED:
            plan = self.plan(m)
            form = LatentFormat(plan.key_bits, plan.value_bits, dtype=short)
            return Recipe(plan.groups, plan.ranks, m.objective, form, m.rotate)
        cfg, groups = self.cfg, rank.group_sizes(self.cfg.kv_heads, m.group)
        size, rest = cfg.head_dim, (m.keep, m.multiple)
        if m.search == "uniform":
            ranks = rank.uniform_ranks(cfg.layers, groups, size, *rest, m.split)
        elif m.search == "error":
            ranks = rank.error_ranks(self.spectra_of(m), groups, size, *rest)
        else:
            per = "group" if m.search == "fisher-group" else "projection"
            ranks = rank.fisher_ranks(self.statistics, groups, size, *rest, per)
        form = LatentFormat(
            m.key_bits, m.value_bits, sinks=m.sinks, window=m.window, dtype=short
        )  # fmt: skip
        return Recipe(groups, ranks, m.objective, form, m.rotate, m.mean_split, m.fuse_values)

    def plan(self, m: Method) -> planner.CachePlan:
        """The best plan for a budget; energies of every group size are made once."""
        if m.objective not in self.energies:
            sizes = [n for n in range(1, self.cfg.kv_heads + 1) if self.cfg.kv_heads % n == 0]
            self.energies[m.objective] = {}
            for n in sizes:
                spectra = self.spectra_of(dataclasses.replace(m, group=n, mean_split=False))
                self.energies[m.objective][n] = [
                    tuple([s.energy_F for s in side] for side in (layer.k, layer.v))
                    for layer in spectra
                ]
        found = planner.plan_cache(
            self.energies[m.objective], self.cfg, m.budget, m.multiple, tokens=m.context,
            slowest=m.slowest,
        )  # fmt: skip
        return found[0]

    def spectra_of(self, m: Method, groups: tuple[int, ...] | None = None):
        groups = groups or rank.group_sizes(self.cfg.kv_heads, m.group)
        key = groups, m.objective, m.mean_split
        if key != self.key:
            found, layers = [], self.params.layers
            with self.progress(
                f"Decomposing (groups of {groups[0]}, {m.objective})", len(layers)
            ) as step:
                for i, layer in enumerate(layers):
                    of_layer = None if self.statistics is None else self.statistics.layers[i]
                    rest = (m.objective, of_layer, m.mean_split)
                    found.append(layer_spectra(layer.attn, self.cfg, groups, *rest))
                    step(i + 1)
            self.key, self.spectra = key, found
        return self.spectra


def group_of(granularity: str, cfg: Config, group: int) -> int:
    """kv heads of a group for M, G (of `group` heads) and J."""
    if granularity == "G" and not 1 < group < cfg.kv_heads:
        raise ConvertError(
            f"G-LRD with {group} kv heads a group is M or J here; this model has {cfg.kv_heads} kv "
            "heads, so --group-size must be between 2 and one less"
        )
    return {"M": 1, "G": group, "J": cfg.kv_heads}[granularity]


def fingerprint(*parts) -> str:
    """A short hash of everything that decides a measurement."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
