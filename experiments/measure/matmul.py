"""How long do a few rows times a low-bit matrix take on a GPU? Finds the best tilings, too.

    python -m experiments.measure.matmul --seconds 220 --out matmul.jsonl

For every named matrix and number of rows, several tilings of the product are compiled at once,
compared with the product in float32, and timed in turns; then variants of the best ones. Rivals in
the same run: XLA's 16-bit product, XLA's dequantization and product, and the floor: the bytes over
the bandwidth of a large read. A time is that of one call, launch included, in a jitted loop over
more copies of the matrix than the second-level cache holds; the median of several loops. Every
measurement is one JSON line and is written at once, so a second run continues where the first one
stopped. `--table` merges the best tilings into the table that the kernel reads, and keeps entries
that were tried in a draft's step. Without a GPU it merges those in `--out`.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from experiments.common import records
from experiments.common.cli import UserError, run
from experiments.measure.timing import Clock, bandwidth, random_packed
from llm_jax.files import atomic_file
from pallas_kernels.quantized_matmul import Packed, quantized_matmul
from pallas_kernels.quantized_matmul.api import LARGEST
from pallas_kernels.quantized_matmul.packing import BLOCK_WORDS
from pallas_kernels.quantized_matmul.reference import dequantized
from pallas_kernels.quantized_matmul.shapes import MATMUL
from pallas_kernels.quantized_matmul.tiling import Tiling, bucket, guess, why_not_tiling

SEVEN = ("gate", "down", "qkv", "gate-up", "o", "kv", "head")
RELATIVE_TOLERANCE = 0.01
"""The largest error that a tiling may have, over the largest result; bfloat16 rounds by 0.004."""


@dataclasses.dataclass(frozen=True)
class MatmulTuning:
    """Time matrices and rows in the order given, until the seconds are used up."""

    shapes: tuple[str, ...] = (
        *(f"qwen2.5-7b/{s}" for s in SEVEN),
        *(f"qwen2.5-32b/{s}" for s in SEVEN),
    )
    rows: tuple[int, ...] = (6, 1, 16)
    bits: int = 4
    group: int = 64
    large: tuple[int, ...] = (289,)
    """Numbers of rows that are timed only for `large_shapes`."""
    large_shapes: tuple[str, ...] = ("qwen2.5-7b/gate",)
    seconds: float = 220
    repeats: int = 5
    calls: int = 120
    """A timed loop makes at least this many calls."""
    rotate_mb: int = 120
    threads: int = 12
    tune: bool = True
    """False: time only the tiling that the kernel would choose."""
    out: pathlib.Path | None = None
    table: pathlib.Path | None = None
    """Where to merge the best; the kernel reads pallas_kernels/quantized_matmul/tuned.json."""


def tiling_candidates(rows: int, blocks: int, chunks: int) -> Iterator[Tiling]:
    """Tilings worth a first try; the first one is what the kernel guesses."""
    first = guess(rows, blocks, chunks)
    yield first
    if rows > 16:
        for height, warps, stages in itertools.product((16, 32, 64), (2, 4, 8), (2, 3)):
            for splits in (1, 2, 4, 8):
                yield Tiling(height, min(splits, chunks), warps, stages)
        return
    for times in (0.4, 0.6, 0.8, 1.3, 1.6, 2):
        yield dataclasses.replace(first, splits=min(chunks, max(1, round(times * first.splits))))


def tiling_variants(cfg: Tiling, chunks: int) -> Iterator[Tiling]:
    """Tilings that differ from `cfg` in one number."""
    change = lambda **new: dataclasses.replace(cfg, **new)
    yield from (change(stages=stages) for stages in (2, 4))
    yield from (change(warps=warps) for warps in (1, 4))
    yield from (change(splits=n) for n in (cfg.splits - 1, cfg.splits + 1) if 0 < n <= chunks)


def tiled_product(cfg: Tiling | None) -> Callable:
    """x, w -> x @ w by the kernel with that tiling, or as the kernel would choose."""
    way = "triton" if cfg else None
    return lambda x, w: quantized_matmul(x, w, implementation=way, tiling=cfg)


class TuningLog:
    """The records of earlier runs on the same file, and of this one."""

    def __init__(self, path: pathlib.Path | None):
        self.path = path
        self.all = records.read(path, fields=("kind",)) if path else []

    def add(self, record: dict[str, Any]) -> None:
        """Takes in a record, and writes it to the file."""
        self.all.append(record)
        if self.path:
            records.append(self.path, record)

    def select(self, **fields: Any) -> list[dict[str, Any]]:
        """The records that have these values in these fields."""
        return [r for r in self.all if all(r.get(k) == v for k, v in fields.items())]


def good(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of tilings that ran and gave the right result, fastest first."""
    fine = [r for r in found if "us" in r and r.get("error", 0) < RELATIVE_TOLERANCE]
    return sorted(fine, key=lambda r: r["us"])


