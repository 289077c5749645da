"""Is every kernel right on this device? Each is compared with float64 NumPy.

    python -m experiments.measure.errors --output errors.jsonl
    python -m experiments.measure.errors --only tree_attention lowrank_attention

A kernel is right when it was checked on the card: interpreters ignore how numbers lie in registers.
The error of a case is its largest difference over the largest number of the result; residuals must
be equal bit by bit. "not taken" says why a kernel does not do a case on this device; XLA does it
then, and is compared in its place. On a GPU shapes are those of models. Without one, small shapes
run in the interpreter. The command fails if any case is wrong.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from llm_jax.packed import packed
from llm_jax.quantize import quantize
from pallas_kernels import float64
from pallas_kernels import lowrank_attention as lowrank
from pallas_kernels import quantized_matmul as matmul
from pallas_kernels import residual_decode as residual
from pallas_kernels import rotary_cache as rotary
from pallas_kernels import tree_attention as tree
from pallas_kernels.bit_fields import pack_codes
from pallas_kernels.device import on_gpu, on_hopper
from pallas_kernels.shapes import LOWRANK, LowrankShape
from subspec_jax.residual.encode import encode

ROUNDING = 2.0**-8
"""Of a bfloat16 number."""


@dataclasses.dataclass(frozen=True)
class Errors:
    """Which kernels to check."""

    only: tuple[str, ...] = ()
    """Names of kernels; all if not given."""
    output: Path | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a kernel, and what it should give."""

    kernel: str
    name: str
    allowed: float
    """The largest error."""
    call: Callable[[bool], tuple[Any, Any, str | None]]
    """(found, expected, why the kernel does not do it) of whether to interpret."""


