"""Every byte of a run before it starts: what is resident, what streams, what the draft shares.

This is pure arithmetic on a `Config`. It starts no device, so the allocator's limit can still be
set to the plan.
"""

import dataclasses
import math

import jax

from llm_jax.config import DTYPES, Config
from llm_jax.params import Params, abstract
from llm_jax.quantize import check_grouping
from subspec_jax import SubspecError, plan_table, tree
from subspec_jax.draft_model import NO_DRAFT, Draft, drafted_layers, substitutes
from subspec_jax.layout import (
    Layout,
    expert_count,
    share_of_experts,
    splits,
    stay,
    substitute_bytes,
    tree_bytes,
    why_not_decoded,
    why_not_int8,
)
from subspec_jax.memory import show_bytes
from subspec_jax.offload import streamed_bytes
from subspec_jax.residual.split import has_split, is_split
from subspec_jax.tree import PassShape, TreeSpec, cache_slots, pass_nodes, shared_spec


class PlanError(SubspecError):
    """There is no plan for a limit or a setting. The message names the least limit that works."""


class TooLittleError(PlanError):
    """The limit is too low; the message says what would do."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where everything is placed. `device` and `host` are the bytes kept there, by name."""

    cfg: Config
    limit: int
    resident: int
    """The number of layers that stay on the device; `stays` says which."""
    table_on_host: bool
    """Whether the embedding table is a NumPy array in host memory. The draft has a low-bit copy."""
    max_length: int
    spec: TreeSpec
    draft: Draft
    chunk: int
    ahead: int
    device: dict[str, int]
    host: dict[str, int]
    streamed_bytes: int
    """Bytes that one pass of the target streams."""
    model: Params = dataclasses.field(repr=False)
    """The target as shapes and dtypes."""
    hot: int | None = None
    """Experts that are kept on the device, of all layers together, where a pass brings only those
    it needs; None: layers stay or are streamed whole."""
    texts: int = 1
    """Most texts that are decoded together; each has a row of the caches."""
    ladder: tuple[int, ...] = ()
    """The numbers of texts that programs are made for, ascending up to `texts`; none: texts are
    decoded one after another."""
    levels: tuple[int, ...] = ()
    """The most levels of a tree for each number of texts in the ladder; none: `shared_spec` alone
    says it."""
    disk: frozenset[int] = frozenset()
    """The numbers of the streamed layers that are on disk, not in host memory."""
    shape: PassShape | None = None
    """Of every pass, where all methods share it."""

    @property
    def slots(self) -> int:
        """Slots of a text's cache."""
        return cache_slots(self.max_length, self.spec, self.shape)

    def spec_of(self, texts: int) -> TreeSpec:
        """The tree of each of `texts` texts, a number of the ladder."""
        spec = shared_spec(self.spec, texts)
        if not self.levels or spec.budget is not None:
            return spec
        most = self.levels[self.ladder.index(texts)]
        return dataclasses.replace(spec, depth=min(spec.depth, most))

    @property
    def streamed(self) -> int:
        """The number of layers that are streamed, whole or by experts."""
        if self.hot is not None:
            return 0 if self.hot == expert_count(self.cfg) else self.cfg.layers
        return self.cfg.layers - self.resident

    @property
    def stays(self) -> frozenset[int]:
        """The numbers of the layers that stay on the device."""
        return stay(self.cfg.layers, self.resident, self.streams_residuals)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the layers that are on disk, which every pass reads."""
        return sum(streamed_bytes(self.model.layers[i]) for i in self.disk)

    @property
    def total(self) -> int:
        """Predicted peak of device memory, in bytes."""
        return sum(self.device.values())

    @property
    def streams_residuals(self) -> bool:
        """Whether layers are streamed as residuals of their substitutes, not as whole layers."""
        return has_split(self.model.layers)

    @property
    def split_head(self) -> bool:
        """Whether the output head is in two parts: a substitute, which the draft uses, and a
        residual."""
        return is_split(self.model.head_DV)

    @property
    def draft_step_bytes(self) -> int:
        """Bytes of weights that a draft step reads."""
        cfg, d = self.cfg, self.draft
        if d.model is not None:
            return d.model.parameter_count * DTYPES[d.model.dtype]
        if d.bits is None:
            return 0
        drafted = drafted_layers(self.model.layers, d, self.resident)
        layers = enumerate(self.model.layers)
        own = sum(substitute_bytes(layer, d) for i, layer in layers if i in drafted)
        if cfg.experts is not None:
            own = own * share_of_experts(cfg, self.spec.width)
        shared = sum(map(streamed_bytes, self.model.layers[: drafted.start]))
        head = self.device.get("draft head", cfg.head_columns * cfg.d_model * DTYPES[cfg.dtype])
        if self.split_head:
            head = tree_bytes(substitutes(self.model.head_DV))
        return shared + own + head

    def __str__(self) -> str:
        """A table of all bytes, and a line about what streams."""
        return plan_table.table(self)

    def pass_seconds(self, link: float, disk: float = math.inf) -> float:
        """Seconds of a streamed pass, if nothing but the link and the disk slows it down. Both in
        bytes per second."""
        return max(self.streamed_bytes / link, self.disk_bytes / disk)

    def tokens_per_second(
        self,
        tau: float,
        link: float,
        memory: float,
        overhead: float = 0.005,
        disk: float = math.inf,
    ) -> float:
        """The upper bound tau / (pass + draft steps + overhead), in tokens per second.

        Every byte moves at the measured bandwidths (`link`, `memory` and `disk`, in bytes per
        second), and arithmetic takes no time. The disk reads while the draft runs, too. `overhead`
        is in seconds.
        """
        draft = self.spec.steps * self.draft_step_bytes / memory
        round_s = draft + self.pass_seconds(link) + overhead
        return tau / max(round_s, self.disk_bytes / disk)


def published_tau(depth: int, hazard: float = 0.9749) -> float:
    """Emitted tokens per pass if every level has the same acceptance: 28.4 at depth 48.

    The hazard is fitted to SubSpec's README (Qwen2.5-7B, MT-Bench, width 6, tau 28.35 at depth 48).
    """
    return (1 - hazard ** (depth + 1)) / (1 - hazard)


MOST_AHEAD = 1000
"""Most layers on their way; a stream that has fewer sends fewer."""


def make_plan(
    cfg: Config,
    limit: int,
    spec: TreeSpec,
    draft: Draft = NO_DRAFT,
    max_length: int = 2048,
    chunk: int = 512,
    ahead: int = 1,
    resident: int | None = None,
    table_on_host: bool | None = None,
    spare: float = 0.02,
    model: Params | None = None,
    kernels: bool = False,
    by_expert: bool = True,
    texts: int = 1,
    ladder: tuple[int, ...] = (),
    shape: PassShape | None = None,
) -> Plan:
    """The plan that streams least: as many resident layers as fit into the limit (bytes).

    `by_expert`: of a model with experts, passes bring those that they need, and what is left of the
    limit keeps hot ones; otherwise its layers stay or are streamed whole, like others.
    `texts` are decoded together, each in caches of its own, whose bytes are all counted; `ladder`
    and `shape` as in `Options`.
    `model` is a tree of shapes and dtypes, needed if the layers are not the plain ones of `cfg`.
    `kernels`: the device runs the package's Triton kernels (see `memory.card_has_kernels`).
    `resident` and `table_on_host` fix a choice that is otherwise made here. A tied table is also
    the head and stays on the device. The fraction `spare` of the limit stays free for the
    allocator's rounding. Raises PlanError, with the least limit that works, if the model does not
    fit even when all layers are streamed.
    """
    if not 1 <= ahead <= MOST_AHEAD:
        raise PlanError(
            f"ahead is {ahead}; at least one layer must be on its way, and at most {MOST_AHEAD}"
        )
    if texts < 1:
        raise PlanError(f"{texts} texts are to be decoded together; at least 1 must be")
    if ladder and (ladder != tuple(sorted(set(ladder))) or ladder[0] < 1 or ladder[-1] != texts):
        raise PlanError(f"a ladder of {ladder} texts; it must ascend and end with {texts}")
    if max_length < 1 or chunk < 1:
        raise PlanError(f"max_length {max_length} and chunk {chunk} must be at least 1")
    if resident is not None and not 0 <= resident <= cfg.layers:
        raise PlanError(f"{resident} resident layers were asked for; the model has {cfg.layers}")
    if table_on_host and cfg.tied:
        raise PlanError("this model's head is its embedding table, which must be on the device")
    if draft.bits is not None and not draft.group:
        if reason := why_not_int8(cfg, draft, model):
            raise PlanError(f"substitutes with one scale for each output: {reason}")
    elif draft.bits is not None and not has_split(model):
        try:
            for path, leaf in jax.tree.leaves_with_path((model or abstract(cfg)).layers):
                name = getattr(path[-1], "name", "")
                stack = name in ("expert_gate_up", "expert_down")
                if leaf.ndim == 2 + stack and not name.endswith("_bias"):
                    check_grouping(path[-1].name, leaf.shape[-2], draft.bits, draft.group)
        except ValueError as e:
            raise PlanError(
                f"substitutes of {draft.bits} bits in groups of {draft.group}: {e}"
            ) from e

    usable = int(limit * (1 - spare))
    model = model or abstract(cfg)
    kernels = kernels and not any(map(why_not_decoded, splits(model.layers)))
    layout = Layout(model, cfg, spec, draft, max_length, chunk, ahead, kernels, texts, shape)
    tables = [False] if cfg.tied else [False, True] if table_on_host is None else [table_on_host]
    found, least, hot = None, None, None
    by_expert = by_expert and cfg.experts is not None and resident is None
    for on_host in tables if by_expert else []:
        kept, *items = layout.expert_items(on_host, usable)
        total = sum(items[0].values())
        least = total if least is None else min(least, total)
        if total <= usable and (hot is None or kept > hot):
            found, hot = (0, on_host, *items), kept
    for on_host in [] if by_expert else tables:
        for r in range(cfg.layers + 1) if resident is None else [resident]:
            items = layout.items(r, on_host)
            total = sum(items[0].values())
            least = total if least is None else min(least, total)
            # Ties go to the table on the device, which is simpler.
            if total <= usable and (found is None or r > found[0]):
                found = (r, on_host, *items)
    if found is None:
        needed = -(-(int(least / (1 - spare)) + 1) // 2**20)
        raise TooLittleError(
            f"{show_bytes(limit)} of device memory is too little for this model, tree and length; "
            f"the least that works is {needed}MB ({show_bytes(needed * 2**20)}). Shorter "
            "--max-length, a smaller tree or --chunk, or fewer --draft-bits lower it"
        )
    r, on_host, device, host = found
    streamed = host["streamed layers"]
    if hot is not None:
        whole = sum(size for i, size in enumerate(layout.matrices) if not cfg.has_experts(i))
        away = 1 - hot / expert_count(cfg)
        streamed = whole + round(
            share_of_experts(cfg, pass_nodes(spec, texts)) * away * (streamed - whole)
        )
    return Plan(
        cfg=cfg,
        limit=limit,
        resident=r,
        table_on_host=on_host,
        max_length=max_length,
        spec=spec,
        draft=draft,
        chunk=chunk,
        ahead=ahead,
        device={name: count for name, count in device.items() if count},
        host={name: count for name, count in host.items() if count},
        streamed_bytes=streamed,
        model=model,
        hot=hot,
        texts=texts,
        ladder=ladder or (tree.ladder(texts) if texts > 1 else ()),
        shape=shape,
    )
