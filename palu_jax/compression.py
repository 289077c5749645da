"""`compress`: from a model and some text to the same model with a small KV cache, in one call.

    palu = compress(params, cfg, batches, keep=0.7, bits=4)
    tokens = generate(palu, prompt, cfg, steps=64)

`Compressor` does the same for many settings of one model, and also gives the recipes.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from llm_jax.config import Config
from llm_jax.params import Params
from llm_jax.progress import Reporter, default_reporter
from palu_jax.calibration import Statistics, calibrate
from palu_jax.convert import (
    ConvertError,
    Objective,
    Recipe,
    Spectra,
    check_finite,
    check_model,
    layer_spectra,
    to_palu,
)
from palu_jax.format import LatentFormat
from palu_jax.planner import CachePlan, plan_cache
from palu_jax.rank import Ranks, error_ranks, fisher_ranks, group_sizes, uniform_ranks

Search = Literal["uniform", "fisher", "fisher-group", "error"]
"""How ranks are chosen. uniform: the same share everywhere. fisher: by Fisher information, a share
for each projection (Palu). fisher-group: a share for each group. error: the least predicted error
over all layers."""


@dataclasses.dataclass(frozen=True)
class Compression:
    """How to compress a model: all choices but the model and the text."""

    keep: float = 0.7
    """The share of the ranks to keep; 0.7 is Palu-30%."""
    format: LatentFormat = dataclasses.field(default_factory=lambda: LatentFormat(4, 4))
    """How latents are stored."""
    group: int | None = None
    """The number of kv heads that share latents; None: all of them."""
    objective: Objective = "gradient"
    """What the factors minimize; `palu_jax.Recipe` explains them."""
    search: Search = "error"
    split: tuple[float, float] = (1, 1)
    """R_k : R_v of the uniform search."""
    multiple: int = 4
    """Ranks are multiples of it; the kernels on a GPU want 16 or 32."""
    rotate: bool = True
    """Rotate latents before they are quantized."""
    mean_split: bool = False
    """Keep each token's coefficient of the mean direction apart, in 16 bits."""
    fuse_values: bool = False
    """Multiply the value factors into the output projection."""
    budget: float | None = None
    """Cache bytes a token, of all layers. The planner then chooses the group size, the ranks and
    the bits, so `keep`, `group`, `search`, `split`, `mean_split` and the bits in `format` do not
    count."""
    slowest: float | None = None
    """With a budget: the most seconds that a decode step's attention may take over `tokens` slots,
    by the cost model of the kernels."""
    tokens: int = 65536
    classes: Literal[1, 2] = 1
    """With a budget: 2 lets the planner store the keys or values of a group in two classes of bits.
    On a GPU the kernels then give way to XLA. With `slowest`, or with a format with blocks, there
    is one class."""

    def __post_init__(self):
        """Raises ConvertError for numbers that no model can use."""
        above = lambda x: x is None or 0 < x < math.inf
        for name in ("keep", "budget", "slowest", "tokens", "multiple", "group"):
            if not above(value := getattr(self, name)):
                raise ConvertError(f"{name} is {value}; expected a number above 0")
        if not all(map(above, self.split)):
            raise ConvertError(f"split is {self.split}; expected two numbers above 0")
        if self.classes not in (1, 2):
            raise ConvertError(f"{self.classes} classes of bits; possible are 1 and 2")

    @property
    def needs_gradients(self) -> bool:
        """Whether the statistics must have gradients."""
        return self.objective == "gradient" or self._by_fisher

    @property
    def needs_statistics(self) -> bool:
        """Whether there must be statistics at all."""
        mean_split = self.mean_split and self.budget is None
        return self.objective != "plain" or mean_split or self._by_fisher

    @property
    def _by_fisher(self) -> bool:
        return self.budget is None and self.search.startswith("fisher")


def compress(
    params: Params,
    cfg: Config,
    batches: Iterable[np.ndarray] = (),
    *,
    keep: float = 0.7,
    bits: int | None = None,
    format: LatentFormat | None = None,
    group: int | None = None,
    objective: Objective = "gradient",
    search: Search = "error",
    split: tuple[float, float] = (1, 1),
    multiple: int = 4,
    rotate: bool = True,
    mean_split: bool = False,
    fuse_values: bool = False,
    budget: float | None = None,
    slowest: float | None = None,
    tokens: int = 65536,
    classes: Literal[1, 2] = 1,
    statistics: Statistics | None = None,
    reporter: Reporter | None = None,
) -> Params:
    """The parameters with low-rank key and value projections and a quantized cache of latents.

    `batches` are token ids, int [B, T], to calibrate on; `statistics` from an earlier `calibrate`
    take their place. `bits` is for keys and values, 4 if neither it nor a `format` is given; the
    other choices are those of `Compression`. Layers may be in host memory. `reporter` shows
    progress; None: in bars on standard error where that is a terminal.

    Raises ConvertError, RankError, FormatError and CalibrationError, which are all PaluError. To
    store the result, take it and its recipe from a `Compressor`.
    """
    if bits is not None and format is not None:
        raise ConvertError("bits and a format both say how latents are stored; give one of them")
    if format is None:
        format = LatentFormat(*(4 if bits is None else bits,) * 2)
    how = Compression(
        keep, format, group, objective, search, split, multiple, rotate, mean_split, fuse_values,
        budget, slowest, tokens, classes,
    )  # fmt: skip
    reporter = reporter or default_reporter()
    if statistics is None and how.needs_statistics:
        batches, gradients = list(batches), how.needs_gradients
        with reporter.bar("Calibrating", sum(map(len, batches))) as step:
            statistics = calibrate(params, batches, cfg, gradients=gradients, progress=step)
    return Compressor(params, cfg, statistics, reporter).compress(how)[0]


