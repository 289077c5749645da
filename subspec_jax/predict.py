"""Seconds of a round before a model is loaded: a layer of each kind is timed, the rest computed.

Weights are random; times do not depend on them. Measured: a block of the verify pass, the draft's
whole tree with two and with four layers, and a round's end. Computed: the pipeline of copies and
blocks, as `llm_jax.stream.Stream` runs it, and the draft with all its layers. Where passes bring
experts one by one, their pipeline is that of `subspec_jax.predict_experts`.
"""

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.attention import caches_for
from llm_jax.cards import empty, together
from llm_jax.params import Attention, JoinedAttention, Layer, Params
from llm_jax.sample import Sampler
from llm_jax.stream import StreamedLayer, to_device
from subspec_jax.bitwise import draws, laid_out
from subspec_jax.draft import Drafting, grow
from subspec_jax.draft_model import drafted_layers, make_draft
from subspec_jax.experts import apart, room_for
from subspec_jax.layout import expert_bytes
from subspec_jax.offload import offload, separate_experts, streamed_bytes
from subspec_jax.plan import Plan
from subspec_jax.predict_experts import Routing, routed_block_seconds, routed_pass_seconds
from subspec_jax.tree import live_sizes, seedling
from subspec_jax.verify import Verified, finish_round, jit_block

FEW, MORE = 2, 4
"""Numbers of layers in the two drafts that are timed. Their difference gives the time per layer."""


@dataclasses.dataclass(frozen=True)
class RoundCosts:
    """Seconds of the parts of a round."""

    draft: float
    """Drafting a whole tree."""
    block: float
    """One layer of the verify pass, with its weights already on the device."""
    rest: float
    """The round's end (logits, walk, moving cache rows) and sending the tree's first inputs."""
    send: float = 0.0
    """The host's time to start the copy of a layer, or of an expert."""
    groups: dict[int, float] = dataclasses.field(default_factory=dict)
    """A program that applies some experts, by how many; `block` is a layer without them then."""


def pass_seconds(
    sizes: Sequence[int],
    block: float,
    link: float,
    ahead: int,
    early: float = 0.0,
    send: float = 0.0,
    lie: Collection[int] = (),
    disk: float = math.inf,
) -> float:
    """Seconds of a streamed pass.

    `sizes` are the bytes that each layer streams, 0 for resident ones. `block` is in seconds per
    layer and `link` in bytes per second. The first `ahead` + 1 copies start `early` seconds before
    the pass. Each later copy starts when a streamed layer's block is complete and the link is free.
    To start a copy takes the host `send` seconds, in which no block runs. The layers `lie` are read
    first, at `disk` bytes per second and one after another: as many as the ring holds beginning
    `early`, each other one when a block lets one go.
    """
    streamed = [i for i, size in enumerate(sizes) if size]
    arrival, free, now = {}, -early, 0.0
    coming, reading = iter(streamed), iter([i for i in streamed if i in lie])
    there, busy = {}, -early

    def read(at):
        nonlocal busy
        if (i := next(reading, None)) is not None:
            busy = there[i] = max(busy, at) + sizes[i] / disk

    for _ in range(ahead + 2 if lie else 0):
        read(-early)

    def start(i, at):
        nonlocal free
        free = arrival[i] = max(free, at, there.get(i, at)) + sizes[i] / link

    for i in itertools.islice(coming, ahead + 1):
        start(i, -early)
    for i, size in enumerate(sizes):
        now = max(now, arrival.get(i, 0.0)) + block
        if i in lie:
            read(now)
        if size and (following := next(coming, None)) is not None:
            now += send
            start(following, now)
    return now


def round_seconds(
    plan: Plan,
    costs: RoundCosts,
    link: float,
    routing: Routing | None = None,
    disk: float | None = None,
) -> float:
    """Seconds of one round of the plan: draft, pass and end. `link` and `disk` are in bytes per
    second.

    `routing` is needed where passes bring experts one by one, `disk` where layers are on it.
    """
    return costs.draft + verify_seconds(plan, costs, link, routing, disk) + costs.rest


