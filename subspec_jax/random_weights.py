"""Random weights in place of a model's, made on the device layer by layer; for timing."""

import concurrent.futures
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.cards import AXIS, PARTS, on_each, together
from llm_jax.packed import packed
from llm_jax.params import Experts, Layer, Params, init_layer, joined
from llm_jax.progress import Progress
from llm_jax.quantize import quantize
from llm_jax.stream import to_device
from pallas_kernels.residual_decode.code import pad
from subspec_jax.load import expert_cache, in_mxfp4, spread
from subspec_jax.offload import offload, separate_experts
from subspec_jax.plan import Plan
from subspec_jax.residual.encode import encode
from subspec_jax.residual.split import Split, SplitExperts, is_split, split_experts, widened
from subspec_jax.stored import Stored
from subspec_jax.tiers import to_home, where
from subspec_jax.verify import Target


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
    lying = tuple(where(stored.layer(i)) for i in range(cfg.layers)) if plan.disk else ()
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
            layer = stored.layer(i)
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