def products(small: bool) -> Iterator[Case]:
    """Rows times a low-bit matrix."""
    inputs, outputs = (256, 300) if small else (3584, 4864)

    def call(bits, group, count, interpret):
        rng = np.random.default_rng(bits)
        codes = rng.integers(0, 2**bits, (inputs // group, group, outputs)).astype(np.uint8)
        step = jnp.asarray(rng.uniform(0.5, 2, (len(codes), outputs)) / 2**bits, jnp.bfloat16)
        offset = -step * jnp.asarray(rng.uniform(0.3, 0.7, step.shape) * 2**bits, jnp.bfloat16)
        w = matmul.repack(jnp.asarray(codes), step, offset, bits)
        dense = codes * float64.f64(step)[:, None] + float64.f64(offset)[:, None]
        x = jnp.asarray(rng.normal(size=(count, inputs)), jnp.bfloat16)
        found = matmul.quantized_matmul(x, w, interpret=interpret)
        want = float64.f64(x) @ dense.reshape(inputs, outputs)
        return found, want, matmul.why_not(x, w)

    for bits, group, rows in [
        *((bits, 64, rows) for bits in (2, 3, 4, 8) for rows in ((5,) if small else (1, 6, 48))),
        *((4, group, 6) for group in (16, 32, 128)),
        *((4, 64, rows) for rows in (() if small else (16, 128, 289))),
    ]:
        name = f"{bits} bits, groups of {group}, {rows} rows"
        make = functools.partial(call, bits, group, rows)
        yield Case("quantized_matmul", name, ROUNDING, make)


def residuals(small: bool) -> Iterator[Case]:
    """Exact matrices from substitutes and residuals."""
    shape = (128, 1024) if small else (896, 4096)

    def call(bits, group, dtype, interpret):
        rng = np.random.default_rng(bits)
        exact = (rng.standard_normal(shape, np.float32) * 0.02).astype(dtype)
        exact[0, :4] = [np.inf, -0.0, 1e-7, 0]
        q = quantize(jnp.asarray(exact), bits, group)
        found = jax.tree.map(jnp.asarray, encode(exact, jax.tree.map(np.asarray, q), "levels"))
        whole = lambda: residual.residual_decode(found, packed(q), interpret=interpret)
        pattern = lambda a: np.asarray(a).view(np.uint16)
        return pattern(whole()), pattern(exact), residual.why_not(found, packed(q))

    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    for bits, group, dtype in [
        (4, 64, bfloat16), (2, 64, bfloat16), (8, 32, bfloat16), (4, 16, bfloat16),
        (4, 64, np.dtype(np.float16)),
    ]:  # fmt: skip
        name = f"{bits} bits, groups of {group}, {dtype.name}"
        yield Case("residual_decode", name, 0, functools.partial(call, bits, group, dtype))


def trees(small: bool) -> Iterator[Case]:
    """Attention of a tree's nodes."""

    def call(T, N, K, H, S, more, interpret):
        rng = np.random.default_rng(T)
        B = len(more["live"]) if "live" in more else 1
        draw = lambda *size: jnp.asarray(rng.standard_normal(size, np.float32) * 2, jnp.bfloat16)
        mask = rng.random((B, T, S)) < 0.3
        mask[:, :, 0] = True
        options = {name: more[name] for name in ("softcap", "scale") if name in more}
        if "live" in more:
            live = np.asarray(more["live"], np.int32)
            mask &= np.arange(S) < live[:, None, None]
            options["rows"] = jnp.asarray(rng.permutation(B), jnp.int32), jnp.asarray(live)
        if "sinks" in more:
            options["sinks_N"] = jnp.asarray(rng.normal(size=N), jnp.float32)
        given = draw(B, T, N, H), draw(B, S, K, H), draw(B, S, K, H), jnp.asarray(mask)
        found = tree.tree_attention(*given, **options, interpret=interpret)
        want = float64.tree_attention(*given, **options)
        return found, want, tree.why_not(*given, options.get("rows"))

    length = 192 if small else 2368
    for name, T, heads, more in [
        ("a draft step", 6, (28, 4, 128), {}),
        ("a chain", 17, (8, 2, 32), {}),
        ("heads of 64", 37, (9, 3, 64), {}),
        ("a large tree", 37 if small else 289, (28, 4, 128), {}),
        ("a wide one", 37 if small else 289, (40, 8, 128), {}),
        ("soft cap and scale", 17, (8, 4, 128), dict(softcap=30.0, scale=0.07)),
        ("sinks", 17, (64, 8, 64), dict(sinks=True)),
        ("texts of a batch", 6, (28, 4, 128), dict(live=(70, length, 1, 150))),
        ("sinks, texts of a batch", 17, (64, 8, 64), dict(sinks=True, live=(70, length, 1, 150))),
    ]:
        make = functools.partial(call, T, *heads, length, more)
        yield Case("tree_attention", f"{name}: {T} rows, {heads}", 2 * ROUNDING, make)


def rotations(small: bool) -> Iterator[Case]:
    """Turned heads, and what is written to caches."""

    def call(X, T, N, K, H, S, interpret):
        rng = np.random.default_rng(X)
        draw = lambda *size: jnp.asarray(rng.standard_normal(size, np.float32))
        angle, F = rng.uniform(0, 6.3, (T, H // 2)), (N + 2 * K) * H
        turn = [jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)]
        caches = [draw(3, S, K, H).astype(jnp.bfloat16) for _ in "kv"]
        place = jnp.ones(T, jnp.int32), jnp.asarray(rng.permutation(S)[:T], jnp.int32)
        given = draw(X, T, F), draw(F).astype(jnp.bfloat16), *turn, *caches, place
        found = rotary.rotary_cache(*given, interpret=interpret)
        return found, float64.rotary_cache(*given), rotary.why_not(given[0], *caches)

    shapes = [
        (14, 6, 28, 4, 128, 64),
        (1, 1, 4, 2, 32, 8),
        (3, 7, 6, 1, 64, 16),
        (2, 6, 8, 4, 256, 64),
    ]
    for shape in shapes if small else [*shapes, (1, 289, 28, 4, 128, 2368)]:
        X, T, N, K, H, _ = shape
        name = f"{X} terms, {T} tokens, heads {N, K, H}"
        yield Case("rotary_cache", name, ROUNDING, functools.partial(call, *shape))


def latents(rng: np.random.Generator, like: lowrank.Latents) -> lowrank.Latents:
    """Random ones of unit variance, in the shape of `like`."""
    B, S, _ = like.codes_BSP.shape
    if like.bits == 16:
        drawn = jnp.asarray(rng.normal(size=like.codes_BSP.shape), jnp.bfloat16)
        return dataclasses.replace(like, codes_BSP=drawn)
    draw = lambda r: jnp.asarray(rng.integers(0, 2**like.bits, (B, S, r)), jnp.uint8)
    codes = jnp.concatenate([pack_codes(draw(r), like.bits) for r in like.blocks], -1)
    step = rng.uniform(3, 5, like.step_BSg.shape) / 2**like.bits
    offset = -step * (2**like.bits - 1) / 2 + rng.normal(size=step.shape) * 0.1
    narrow = lambda a: jnp.asarray(a, jnp.bfloat16)
    return lowrank.Latents(codes, narrow(step), narrow(offset), like.bits, like.blocks)


def lowrank_attentions(small: bool) -> Iterator[Case]:
    """Attention over latents."""

    def call(shape: LowrankShape, bits, T, S, extras, way, interpret):
        rng = np.random.default_rng(bits)
        q, k, v, up_k, up_v, _ = shape.arguments(2, S, bits, T)
        draw = lambda like, size=1.0: jnp.asarray(rng.normal(size=like.shape) * size, like.dtype)
        ups = draw(up_k, up_k.shape[1] ** -0.5), draw(up_v, up_v.shape[1] ** -0.5)
        lengths = jnp.asarray([S, S // 3], jnp.int32)
        given = draw(q), latents(rng, k), latents(rng, v), *ups, shape.frequencies, lengths
        options, heads = {}, jax.ShapeDtypeStruct((shape.kv_heads, shape.head_dim), jnp.bfloat16)
        if "mask" in extras:
            mask = rng.random((1, T, S)) < 0.7
            mask[..., 0] = True
            options["mask_BTS"] = jnp.asarray(mask)
        if "bias" in extras:
            options |= dict(k_bias_KH=draw(heads), v_bias_KH=draw(heads))
        reason = (lowrank.why_not_mosaic if way else lowrank.why_not)(*given, **options)
        run = functools.partial(lowrank.lowrank_attention, *given, **options, interpret=interpret)
        found = run(implementation=None if reason else way)
        return found, float64.lowrank_attention(*given, **options), reason

    small_shape = LowrankShape(4, 4, 32, 2, 32, 64, 1e4)
    shapes = {"small": small_shape} if small else LOWRANK
    for name, shape in shapes.items():
        for bits, T, extras, way in [
            *((bits, 1, (), way) for way in ([None, "mosaic"] if on_hopper() else [None])
              for bits in (16, 8, 4)),
            (16, 5, ("mask",), None), (4, 5, ("mask", "bias"), None),
        ]:  # fmt: skip
            said = f"{name}, {bits} bits, {T} rows{''.join(f', {extra}' for extra in extras)}"
            said += f", {way}" if way else ""
            make = functools.partial(call, shape, bits, T, 70 if small else 1504, extras, way)
            yield Case("lowrank_attention", said, 4 * ROUNDING, make)


KERNELS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "quantized_matmul": products,
    "residual_decode": residuals,
    "tree_attention": trees,
    "rotary_cache": rotations,
    "lowrank_attention": lowrank_attentions,
}


def largest_error(found: Any, want: Any) -> float:
    """The largest difference over the largest number; infinite where a number is not finite."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
    worst = 0.0
    for a, b in pairs:
        a, b = float64.f64(a), np.asarray(b, np.float64)
        if a.shape != b.shape or not np.isfinite(a).all():
            return float("inf")
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return worst


def checked(case: Case, interpret: bool) -> dict[str, Any]:
    """The record of a case; a kernel that fails has no error, but what it said."""
    record = dict(kernel=case.kernel, case=case.name, allowed=case.allowed)
    began = time.perf_counter()
    try:
        found, want, reason = case.call(interpret)
        error = largest_error(found, want)
        record |= dict(error=error, right=error <= case.allowed, not_taken=reason)
    except Exception as e:
        record |= dict(right=False, failed=f"{type(e).__name__}: {e}"[:500])
    return record | dict(seconds=time.perf_counter() - began)


def main(args: Errors, console: Console) -> None:
    if unknown := set(args.only) - set(KERNELS):
        raise UserError(f"no kernel is called {min(unknown)}; one of {', '.join(KERNELS)}")
    small = not on_gpu()
    if small:
        console.print("No GPU that runs the kernels: small shapes, in the interpreter.")
    stamp = dict(device=jax.devices()[0].device_kind, interpreted=small)
    stamp |= dict(environment=records.environment())
    table, wrong, count = Table("kernel", "case", "error", "allowed", "", box=None), 0, 0
    for name in args.only or KERNELS:
        for case in KERNELS[name](small):
            found = checked(case, interpret=small)
            if args.output:
                records.append(args.output, stamp | found)
            wrong, count = wrong + (not found["right"]), count + 1
            said = found.get("failed") or (
                found["not_taken"] and f"not taken: {found['not_taken']}"
            )
            error = f"{found['error']:.1e}" if "error" in found else ""
            verdict = ("" if found["right"] else "WRONG ") + (said or "")
            table.add_row(name, case.name, error, f"{case.allowed:.1e}", verdict)
    console.print(table)
    if wrong:
        raise UserError(f"{wrong} of {count} cases are wrong")
    console.print(f"All {count} cases are right.")


def cli(words: Sequence[str] | None = None) -> int:
    return run(Errors, main, __doc__, words, again=None)


if __name__ == "__main__":
    sys.exit(cli())
