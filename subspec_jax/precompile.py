"""Compiles a run's programs before its weights are placed.

XLA for GPUs times candidate kernels on its own buffers, which are as large as the operands: for the
output head of a 7B model alone, 1 GB. A tight memory limit has no room for this next to the
weights. So the large programs are compiled from shapes while the device is empty. If JAX has a
compilation cache directory, later calls find the programs there.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.attention import caches_for, causal_step
from llm_jax.cache import KV
from llm_jax.cards import shapes_of
from llm_jax.generation import chunk_sizes
from llm_jax.progress import Reporter
from llm_jax.sample import Sampler
from llm_jax.stream import home
from subspec_jax.accept import Gate
from subspec_jax.batch_compile import lowered_together
from subspec_jax.bitwise import jit_drawn, laid_out
from subspec_jax.draft import Drafting, extend_once, grow, grow_along
from subspec_jax.draft_model import make_draft
from subspec_jax.experts import lowered, room_for
from subspec_jax.layout import expert_bytes
from subspec_jax.offload import separate_shapes
from subspec_jax.plan import Plan
from subspec_jax.tree import live_sizes, seedling
from subspec_jax.verify import Verified, finish_round, jit_block, last_logits

PROGRAMS_AT_ONCE = 8
"""Programs compiled in parallel. Each needs memory for the candidates that are timed; 12 at once
had room in the 8 GB of a 7B."""


def use_cache(folder: str | Path) -> None:
    """Keeps all compiled programs in `folder`, also those that compile quickly."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Ahead(NamedTuple):
    """A method whose programs are compiled ahead."""

    plan: Plan
    sampler: Sampler
    gate: Gate | None = None
    replay: bool = False
    longest: int = 3

    def programs(self) -> Iterator[jax.stages.Lowered]:
        """The block for a tree and for prefill, the head, and the draft; if several texts are
        planned for, for each number of them in the plan's ladder."""
        if self.plan.ladder:
            return lowered_together(self.plan, self.replay, self.gate, self.longest)
        return _lowered(*self)


def compile_ahead(methods: Mapping[str, Ahead], reporter: Reporter = Reporter()) -> dict[str, int]:
    """By method, the largest work space of its programs in bytes, without inputs and outputs.

    Programs of all methods are compiled side by side, and those that methods share once.
    """
    title = f"Compiling for {', '.join(methods)}"
    with concurrent.futures.ThreadPoolExecutor(PROGRAMS_AT_ONCE) as pool:
        once: dict[str, concurrent.futures.Future] = {}
        of = {name: [] for name in methods}
        with reporter.status(title):
            for name, method in methods.items():
                for program in method.programs():
                    key = hashlib.sha256(program.as_text().encode()).hexdigest()
                    if key not in once:
                        once[key] = pool.submit(program.compile)
                    of[name].append(once[key])
        with reporter.bar(title, len(once)) as step:
            for done, _ in enumerate(concurrent.futures.as_completed(once.values()), 1):
                step(done)
    needs = lambda program: program.result().memory_analysis().temp_size_in_bytes
    return {name: max(map(needs, programs)) for name, programs in of.items()}


def _lowered(
    plan: Plan, sampler: Sampler, gate: Gate | None, replay: bool, longest: int
) -> Iterator[jax.stages.Lowered]:
    """The programs, one after another when they are traced."""
    cfg, spec = plan.cfg, plan.spec
    device = home(cards=cfg.cards)
    placed = functools.partial(shapes_of, cards=cfg.cards)
    shapes = lambda f, *args: placed(jax.eval_shape(f, *args))
    array = lambda *shape: jax.ShapeDtypeStruct(shape, cfg.dtype, sharding=device)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=device)
    key = jax.eval_shape(lambda: jax.random.key(0))

    params = placed(plan.model)
    layers = params.layers
    table = None if plan.table_on_host else params.embed_VD
    top = dataclasses.replace(params, embed_VD=table, layers=())
    slots, shape = plan.slots, plan.shape
    caches = shapes(functools.partial(caches_for, plan.model, cfg, 1, slots, spec.places + 1))
    # Layers of one shape share their programs.
    kinds = {str(jax.tree.structure(l)) + str(jax.tree.leaves(l)): i for i, l in enumerate(layers)}

    routed = None
    if plan.hot is not None:
        routed_kinds = {kind: i for kind, i in kinds.items() if cfg.has_experts(i)}
        kinds = {kind: i for kind, i in kinds.items() if not cfg.has_experts(i)}
        if plan.draft.bits is not None:
            routed = sum(map(cfg.has_experts, range(cfg.layers))), cfg.experts.count
    tree = shapes(lambda: seedling(jnp.int32(0), spec, routed))
    plain = all(isinstance(cache, KV) for cache in caches)
    sizes = live_sizes(slots) if plain else [slots]
    rows = array(1, spec.nodes if shape is None else shape.rows, cfg.d_model)
    common = dict(at=number, key=key, cfg=cfg, spec=spec, sampler=sampler)
    if plan.draft.bits is not None and not plan.draft.own_cache:  # first: it takes longest
        how = dict(table_on_host=plan.table_on_host, cards=cfg.cards)
        draft = make_draft(plan.model, plan.draft, plan.resident, **how)
        given = Drafting(params=placed(draft), tree=tree, caches=caches, longest=longest, **common)
        least = jax.ShapeDtypeStruct((max(spec.steps, 1),), jnp.float32, sharding=device)
        text = jax.ShapeDtypeStruct((slots,), jnp.int32, sharding=device)
        for live in sizes:
            given = dataclasses.replace(given, live=live)
            yield grow.lower(dataclasses.replace(given, least_L=least))
            if spec.lookup:
                yield grow_along.lower(dataclasses.replace(given, least_L=least, text_S=text))
            if spec.extra:
                yield extend_once.lower(given)

    cut = tree
    for i in kinds.values():
        for live in sizes if shape is None else sizes[-1:]:
            cut, _, step = shapes(lambda t: laid_out(t, jnp.int32(0), spec, live, shape), tree)  # noqa: B023
            yield jit_block.lower(layers[i], rows, caches[i], step, cfg)
        for length in chunk_sizes(plan.chunk):
            causal = jax.eval_shape(functools.partial(causal_step, 0, length, slots, 0))
            piece = array(1, length, cfg.d_model)
            yield jit_block.lower(layers[i], piece, caches[i], causal, cfg)
    if plan.hot is not None:
        for live in sizes:
            cut, _, step = shapes(lambda t: laid_out(t, jnp.int32(0), spec, live, None), tree)  # noqa: B023
        at_once = room_for(cfg, expert_bytes(plan))[1]
        for i in routed_kinds.values():
            layer = placed(separate_shapes(layers[i]))
            yield from lowered(layer, rows, caches[i], step, number, at_once, cfg)
    yield last_logits.lower(top, array(1, 1, cfg.d_model), cfg)
    draw_R = None
    if shape is not None:
        draw_R = placed(jax.ShapeDtypeStruct((shape.rows,), jnp.int32))
        yield jit_drawn.lower(top, rows, draw_R, key, cfg, sampler)
    yield finish_round.lower(
        Verified(
            top=top,
            x_1ED=rows,
            tree=cut,
            extended=tree,
            caches=caches,
            accepted=number,
            gate=gate,
            replay=replay,
            draw_R=draw_R,
            **common,
        )
    )
