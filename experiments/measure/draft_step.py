"""A draft's tree, timed and taken apart into kernels: what a step costs beside the bytes it reads.

    python -m experiments.measure.draft_step --model qwen2.5-7b --output steps.jsonl

The weights are zeros, in the shapes of low-bit substitutes of every layer; nothing streams. A step
is the slope between a whole tree and one that stops half way, so that what a tree costs once is not
in it. The floor is the draft's bytes over the bandwidth of a large read in the same run. Kernels
are those of the profiler, on a GPU. `--head-bits 4` gives the draft an output head of its own.
"""

import collections
import dataclasses
import functools
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from experiments.common import records
from experiments.measure.timing import Clock, bandwidth
from llm_jax import registry
from llm_jax.attention import caches_for
from llm_jax.checkpoint import CheckpointError
from llm_jax.config import Config
from llm_jax.packed import packed
from llm_jax.params import Params, abstract, joined
from llm_jax.quantize import quantize
from llm_jax.sample import Sampler
from subspec_jax.draft import grow
from subspec_jax.offload import to_device
from subspec_jax.tree import TreeSpec, cache_slots, live_sizes, seedling


@dataclasses.dataclass(frozen=True)
class Step:
    """What to time."""

    model: str = "qwen2.5-7b"
    depth: int = 48
    width: int = 6
    bits: int = 4
    group: int = 64
    head_bits: int | None = None
    """None: the target's 16-bit head."""
    length: int = 512
    """Committed tokens."""
    max_length: int = 2048
    repeats: int = 5
    output: Path | None = None


def draft_shapes(cfg: Config, bits: int, group: int, head_bits: int | None) -> Params:
    """Substitutes of all layers and the head, as shapes."""
    low = lambda w, bits: packed(quantize(w, bits, group, 0))

    def make(model: Params) -> Params:
        join = lambda *ws: low(jnp.concatenate(ws, axis=-1), bits)
        layers = tuple(joined(layer, join) for layer in model.layers)
        head = model.embed_VD.T if cfg.tied else model.head_DV
        head = head if head_bits is None else low(head, head_bits)
        return dataclasses.replace(model, layers=layers, head_DV=head)

    return jax.eval_shape(make, abstract(cfg))


def time_tree(args: Step, cfg: Config) -> dict:
    """Seconds and bytes: {"step", "tree", "bytes", "kernels"}."""
    spec = TreeSpec("beam", args.depth, args.width)
    slots = cache_slots(args.max_length, spec)
    live = next(n for n in live_sizes(slots) if n >= args.length + spec.places)
    zeros = functools.partial(jax.tree.map, lambda a: jnp.zeros(a.shape, a.dtype))
    draft = to_device(zeros(draft_shapes(cfg, args.bits, args.group, args.head_bits)))
    state = [to_device(caches_for(draft, cfg, 1, slots, spec.places + 1))]
    at, key, fresh = (to_device(jnp.int32(args.length)), jax.random.key(0), seedling(1, spec))
    step_L = jnp.arange(spec.steps)
    half = max(1, spec.steps // 2)
    least = {
        n: to_device(jnp.where(step_L + 1 >= n, jnp.inf, -jnp.inf).astype(jnp.float32))
        for n in (half, spec.steps)
    }

    def run(steps):
        tree, state[0] = grow(
            draft, jax.tree.map(jnp.copy, to_device(fresh)), state[0], at, key, least[steps], cfg,
            spec, Sampler(), live,
        )  # fmt: skip
        return tree.size

    def seconds(steps):
        times = []
        for _ in range(args.repeats + 1):
            began = time.perf_counter()
            jax.block_until_ready(run(steps))
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    whole, part = seconds(spec.steps), seconds(half)
    weights = draft.layers, draft.head_DV
    return {
        "tree": whole,
        "step": (whole - part) / (spec.steps - half) if half < spec.steps else whole,
        "steps": spec.steps,
        "bytes": sum(a.nbytes for a in jax.tree.leaves(weights)),
        "kernels": kernels(lambda: run(spec.steps), spec.steps),
    }


def kernels(run, steps: int) -> list[dict]:
    """[{"name", "count", "us"}] a step, the longest first; nothing without a GPU."""
    if jax.default_backend() != "gpu":
        return []
    found = collections.defaultdict(lambda: [0, 0.0])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        for path in Path(folder).glob("**/*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                lines = plane.lines if "GPU" in plane.name else ()
                for event in (e for l in lines if l.name.startswith("Stream") for e in l.events):
                    of_name = found[event.name.split("(")[0]]
                    of_name[0] += 1
                    of_name[1] += event.duration_ns / 1e3
    rows = [{"name": n, "count": c / steps, "us": us / steps} for n, (c, us) in found.items()]
    return sorted(rows, key=lambda r: -r["us"])


def main(args: Step, console: Console) -> dict:
    try:
        cfg = dataclasses.replace(registry.find_model(args.model).config, dtype="bfloat16")
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from error
    read = bandwidth(Clock(60, 5, 64, 2))["read"] * 1e12
    found = time_tree(args, cfg)
    floor = found["bytes"] / read
    record = {
        "kind": "draft_step", **found, "floor": floor, "read_bytes_per_s": read,
        "step_over_floor": found["step"] / floor,
        "tree_over_steps": found["tree"] / (found["steps"] * found["step"]),
        "device": jax.devices()[0].device_kind,
        "arguments": {k: v for k, v in dataclasses.asdict(args).items() if k != "output"},
        "environment": records.environment(),
    }  # fmt: skip
    console.print(
        f"step {1e3 * found['step']:.3f} ms, {record['step_over_floor']:.2f} of its floor; tree "
        f"{1e3 * found['tree']:.1f} ms, {record['tree_over_steps']:.3f} of {found['steps']} steps",
        highlight=False,
    )
    if found["kernels"]:
        table = Table("kernel", "a step", "us each", "us a step")
        for r in found["kernels"][:25]:
            table.add_row(
                r["name"][:60], f"{r['count']:.1f}", f"{r['us'] / r['count']:.2f}", f"{r['us']:.1f}"
            )
        console.print(table)
    if args.output:
        records.append(args.output, record)
    return record


if __name__ == "__main__":
    main(tyro.cli(Step, description=__doc__), Console(width=110))
