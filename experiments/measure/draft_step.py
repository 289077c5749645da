"""Times the draft's tree and lists its kernels: what does a step cost, beside the bytes it reads?

    python -m experiments.measure.draft_step --model qwen2.5-7b --output steps.jsonl

The weights are zeros in the shapes of low-bit substitutes of every layer, and nothing streams. The
time of a step is the slope between a whole tree and one that stops half way, so it does not hold
what a tree costs once. The floor is the draft's bytes over the bandwidth of a large read in the
same run. On a GPU the profiler lists the kernels. `--head-bits 4` gives the draft its own output
head.
"""

import collections
import dataclasses
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from experiments.common import records
from experiments.common.cli import run
from experiments.measure.timing import Clock, bandwidth, wall_seconds
from llm_jax import registry
from llm_jax.attention import caches_for
from llm_jax.config import Config
from llm_jax.params import Params, abstract
from llm_jax.sample import Sampler
from llm_jax.stream import to_device
from subspec_jax.draft import Drafting, grow
from subspec_jax.draft_model import Draft, make_draft
from subspec_jax.tree import TreeSpec, cache_slots, live_sizes, seedling


@dataclasses.dataclass(frozen=True)
class DraftStep:
    """Time one step of a draft's tree."""

    model: str = "qwen2.5-7b"
    depth: int = 48
    width: int = 6
    bits: int = 4
    group: int = 64
    head_bits: int | None = None
    """None: the target's 16-bit head."""
    length: int = 512
    """Tokens that are committed before the tree."""
    max_length: int = 2048
    repeats: int = 5
    output: Path | None = None


def draft_shapes(cfg: Config, bits: int, group: int, head_bits: int | None) -> Params:
    """The shapes of the substitutes of all layers, and of the head in `head_bits` if given."""
    draft = make_draft(abstract(cfg), Draft(bits, group, head_bits), table_on_host=False)
    if draft.head_DV is not None:
        return draft
    head = jax.ShapeDtypeStruct((cfg.d_model, cfg.vocab), draft.embed_VD.dtype)
    return dataclasses.replace(draft, head_DV=head)  # a tied head is read as often as another


def time_tree(args: DraftStep, cfg: Config) -> dict[str, Any]:
    """{"tree": and "step": seconds, "steps": of a tree, "bytes": of the draft, "kernels"}."""
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

    def size(steps: int) -> jax.Array:
        tree, state[0] = grow(
            Drafting(
                params=draft,
                tree=jax.tree.map(jnp.copy, to_device(fresh)),
                caches=state[0],
                at=at,
                key=key,
                cfg=cfg,
                spec=spec,
                sampler=Sampler(),
                live=live,
                least_L=least[steps],
            )
        )
        return tree.size

    seconds = lambda steps: statistics.median(wall_seconds(size, steps, repeats=args.repeats))
    whole, part = seconds(spec.steps), seconds(half)
    weights = draft.layers, draft.head_DV
    return {
        "tree": whole,
        "step": (whole - part) / (spec.steps - half) if half < spec.steps else whole,
        "steps": spec.steps,
        "bytes": sum(a.nbytes for a in jax.tree.leaves(weights)),
        "kernels": kernels(lambda: size(spec.steps), spec.steps),
    }


def kernels(grow_tree: Callable, steps: int) -> list[dict[str, Any]]:
    """[{"name", "count", "us"}] of one step, the longest first; empty without a GPU."""
    if jax.default_backend() != "gpu":
        return []
    found = collections.defaultdict(lambda: [0, 0.0])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(grow_tree())
        for path in Path(folder).glob("**/*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                lines = plane.lines if "GPU" in plane.name else ()
                for event in (e for l in lines if l.name.startswith("Stream") for e in l.events):
                    of_name = found[event.name.split("(")[0]]
                    of_name[0] += 1
                    of_name[1] += event.duration_ns / 1e3
    rows = [{"name": n, "count": c / steps, "us": us / steps} for n, (c, us) in found.items()]
    return sorted(rows, key=lambda r: -r["us"])


def main(args: DraftStep, console: Console) -> dict[str, Any]:
    cfg = dataclasses.replace(registry.find_model(args.model).config, dtype="bfloat16")
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


def cli(words: Sequence[str] | None = None) -> int:
    return run(DraftStep, main, __doc__, words, again=None)


if __name__ == "__main__":
    sys.exit(cli())
