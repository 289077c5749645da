"""Every byte of a run before it starts: what is resident, what streams, what the draft shares.

This is pure arithmetic on a `Config`. It starts no device, so the allocator's limit can still be
set to the plan.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax

from llm_jax.attention import caches_for
from llm_jax.config import DTYPES, Config
from llm_jax.int8 import Int8
from llm_jax.params import Attention, Experts, JoinedAttention, Params, abstract
from llm_jax.quantize import check_grouping
from pallas_kernels.residual_decode import why_not
from subspec_jax import SubspecError, tree
from subspec_jax.draft_model import (
    NO_DRAFT,
    Draft,
    drafted_layers,
    substitute_head,
    substitute_layer,
    substitute_table,
    substitutes,
)
from subspec_jax.experts import room_for
from subspec_jax.memory import show_bytes
from subspec_jax.offload import streamed_bytes
from subspec_jax.residual.split import Split, SplitExperts, has_split, is_split
from subspec_jax.tree import TreeSpec, cache_slots, pass_nodes, shared_spec
from subspec_jax.work_space import work_bytes


class PlanError(SubspecError):
    """There is no plan for a limit or a setting. The message names the least limit that works."""


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
        return _stay(self.cfg.layers, self.resident, self.streams_residuals)

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
        own = sum(_substitute_bytes(layer, d) for i, layer in layers if i in drafted)
        if cfg.experts is not None:
            own = own * share_of_experts(cfg, self.spec.width)
        shared = sum(map(streamed_bytes, self.model.layers[: drafted.start]))
        head = self.device.get("draft head", cfg.head_columns * cfg.d_model * DTYPES[cfg.dtype])
        if self.split_head:
            head = tree_bytes(substitutes(self.model.head_DV))
        return shared + own + head

    def __str__(self) -> str:
        """A table of all bytes, and a line about what streams."""
        rows, host = [("", "device", "host")], dict(self.host)
        for name, count in self.device.items():
            kept = host.pop(name, 0)
            rows.append((name, show_bytes(count), show_bytes(kept) if kept else ""))
        rows += [(name, "", show_bytes(count)) for name, count in host.items()]
        rows.append(("predicted peak", show_bytes(self.total), ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{name:{widths[0]}}  {device:>{widths[1]}}  {away:>{widths[2]}}".rstrip()
            for name, device, away in rows
        ]
        title, cards = f"Plan within {show_bytes(self.limit)}", self.cfg.cards
        if cards > 1:
            title += f" on each of {cards} devices, which share every layer"
        if self.hot is not None:
            total = expert_count(self.cfg)
            lines.append(
                f"{self.hot} of {total} experts kept; {show_bytes(self.streamed_bytes)} a pass if "
                "all experts were as likely"
            )
            return "\n".join([title, *lines])
        what = "residuals" if self.streams_residuals else "layers"
        lines.append(
            f"{self.resident} of {self.cfg.layers} {what} resident, {self.streamed} streamed: "
            f"{show_bytes(self.streamed_bytes)} a pass"
        )
        return "\n".join([title, *lines])

    def pass_seconds(self, link: float) -> float:
        """Seconds of a streamed pass at `link` bytes per second, if nothing else slows it down."""
        return self.streamed_bytes / link

    def tokens_per_second(
        self, tau: float, link: float, memory: float, overhead: float = 0.005
    ) -> float:
        """The upper bound tau / (pass + draft steps + overhead), in tokens per second.

        Every byte moves at the measured bandwidths (`link` and `memory`, in bytes per second), and
        arithmetic takes no time. `overhead` is in seconds.
        """
        draft = self.spec.steps * self.draft_step_bytes / memory
        return tau / (self.pass_seconds(link) + draft + overhead)


def published_tau(depth: int, hazard: float = 0.9749) -> float:
    """Emitted tokens per pass if every level has the same acceptance: 28.4 at depth 48.

    The hazard is fitted to SubSpec's README (Qwen2.5-7B, MT-Bench, width 6, tau 28.35 at depth 48).
    """
    return (1 - hazard ** (depth + 1)) / (1 - hazard)


def _stay(layers: int, resident: int, residual: bool) -> frozenset[int]:
    """The resident layers: the first ones, or for residuals, evenly spread ones.

    A resident residual must be decoded too. During this time the link is busy only if other layers
    still have to arrive.
    """
    if not residual:
        return frozenset(range(resident))
    gaps = max(1, layers - resident - 1)
    moved = {(i * (layers - 1) + gaps // 2) // gaps for i in range(layers - resident)}
    return frozenset(range(layers)) - moved


def splits(layers: Iterable[Any]) -> list[Split | SplitExperts]:
    """All matrices and stacks of experts that are in two parts."""
    return [w for w in jax.tree.leaves(layers, is_leaf=is_split) if is_split(w)]


def _why_not_decoded(w: Split | SplitExperts) -> str | None:
    """Why the kernel cannot decode a matrix, or an expert of a stack; None where it can."""
    if isinstance(w, SplitExperts):
        both = jax.eval_shape(lambda w: w.matrices(w.each[0], 0), w)
        return next(filter(None, (why_not(*m.pair) for m in both)), None)
    return why_not(*w.pair)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays in the tree; shapes count like arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _substitute_bytes(layer, draft: Draft) -> int:
    """Bytes of the matrices of a layer's substitute. Its vectors are those of the target."""
    low = substitute_layer(layer, draft.bits, draft.group)
    if isinstance(layer.mlp, Experts):  # all else is shared
        return tree_bytes((low.mlp.expert_gate_up, low.mlp.expert_down))
    # A low-bit matrix counts as a whole, with the scales of its outputs.
    leaves = jax.tree.leaves(low, is_leaf=lambda w: isinstance(w, Int8))
    return tree_bytes([leaf for leaf in leaves if leaf.ndim > 1])


