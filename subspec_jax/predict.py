"""Seconds of a round before a model is loaded: a layer of each kind is timed, the rest computed.

Weights are random; times do not depend on them. Measured: a block of the verify pass, the draft's
whole tree with two and with four layers, and a round's end. Computed: the pipeline of copies and
blocks, as `llm_jax.stream.Stream` runs it, and the draft with all its layers.
"""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.attention import caches_for
from llm_jax.params import Layer, Params
from llm_jax.sample import Sampler
from llm_jax.stream import StreamedLayer, to_device
from subspec_jax.draft import Drafting, grow
from subspec_jax.draft_model import drafted_layers, make_draft
from subspec_jax.offload import offload, streamed_bytes
from subspec_jax.plan import Plan
from subspec_jax.tree import cache_slots, live_sizes, seedling
from subspec_jax.verify import Verified, finish_round, jit_block, lay_out

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
    """The host's time to start the copy of a layer."""


def pass_seconds(
    sizes: Sequence[int],
    block: float,
    link: float,
    ahead: int,
    early: float = 0.0,
    send: float = 0.0,
) -> float:
    """Seconds of a streamed pass.

    `sizes` are the bytes that each layer streams, 0 for resident ones. `block` is in seconds per
    layer and `link` in bytes per second. The first `ahead` + 1 copies start `early` seconds before
    the pass. Each later copy starts when a streamed layer's block is complete and the link is free.
    To start a copy takes the host `send` seconds, in which no block runs.
    """
    streamed = [i for i, size in enumerate(sizes) if size]
    arrival, free, now = {}, -early, 0.0
    coming = iter(streamed)

    def start(i, at):
        nonlocal free
        free = arrival[i] = max(free, at) + sizes[i] / link

    for i in itertools.islice(coming, ahead + 1):
        start(i, -early)
    for i, size in enumerate(sizes):
        now = max(now, arrival.get(i, 0.0)) + block
        if size and (following := next(coming, None)) is not None:
            now += send
            start(following, now)
    return now


def expected_experts(tokens_LE: np.ndarray, tokens: int, chosen: int, kept: int) -> float:
    """Experts that a pass over `tokens` tokens is expected to fetch, if they are routed alone by
    how popular experts are.

    `tokens_LE` counts the tokens of each expert, of which each has `chosen`; the `kept` most
    popular of all layers are on the device.
    """
    total_L1 = np.maximum(tokens_LE.sum(1, keepdims=True), 1e-9)
    chance_LE = np.clip(tokens_LE / total_L1 * chosen, 0, 1)
    needed_LE = 1 - (1 - chance_LE) ** tokens
    away = np.argsort(-tokens_LE, axis=None, kind="stable")[kept:]
    return float(needed_LE.reshape(-1)[away].sum())


def round_seconds(plan: Plan, costs: RoundCosts, link: float) -> float:
    """Seconds of one round of the plan: draft, pass and end. `link` is in bytes per second."""
    layers = enumerate(plan.model.layers)
    sizes = [0 if i in plan.stays else streamed_bytes(layer) for i, layer in layers]
    verify = pass_seconds(sizes, costs.block, link, plan.ahead, costs.draft, costs.send)
    return costs.draft + verify + costs.rest


def measure(
    plan: Plan, exact: Layer, sampler: Sampler = Sampler(), length: int | None = None
) -> RoundCosts:
    """The measured times of the plan's parts. The device should hold nothing else.

    `exact` is a layer of the target, on host or device. `length` is the expected number of tokens;
    None: a quarter of the plan's `max_length`. Raises ValueError if the draft is another model.
    """
    if plan.draft.model is not None:
        raise ValueError("a draft that is another model is not predicted")
    cfg, spec = plan.cfg, plan.spec
    length = length or max(1, plan.max_length // 4)
    slots = cache_slots(plan.max_length, spec)
    live = next(size for size in live_sizes(slots) if size >= length + spec.places)
    at, key = to_device(jnp.int32(length)), jax.random.key(0)
    send = _send_seconds(exact) if plan.streamed else 0.0
    exact = to_device(exact)
    model = _model(plan, (exact,))
    caches = lambda n: to_device(
        caches_for(_model(plan, (exact,) * n), cfg, 1, slots, spec.places + 1)
    )

    tree = to_device(seedling(jnp.int32(0), spec))
    _, tokens, step = lay_out(tree, at, spec, live)
    state = [to_device(jnp.zeros((*tokens.shape, cfg.d_model), cfg.dtype)), caches(1)[0]]

    def block():
        state[0], state[1], done = jit_block(exact, state[0], state[1], step, cfg)
        return done

    times = {"block": _seconds(block, 8)}
    drafted = {}
    if plan.draft.bits is not None:
        for name, draft in _draft_kinds(plan, model).items():
            for n in (FEW, MORE):
                layers = tuple(jax.tree.map(jnp.copy, draft.layers[0]) for _ in range(n))
                given = Drafting(
                    params=dataclasses.replace(draft, layers=layers),
                    tree=tree,
                    caches=caches(n),
                    at=at,
                    key=key,
                    cfg=cfg,
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
        cut, *_ = lay_out(tree, at, spec, live)
        finished = finish_round(
            Verified(
                top=top,
                x_1ED=x,
                tree=cut,
                extended=jax.tree.map(jnp.copy, tree),
                caches=tuple(kept[0]),
                at=at,
                key=key,
                accepted=to_device(jnp.int32(0)),
                cfg=cfg,
                spec=spec,
                sampler=sampler,
                replay=True,
            )
        )
        kept[0] = finished.caches
        return jax.device_get((finished.emitted_P, finished.length, finished.last))

    times["rest"] = _seconds(end, 1)
    return RoundCosts(_draft_seconds(plan, drafted), times["block"], times["rest"], send)


def _send_seconds(exact: Layer, repeats: int = 5) -> float:
    """Median seconds that a `Stream` takes to start a copy, without the copy itself."""
    layer, times = StreamedLayer.of(offload(exact)), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        copies = layer.send()
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
    make = functools.partial(make_draft, model, plan.draft, iterations=0)
    return {
        name: to_device(make(resident=resident))
        for name, (count, resident) in kinds.items()
        if count
    }


def _tree_seconds(given: Drafting) -> float:
    """Median seconds to draft a whole tree."""
    caches, fresh = [given.caches], given.tree
    never = to_device(jnp.full(max(given.spec.steps, 1), -jnp.inf, jnp.float32))
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
    zeros = lambda *shape: to_device(jnp.zeros(shape, cfg.dtype))
    size = cfg.vocab, cfg.d_model
    table = np.zeros(size, cfg.dtype) if plan.table_on_host else zeros(*size)
    shapes = plan.model.head_DV
    head = to_device(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes))
    return Params(table, layers, zeros(cfg.d_model), head)
