"""What do the checks of files cost? Loading with and without them, and the identity of a file.

    python -m experiments.convert --model smollm2-135m --to smollm2-split
    python -m experiments.measure.checks --converted smollm2-split --output out.jsonl
    python -m experiments.measure.checks --file large.bin --output out.jsonl

A load is timed with the check, then without it, then the other way round, and so on. Every load
opens the folder anew, so that its pages are mapped anew. The least of all times counts, because
other work on the machine only adds to it; medians are in the record. So are the least seconds of
processor time: what a check costs where no processor is free to hash beside the loading. The files
are in the page cache, or, with --cold, dropped from it before each load.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments.common import records
from experiments.common.cli import UserError, run
from llm_jax import digest
from subspec_jax.draft_model import Draft
from subspec_jax.load import load_target
from subspec_jax.plan import make_plan
from subspec_jax.residual.files import Converted
from subspec_jax.tree import TreeSpec


@dataclasses.dataclass(frozen=True)
class Checks:
    """Which files, and how often."""

    converted: Path | None = None
    """A folder that `experiments.convert` wrote: it is loaded with and without the check."""
    file: Path | None = None
    """A file whose content is hashed, as a checkpoint's is for its identity."""
    repeats: int = 20
    """Loads of each kind, or hashes."""
    cold: bool = False
    """The files of the folder are dropped from the page cache before each load."""
    resident: int = 7
    """Layers on the device; the others are in pinned host memory."""
    output: Path | None = None


def load_seconds(folder: Path, args: Checks) -> dict[bool, np.ndarray]:
    """Whether files are checked -> [loads, 2], the seconds of each load and of the processor."""
    model = Converted(folder)
    draft = Draft(model.manifest["bits"], model.manifest["group"])
    options = dict(
        max_length=64, chunk=16, resident=args.resident, model=model.model_with_split_head
    )
    plan = make_plan(model.cfg, 2**40, TreeSpec("beam", 2, 2), draft, **options)
    seconds = {True: [], False: []}
    for turn in range(-1, args.repeats):  # the first one warms up
        for check in (turn % 2 == 0, turn % 2 == 1):
            del model
            if args.cold:
                drop(folder)
            model = Converted(folder)
            began = np.array([time.perf_counter(), time.process_time()])
            jax.block_until_ready(load_target(model, plan, check=check).params)
            if turn >= 0:
                seconds[check].append([time.perf_counter(), time.process_time()] - began)
    return {check: np.stack(times) for check, times in seconds.items()}


def drop(folder: Path) -> None:
    """Lets the system forget what it has read of a folder's files, which nobody may have mapped."""
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load_record(folder: Path, args: Checks) -> dict[str, Any]:
    """How much longer a load takes with the check."""
    seconds = load_seconds(folder, args)
    with_check, without = (seconds[check].min(0).tolist() for check in (True, False))
    medians = [float(np.median(seconds[check][:, 0])) for check in (True, False)]
    return dict(
        case="load from the disk" if args.cold else "load from the page cache",
        model=folder.name,
        bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        resident=args.resident,
        checked_s=with_check[0],
        unchecked_s=without[0],
        ratio=with_check[0] / without[0],
        median_checked_s=medians[0],
        median_unchecked_s=medians[1],
        processor_checked_s=with_check[1],
        processor_unchecked_s=without[1],
    )


def identity_record(file: Path, repeats: int) -> dict[str, Any]:
    """How fast the content of a file is hashed; what is kept of earlier calls is not used."""
    seconds = [_seconds(lambda: digest.hash_file(file)) for _ in range(repeats)]
    size = file.stat().st_size
    return dict(
        case="identity", bytes=size, seconds=min(seconds), GB_per_s=size / min(seconds) / 1e9
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(args: Checks, console: Console) -> None:
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}; expected 1 or more")
    found = []
    if args.converted:
        found.append(load_record(args.converted, args))
    if args.file:
        found.append(identity_record(args.file, args.repeats))
    if not found:
        raise UserError("nothing to time; give --converted or --file")
    for record in found:
        console.print(record)
        if args.output:
            stamp = dict(repeats=args.repeats, device=jax.devices()[0].device_kind)
            records.append(args.output, record | stamp | dict(environment=records.environment()))


def cli(words: Sequence[str] | None = None) -> int:
    return run(Checks, main, __doc__, words, again=None)


if __name__ == "__main__":
    sys.exit(cli())
