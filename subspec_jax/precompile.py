"""Compiling a run's programs before its weights are placed.

XLA for GPUs times candidate kernels on buffers of its own, as large as the operands: the output
head of a 7B model alone takes 1 GB. Under a tight memory limit there is no room for that beside the
weights, so the large programs are compiled while the device is empty, from shapes alone. With a
compilation cache directory set, the calls that follow find them there.
"""

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp

from llm_jax.attention import caches_for, causal_step
from llm_jax.cache import KV
from llm_jax.generate import chunk_sizes
from llm_jax.packed import packed
from llm_jax.params import Params
from llm_jax.quantize import QuantizedTable, quantize
from llm_jax.sample import Sampler
from subspec_jax.accept import Gate
from subspec_jax.draft import extend_once, grow, grow_along
from subspec_jax.offload import home
from subspec_jax.plan import Plan
from subspec_jax.residual.split import is_split
from subspec_jax.substitute import substitute_shapes, substitutes
from subspec_jax.tree import cache_slots, live_sizes, seedling
from subspec_jax.verify import finish_round, jit_block, last_logits, lay_out

AT_ONCE = 4
"""Programs compiled side by side; more would need more memory for candidates that are timed."""


def use_cache(folder) -> None:
    """Keeps compiled programs in `folder`, however quickly they were compiled."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compile_ahead(
    plan: Plan, sampler: Sampler, gate: Gate | None = None, replay: bool = False, longest: int = 3
) -> int:
    """Compiles the plan's programs: the block for a tree and for prefill, the head, the draft.

    Returns the most bytes that one of them needs beside its inputs and what it returns.
    """
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        lowered = _lowered(plan, sampler, gate, replay, longest)
        waiting = [pool.submit(program.compile) for program in lowered]
        needs = [program.result().memory_analysis() for program in waiting]
    return max(need.temp_size_in_bytes for need in needs)


def _lowered(plan: Plan, sampler: Sampler, gate: Gate | None, replay: bool, longest: int):
    """The programs, one after another as they are traced."""
    cfg, spec = plan.cfg, plan.spec
    device = home()
    placed = functools.partial(
        jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device)
    )
    shapes = lambda f, *args: placed(jax.eval_shape(f, *args))
    key = jax.eval_shape(lambda: jax.random.key(0))
    at = jax.ShapeDtypeStruct((), jnp.int32, sharding=device)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, cfg.dtype, sharding=device)

    layers = placed(plan.model.layers)
    table = array(cfg.vocab, cfg.d_model)
    head = placed(plan.model.head_DV)
    params = Params(table, layers, array(cfg.d_model), head)
    top = dataclasses.replace(params, embed_VD=None if plan.table_on_host else table, layers=())
    slots = cache_slots(plan.max_length, spec)
    caches = shapes(functools.partial(caches_for, plan.model, cfg, 1, slots, spec.places + 1))
    # Layers of one shape share their programs.
    kinds = {str(jax.tree.structure(l)) + str(jax.tree.leaves(l)): i for i, l in enumerate(layers)}

    tree = shapes(lambda: seedling(jnp.int32(0), spec))
    plain = all(isinstance(cache, KV) for cache in caches)
    sizes = live_sizes(slots) if plain else [slots]
    for i in kinds.values():
        tokens = array(1, spec.nodes, cfg.d_model)
        for live in sizes:
            cut, _, step = shapes(lambda t: lay_out(t, jnp.int32(0), spec, live), tree)  # noqa: B023
            yield jit_block.lower(layers[i], tokens, caches[i], step, cfg)
        for length in chunk_sizes(plan.chunk):
            causal = jax.eval_shape(functools.partial(causal_step, 0, length, slots, 0))
            rows = array(1, length, cfg.d_model)
            yield jit_block.lower(layers[i], rows, caches[i], causal, cfg)
    yield last_logits.lower(top, array(1, 1, cfg.d_model), cfg)
    rows = array(1, spec.nodes, cfg.d_model)
    yield finish_round.lower(
        top, rows, cut, tree, caches, at, key, at, cfg, spec, sampler, gate, replay
    )

    if plan.draft.bits is None or plan.draft.own_cache:
        return
    bits, group, head_bits = plan.draft.bits, plan.draft.group, plan.draft.head_bits
    shared = plan.resident if plan.draft.share_resident and not plan.streams_residuals else 0
    if plan.table_on_host:
        table = shapes(lambda t: QuantizedTable(quantize(t.T, bits, group, 0)), table)
    if is_split(head):
        head = substitutes(head)
    elif head_bits is not None:
        head = array(cfg.d_model, cfg.vocab)
        head = shapes(lambda w: packed(quantize(w, head_bits, group, 0)), head)
    low = (placed(substitute_shapes(layer, bits, group)) for layer in layers[shared:])
    draft = dataclasses.replace(
        params, embed_VD=table, layers=(*layers[:shared], *low), head_DV=head
    )
    least = jax.ShapeDtypeStruct((max(spec.steps, 1),), jnp.float32, sharding=device)
    for live in sizes:
        how = cfg, spec, sampler, live
        yield grow.lower(draft, tree, caches, at, key, least, *how)
        if spec.lookup:
            text = jax.ShapeDtypeStruct((slots,), jnp.int32, sharding=device)
            given = draft, tree, caches, at, key, least, text, longest
            yield grow_along.lower(*given, *how)
        if spec.extra:
            yield extend_once.lower(draft, tree, caches, at, key, *how)
