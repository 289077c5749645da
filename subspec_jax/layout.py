"""Bytes of a model's parts in every placement of its layers: what a plan chooses among."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax

from llm_jax.attention import caches_for
from llm_jax.config import DTYPES, Config
from llm_jax.int8 import Int8
from llm_jax.params import Attention, Experts, JoinedAttention, Params, abstract
from pallas_kernels.residual_decode import why_not
from subspec_jax.draft_model import (
    Draft,
    drafted_layers,
    substitute_head,
    substitute_layer,
    substitute_table,
)
from subspec_jax.experts import room_for
from subspec_jax.offload import streamed_bytes
from subspec_jax.residual.split import Split, SplitExperts, has_split, is_split
from subspec_jax.tree import PassShape, TreeSpec, cache_slots
from subspec_jax.work_space import work_bytes


def stay(layers: int, resident: int, residual: bool) -> frozenset[int]:
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


def why_not_decoded(w: Split | SplitExperts) -> str | None:
    """Why the kernel cannot decode a matrix, or an expert of a stack; None where it can."""
    if isinstance(w, SplitExperts):
        both = jax.eval_shape(lambda w: w.matrices(w.each[0], 0), w)
        return next(filter(None, (why_not(*m.pair) for m in both)), None)
    return why_not(*w.pair)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays in the tree; shapes count like arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def substitute_bytes(layer, draft: Draft) -> int:
    """Bytes of the matrices of a layer's substitute. Its vectors are those of the target."""
    low = substitute_layer(layer, draft.bits, draft.group)
    if isinstance(layer.mlp, Experts):  # all else is shared
        return tree_bytes((low.mlp.expert_gate_up, low.mlp.expert_down))
    # A low-bit matrix counts as a whole, with the scales of its outputs.
    leaves = jax.tree.leaves(low, is_leaf=lambda w: isinstance(w, Int8))
    return tree_bytes([leaf for leaf in leaves if leaf.ndim > 1])


def why_not_int8(cfg: Config, draft: Draft, model: Params | None) -> str | None:
    """Why the model cannot have such substitutes; None where it can."""
    if draft.bits != 8 or draft.head_bits not in (None, 8):
        return "they have 8 bits, the head's too; give a group for other numbers"
    if cfg.experts is not None:
        return "experts have groups"
    return "residuals have groups" if has_split(model) else None


def cache_bytes(model: Params, cfg: Config, slots: int, scratch: int, texts: int = 1) -> int:
    """Bytes of the caches of a model with these shapes, for this many texts."""
    one = dataclasses.replace(cfg, cards=1)  # of a card
    empty = functools.partial(caches_for, model, one, texts, slots, scratch)
    return tree_bytes(jax.eval_shape(empty))


@dataclasses.dataclass(frozen=True)
class Layout:
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
    shape: PassShape | None = None

    @functools.cached_property
    def slots(self) -> int:
        """Cache slots of the target."""
        return cache_slots(self.max_length, self.spec, self.shape)

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
        return [substitute_bytes(layer, self.draft) for layer in self.model.layers]

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
            shape=self.shape,
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
        stays = stay(self.cfg.layers, resident, self.kept > 0)
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


def expert_bytes(plan: Any) -> int:
    """Bytes that move when an expert is brought, of a `Plan` or a `Layout`."""
    first = next(i for i in range(plan.cfg.layers) if plan.cfg.has_experts(i))
    return -(-streamed_bytes(plan.model.layers[first]) // plan.cfg.experts.count)


def share_of_experts(cfg: Config, tokens: int) -> float:
    """The part of a layer's experts that some tokens are routed to, if all are as likely."""
    e = cfg.experts
    return 1 - (1 - e.chosen / e.count) ** tokens
