"""Seconds of a round that several texts share, and how deep their trees should be.

As in `subspec_jax.predict`, one layer of each kind is timed with random weights, in the programs of
`subspec_jax.batch_programs`. Two numbers of texts and two depths are timed; a draft's step is
linear in the texts, a block and a round's end in the nodes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.cards import empty
from llm_jax.params import Layer
from llm_jax.sample import Sampler, Samplers
from llm_jax.stream import to_device
from subspec_jax import batch_programs as programs
from subspec_jax.batch_programs import Growing, Seats, Verifying
from subspec_jax.plan import Plan, published_tau
from subspec_jax.predict import (
    FEW,
    MORE,
    RoundCosts,
    _draft_kinds,
    _draft_seconds,
    _fresh,
    _model,
    _seconds,
    _send_seconds,
    round_seconds,
    timed_layer,
)
from subspec_jax.tree import TreeSpec, cache_slots, live_sizes
from subspec_jax.verify import jit_block


def measure_together(plan: Plan, exact: Layer, texts: int, spec: TreeSpec) -> RoundCosts:
    """The measured times of a round of `texts` texts with trees of `spec`.

    `exact` is a layer of the target. The device should hold nothing else. Every text has a quarter
    of the plan's `max_length`.
    """
    cfg, length = plan.cfg, max(1, plan.max_length // 4)
    slots = cache_slots(plan.max_length, plan.spec)
    live = next(size for size in live_sizes(slots) if size >= min(slots, length + spec.places))
    live = programs.slot_sizes(slots, plain=True)[0] if programs.device.on_gpu() else live
    send = _send_seconds(exact, cfg.cards) if plan.streamed else 0.0
    sent = functools.partial(to_device, cards=cfg.cards)
    exact = timed_layer(exact, cfg.cards)
    model = _model(plan, (exact,))
    fresh = functools.partial(_fresh, plan, exact, texts, slots)
    caches = lambda n: empty(functools.partial(fresh, n), cfg.cards)
    column = lambda value: np.full(texts, value, np.int32)
    samplers = Samplers.of([Sampler()] * texts, [0] * texts)
    seats = sent(Seats(column(0), column(length), np.arange(texts, dtype=np.int32), samplers))
    shape = dict(spec=spec, slots=live, rows=texts)

    trees, tokens, step, _ = programs.lay_out_each(programs.only_roots(seats, spec), seats, **shape)
    state = [sent(jnp.zeros((*tokens.shape, cfg.d_model), cfg.dtype)), caches(1)[0]]

    def block():
        state[0], state[1], done = jit_block(exact, state[0], state[1], step, cfg)
        return done

    block_s, drafted = _seconds(block, 4), {}
    if plan.draft.bits is not None and spec.steps:
        never = sent(jnp.full(max(spec.steps, 1), -jnp.inf, jnp.float32))
        for name, draft in _draft_kinds(plan, model).items():
            for n in (FEW, MORE):
                kept = [caches(n)]
                layers = tuple(jax.tree.map(jnp.copy, draft.layers[0]) for _ in range(n))
                params = dataclasses.replace(draft, layers=layers)

                def grown(kept=kept, params=params):
                    given = Growing(params, kept[0], seats, never, cfg, **shape)
                    found, kept[0], _ = programs.grow_each(given)
                    return found.size

                drafted[name, n] = _seconds(grown, 1)
    top = dataclasses.replace(model, layers=())
    if plan.table_on_host:
        top = dataclasses.replace(top, embed_VD=None)
    kept = [caches(1)]

    def end():
        given = top, state[0], trees, tuple(kept[0]), seats, sent(column(0))
        ended = programs.finish_each(Verifying(*given, cfg, spec, replay=True))
        kept[0] = ended.caches
        return jax.device_get((ended.emitted_BP, ended.length_B))

    return RoundCosts(_draft_seconds(plan, drafted), block_s, _seconds(end, 1), send)


def why_not_together(plan: Plan) -> str | None:
    """Why rounds of several texts are not predicted, where those of one are; None if they are."""
    if plan.cfg.experts is not None:
        return "experts that several texts share are not predicted"
    if plan.spec.budget is not None:
        return "trees of several texts are predicted for beams and chains alone"
    return None


Timed = Mapping[tuple[int, int], RoundCosts]
"""Measured costs by (texts, levels)."""


def timed_shapes(plan: Plan) -> list[tuple[int, int]]:
    """The (texts, levels) to time: the fewest and the most texts, a small and the largest tree."""
    found = []
    for texts in dict.fromkeys((plan.ladder[0], plan.ladder[-1])):
        deepest = plan.spec_of(texts).depth
        found += [(texts, d) for d in dict.fromkeys((max(1, deepest // 4), deepest))]
    return found


def costs_between(timed: Timed, width: int) -> Callable[[int, int], RoundCosts]:
    """The costs of any (texts, levels), from the timed ones."""
    numbers = sorted({texts for texts, _ in timed})
    nodes = {texts * (1 + levels * width): c for (texts, levels), c in timed.items()}
    places = sorted(nodes)
    by_nodes = lambda name, at: float(
        np.interp(at, places, [getattr(nodes[p], name) for p in places])
    )

    def draft_of(texts: int, levels: int) -> float:
        own = sorted((d, c.draft) for (n, d), c in timed.items() if n == texts)
        (low, first), (high, last) = own[0], own[-1]
        slope = (last - first) / (high - low) if high > low else last / high
        return max(0.0, first + slope * (levels - low))

    def costs(texts: int, levels: int) -> RoundCosts:
        draft = float(np.interp(texts, numbers, [draft_of(n, levels) for n in numbers]))
        at = texts * (1 + levels * width)
        send = max(c.send for c in timed.values())
        return RoundCosts(draft, by_nodes("block", at), by_nodes("rest", at), send)

    return costs


def best_levels(
    plan: Plan, timed: Timed, link: float, tau: Callable[[int], float] = published_tau
) -> dict[int, tuple[int, float]]:
    """By number of texts in the plan's ladder: (levels, tokens/s of all texts) of the fastest tree.

    `link` is in bytes per second; `tau` gives the tokens a pass of a tree with so many levels. No
    tree is deeper than `Plan.spec_of` says, for which there is memory. Ties go to the smaller tree.
    """
    costs, found = costs_between(timed, plan.spec.width), {}
    for texts in plan.ladder:
        rates = [
            texts * tau(d) / round_seconds(plan, costs(texts, d), link)
            for d in range(1, plan.spec_of(texts).depth + 1)
        ]
        best = int(np.argmax(rates))
        found[texts] = best + 1, float(rates[best])
    return found
