"""One model on several cards: each has a part of every matrix and of the caches.

Tensor parallelism (Megatron-LM, arXiv 1909.08053): heads and the feed-forward's numbers are
divided, every card computes its part of both branches of a layer, and the parts are summed. What is
between them, x_BTD, is the same on all cards.

A card's part of a model is a model with fewer heads, and its `Config` (`per_card`) says so. Arrays
of all cards are one `jax.Array` each, with the cards' parts behind one another along the first
axis. Programs see their own card's part (`on_each`), so kernels need not know of others.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import LLMError
from llm_jax.cache import KV
from llm_jax.config import AXIS, Config
from llm_jax.params import Layer, Params, layer_from, named_parameters

ALIKE = PartitionSpec()
"""The same on all cards."""
PARTS = PartitionSpec(AXIS)
"""Parts behind one another along the first axis."""
CACHES = PartitionSpec(None, None, AXIS)
"""Keys and values, by heads."""


class CardsError(LLMError):
    """A model that cannot be divided among so many cards."""


@functools.cache
def mesh(cards: int) -> jax.sharding.Mesh:
    """The first `cards` devices. Raises CardsError where there are not so many."""
    devices = jax.devices()
    if len(devices) < cards:
        raise CardsError(f"{cards} devices were asked for, and JAX has {len(devices)}")
    return jax.sharding.Mesh(np.array(devices[:cards]), (AXIS,))


def alike(cards: int, memory_kind: str = "device") -> jax.sharding.Sharding:
    """The place of what all cards have."""
    if cards == 1:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=memory_kind)
    return NamedSharding(mesh(cards), ALIKE, memory_kind=memory_kind)


def place_of(a: Any, cards: int, memory_kind: str = "device") -> jax.sharding.Sharding:
    """Where an array goes in that kind of memory: each card's part stays with its card."""
    if isinstance(a, jax.Array) and len(a.sharding.device_set) > 1:
        return a.sharding.with_memory_kind(memory_kind)
    return alike(cards, memory_kind)


# ---------------------------------------------------------------------- programs


def specs(value: Any) -> Any:
    """How the arrays in an argument of a program lie on cards, by the types that hold them."""
    if isinstance(value, Layer):
        return PARTS
    if isinstance(value, KV):
        return CACHES
    if isinstance(value, Params):
        return Params(ALIKE, tuple(map(specs, value.layers)), ALIKE, PARTS)
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(map(specs, value))
    if dataclasses.is_dataclass(value):
        held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if any(isinstance(v, Params | Layer | KV | tuple) for v in held.values()):
            dynamic = [f.name for f in dataclasses.fields(value) if not f.metadata.get("static")]
            return dataclasses.replace(
                value, **{n: specs(held[n]) for n in dynamic if held[n] is not None}
            )
    return ALIKE


def on_each(f: Callable, cards: int, results: Any = ALIKE) -> Callable:
    """`f`, which every card runs on its parts of the arguments. `results` says how the arrays that
    it returns lie on the cards, as a prefix of their tree. To be used where JAX traces."""
    if cards == 1:
        return f

    def run(*args):
        given = tuple(map(specs, args))
        each = dict(mesh=mesh(cards), in_specs=given, out_specs=results, check_vma=False)
        return jax.shard_map(f, **each)(*args)

    return functools.wraps(f)(run)


def summed(y: jax.Array, cfg: Config) -> jax.Array:
    """The sum of all cards' parts of a product."""
    return y if cfg.cards == 1 else jax.lax.psum(y, AXIS)


def side_by_side(y: jax.Array, cfg: Config) -> jax.Array:
    """All cards' columns of the output head's product, the padding of each left out."""
    if cfg.cards == 1:
        return y
    return jax.lax.all_gather(y[..., : cfg.head_columns], AXIS, axis=y.ndim - 1, tiled=True)


