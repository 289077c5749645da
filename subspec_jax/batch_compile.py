"""The programs of a round that several texts share, from shapes, to be compiled ahead."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.attention import caches_for, causal_steps
from llm_jax.cache import KV
from llm_jax.cards import shapes_of
from llm_jax.params import Params
from llm_jax.sample import Sampler, Samplers
from subspec_jax import batch_programs as programs
from subspec_jax.accept import Gate
from subspec_jax.batch_lookup import along, grow_each_along
from subspec_jax.batch_programs import Growing, Seats, Verifying
from subspec_jax.draft_model import make_draft
from subspec_jax.experts import lowered, room_for
from subspec_jax.layout import expert_bytes
from subspec_jax.offload import separate_shapes
from subspec_jax.plan import Plan
from subspec_jax.tree import cache_slots
from subspec_jax.verify import jit_block


def lowered_together(
    plan: Plan, replay: bool = False, gate: Gate | None = None, longest: int = 3
) -> Iterator[jax.stages.Lowered]:
    """The programs for each number of texts in the ladder, one after another."""
    placed = functools.partial(shapes_of, cards=plan.cfg.cards)
    cfg, params = plan.cfg, placed(plan.model)
    slots = cache_slots(plan.max_length, plan.spec)
    given = plan.model, cfg, plan.texts, slots, plan.spec.places + 1
    caches = placed(jax.eval_shape(functools.partial(caches_for, *given)))
    plain = all(isinstance(cache, KV) for cache in caches)
    table = None if plan.table_on_host else params.embed_VD
    top = dataclasses.replace(params, embed_VD=table, layers=())
    draft = None
    if plan.draft.bits is not None:
        how = plan.draft, plan.resident
        where = dict(table_on_host=plan.table_on_host, cards=cfg.cards)
        draft = placed(make_draft(plan.model, *how, **where))
    for texts in plan.ladder:
        for live in programs.slot_sizes(slots, plain):
            yield from _of(
                plan, texts, live, params, top, draft, caches, placed, replay, gate, longest
            )


def _of(
    plan: Plan,
    texts: int,
    live: int,
    params: Params,
    top: Params,
    draft,
    caches,
    placed,
    replay,
    gate,
    longest,
) -> Iterator[jax.stages.Lowered]:
    """The programs for `texts` texts that look at `live` slots."""
    cfg, spec = plan.cfg, plan.spec_of(texts)
    of_kind = lambda dtype, *shape: placed(jax.ShapeDtypeStruct(shape, dtype))
    array = functools.partial(of_kind, cfg.dtype)
    number_B = of_kind(np.int32, texts)
    samplers = placed(jax.eval_shape(lambda: Samplers.of([Sampler()] * texts, [0] * texts)))
    seats = Seats(number_B, number_B, number_B, samplers)
    trees = placed(jax.eval_shape(functools.partial(programs.only_roots, spec=spec), seats))
    how = dict(spec=spec, slots=live, rows=plan.texts)
    cut, _, step, real_M = placed(
        jax.eval_shape(functools.partial(programs.lay_out_each, **how), trees, seats)
    )
    sizes = programs.prefill_sizes(plan.chunk, plan.spec, texts, plan.texts)
    x = array(texts, spec.nodes, cfg.d_model)
    passes = [(x, step, real_M)]
    for length in sizes:
        causal = lambda at, row, real: causal_steps(at, length, live, row, real)  # noqa: B023
        steps = placed(jax.eval_shape(causal, number_B, number_B, number_B))
        counted_M = of_kind(jnp.bool_, texts * length)
        passes.append((array(texts, length, cfg.d_model), steps, counted_M))
    seen: set[str] = set()
    for i, layer in enumerate(params.layers):
        kind = str(jax.tree.structure(layer)) + str(jax.tree.leaves(layer))
        routed = plan.hot is not None and cfg.has_experts(i)
        for rows, where, counted_M in [] if kind in seen else passes:
            if routed:
                at_once, apart = room_for(cfg, expert_bytes(plan))[1], separate_shapes(layer)
                given = rows, caches[i], where, counted_M, at_once, cfg
                yield from lowered(placed(apart), *given)
            else:
                yield jit_block.lower(layer, rows, caches[i], where, cfg)
        seen.add(kind)
    yield programs.finish_each.lower(
        Verifying(
            top=top,
            x_BED=x,
            trees=cut,
            caches=caches,
            seats=seats,
            accepted_B=number_B,
            cfg=cfg,
            spec=spec,
            replay=replay,
            gate=gate,
        )
    )
    for length in sizes:
        piece = array(texts, length, cfg.d_model)
        yield programs.first_draws.lower(top, piece, seats, number_B, cfg)
    if draft is None or plan.draft.own_cache:
        return
    routed = plan.hot is not None
    layers = sum(map(cfg.has_experts, range(cfg.layers)))
    growing = Growing(
        params=draft,
        caches=caches,
        seats=seats,
        least_L=of_kind(jnp.float32, max(spec.steps, 1)),
        cfg=cfg,
        spec=spec,
        slots=live,
        rows=plan.texts,
        experts=(layers, cfg.experts.count) if routed else None,
    )
    yield programs.grow_each.lower(growing)
    if spec.lookup:
        text_BS = of_kind(np.int32, texts, cache_slots(plan.max_length, plan.spec))
        yield grow_each_along.lower(along(growing, text_BS, longest))