def tune(
    at: dict[str, Any],
    x: jax.Array,
    copies: Sequence[Packed],
    wanted: jax.Array,
    clock: Clock,
    log: TuningLog,
) -> None:
    """Times candidates, then variants of the best two. `at`: the point's fields of a record."""
    blocks, chunks = copies[0].words // BLOCK_WORDS, copies[0].words_BNSc.shape[1]
    done = lambda: {json.dumps(r["tiling"]) for r in log.select(kind="tiling", **at)}

    def measure(some: Iterable[Tiling]) -> None:
        known, todo = done(), {}
        for cfg in some:
            name = json.dumps(dataclasses.asdict(cfg))
            if name not in known and why_not_tiling(cfg, chunks) is None:
                todo[name] = tiled_product(cfg)
        for name, found in clock.microseconds(todo, x, copies, wanted).items():
            log.add({"kind": "tiling", **at, "tiling": json.loads(name), **found})

    measure(tiling_candidates(x.shape[0], blocks, chunks))
    best = good(log.select(kind="tiling", **at))[:2]
    if not clock.over():
        measure(cfg for r in best for cfg in tiling_variants(Tiling(**r["tiling"]), chunks))


def one_point(
    name: str, rows: int, args: MatmulTuning, clock: Clock, log: TuningLog, device: str
) -> dict[str, Any]:
    """Tunes one matrix and number of rows and times the rivals; returns the last record."""
    shape = MATMUL[name]
    at = {"device": device, "shape": name, "rows": rows, "bits": args.bits, "group": args.group}
    keys = jax.random.split(jax.random.key(0), 33)
    like = shape.packed(args.bits, args.group)
    count = min(32, max(4, math.ceil(args.rotate_mb * 1e6 / like.size_bytes)))
    make = jax.jit(lambda key: random_packed(like, key))
    copies = [make(key) for key in keys[:count]]
    x = jax.random.normal(keys[-1], (rows, shape.inputs), jnp.bfloat16)
    wanted = jax.jit(
        lambda x, w: jnp.matmul(
            x.astype(jnp.float32), dequantized(w), precision=jax.lax.Precision.HIGHEST
        )
    )(x, copies[0])
    if args.tune and rows <= LARGEST:
        tune(at, x, copies, wanted, clock, log)
    best = good(log.select(kind="tiling", **at))
    ways = {"kernel": tiled_product(Tiling(**best[0]["tiling"]) if best else None)}
    ways["xla"] = lambda x, w: quantized_matmul(x, w, implementation="xla")
    found = clock.microseconds(ways, x, copies, wanted)
    dense = [
        jax.jit(lambda key: jax.random.normal(key, (shape.inputs, shape.outputs), jnp.bfloat16))(k)
        for k in keys[: max(4, math.ceil(args.rotate_mb * 1e6 / shape.dense_bytes))][:32]
    ]
    found |= clock.microseconds({"bf16": jnp.matmul}, x, dense)
    record = {
        "kind": "compare", **at, "tiling": best[0]["tiling"] if best else None,
        "bytes": like.size_bytes, "copies": count,
        **{key: value for way, r in found.items() for key, value in named(way, r).items()},
    }  # fmt: skip
    log.add(record)
    return record


def named(way: str, found: dict[str, Any]) -> dict[str, Any]:
    """The fields of one way, with its name in front of each."""
    return {f"{way}_{key}": value for key, value in found.items()}


