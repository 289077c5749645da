"""Loading a target where a plan says: layers and tables on the device or on the host."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.cards import AXIS, PARTS, cut, cut_head, on_each, together
from llm_jax.checkpoint import Checkpoint
from llm_jax.disk import loaded
from llm_jax.packed import packed
from llm_jax.params import Experts, Layer, Params, init_layer, joined, unjoined
from llm_jax.progress import Progress
from llm_jax.quantize import quantize
from llm_jax.stream import to_device
from pallas_kernels.residual_decode.code import pad
from subspec_jax.experts import ExpertCache, apart, room_for
from subspec_jax.layout import expert_bytes
from subspec_jax.offload import moving, offload, separate_experts
from subspec_jax.plan import Plan
from subspec_jax.residual.encode import encode
from subspec_jax.residual.files import Converted
from subspec_jax.residual.parts import ConvertedParts
from subspec_jax.residual.split import (
    Split,
    SplitExperts,
    decode_layer,
    is_split,
    split_experts,
    widened,
)
from subspec_jax.residual.stacks import decoded_experts
from subspec_jax.stored import Stored
from subspec_jax.tiers import rearranged, to_home
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
        lying = tuple(map(of, range(plan.cfg.layers)))

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
        layers = _placed(lying, place_layer, progress)
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


def random_target(
    plan: Plan,
    seed: int = 0,
    progress: Progress | None = None,
    split: dict[bool, Layer] | None = None,
    zipf: float = 0.0,
    stored: Stored | None = None,
) -> Target:
    """Random weights of the plan's architecture, made on the device layer by layer; for timing.

    Layers with experts share one layer's, in another order in each. With `zipf`, their routers
    prefer some of them: the one of rank r as if its chance were 1 / r ** zipf.

    If the plan streams residuals, one layer is encoded on the host, and one more where only some
    have experts; all layers are copies of these. `split`, made by `random_splits`, can be given
    instead. A head in two parts is encoded too. Where the plan has layers on disk, all layers are
    those that are `stored`.
    """
    cfg = plan.cfg
    make = functools.partial(_random_layer, cfg=cfg)
    lying = tuple(map(stored.layer, range(cfg.layers))) if plan.disk else ()
    first: list[Layer] = []
    normal = functools.partial(_normal, cards=cfg.cards)
    key, layers = jax.random.key(seed), []
    if plan.streams_residuals and not plan.disk:
        split = split or random_splits(plan, seed)
        copied = lambda a: jnp.copy(a) if isinstance(a, jax.Array) else a.copy()
    table_key, head_key = jax.random.split(jax.random.fold_in(key, cfg.layers))
    table = head = None
    if plan.table_on_host:  # first, while the device has room for a whole table
        table = np.asarray(_random_table(table_key, cfg))
    if plan.split_head:
        shape = plan.model.head_DV.shape
        head = _normal(head_key, shape, cfg.dtype)
        one = jax.tree.map(np.asarray, split_layer(head, plan.model.head_DV))
        head = together([one] * cfg.cards)
    for i in range(cfg.layers):
        if lying:
            layer = lying[i]
        elif plan.streams_residuals and not cfg.has_experts(i):
            layer = jax.tree.map(copied, split[False])
        elif plan.streams_residuals:  # its experts are shared, all else is its own
            w = split[True].mlp.expert_gate_up
            rest = dataclasses.replace(split[True].mlp, expert_gate_up=None)
            layer = jax.tree.map(copied, dataclasses.replace(split[True], mlp=rest))
            mlp = dataclasses.replace(layer.mlp, expert_gate_up=w)
            layer = dataclasses.replace(layer, mlp=mlp)
        else:
            layer = make(jax.random.fold_in(key, i), index=i)
        layer = layer.of_kind(cfg.kind(i))
        if cfg.has_experts(i):
            layer = _smaller_steps(layer, cfg) if split is None else layer
            layer = _with_shared_experts(layer, first, i, zipf, in_mxfp4(plan, i))
        if plan.streams_residuals and cfg.cards > 1:
            layer = spread([layer] * cfg.cards, i in plan.stays)
        layers.append(to_home(i, layer, lying, plan))
        if progress:
            progress(i + 1)
    if table is None:
        table = to_device(_random_table(table_key, cfg), cfg.cards)
    if not cfg.tied and head is None:
        head = normal(head_key, (cfg.d_model, cfg.head_columns), cfg.dtype)
    norm = jnp.ones(cfg.d_model, cfg.dtype)
    head, norm = to_device((head, norm), cfg.cards)
    params = Params(table, tuple(layers), norm, head)
    return Target(params, cfg, plan.ahead, expert_cache(params, plan), lying)


def _random_table(key, cfg):
    table = _normal(key, (cfg.vocab, cfg.d_model), cfg.dtype)
    if cfg.experts is None:
        return table
    # As large as what layers add, or all tokens are routed alike.
    return table * jnp.asarray(cfg.d_model**0.5, table.dtype)


def random_splits(plan: Plan, seed: int = 0) -> dict[bool, Layer]:
    """By whether it has experts, a random layer in two parts, as the plan's first such layer."""
    cfg, found = plan.cfg, {}
    for i in range(cfg.layers):
        if (kind := cfg.has_experts(i)) not in found:
            layer = init_layer(jax.random.key(seed), cfg, i)
            layer = _smaller_steps(layer, cfg) if kind else layer
            found[kind] = split_layer(layer, plan.model.layers[i])
    return found


