"""Putting a model where a plan says: target on device and host, draft on the device."""

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.packed import packed
from llm_jax.params import Layer, Params, init_layer, joined, unjoined
from llm_jax.progress import Progress
from llm_jax.quantize import quantize
from pallas_kernels.residual_decode.code import pad
from subspec_jax.offload import offload, place, to_device
from subspec_jax.plan import Plan
from subspec_jax.residual.encode import encode
from subspec_jax.residual.files import Converted
from subspec_jax.residual.split import Split, decode_layer, is_split
from subspec_jax.verify import Target


def load_target(
    source, plan: Plan, progress: Progress | None = None, verify: bool = False
) -> Target:
    """A model's weights, each layer placed as it is read: at most one layer waits.

    `source` is what `llm_jax.formats.open_checkpoint` returns, or a `residual_file.Converted`:
    then layers are residuals and substitutes, or, where the plan has plain layers, put together on
    the device before they are placed. `verify` compares a converted model's weights with their
    checksums, which takes some seconds a layer, and raises ResidualError.
    """

    def place_layer(i, layer):
        return jax.block_until_ready((to_device if i in plan.stays else offload)(layer))

    def place_table(name, array):
        on_host = name == "embed_VD" and plan.table_on_host
        return np.array(array) if on_host else to_device(array)

    if isinstance(source, Converted):
        return _load_converted(source, plan, place_layer, place_table, progress, verify)
    if plan.streams_residuals:
        raise ValueError("this plan streams residuals; convert the checkpoint first")
    report = (lambda done, total: progress(done)) if progress else None
    params = source.load(plan.cfg, place_layer, place_table, report)
    return Target(params, plan.cfg, plan.ahead)


_decode_layer = jax.jit(decode_layer)


@functools.partial(jax.jit, static_argnames="vocab")
def _decode_head(head: Split, vocab: int):
    return decode_layer(head)[:, :vocab]


def _load_converted(source, plan, place_layer, place_table, progress, verify) -> Target:
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
    layers = []
    for i in range(plan.cfg.layers):
        split = source.layer(i)
        if verify or not plan.streams_residuals:
            whole = _decode_layer(to_device(split))
            if verify:
                source.verify(i, whole)
        layers.append(
            place_layer(i, split if plan.streams_residuals else unjoined(whole, plan.cfg))
        )
        if progress:
            progress(i + 1)
    return Target(Params(layers=tuple(layers), **tables), plan.cfg, plan.ahead)


def random_target(
    plan: Plan, seed: int = 0, progress: Progress | None = None, split: Layer | None = None
) -> Target:
    """Random weights of the plan's architecture, made on the device layer by layer; for timing.

    Where the plan streams residuals, one layer is encoded, on the host, and all are its copies;
    or copies of `split`, which `split_layer` made. A head in two parts is encoded as well.
    """
    cfg = plan.cfg
    make = jax.jit(init_layer, static_argnames="cfg")
    normal = jax.jit(_normal, static_argnames=("shape", "dtype"))
    key, layers = jax.random.key(seed), []
    if plan.streams_residuals:
        split = split or split_layer(make(key, cfg), plan.model.layers[0])
        copied = lambda a: jnp.copy(a) if isinstance(a, jax.Array) else a.copy()
    table_key, head_key = jax.random.split(jax.random.fold_in(key, cfg.layers))
    head = None
    if plan.split_head:  # first, while there is room for the whole one
        shape = plan.model.head_DV.shape
        head = normal(head_key, shape, cfg.dtype)
        head = to_device(split_layer(head, plan.model.head_DV))
    for i in range(cfg.layers):
        if plan.streams_residuals:
            layer = jax.tree.map(copied, split)
        else:
            layer = make(jax.random.fold_in(key, i), cfg)
        layers.append(jax.block_until_ready((to_device if i in plan.stays else offload)(layer)))
        if progress:
            progress(i + 1)
    table = normal(table_key, (cfg.vocab, cfg.d_model), cfg.dtype)
    table = np.asarray(table) if plan.table_on_host else to_device(table)
    if not cfg.tied and head is None:
        head = normal(head_key, (cfg.d_model, cfg.vocab), cfg.dtype)
    norm = jnp.ones(cfg.d_model, cfg.dtype)
    head, norm = to_device((head, norm))
    return Target(Params(table, tuple(layers), norm, head), cfg, plan.ahead)


def split_layer(layer: Layer, like: Layer, iterations: int = 0) -> Layer:
    """A plain layer as substitutes on the device and residuals, NumPy arrays, shaped as in `like`;
    or a matrix, as one `Split`.

    Raises ValueError if a residual needs more room than `like` has.
    """
    whole = layer
    if isinstance(layer, Layer):
        whole = joined(layer, lambda *w: jnp.concatenate(w, axis=-1))

    def split(w, shapes):
        if not isinstance(shapes, Split):
            return w
        bits, group = shapes.substitute.bits, shapes.substitute.group
        q = quantize(w, bits, group, iterations)
        residual = encode(np.asarray(w), jax.tree.map(np.asarray, q), shapes.residual.code)
        room = shapes.residual.words.shape[0], shapes.residual.patches
        return Split(packed(q), pad(residual, *room))

    pairs = jax.tree.leaves(whole), jax.tree.leaves(like, is_leaf=is_split)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(split, *pairs))
    return jax.tree.unflatten(jax.tree.structure(whole), found)


def _normal(key, shape, dtype):
    return jax.random.normal(key, shape, dtype) * jnp.asarray(min(shape) ** -0.5, dtype)


def arrange(target: Target, plan: Plan) -> Target:
    """The target moved to where another plan wants it; what is in its place stays untouched."""
    table = target.params.embed_VD
    if plan.table_on_host and not isinstance(table, np.ndarray):
        table = np.asarray(table)
    layers = place(target.params.layers, plan.stays)
    if not plan.table_on_host:
        table = to_device(table)
    params = dataclasses.replace(target.params, embed_VD=table, layers=layers)
    return dataclasses.replace(target, params=params, ahead=plan.ahead)


def all_on_device(params: Params) -> Params:
    """All parameters on the device, for plain use of a model that fits."""
    layers = tuple(to_device(layer) for layer in params.layers)
    return dataclasses.replace(params, embed_VD=to_device(params.embed_VD), layers=layers)