def verify_seconds(
    plan: Plan,
    costs: RoundCosts,
    link: float,
    routing: Routing | None = None,
    disk: float | None = None,
) -> float:
    """Seconds of the plan's pass, as in `round_seconds`."""
    if plan.hot is not None:
        spec, size = plan.spec, expert_bytes(plan)
        forwarded = 1 + (spec.steps - 1) * spec.width if plan.draft.bits and spec.steps else 0
        share = (plan.draft.experts or plan.cfg.experts.chosen) / plan.cfg.experts.chosen
        drawn = routing.draw(spec.nodes, forwarded, plan.hot, share)
        ring, _ = room_for(plan.cfg, size)
        given = costs.block, costs.groups, size / link, costs.send, ring
        return statistics.fmean(routed_pass_seconds(counts, *given) for counts in drawn)
    layers = enumerate(plan.model.layers)
    sizes = [0 if i in plan.stays else streamed_bytes(layer) for i, layer in layers]
    given = sizes, costs.block, link, plan.ahead, costs.draft, costs.send
    return pass_seconds(*given, plan.disk, disk or math.inf)


def why_not(plan: Plan) -> str | None:
    """Why rounds of the plan are not predicted; None if they are."""
    cfg, layers = plan.cfg, plan.model.layers
    if plan.draft.model is not None:
        return "a draft that is another model is not predicted"
    if plan.hot is None and cfg.experts is not None:
        return "whole layers of experts are not predicted"
    if plan.hot is not None and not all(map(cfg.has_experts, range(cfg.layers))):
        return "layers with experts beside others are not predicted"
    if not all(isinstance(l.attn, Attention | JoinedAttention) for l in layers):
        return "another kind of attention is not predicted"
    return None


