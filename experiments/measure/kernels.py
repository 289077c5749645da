"""How long does attention of one new token take on a GPU, over a full cache and over latents?

    python -m experiments.measure.kernels --out experiments/results/h200_lowrank_attention.jsonl

Prints a table of microseconds a layer and writes one JSON line for each measurement. A time is that
of the kernels on the device (CUPTI), the median of several runs. Every call reads another copy of
the inputs, so the second-level cache helps nobody. "latents-16" is Triton's form,
"latents-16-mosaic" that of Mosaic GPU (compute capability 9.0). Rivals: the best 16-bit attention
that JAX has (cuDNN's and XLA's), a full-size 4-bit cache that XLA dequantizes, and the floor: the
bytes over the bandwidth of a large read in the same run.
docs/performance.md has the outcome on an H200.
"""

import dataclasses
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from experiments.common.cli import UserError, run
from llm_jax.files import atomic_file
from pallas_kernels.lowrank_attention import Latents, lowrank_attention
from pallas_kernels.shapes import LOWRANK, LowrankShape

FULL_CACHES = ("cudnn", "xla", "int4-full")
LATENTS = tuple(f"latents-{bits}{way}" for way in ("", "-mosaic", "-xla") for bits in (16, 8, 4))
"""Latents of so many bits, through Triton, Mosaic GPU or XLA."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Time every way to attend at every combination of a shape and a BATCHxTOKENS point."""

    shapes: tuple[str, ...] = ("llama-2-7b", "qwen2.5-7b")
    points: tuple[str, ...] = (
        "1x4096", "1x8192", "1x16384", "1x32768", "1x65536", "1x131072", "1x262144",
        "8x4096", "8x16384", "32x4096",
    )  # fmt: skip
    ways: tuple[str, ...] = (*FULL_CACHES, *LATENTS[:6])
    repeats: int = 5
    rotate_mb: int = 130
    """Inputs are copied until they take this many MB, but at most `copies` times."""
    copies: int = 8
    out: pathlib.Path | None = None
    plot: pathlib.Path | None = None


def _point(text: str) -> tuple[int, int]:
    """(1, 4096) for "1x4096"."""
    try:
        batch, slots = map(int, text.split("x"))
    except ValueError as error:
        raise UserError(f"{text!r} is no BATCHxTOKENS point, such as 1x4096") from error
    return batch, slots


def full_attention(way: str) -> Callable:
    """A function of q [B, 1, N, H] and the arrays of `full_cache`: attention over that cache."""
    if way != "int4-full":
        return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation=way)

    def dequantized(q, k, k_scale, v, v_scale):
        wide = lambda codes, scale: (
            jnp.concatenate([codes & 15, codes >> 4], -1).astype(jnp.bfloat16) * scale[..., :1]
            + scale[..., 1:]
        )
        return jax.nn.dot_product_attention(q, wide(k, k_scale), wide(v, v_scale))

    return dequantized


def full_cache(
    shape: LowrankShape, way: str, batch: int, slots: int, key: jax.Array
) -> tuple[jax.Array, ...]:
    """Random keys and values [B, S, K, H], or for int4-full their codes and scales."""
    size = batch, slots, shape.kv_heads
    if way != "int4-full":
        draw = lambda key: jax.random.normal(key, (*size, shape.head_dim), jnp.bfloat16)
        return tuple(draw(k) for k in jax.random.split(key))
    keys = jax.random.split(key, 4)
    codes = (jax.random.bits(k, (*size, shape.head_dim // 2), jnp.uint8) for k in keys[:2])
    scales = (jax.random.uniform(k, (*size, 2), jnp.bfloat16) for k in keys[2:])
    return tuple(a for pair in zip(codes, scales, strict=True) for a in pair)


def latent_cache(
    shape: LowrankShape, bits: int, batch: int, slots: int, key: jax.Array
) -> tuple[Latents, ...]:
    """Random latents of the keys and of the values."""

    def draw(like: Latents, key):
        if bits == 16:
            codes = jax.random.normal(key, like.codes_BSP.shape, jnp.bfloat16)
            return dataclasses.replace(like, codes_BSP=codes)
        codes = jax.random.bits(key, like.codes_BSP.shape, jnp.uint8)
        step = jax.random.uniform(key, like.step_BSg.shape, jnp.bfloat16, 0.2, 0.3)
        return Latents(codes, step, -7.5 * step, bits, like.blocks)

    _, k, v, *_ = shape.arguments(batch, slots, bits)
    return tuple(draw(z, key) for z, key in zip((k, v), jax.random.split(key), strict=True))


def device_microseconds(
    f: Callable, arguments: Sequence[Any], repeats: int
) -> tuple[float, dict[str, float]]:
    """(the time of all kernels that `f` runs, that of each), medians in microseconds (CUPTI)."""
    from jax.experimental.mosaic.gpu import profiler

    _, runs = profiler.measure(jax.jit(f), aggregate=False, iterations=repeats)(*arguments)
    by_name: dict[str, float] = {}
    for calls in zip(*runs, strict=True):
        middle = statistics.median(time for _, time in calls) * 1e3
        by_name[calls[0][0]] = by_name.get(calls[0][0], 0.0) + middle
    return statistics.median(sum(t for _, t in run) for run in runs) * 1e3, by_name


def _device_bandwidth(repeats: int) -> dict[str, float]:
    """TB/s of a large copy, whose bytes are counted read and written, and of a large read.

    Timed as the kernels are, without launches. The loop of `timing.bandwidth`, which pays for
    launches as the products that it is compared with do, gives 5% less on an H100.
    """
    x = jnp.arange(2**30, dtype=jnp.float32)
    copied, _ = device_microseconds(lambda x: x + 1, (x,), repeats)
    read, _ = device_microseconds(jnp.sum, (x,), repeats)
    return {"copy": 2 * x.nbytes / copied / 1e6, "read": x.nbytes / read / 1e6}


def time_attention(
    shape: LowrankShape, way: str, batch: int, slots: int, args: Kernels
) -> dict[str, Any]:
    """One record: the time of one call, the bytes of its cache, and the four longest kernels."""
    key = jax.random.key(0)
    q = jax.random.normal(key, (batch, 1, shape.heads, shape.head_dim), jnp.bfloat16)
    if way in FULL_CACHES:
        make = lambda key: full_cache(shape, way, batch, slots, key)
        attend = lambda q, ups, lengths, cache: full_attention(way)(q, *cache)
    else:
        _, bits, *through = way.split("-")
        make = lambda key: latent_cache(shape, int(bits), batch, slots, key)
        attend = lambda q, ups, lengths, cache: lowrank_attention(
            q, *cache, *ups, shape.frequencies, lengths,
            implementation=through[0] if through else "triton",
        )  # fmt: skip
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(make, key)))
    count = min(args.copies, max(1, math.ceil(args.rotate_mb * 1e6 / size)))
    caches = [jax.jit(make)(k) for k in jax.random.split(key, count)]
    _, _, _, *ups, lengths = shape.arguments(batch, slots, 16)
    scaled = lambda up: jax.random.normal(key, up.shape, up.dtype) * up.shape[1] ** -0.5
    ups = [scaled(up) for up in ups]

    def every(q, ups, lengths, caches):
        return [attend(q, ups, lengths, cache) for cache in caches]

    inputs = q, ups, jnp.full(lengths.shape, slots, jnp.int32), caches
    time, kernels = device_microseconds(every, inputs, args.repeats)
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:4]
    return {
        "way": way,
        "batch": batch,
        "slots": slots,
        "microseconds": round(time / count, 2),
        "cache_bytes": size,
        "copies": count,
        "kernels": {name: round(t / count, 2) for name, t in longest},
    }


