"""The configurations that `experiments.palu` compares: what each is, and its name."""

import dataclasses
import hashlib
from typing import Literal, get_args

from llm_jax.config import Config
from llm_jax.params import Params
from palu_jax import (
    CachePlan,
    Compression,
    Compressor,
    ConvertError,
    KVFormat,
    LatentFormat,
    Recipe,
    kivi,
    to_quantized_cache,
)
from palu_jax.attention import why_not

PLANNED = "planned"
"""The search of a method whose group size, bits and ranks the planner chooses."""
Granularity = Literal["M", "G", "J"]
Bits = Literal[16, 8, 4, 3, 2]
Classes = Literal[1, 2]
Rival = Literal["int8", "int4", "int3", "int2", "kivi4", "kivi2"]
RIVALS: tuple[Rival, ...] = get_args(Rival)


@dataclasses.dataclass(frozen=True)
class CacheMethod:
    """One configuration. `kind` is dense, palu, or one of RIVALS."""

    kind: str
    keep: float = 1.0
    """The share of the ranks that is kept; 0.7 is Palu-30%."""
    key_bits: int = 16
    value_bits: int = 16
    granularity: str = "J"
    group: int = 0
    """The number of kv heads in a group."""
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
    """Cache bytes a token, for a planned method."""
    slowest: float | None = None
    """The most seconds of a step's attention over `context` tokens, for a planned method."""
    context: int = 0
    classes: int = 1
    """The most classes of bits of a group's keys or values, for a planned method."""

    @property
    def name(self) -> str:
        """What tables and records call it."""
        if self.kind != "palu":
            return self.kind
        if self.search == PLANNED:
            within = "" if self.slowest is None else f", {self.slowest * 1e6:g} µs a step"
            classes = ", two classes" if self.classes == 2 else ""
            return f"palu planned for {self.budget:g} B{within}, {self.objective}{classes}"
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
        """Whether the statistics must have gradients."""
        return self.kind == "palu" and self.compression().needs_gradients

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration is needed."""
        return self.kind == "palu" and self.compression().needs_statistics

    def compression(self, dtype: str | None = None) -> Compression:
        """The same choices for `palu_jax`; `dtype` is that of 16-bit latents."""
        common = dict(objective=self.objective, rotate=self.rotate, multiple=self.multiple)
        if self.search == PLANNED:
            limits = dict(budget=self.budget, slowest=self.slowest, tokens=self.context)
            limits["classes"] = self.classes
            return Compression(format=LatentFormat(dtype=dtype), **limits, **common)
        form = LatentFormat(
            self.key_bits, self.value_bits, sinks=self.sinks, window=self.window, dtype=dtype
        )
        return Compression(
            self.keep, form, self.group, search=self.search, split=self.split,
            mean_split=self.mean_split, fuse_values=self.fuse_values, **common,
        )  # fmt: skip

    def plan(self, cfg: Config, compressor: Compressor | None) -> CachePlan | None:
        """What the planner chooses for a planned method; None for any other."""
        if compressor is None or self.search != PLANNED:
            return None
        return compressor.plans(self.compression(_short(cfg)))[0]

    def applied(
        self, params: Params, cfg: Config, compressor: Compressor | None
    ) -> tuple[Params, Recipe | None]:
        """(the parameters with this method, the recipe of a conversion).

        Only the kind palu needs a `compressor`. Caches of 16 bits take 2 bytes a number for float32
        models, too, but for the dense model where its attention has no other cache than its own.
        """
        short = _short(cfg)
        if self.kind == "palu":
            if compressor is None:
                raise ValueError("a conversion needs a compressor")
            return compressor.compress(self.compression(short))
        if self.kind == "dense" and why_not(cfg):
            return params, None
        bits = 16 if self.kind == "dense" else int(self.kind[-1])
        form = KVFormat(bits, dtype=short)
        if self.kind.startswith("kivi"):
            form = kivi(bits, short)
        return to_quantized_cache(params, cfg, form), None


def _short(cfg: Config) -> str | None:
    """The dtype of 16-bit caches, where it is not the model's."""
    return "bfloat16" if cfg.dtype == "float32" else None


def group_of(granularity: str, cfg: Config, group: int) -> int:
    """The number of kv heads in a group for M, G (of `group` heads) and J; raises ConvertError."""
    if granularity == "G" and not 1 < group < cfg.kv_heads:
        raise ConvertError(
            f"G-LRD with {group} kv heads a group is M or J here; this model has {cfg.kv_heads} kv "
            "heads, so --group-size must be between 2 and one less"
        )
    return {"M": 1, "G": group, "J": cfg.kv_heads}[granularity]


def fingerprint(*parts: object) -> str:
    """A short hash of everything that a measurement depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