def _smaller_steps(layer: Layer, cfg) -> Layer:
    """The layer with smaller outputs, as GPT-2 begins: 1 / sqrt(2 layers) of the usual size.

    Otherwise the states of all tokens get alike with depth, and all are routed to the same experts.
    """
    scale = jnp.asarray((2 * cfg.layers) ** -0.5, cfg.dtype)
    attn = dataclasses.replace(layer.attn, o=layer.attn.o * scale)
    mlp = dataclasses.replace(layer.mlp, expert_down=layer.mlp.expert_down * scale)
    return dataclasses.replace(layer, attn=attn, mlp=mlp)


def _with_shared_experts(
    layer: Layer, shared: list[Layer], index: int, zipf: float, mxfp4: bool = False
) -> Layer:
    """The layer with the experts of the first one, turned by `index`; they are in host memory."""
    if not shared:
        layer = separate_experts(layer, mxfp4, exact=False)
        shared.append(jax.block_until_ready(offload(layer)).mlp)
    count = layer.mlp.router.shape[1]
    index %= count

    turn = lambda a: a if index == 0 else jnp.roll(a, -index, axis=0)
    w = shared[0].expert_gate_up
    low = {}
    if isinstance(w, SplitExperts):
        low = dict(gate_up=jax.tree.map(turn, w.gate_up), down=jax.tree.map(turn, w.down))
    turned = dataclasses.replace(w, each=w.each[index:] + w.each[:index], **low)
    rank = np.random.default_rng(index).permutation(count) + 1.0
    bias = jnp.asarray(-zipf * np.log(rank), layer.mlp.router.dtype) if zipf else None
    mlp = dataclasses.replace(
        layer.mlp,
        expert_gate_up=turned,
        expert_down=None,
        router_bias=layer.mlp.router_bias if bias is None else bias,
    )
    return dataclasses.replace(layer, mlp=mlp)


def split_layer(layer: Any, like: Any, iterations: int = 0) -> Any:
    """A plain layer as a `Layer` of `Split` matrices, with the shapes of `like`.

    Substitutes are on the device, residuals are NumPy arrays. A single matrix gives one `Split`.
    Raises ValueError if a residual needs more room than `like` has.
    """
    whole = layer
    if isinstance(layer, Layer) and isinstance(layer.mlp, Experts):
        return _split_experts(layer, like, iterations)
    if isinstance(layer, Layer):
        whole = joined(layer, lambda *w: jnp.concatenate(w, axis=-1))

    def split(w, shapes):
        if not isinstance(shapes, Split):
            return w
        bits, group = shapes.substitute.bits, shapes.substitute.group
        wide = widened(w, bits)
        q = quantize(wide, bits, group, iterations)
        residual = encode(np.asarray(wide), jax.tree.map(np.asarray, q), shapes.residual.code)
        room = shapes.residual.words.shape[0], shapes.residual.patches
        low = dataclasses.replace(packed(q), columns=w.shape[1])
        return Split(low, pad(residual, *room))

    pairs = jax.tree.leaves(whole), jax.tree.leaves(like, is_leaf=is_split)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(split, *pairs))
    return jax.tree.unflatten(jax.tree.structure(whole), found)


def _split_experts(layer: Layer, like: Layer, iterations: int) -> Layer:
    """`split_layer` of a layer with experts: they alone are split."""

    w = like.mlp.expert_gate_up
    bits, group = w.gate_up.bits, w.gate_up.group
    rows = w.rows, w.each[0].shape[0] - w.rows

    def one(pair):
        low, exact = [], []
        for matrix, room, patches in zip(pair, rows, w.patches, strict=True):
            q = quantize(matrix, bits, group, iterations)
            residual = encode(np.asarray(matrix), jax.tree.map(np.asarray, q), "levels")
            low.append(packed(q))
            exact.append(pad(residual, room, patches))
        return tuple(low), tuple(exact)

    pairs = zip(layer.mlp.expert_gate_up, layer.mlp.expert_down, strict=True)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        low, exact = zip(*pool.map(one, pairs), strict=True)
    low = jax.tree.map(lambda *a: jnp.stack(a), *low)
    mlp = dataclasses.replace(layer.mlp, expert_gate_up=split_experts(low, exact), expert_down=None)
    return dataclasses.replace(layer, mlp=mlp)


@functools.partial(jax.jit, static_argnames=("cfg", "index"))
def _random_layer(key, cfg, index):
    return on_each(lambda k: init_layer(_of_card(k, cfg.cards), cfg, index), cfg.cards, PARTS)(key)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "cards"))
def _normal(key, shape, dtype, cards=1):
    """Of `cards` cards, each has an array of this shape."""
    scale = jnp.asarray(min(shape) ** -0.5, dtype)
    draw = lambda k: jax.random.normal(_of_card(k, cards), shape, dtype) * scale
    return on_each(draw, cards, PARTS)(key)


def _of_card(key, cards):
    return key if cards == 1 else jax.random.fold_in(key, jax.lax.axis_index(AXIS))


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
