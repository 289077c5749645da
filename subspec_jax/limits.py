"""The plan of a method within a limit, and the limit: given, the card's memory, or emulated.

Everything here runs before JAX starts, so that the limit can be enforced.
"""

import contextlib
from collections.abc import Iterable

import jax

from llm_jax.progress import Reporter
from pallas_kernels.device import switched_off
from subspec_jax import SubspecError, memory
from subspec_jax.methods import Method
from subspec_jax.options import Options
from subspec_jax.plan import Plan, PlanError, make_plan
from subspec_jax.sources import Source
from subspec_jax.tiers import host_room, why_not_on_disk, with_disk

TRIALS = 2**29
"""Added to the pool of an emulated limit: the compiler times candidate kernels on buffers of its
own, which are larger than a model as small as SmolLM2."""


def plan_for(
    source: Source,
    method: Method,
    options: Options,
    limit: int,
    resident: int | None = None,
    table_on_host: bool | None = None,
) -> Plan:
    """The plan of a method; `resident` and `table_on_host` override the options'."""
    kernels = memory.card_has_kernels() and not switched_off() and source.cfg.dtype == "bfloat16"
    on_host = options.table_on_host if table_on_host is None else table_on_host
    plan = make_plan(
        source.cfg,
        limit,
        method.spec,
        method.draft,
        max_length=options.max_length,
        chunk=options.chunk,
        ahead=options.ahead,
        resident=options.resident if resident is None else resident,
        table_on_host=on_host,
        model=source.shapes(method.draft),
        kernels=kernels,
        by_expert=options.experts == "routed",
        texts=options.texts,
        ladder=options.ladder,
        shape=options.shape,
    )
    room = host_room(options.host_limit, source.checkpoint is None)
    if room is None or (options.host_limit is None and why_not_on_disk(plan)):
        return plan
    return with_disk(plan, room, memory.card_bytes() is not None)


def chosen_limit(
    wanted: str | int,
    source: Source,
    methods: Iterable[Method],
    options: Options,
    reporter: Reporter = Reporter(),
) -> tuple[int, int | None]:
    """(bytes to plan with, bytes of the pool that is enforced on a GPU, or None).

    `wanted` is what `subspec_jax.open` calls `memory`. If JAX has started on a GPU already, as for
    the second engine of a process, no limit can be enforced; the limit is then at most what is
    free in the pool of the process.
    """
    methods, card = list(methods), memory.card_bytes()
    if memory.card_is_idle():
        warning = "There is an NVIDIA card here, but this JAX is for CPUs: "
        reporter.say(warning + "pip install 'thimble-jax[cuda]'", warning=True)
    started = card is not None and memory.backends_started()
    free = _free_bytes() if started else None
    whole = 2**60 if card is None else card - memory.CONTEXT_BYTES
    if free is not None:
        whole = min(whole, free)
    slack = 0
    if wanted == "full":
        limit = whole
    elif wanted != "auto":
        limit = wanted if isinstance(wanted, int) else memory.parse_bytes(wanted)
    else:
        limit = whole
        with contextlib.suppress(PlanError):
            fits = all(plan_for(source, m, options, whole).streamed == 0 for m in methods)
            if fits and options.resident is None:
                # An untied table may go to the host, which a plan would use for more layers.
                rest = (2**60, source.cfg.layers // 4, None if source.cfg.tied else True)
                quarter = (plan_for(source, m, options, *rest) for m in methods)
                limit = round(max(part.total for part in quarter) / 0.975)
                reporter.say(
                    f"The whole model fits here. A limit of {memory.show_bytes(limit)} is "
                    "emulated, so that most layers stream; --memory-limit full uses what there is."
                )
                slack = TRIALS
    if started:
        return (limit if free is None else min(limit, free)), free
    pool = memory.enforce_limit(limit + slack, options.host_limit)
    return (limit if pool is None else min(limit, pool)), pool


def chosen_devices(source: Source, wanted: int | None, reporter: Reporter = Reporter()) -> int:
    """How many devices share the model: those that are wanted, or all GPUs. Raises CardsError for a
    model that cannot be shared by the devices that are wanted."""
    if wanted is not None:
        if wanted < 1:
            raise SubspecError(f"{wanted} devices were asked for; give at least 1")
        return wanted
    found = memory.card_count()
    if found > 1 and (reason := source.why_not_shared()) is not None:
        reporter.say(f"One of {found} devices is used: {reason}.", warning=True)
        return 1
    return max(found, 1)


def _free_bytes() -> int | None:
    stats = jax.devices()[0].memory_stats()
    return stats and stats["bytes_limit"] - stats["bytes_in_use"]
