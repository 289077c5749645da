"""Loading a target where a plan says: layers and tables on the device or on the host."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from llm_jax.cards import cut, cut_head, together
from llm_jax.checkpoint import Checkpoint
from llm_jax.disk import loaded
from llm_jax.params import Experts, Layer, Params, unjoined
from llm_jax.progress import Progress
from llm_jax.stream import to_device
from subspec_jax.experts import ExpertCache, apart, room_for
from subspec_jax.layout import expert_bytes
from subspec_jax.offload import moving, separate_experts
from subspec_jax.plan import Plan
from subspec_jax.residual.files import Converted
from subspec_jax.residual.parts import ConvertedParts
from subspec_jax.residual.split import (
    Split,
    decode_layer,
)
from subspec_jax.residual.stacks import decoded_experts
from subspec_jax.stored import Stored
from subspec_jax.tiers import rearranged, to_home, where
from subspec_jax.verify import Target


def load_target(
    source: Checkpoint | Converted | ConvertedParts | Stored,
    plan: Plan,
    progress: Progress | None = None,
    verify: bool = False,
    check: bool = True,
) -> Target:
    """A model's weights. Each layer is placed when it is read, so at most one layer waits.

    `source` is what `llm_jax.formats.open_checkpoint` returns, or a converted model. Layers of a
    converted model are residuals and substitutes. If the plan has plain layers, they are decoded on
    the device before they are placed. `check` compares the files of a converted model with their
    checksums, at some GB a second. `verify` also decodes all weights and compares them with those
    that were converted, which takes some seconds a layer. Both raise ResidualError for a
    difference. Raises ValueError if the plan streams residuals and the source is not converted, or
    has layers on disk and the source is a checkpoint, whose matrices lie otherwise.
    """
    lying: tuple[Layer, ...] = ()
    if plan.disk and isinstance(source, Converted | Stored):
        of = source.lying if isinstance(source, Converted) else source.layer
        lying = tuple(where(of(i)) for i in range(plan.cfg.layers))

    if isinstance(source, ConvertedParts):
        return _load_converted_parts(source, plan, progress, verify, check)
    if plan.cfg.cards > 1:
        return _load_parts(source, plan, progress)

    def place_layer(i, layer):
        layer = separate_experts(layer, True) if in_mxfp4(plan, i) else layer
        return to_home(i, layer, lying, plan)

    def place_table(name, array):
        on_host = name == "embed_VD" and plan.table_on_host
        return np.array(array) if on_host else to_device(array)

    if isinstance(source, Converted):
        given = place_layer, place_table, progress, verify, check
        return dataclasses.replace(_load_converted(source, plan, *given), stored=lying)
    if isinstance(source, Stored):
        tables = {name: place_table(name, loaded(a)) for name, a in source.tables().items()}
        each = map(source.layer, range(plan.cfg.layers))
        layers = _placed(each, place_layer, progress)
        return Target(Params(layers=layers, **tables), plan.cfg, plan.ahead, stored=lying)
    if plan.disk:
        raise ValueError("this plan has layers on disk; store the checkpoint's first")
    if plan.streams_residuals:
        raise ValueError("this plan streams residuals; convert the checkpoint first")
    report = (lambda done, total: progress(done)) if progress else None
    params = source.load(plan.cfg, place_layer, place_table, report)
    return Target(params, plan.cfg, plan.ahead, expert_cache(params, plan))


def _load_parts(source: Checkpoint, plan: Plan, progress) -> Target:
    """The weights of cards that share the model: each gets its part when a layer is read."""
    cfg = plan.cfg
    every = range(cfg.cards)

    def place_layer(i, layer):
        return jax.block_until_ready(
            spread([cut(layer, i, cfg, c) for c in every], i in plan.stays)
        )

    def place_table(name, array):
        if name == "head_DV":
            return together([cut_head(array, cfg, c) for c in every])
        on_host = name == "embed_VD" and plan.table_on_host
        return np.array(array) if on_host else to_device(array, cfg.cards)

    report = (lambda done, total: progress(done)) if progress else None
    whole = source.config(cfg.dtype)
    return Target(source.load(whole, place_layer, place_table, report), cfg, plan.ahead)


def _load_converted_parts(source: ConvertedParts, plan: Plan, progress, verify, check) -> Target:
    """The same of a converted model."""
    cfg, layers = plan.cfg, []

    def exact(i, name, whole):
        """Compares each card's decoded weights with those that were converted."""
        for part, w in zip(source.parts, whole, strict=True):
            part.verify_head(w) if name else part.verify(i, w)

    if check:
        source.check()
    place = lambda name, a: (
        np.array(a) if name == "embed_VD" and plan.table_on_host else to_device(a, cfg.cards)
    )
    tables = {name: place(name, array) for name, array in source.tables.items()}
    if (heads := source.heads()) is not None:
        if isinstance(heads[0], Split) and (verify or not plan.split_head):
            columns = [min(cfg.head_columns, h.shape[1]) for h in heads]
            whole = [_decode_head(to_device(h), n) for h, n in zip(heads, columns, strict=True)]
            if verify:
                exact(None, "head_DV", whole)
            heads = heads if plan.split_head else list(map(np.asarray, whole))
        tables["head_DV"] = together(heads)
    for i in range(cfg.layers):
        if check:
            source.check(i)
        parts = source.layer(i)
        if verify:
            exact(i, "", [_decode_layer(to_device(part)) for part in parts])
        layers.append(jax.block_until_ready(spread(parts, i in plan.stays)))
        if progress:
            progress(i + 1)
    return Target(Params(layers=tuple(layers), **tables), cfg, plan.ahead)