def merge_tuned(log: TuningLog, path: pathlib.Path) -> None:
    """Puts the best tiling of each point into the table at `path`.

    Entries with `us_in_a_step` stay: they were tried in a draft's step, where another tiling can be
    the best one than in a loop of a single product. Records of earlier forms of `Tiling` are left
    out.
    """
    known = {field.name for field in dataclasses.fields(Tiling)}
    names = ("device", "inputs", "outputs", "bits", "group", "rows")
    entries = json.loads(path.read_text()) if path.exists() else []
    table = {tuple(e[n] for n in names): e for e in entries}
    best: dict[tuple, dict] = {}
    for r in good(log.select(kind="tiling")):
        if set(r["tiling"]) != known or bucket(r["rows"]) is None:
            continue
        shape = MATMUL[r["shape"]]
        key = r["device"], shape.inputs, shape.outputs, r["bits"], r["group"], bucket(r["rows"])
        best.setdefault(key, {**dict(zip(names, key)), "tiling": r["tiling"], "us": r["us"]})
    kept = {key: e for key, e in table.items() if "us_in_a_step" in e}
    lines = [json.dumps(e) for _, e in sorted({**table, **best, **kept}.items())]
    with atomic_file(path) as scratch:
        scratch.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def tuning_table(log: TuningLog, speed: float) -> Table:
    """Microseconds by matrix and rows, the floor at `speed` TB/s, and the gain over 16 bits."""
    shown = Table("matrix", "rows", "kernel", "floor", "bf16", "faster", "xla", "error", "tiling")
    for r in log.select(kind="compare"):
        kernel, bf16 = r.get("kernel_us", math.nan), r.get("bf16_us", math.nan)
        tiling = " ".join(str(v) for v in (r["tiling"] or {}).values())
        shown.add_row(
            r["shape"], str(r["rows"]), f"{kernel:.1f}", f"{r['bytes'] / speed / 1e6:.1f}",
            f"{bf16:.1f}", f"{bf16 / kernel:.2f}x", f"{r.get('xla_us', math.nan):.1f}",
            f"{r.get('kernel_error', math.nan):.4f}", tiling,
        )  # fmt: skip
    return shown


def main(args: MatmulTuning, console: Console) -> TuningLog:
    """All records, with those of earlier runs on the same file."""
    log = TuningLog(args.out)
    if jax.default_backend() != "gpu":
        if not (args.table and log.all):
            raise UserError("this times GPU kernels, and there is no GPU")
        merge_tuned(log, args.table)
        console.print(tuning_table(log, log.select(kind="bandwidth")[-1]["read"]))
        return log
    device = jax.devices()[0].device_kind
    clock = Clock(args.seconds, args.repeats, args.calls, args.threads)
    log.add({"kind": "bandwidth", "device": device, "jax": jax.__version__, **bandwidth(clock)})
    console.print(log.all[-1])
    speed = log.all[-1]["read"]
    points = [(s, m) for s in args.shapes for m in args.rows]
    points.sort(key=lambda p: (args.rows.index(p[1]), args.shapes.index(p[0])))
    first = [(args.shapes[0], m) for m in (*args.rows, *args.large)]  # the most important matrix
    points = first + [(s, m) for s in args.large_shapes for m in args.large] + points
    for name, rows in dict.fromkeys(points):
        if clock.over():
            break
        known = {"shape": name, "rows": rows, "bits": args.bits, "group": args.group}
        if log.select(kind="compare", device=device, **known):
            continue
        start = time.monotonic()
        try:
            r = one_point(name, rows, args, clock, log, device)
        except Exception as error:  # no memory for the copies, for example
            console.print(name, rows, f"{type(error).__name__}: {str(error)[:300]}")
            continue
        console.print(
            f"{name} x {rows}: kernel {r.get('kernel_us')}, floor {r['bytes'] / speed / 1e6:.1f}, "
            f"bf16 {r.get('bf16_us')}, xla {r.get('xla_us')} ({time.monotonic() - start:.0f} s)"
        )
        if args.table:
            merge_tuned(log, args.table)
    console.print(tuning_table(log, speed))
    return log


def cli(words: Sequence[str] | None = None) -> int:
    again = "the same command with the same --out continues"
    return run(MatmulTuning, main, __doc__, words, width=180, again=again)


if __name__ == "__main__":
    sys.exit(cli())
