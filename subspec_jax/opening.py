"""`subspec_jax.open`: from a name and a memory limit to an engine with its plans.

with subspec_jax.open("smollm2-135m", memory="450MB") as model:
    print(model.plan)
    for text in model.chat("Name three uses of a thimble."):
        print(text, end="")
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_jax.checkpoint import Checkpoint
from llm_jax.generation import checked_seed
from llm_jax.progress import Reporter, default_reporter
from subspec_jax.accept import Gate
from subspec_jax.bitwise import shaped
from subspec_jax.decoder import LengthError
from subspec_jax.draft_model import Draft
from subspec_jax.engine import Engine
from subspec_jax.limits import chosen_devices, chosen_limit, plan_for
from subspec_jax.memory import MOST_BYTES, parse_bytes
from subspec_jax.methods import Method, make_method
from subspec_jax.options import Options, default_draft, default_tree, reads_disk
from subspec_jax.plan import PlanError, TooLittleError
from subspec_jax.sources import Source, add_converted, find_draft_model, find_source
from subspec_jax.tree import TreeSpec


def open(
    model: str | Path | Checkpoint,
    memory: str | int = "auto",
    *,
    host: str | int = "auto",
    method: str | Method = "subspec",
    also: Sequence[str | Method] = (),
    tree: TreeSpec | None = None,
    draft: Draft | None = None,
    gate: Gate = Gate(),
    stop_gain: float | str = 0.0,
    longest: int = 3,
    draft_model: str | Path | None = None,
    adapter: str | Path | None = None,
    options: Options = Options(),
    reporter: Reporter | None = None,
    **changes: Any,
) -> "Engine":
    """An engine for a registered name, a folder, a GGUF file or an open checkpoint, planned.

    Weights are loaded at the first use. `memory` limits device memory: a number of bytes, or text
    such as "8GB". It is enforced on a GPU, before JAX starts; on a CPU it is only planned for.
    "full": all of the card. "auto": the same, but if the whole model fits, a limit that holds a
    quarter of its layers. `host` limits host memory in the same way: layers beyond it are read from
    disk in every pass. "auto": what the machine has; without a GPU, device and host are one memory,
    and all layers that `memory` does not hold are on disk. "full": all are in memory.

    `method` is a name of `subspec_jax.methods.METHOD_NAMES`; `also` names further methods that this
    engine can change to (`Engine.use`); they share the limit. `tree`, `draft` (None: what suits the
    machine, see `options.default_tree` and `default_draft`), `gate`, `stop_gain`, `longest` (the
    longest n-gram that is looked up) and `draft_model` shape them. `adapter` is the folder of a
    LoRA adapter that is merged into the model; such a folder as `model` brings the model that it
    was trained on.
    Fields of `Options` may be given by name. `reporter` shows what takes long; None: bars on a
    terminal. Raises a SubspecError, such as a limit that no plan meets, or an LLMError, such as a
    checkpoint that cannot be used.
    """
    options = dataclasses.replace(options, **changes)
    if host != "auto":
        options = dataclasses.replace(options, host_limit=host_bytes(host))
    checked_seed(options.seed)
    reporter = default_reporter() if reporter is None else reporter
    residual = options.stream == "residual"
    random = options.weights == "random"
    where = options.dtype, residual, random, options.seed, reporter, options.zipf, options.experts
    source = find_source(model, *where, adapter)
    source.share(chosen_devices(source, options.devices, reporter))
    source.disk_folder = options.disk_folder
    longest_text = options.max_length or min(LONGEST, source.cfg.max_length)
    if longest_text > source.cfg.max_length:
        raise LengthError(
            f"--max-length {longest_text} is more than the {source.cfg.max_length} positions "
            "this model was made for (its sliding window, where it has one)"
        )
    small = None if draft_model is None else find_draft_model(draft_model, source, reporter)
    shorten = options.max_length is None
    options = dataclasses.replace(options, max_length=longest_text)

    def planned(draft: Draft) -> Engine:
        if residual and not draft.group:
            raise PlanError("residuals need substitutes in groups; leave --draft-group out")
        made = functools.partial(
            make_method,
            spec=tree or default_tree(reads_disk(memory, options)),
            draft=draft,
            gate=gate,
            stop_gain=stop_gain,
            draft_model=small and small.cfg,
            longest=longest,
        )
        named = [m if isinstance(m, Method) else made(m) for m in (method, *also)]
        methods = {m.name: m for m in named}
        if residual and options.exact == "bitwise":
            source.substitutes = draft
        shared = shaped(options, methods.values(), source)
        if residual:
            add_converted(source, draft, options.quantizer, options.converted, reporter)
        limit, pool = chosen_limit(memory, source, methods.values(), shared, reporter)
        fitting = _fitting(source, methods, shared, limit) if shorten else shared
        return Engine(source, methods, fitting, limit, pool, reporter, small)

    if draft is not None:
        return planned(draft)
    try:
        return planned(default_draft(source.cfg, residual))
    except PlanError as error:
        try:
            return planned(Draft())  # 4 bits take less room than a CPU's 8
        except PlanError as other:
            raise (other if isinstance(other, TooLittleError) else error) from None


def host_bytes(wanted: str | int) -> int:
    """Bytes of host memory that `open` calls `host`, but for "auto"."""
    if wanted == "full":
        return MOST_BYTES
    return wanted if isinstance(wanted, int) else parse_bytes(wanted)


LONGEST, SHORTEST = 2048, 512
"""Tokens of a conversation where none are asked for."""


def _fitting(source: Source, methods: dict, options: Options, limit: int) -> Options:
    """The options with the longest conversation for which every method has a plan."""
    shorter = options
    while shorter.max_length >= SHORTEST:
        try:
            for m in methods.values():
                plan_for(source, m, shorter, limit)
        except PlanError:
            shorter = dataclasses.replace(shorter, max_length=shorter.max_length // 2)
        else:
            return shorter
    return options