def own_rows(table_VD: jax.Array, cards: int) -> jax.Array:
    """A card's rows of a table that all cards have; zeros behind the last."""
    if cards == 1:
        return table_VD
    count = -(-table_VD.shape[0] // cards)
    rest = count * cards - table_VD.shape[0]
    table_VD = jnp.pad(table_VD, ((0, rest), (0, 0))) if rest else table_VD
    return jax.lax.dynamic_slice_in_dim(table_VD, jax.lax.axis_index(AXIS) * count, count)


# ---------------------------------------------------------------------- what a card has


def why_not(cfg: Config) -> str | None:
    """Why the model cannot be divided among cards; None where it can."""
    if cfg.experts is not None:
        return "models with experts are decoded on one device"
    if cfg.qk_norm_whole:
        return "the norms of q and k are over all heads, which would be on several devices"
    return None


def per_card(cfg: Config, cards: int) -> Config:
    """The model that each card has. Raises CardsError for one that cannot be divided.

    Heads and the feed-forward are padded with zeros where they do not divide: 3 kv heads on two
    cards are 2 on each, the last one empty.
    """
    if cards == 1:
        return cfg
    if (reason := why_not(cfg)) is not None:
        raise CardsError(f"{cards} devices: {reason}")
    kv_heads, whole = -(-cfg.kv_heads // cards), cfg.heads // cfg.kv_heads
    # Cut between groups of weights that share a step, if there are enough of them.
    units = (u for u in (64, 32, 16, 8, 4, 2) if cfg.d_ff % u == 0 and cfg.d_ff // u >= cards)
    unit = next(units, 1)
    d_ff = -(-cfg.d_ff // (unit * cards)) * unit
    return dataclasses.replace(
        cfg, heads=kv_heads * whole, kv_heads=kv_heads, d_ff=d_ff, cards=cards
    )


COLUMNS = ("q", "k", "v", "q_bias", "k_bias", "v_bias", "sinks")
COLUMNS += ("gate", "up", "gate_bias", "up_bias")
"""Parameters of which a card has some of the last axis."""
ROWS = ("o", "down")
"""Parameters of which a card has some of the first axis."""


def cut(layer: Layer, index: int, cfg: Config, card: int) -> Layer:
    """A card's part of a whole plain layer of NumPy arrays; `cfg` is of one card."""
    named = named_parameters(layer)
    sizes = cfg.layer_shapes(index)
    for name, array in named.items():
        if name in COLUMNS:
            named[name] = _some(array, array.ndim - 1, sizes[name][-1], card)
        elif name in ROWS:
            named[name] = _some(array, 0, sizes[name][0], card)
    return layer_from(named, index, cfg)


def cut_head(head_DV: np.ndarray, cfg: Config, card: int) -> np.ndarray:
    """A card's columns of the output head."""
    return _some(head_DV, 1, cfg.head_columns, card)


def _some(a: np.ndarray, axis: int, size: int, card: int) -> np.ndarray:
    """The card's part along an axis, padded with zeros to `size`."""
    some = np.take(a, range(card * size, min((card + 1) * size, a.shape[axis])), axis)
    rest = size - some.shape[axis]
    widths = [(0, rest if i == axis else 0) for i in range(a.ndim)]
    return np.ascontiguousarray(np.pad(some, widths) if rest else some)


def together(parts: Sequence[Any], memory_kinds: Any = "device") -> Any:
    """The trees of all cards as one: each array's parts behind one another, each on its card.

    `memory_kinds` is a kind of memory, or a tree of them. For one card, its tree in that memory.
    """
    devices = mesh(len(parts)).devices.tolist()
    if isinstance(memory_kinds, str):
        kind = memory_kinds
        memory_kinds = jax.tree.map(lambda _: kind, parts[0])

    def join(kind, *arrays):
        places = [jax.sharding.SingleDeviceSharding(d, memory_kind=kind) for d in devices]
        each = [jax.device_put(a, place) for a, place in zip(arrays, places, strict=True)]
        if len(each) == 1:
            return each[0]
        shape = len(each) * each[0].shape[0], *each[0].shape[1:]
        place = NamedSharding(mesh(len(each)), PARTS, memory_kind=kind)
        return jax.make_array_from_single_device_arrays(shape, place, each)

    return jax.tree.map(join, memory_kinds, *parts)


def shapes_of(tree: Any, cards: int) -> Any:
    """The shapes of all cards' arrays, of a tree of shapes that are a card's (of caches: all
    cards'), with the places where they lie."""
    if cards == 1:
        place = alike(1)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)

    def placed(spec, part):
        place, times = NamedSharding(mesh(cards), spec), cards if spec == PARTS else 1
        shape = lambda a: (times * a.shape[0], *a.shape[1:]) if times > 1 else a.shape
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(shape(a), a.dtype, sharding=place), part)

    is_spec = lambda s: isinstance(s, PartitionSpec)
    return jax.tree.map(placed, specs(tree), tree, is_leaf=is_spec)


def empty(make: Callable[[], Any], cards: int, parts: bool = True) -> Any:
    """The caches that `make` makes, on their cards: each has some heads, or without `parts` all."""
    if cards == 1:
        return jax.device_put(make(), alike(1))
    shapes = jax.eval_shape(make)
    is_cache = lambda c: isinstance(c, KV)
    spread = lambda c: jax.tree.map(
        lambda _: NamedSharding(mesh(cards), specs(c) if parts else ALIKE), c
    )
    return jax.jit(make, out_shardings=jax.tree.map(spread, shapes, is_leaf=is_cache))()