def measure(
    plan: Plan, exact: Layer, sampler: Sampler = Sampler(), length: int | None = None
) -> RoundCosts:
    """The measured times of the plan's parts. The device should hold nothing else.

    `exact` is a layer of the target, on host or device. `length` is the expected number of tokens;
    None: a quarter of the plan's `max_length`. Raises ValueError for what is not predicted
    (`why_not`).
    """
    if (reason := why_not(plan)) is not None:
        raise ValueError(reason)
    cfg, spec, by_expert = plan.cfg, plan.spec, plan.hot is not None
    length = length or max(1, plan.max_length // 4)
    slots, shape = plan.slots, plan.shape
    live = next(size for size in live_sizes(slots) if size >= length + spec.places)
    sent = functools.partial(to_device, cards=cfg.cards)
    at, key = sent(jnp.int32(length)), jax.random.key(0)
    if by_expert:
        in_mxfp4 = getattr(apart(plan.model.layers[0]), "mxfp4", False)
        exact = offload(separate_experts(exact, in_mxfp4, exact=False))
    send = _send_seconds(exact, cfg.cards, by_expert) if plan.streamed else 0.0
    exact = exact if by_expert else timed_layer(exact, cfg.cards)
    model = _model(plan, (exact,))
    fresh = functools.partial(_fresh, plan, exact, 1, slots)
    caches = lambda n: empty(functools.partial(fresh, n), cfg.cards)

    tree = sent(seedling(jnp.int32(0), spec))
    draft_cfg = cfg
    if plan.draft.experts is not None:
        fewer = dataclasses.replace(cfg.experts, chosen=plan.draft.experts)
        draft_cfg = dataclasses.replace(cfg, experts=fewer)
    _, tokens, step = laid_out(tree, at, spec, live, shape)
    state = [sent(jnp.zeros((*tokens.shape, cfg.d_model), cfg.dtype)), caches(1)[0]]

    times = {}

    def block():
        state[0], state[1], done = jit_block(exact, state[0], state[1], step, cfg)
        return done

    groups = {}
    if by_expert:
        _, at_once = room_for(cfg, expert_bytes(plan))
        clock = functools.partial(_seconds, calls=8)
        given = exact, state, step, spec.nodes, at_once, cfg, clock
        times["block"], groups = routed_block_seconds(*given)
    else:
        times["block"] = _seconds(block, 8)
    drafted = {}
    if plan.draft.bits is not None:
        for name, draft in _draft_kinds(plan, model).items():
            for n in (FEW, MORE):
                layers = tuple(jax.tree.map(jnp.copy, draft.layers[0]) for _ in range(n))
                routed = (n, cfg.experts.count) if by_expert else None
                given = Drafting(
                    params=dataclasses.replace(draft, layers=layers),
                    tree=sent(seedling(jnp.int32(0), spec, routed)),
                    caches=caches(n),
                    at=at,
                    key=key,
                    cfg=draft_cfg,
                    spec=spec,
                    sampler=sampler,
                    live=live,
                )
                drafted[name, n] = _tree_seconds(given)
    x, top = state[0], dataclasses.replace(model, layers=())
    if plan.table_on_host:
        top = dataclasses.replace(top, embed_VD=None)
    kept = [caches(1)]

    def end():
        cut, _, step = laid_out(tree, at, spec, live, shape)
        finished = finish_round(
            Verified(
                top=top,
                x_1ED=x,
                tree=cut,
                extended=jax.tree.map(jnp.copy, tree),
                caches=tuple(kept[0]),
                at=at,
                key=key,
                accepted=sent(jnp.int32(0)),
                cfg=cfg,
                spec=spec,
                sampler=sampler,
                replay=True,
                draw_R=draws(top, x, step, key, cfg, sampler, shape),
            )
        )
        kept[0] = finished.caches
        return jax.device_get((finished.emitted_P, finished.length, finished.last))

    times["rest"] = _seconds(end, 1)
    drafting = _draft_seconds(plan, drafted)
    return RoundCosts(drafting, times["block"], times["rest"], send, groups)


def timed_layer(exact: Layer, cards: int) -> Layer:
    """The layer on the device; of several cards, each has a copy in place of its part."""
    if cards == 1:
        return to_device(exact)
    return together([jax.tree.map(np.asarray, exact)] * cards)


def _fresh(plan: Plan, exact: Layer, texts: int, slots: int, layers: int) -> tuple:
    """Empty caches of a model of `layers` such layers."""
    params = Params(None, (exact,) * layers, None)
    return caches_for(params, plan.cfg, texts, slots, plan.spec.places + 1)


def _send_seconds(exact: Layer, cards: int = 1, by_expert: bool = False, repeats: int = 5) -> float:
    """Median seconds to start the copy of a layer, or of an expert, without the copy itself."""
    layer, times = offload(exact if by_expert else timed_layer(exact, cards)), []
    one = functools.partial(to_device, apart(layer).each[0]) if by_expert else None
    send = one or StreamedLayer.of(layer).send
    for _ in range(repeats + 1):
        began = time.perf_counter()
        copies = send()
        times.append(time.perf_counter() - began)
        jax.block_until_ready(copies)
    return statistics.median(times[1:])


def _draft_seconds(plan: Plan, drafted: dict[tuple[str, int], float]) -> float:
    """Seconds of a draft with all layers, from drafts with FEW and MORE layers of each kind."""
    if not drafted:
        return 0.0
    slope = lambda name: (drafted[name, MORE] - drafted[name, FEW]) / (MORE - FEW)
    names = dict.fromkeys(name for name, _ in drafted)
    low = len(drafted_layers(plan.model.layers, plan.draft, plan.resident))
    counts = {"shared": plan.cfg.layers - low, "low": low}
    first = next(iter(names))
    base = drafted[first, FEW] - FEW * slope(first)
    return base + sum(counts[name] * slope(name) for name in names)


def _draft_kinds(plan: Plan, model: Params) -> dict[str, Params]:
    """By name, a draft of one layer for each kind of layer in the plan's draft."""
    low = len(drafted_layers(plan.model.layers, plan.draft, plan.resident))
    kinds = {"low": (low, 0), "shared": (plan.cfg.layers - low, 1)}
    make = functools.partial(make_draft, model, plan.draft, iterations=0, cards=plan.cfg.cards)
    return {
        name: to_device(make(resident=resident), plan.cfg.cards)
        for name, (count, resident) in kinds.items()
        if count
    }


def _tree_seconds(given: Drafting) -> float:
    """Median seconds to draft a whole tree."""
    caches, fresh = [given.caches], given.tree
    never = jnp.full(max(given.spec.steps, 1), -jnp.inf, jnp.float32)
    never = to_device(never, given.cfg.cards)
    given = dataclasses.replace(given, least_L=never)

    def run():
        tree = jax.tree.map(jnp.copy, fresh)
        tree, caches[0] = grow(dataclasses.replace(given, tree=tree, caches=caches[0]))
        return tree.size

    return _seconds(run, 1)


def _seconds(f: Callable, calls: int, repeats: int = 5) -> float:
    """Median seconds of a call of `f`, without the first calls. `f` returns arrays to wait for."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        for _ in range(calls):
            last = f()
        jax.block_until_ready(last)
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times[1:])


def _model(plan: Plan, layers: tuple) -> Params:
    """The layers with tables of zeros. Zeros take as long as any other values."""
    cfg = plan.cfg
    sent = functools.partial(to_device, cards=cfg.cards)
    zeros = lambda *shape: sent(jnp.zeros(shape, cfg.dtype))
    size = cfg.vocab, cfg.d_model
    table = np.zeros(size, cfg.dtype) if plan.table_on_host else zeros(*size)
    shapes = plan.model.head_DV
    head = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    head = together([head] * cfg.cards)
    return Params(table, layers, zeros(cfg.d_model), head)