def cache_bytes(model: Params, cfg: Config, slots: int, scratch: int, texts: int = 1) -> int:
    """Bytes of the caches of a model with these shapes, for this many texts."""
    one = dataclasses.replace(cfg, cards=1)  # of a card
    empty = functools.partial(caches_for, model, one, texts, slots, scratch)
    return tree_bytes(jax.eval_shape(empty))


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The values that all placements of a model share."""

    model: Params
    cfg: Config
    spec: TreeSpec
    draft: Draft
    max_length: int
    chunk: int
    ahead: int
    kernels: bool
    texts: int = 1

    @functools.cached_property
    def slots(self) -> int:
        """Cache slots of the target."""
        return cache_slots(self.max_length, self.spec)

    @functools.cached_property
    def cache(self) -> int:
        """Bytes of the target's cache."""
        return cache_bytes(self.model, self.cfg, self.slots, self.spec.places + 1, self.texts)

    @functools.cached_property
    def matrices(self) -> list[int]:
        """Bytes that each layer moves when it is streamed."""
        return [streamed_bytes(layer) for layer in self.model.layers]

    @functools.cached_property
    def kept(self) -> int:
        """Bytes of the substitutes of `Split` layers, which are always on the device."""
        low = lambda w: (w.gate_up, w.down) if isinstance(w, SplitExperts) else w.substitute
        return sum(tree_bytes(low(w)) for w in splits(self.model.layers))

    @functools.cached_property
    def own(self) -> list[int]:
        """Bytes of each layer's substitute."""
        return [_substitute_bytes(layer, self.draft) for layer in self.model.layers]

    @functools.cached_property
    def low_head(self) -> int:
        """Bytes of a low-bit head."""
        bits = self.draft.head_bits or self.draft.bits
        how = bits, self.draft.group, self.cfg.cards
        return tree_bytes(substitute_head(self.model, *how))

    @functools.cached_property
    def low_table(self) -> int:
        """Bytes of a low-bit embedding table."""
        return tree_bytes(substitute_table(self.model.embed_VD, self.draft.bits, self.draft.group))

    @functools.cached_property
    def vectors(self) -> int:
        """Bytes of norms and biases."""
        norm = self.cfg.d_model * DTYPES[self.cfg.dtype]
        return tree_bytes(self.model.layers) - sum(self.matrices) - self.kept + norm

    @functools.cached_property
    def work(self) -> int:
        """Bytes of work space."""
        layers = self.model.layers
        plain = all(isinstance(layer.attn, Attention | JoinedAttention) for layer in layers)
        return work_bytes(
            self.cfg,
            self.spec,
            self.draft,
            self.slots,
            self.chunk,
            plain=plain,
            residual=self.kept > 0,
            kernels=self.kernels,
            split_head=is_split(self.model.head_DV),
            texts=self.texts,
        )

    def expert_items(self, table_on_host: bool, usable: int) -> tuple[int, dict, dict]:
        """(experts that fit, bytes on the device, bytes on the host), where passes bring experts
        one by one."""
        device, host = self.items(0, table_on_host)
        total, size = expert_count(self.cfg), expert_bytes(self)
        device |= {"norms and biases": 0, "attention and routers": self.vectors}
        # What is let go is free when the programs that use it have run: as many for one of them.
        ring = min(sum(room_for(self.cfg, size)), total) * size
        whole = [n for i, n in enumerate(self.matrices) if not self.cfg.has_experts(i)]
        device["streaming ring"] = ring + min(self.ahead + 1, len(whole)) * max(whole, default=0)
        room = usable - sum(device.values())
        hot = min(max(room // size, 0), total)
        return hot, device | {"experts kept": hot * size}, host

    def items(self, resident: int, table_on_host: bool) -> tuple[dict[str, int], dict[str, int]]:
        """(bytes on the device, bytes on the host), by name."""
        stays = _stay(self.cfg.layers, resident, self.kept > 0)
        moved = [size for i, size in enumerate(self.matrices) if i not in stays]
        table = self.cfg.vocab * self.cfg.d_model * DTYPES[self.cfg.dtype]
        device = {
            "embedding": 0 if table_on_host else table,
            "output head": tree_bytes(self.model.head_DV),
            "norms and biases": self.vectors,
            "resident layers": sum(self.matrices) - sum(moved),
            "streaming ring": min(self.ahead + 1, len(moved)) * max(moved, default=0),
            "KV cache": self.cache,
            "substitutes": self.kept,
        }
        device |= self._draft_items(resident, table_on_host)
        device["work space"] = self.work
        return device, {"streamed layers": sum(moved), "embedding": table if table_on_host else 0}

    def _draft_items(self, resident: int, table_on_host: bool) -> dict[str, int]:
        draft, model, items = self.draft, self.model, {}
        if draft.bits is not None:
            if not self.kept:
                drafted = drafted_layers(model.layers, draft, resident)
                items["substitutes"] = sum(self.own[i] for i in drafted)
            if (draft.head_bits is not None or draft.int8) and not is_split(model.head_DV):
                items["draft head"] = self.low_head
            if table_on_host:
                items["substitute embedding"] = self.low_table
        if draft.model is not None:
            items["draft model"] = draft.model.parameter_count * DTYPES[draft.model.dtype]
            small, places = abstract(draft.model), self.spec.places
            items["draft KV cache"] = cache_bytes(
                small, draft.model, self.slots, places, self.texts
            )
        elif draft.own_cache:
            items["draft KV cache"] = self.cache
        return items


def expert_count(cfg: Config) -> int:
    """Experts of all layers."""
    return cfg.experts.count * sum(map(cfg.has_experts, range(cfg.layers)))


def expert_bytes(plan: "Plan | _Layout") -> int:
    """Bytes that move when an expert is brought."""
    first = next(i for i in range(plan.cfg.layers) if plan.cfg.has_experts(i))
    return -(-streamed_bytes(plan.model.layers[first]) // plan.cfg.experts.count)


def share_of_experts(cfg: Config, tokens: int) -> float:
    """The part of a layer's experts that some tokens are routed to, if all are as likely."""
    e = cfg.experts
    return 1 - (1 - e.chosen / e.count) ** tokens


def _why_not_int8(cfg: Config, draft: Draft, model: Params | None) -> str | None:
    """Why the model cannot have such substitutes; None where it can."""
    if draft.bits != 8 or draft.head_bits not in (None, 8):
        return "they have 8 bits, the head's too; give a group for other numbers"
    if cfg.experts is not None:
        return "experts have groups"
    return "residuals have groups" if has_split(model) else None


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
) -> Plan:
    """The plan that streams least: as many resident layers as fit into the limit (bytes).

    `by_expert`: of a model with experts, passes bring those that they need, and what is left of the
    limit keeps hot ones; otherwise its layers stay or are streamed whole, like others.
    `texts` are decoded together, each in caches of its own, whose bytes are all counted; `ladder`
    as in `Options`.
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
        if reason := _why_not_int8(cfg, draft, model):
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
    kernels = kernels and not any(map(_why_not_decoded, splits(model.layers)))
    layout = _Layout(model, cfg, spec, draft, max_length, chunk, ahead, kernels, texts)
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
        raise PlanError(
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
    )