class Compressor:
    """Compresses one model in several ways.

    Decompositions are kept from call to call, because ranks and formats share them: in host memory
    up to 48 * D * F bytes a layer, for a model of width D with F numbers in a token's keys. Calls
    with the same group size, objective and mean split should follow each other.
    """

    def __init__(
        self,
        params: Params,
        cfg: Config,
        statistics: Statistics | None = None,
        reporter: Reporter | None = None,
    ):
        """`statistics` of `calibrate` are needed where `Compression.needs_statistics` says so.

        Raises ConvertError where they are of other parameters.
        """
        check_model(params, cfg, statistics)
        self._params, self._cfg, self._statistics = params, cfg, statistics
        self._reporter = reporter or default_reporter()
        self._kept: tuple[Any, list[Spectra]] | None = None
        self._energies: dict[Objective, dict[int, list]] = {}
        self._planned: tuple[Compression, list[CachePlan]] | None = None

    def compress(self, how: Compression, plan: CachePlan | None = None) -> tuple[Params, Recipe]:
        """(the compressed parameters, the recipe, as `palu_jax.save` wants it).

        `plan` is one of `plans`; None: the best of them, where `how` has a budget.
        """
        recipe = self.recipe(how, plan)
        spectra = self._spectra(recipe.groups, recipe.objective, recipe.mean_split)
        return to_palu(self._params, self._cfg, recipe, self._statistics, spectra=spectra), recipe

    def recipe(self, how: Compression, plan: CachePlan | None = None) -> Recipe:
        """The recipe with the ranks that the search or the planner chooses, or with those of
        `plan`."""
        if plan is None and how.budget is not None:
            plan = self.plans(how)[0]
        if plan is not None:
            form = plan.format(how.format)
            return Recipe(
                plan.groups, plan.ranks, how.objective, form, how.rotate, False, how.fuse_values
            )
        groups = group_sizes(self._cfg.kv_heads, how.group or self._cfg.kv_heads)
        return Recipe(
            groups, self._ranks(how, groups), how.objective, how.format, how.rotate,
            how.mean_split, how.fuse_values,
        )  # fmt: skip

    def _ranks(self, how: Compression, groups: tuple[int, ...]) -> Ranks:
        cfg, size = self._cfg, (self._cfg.head_dim, how.keep, how.multiple)
        if how.search == "uniform":
            return uniform_ranks(cfg.layers, groups, *size, how.split)
        if how.search == "error":
            return error_ranks(
                self._spectra(groups, how.objective, how.mean_split), groups, *size
            )  # fmt: skip
        if self._statistics is None:
            raise ConvertError(f"the search {how.search} needs statistics; calibrate first")
        per = "group" if how.search == "fisher-group" else "projection"
        return fisher_ranks(self._statistics, groups, *size, per)

    def plans(self, how: Compression) -> list[CachePlan]:
        """Every way to spend `how.budget`, the least predicted error first; raises RankError."""
        if how.budget is None:
            raise ConvertError("there is no budget to plan for; give bytes a token")
        if self._planned is not None and self._planned[0] == how:
            return self._planned[1]
        found = plan_cache(
            self.energies(how.objective), self._cfg, how.budget, how.multiple,
            tokens=how.tokens, slowest=how.slowest, classes=1 if how.format.block else how.classes,
        )  # fmt: skip
        self._planned = how, found
        return found

    def energies(self, objective: Objective = "gradient") -> dict[int, list]:
        """What `plan_cache` plans by: group size -> for each layer the eigenvalues of its key
        groups and of its value groups.

        The sizes are those that divide the kv heads. The forecast of a plan is one of the loss
        under the gradient objective alone.
        """
        if objective not in self._energies:
            kv_heads = self._cfg.kv_heads
            sizes = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
            self._energies[objective] = {n: self._energy(n, objective) for n in sizes}
        return self._energies[objective]

    def _energy(self, group: int, objective: Objective) -> list:
        """For each layer the eigenvalues of its key groups and of its value groups."""
        spectra = self._spectra(group_sizes(self._cfg.kv_heads, group), objective, False)
        return [
            tuple([s.energy_F for s in side] for side in (layer.k, layer.v)) for layer in spectra
        ]

    def _spectra(
        self, groups: tuple[int, ...], objective: Objective, mean_split: bool
    ) -> list[Spectra]:
        """The spectra of all layers; the last ones made are kept."""
        key = groups, objective, mean_split
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        self._kept, found = None, []
        layers, title = self._params.layers, f"Decomposing (groups of {groups[0]}, {objective})"
        with self._reporter.bar(title, len(layers)) as step:
            for i, layer in enumerate(layers):
                own = None if self._statistics is None else self._statistics.layers[i]
                check_finite(i, layer.attn, own)
                rest = groups, objective, own, mean_split
                found.append(layer_spectra(layer.attn, self._cfg, *rest))
                step(i + 1)
        self._kept = key, found
        return found