def time_all(args: Kernels, console: Console) -> list[dict[str, Any]]:
    """All records. The first has the bandwidth; one that failed has the reason, in "error"."""
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    records = [{**device, "way": "bandwidth", "TB/s": _device_bandwidth(args.repeats)}]
    console.print(records[0])
    for name in args.shapes:
        for point in args.points:
            batch, slots = _point(point)
            for way in args.ways:
                record = {**device, "shape": name, "batch": batch, "slots": slots, "way": way}
                try:
                    record |= time_attention(LOWRANK[name], way, batch, slots, args)
                except Exception as error:  # no memory, or a way that this device does not have
                    record["error"] = f"{type(error).__name__}: {str(error)[:200]}"
                records.append(record)
                console.print(f"{name} {point} {way}", record.get("microseconds", "failed"))
                if args.out:
                    with atomic_file(args.out) as scratch:
                        scratch.write_text("".join(json.dumps(r) + "\n" for r in records))
    return records


def attention_table(records: list[dict[str, Any]], args: Kernels) -> Table:
    """Microseconds by shape and point, and how many times faster than the best 16-bit cache."""
    speed = records[0]["TB/s"]["read"]
    view = Table("shape", "batch x tokens", *args.ways, "floor 16", "floor 8", "floor 4")
    for name in args.shapes:
        for point in args.points:
            batch, slots = _point(point)
            own = {
                r["way"]: r["microseconds"]
                for r in records[1:]
                if (r["shape"], r["batch"], r["slots"]) == (name, batch, slots) and "error" not in r
            }
            best = min((own[w] for w in ("cudnn", "xla") if w in own), default=math.nan)
            shown = (f"{own[w]:.1f} ({best / own[w]:.2f}x)" if w in own else "-" for w in args.ways)
            bound = (LOWRANK[name].cache_bytes(batch, slots, b) / speed / 1e6 for b in (16, 8, 4))
            view.add_row(name, point, *shown, *(f"{b:.1f}" for b in bound))
    return view


def draw(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Writes a plot of time against tokens at batch 1, with a panel for each shape."""
    from matplotlib.figure import Figure

    good = [r for r in records[1:] if "error" not in r and r["batch"] == 1]
    names = list(dict.fromkeys(r["shape"] for r in good))
    figure = Figure(figsize=(5 * len(names), 4))
    panels = figure.subplots(1, len(names), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for way in dict.fromkeys(r["way"] for r in good):
            own = [r for r in good if (r["way"], r["shape"]) == (way, name)]
            own = sorted((r["slots"], r["microseconds"]) for r in own)
            panel.plot(*zip(*own, strict=True), marker="o", label=way)
        panel.set(title=name, xlabel="cached tokens", ylabel="microseconds a layer")
        panel.set_xscale("log", base=2), panel.set_yscale("log"), panel.legend()
    figure.tight_layout()
    with atomic_file(path) as scratch:
        figure.savefig(scratch)


def main(args: Kernels, console: Console) -> None:
    unknown = [s for s in args.shapes if s not in LOWRANK]
    unknown += [w for w in args.ways if w not in FULL_CACHES + LATENTS]
    if unknown:
        ways = ", ".join(FULL_CACHES + LATENTS)
        raise UserError(
            f"unknown: {', '.join(unknown)}; shapes are {', '.join(LOWRANK)}, and ways {ways}"
        )
    for point in args.points:
        _point(point)
    if jax.default_backend() != "gpu":
        raise UserError("this times GPU kernels, and there is no GPU")
    records = time_all(args, console)
    console.print(attention_table(records, args))
    if args.plot:
        draw(records, args.plot)


def cli(words: Sequence[str] | None = None) -> int:
    return run(Kernels, main, __doc__, words, width=180, again=None)


if __name__ == "__main__":
    sys.exit(cli())