def spread(parts: Sequence[Layer], stays: bool) -> Layer:
    """The cards' parts of a layer, each with its card: on the device, or what moves on the host."""
    kind = lambda moves: "pinned_host" if moves and not stays else "device"
    return together(parts, jax.tree.map(kind, moving(parts[0])))


def _placed(layers, place_layer, progress: Progress | None) -> tuple[Layer, ...]:
    placed = []
    for i, layer in enumerate(layers):
        placed.append(place_layer(i, layer))
        if progress:
            progress(i + 1)
    return tuple(placed)


def in_mxfp4(plan: Plan, layer: int) -> bool:
    """Whether the plan has a layer's experts in MXFP4's own form."""
    return getattr(apart(plan.model.layers[layer]), "mxfp4", False)


def expert_cache(params: Params, plan: Plan) -> ExpertCache | None:
    """The cache of the plan's experts; None where layers stay or are streamed whole."""
    if plan.hot is None:
        return None
    return ExpertCache(params.layers, plan.hot, *room_for(plan.cfg, expert_bytes(plan)))


_decode_layer = jax.jit(decode_layer)


def _whole(split: Layer) -> Layer:
    """A converted layer's exact weights: on the device and joined, or with experts in host memory,
    one of which is on the device at a time."""
    if not isinstance(split.mlp, Experts):
        return _decode_layer(to_device(split))
    gate_up, down = decoded_experts(split.mlp.expert_gate_up)
    mlp = dataclasses.replace(split.mlp, expert_gate_up=gate_up, expert_down=down)
    return dataclasses.replace(split, mlp=mlp)


@functools.partial(jax.jit, static_argnames="vocab")
def _decode_head(head: Split, vocab: int):
    return decode_layer(head)[:, :vocab]


def _load_converted(source, plan, place_layer, place_table, progress, verify, check) -> Target:
    layers, split_layers = [], plan.streams_residuals  # which looks at every layer of the plan
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # the next file, while one is placed
        check_file = lambda i: source.check(i, i in plan.disk)
        checked = [pool.submit(check_file, i) for i in (None, 0)] if check else []
        if verify:
            source.verify_tables()
        tables = {name: place_table(name, array) for name, array in source.tables.items()}
        if source.head is not None:
            head = to_device(source.head)
            whole = None
            if verify or not plan.split_head:
                whole = _decode_head(head, plan.cfg.vocab)
            if verify:
                source.verify_head(whole)
            tables["head_DV"] = head if plan.split_head else whole
        for i in range(plan.cfg.layers):
            for file in checked:
                file.result()
            last = i + 1 == plan.cfg.layers
            checked = [pool.submit(check_file, i + 1)] if check and not last else []
            split = source.lying(i) if i in plan.disk and not verify else source.layer(i)
            if verify or not split_layers:
                whole = _whole(split)
                if verify:
                    source.verify(i, whole)
                if not split_layers:
                    split = whole if plan.cfg.has_experts(i) else unjoined(whole, plan.cfg)
                del whole
            layers.append(place_layer(i, split))
            if progress:
                progress(i + 1)
    params = Params(layers=tuple(layers), **tables)
    return Target(params, plan.cfg, plan.ahead, expert_cache(params, plan))


def arrange(target: Target, plan: Plan) -> Target:
    """The target with its layers and table where another plan wants them.

    Arrays that are already in the right place are not moved.
    """
    table = target.params.embed_VD
    if plan.table_on_host and not isinstance(table, np.ndarray):
        table = np.asarray(table)
    layers = rearranged(target.params.layers, target.stored, plan)
    if not plan.table_on_host:
        table = to_device(table, plan.cfg.cards)
    params = dataclasses.replace(target.params, embed_VD=table, layers=layers)
    experts = expert_cache(params, plan)
    return dataclasses.replace(target, params=params, ahead=plan.ahead, experts=experts)


def all_on_device(params: Params, cards: int = 1) -> Params:
    """All parameters on the device, to use a model that fits without streaming."""
    return to_device(params, cards)
