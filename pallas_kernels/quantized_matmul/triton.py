"""Two Triton kernels: products in the tensor cores, and multiply-adds for a row or two.

In a group, sum_d x_d (code_d step + offset) = step sum_d x_d code_d + offset sum_d x_d, so the
inner loop neither scales nor shifts a weight. Letters: M rows, D inputs, F outputs, Q groups, S
columns of words, i fields of a word, X splits of the groups.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.quantized_matmul.packing import Packed
from pallas_kernels.quantized_matmul.tiling import Tiling
from pallas_kernels.quantized_matmul.unpack import (
    fma,
    lift,
    number,
    operand,
    place,
    step_offset,
    weights,
)


def _turns(x, groups: int, together: int, splits: int):
    """Range of turns of split x; a turn takes `together` groups."""
    turns = groups // together
    each = pl.cdiv(turns, splits)
    return x * each, jnp.minimum((x + 1) * each, turns)


def _store(ref, index, value, ok):
    """Writes float32 [rows, tile], in ref's dtype, where ok (None: everywhere)."""
    value = value.astype(ref.dtype)
    if ok is None:
        ref[index] = value
    else:
        plgpu.store(ref.at[index], value, mask=jnp.broadcast_to(ok[:, None], value.shape))


def _products(*refs, cfg, rows, groups, bits, fields, dense, interpret):
    """A block of rows times a tile of words, summed over the groups of a split."""
    x_ref, words_ref, *refs = refs
    top_ref = refs.pop(0) if bits == 3 else None
    scale_ref, y_ref = refs
    group, block, part = words_ref.shape[1], pl.program_id(0), None
    if cfg.parts > 1:
        part, block, fields = block % cfg.parts, block // cfg.parts, fields // cfg.parts
    field = lambda i: jnp.int32(i) if part is None else part * fields + i
    own, tile = pl.ds(block * cfg.rows, cfg.rows), pl.ds(pl.program_id(1) * cfg.tile, cfg.tile)
    spread = functools.partial(jnp.broadcast_to, shape=(cfg.rows, cfg.tile))
    ok = None
    if rows % cfg.rows:
        ok = block * cfg.rows + jax.lax.broadcasted_iota(jnp.int32, (cfg.rows,), 0) < rows
    ones = jnp.ones((group, cfg.tile), jnp.bfloat16)

    def scales(q):
        return [scale_ref[q, field(i), tile] for i in range(fields)]

    def one(q, scale, sums):
        words = words_ref[q, :, tile]
        top = None if top_ref is None else top_ref[q, :, tile]
        if part is not None:  # its own fields come first
            words = words >> (part * (32 // cfg.parts)).astype(jnp.uint32)
            top = None if top is None else top >> (part * (16 // cfg.parts)).astype(jnp.uint16)
        index = own, pl.ds(q * group, group)
        if ok is None:
            x = x_ref[index]
        else:
            mask = jnp.broadcast_to(ok[:, None], (cfg.rows, group))
            x = plgpu.load(x_ref.at[index], mask=mask, other=jnp.zeros((), x_ref.dtype))
        operands = []
        for i in range(fields):
            if dense:
                pair = (half[None].astype(x.dtype) for half in step_offset(scale[i]))
                pair = [jnp.broadcast_to(half, words.shape) for half in pair]
                operands.append(weights(words, top, *pair, bits, i, interpret))
            else:
                operands.append(operand(words, top, bits, i, interpret))
        if dense:
            return [total + plgpu.dot(x, w) for total, w in zip(sums, operands, strict=True)]
        total, found = plgpu.dot(x, ones), []
        for i in range(fields):
            step, offset = step_offset(scale[i])
            down = fma(step, jnp.full_like(step, -lift(bits)), offset, interpret)
            y = fma(plgpu.dot(x, operands[i]), spread(step), sums[i], interpret)
            found.append(fma(total, spread(down), y, interpret))
        return found

    x = pl.program_id(2)
    first, last = _turns(x, groups, cfg.together, cfg.splits)

    def turn(n, carry):
        sums, scale = carry
        for u in range(cfg.together):
            q = n * cfg.together + u
            now = scale if cfg.ahead else scales(q)
            if cfg.ahead:  # asked for now, needed after the next products
                scale = scales(jnp.minimum(q + 1, groups - 1))
            sums = one(q, now, sums)
        return sums, scale

    start = [jnp.zeros((cfg.rows, cfg.tile), jnp.float32)] * fields
    early = scales(first * cfg.together) if cfg.ahead else []
    sums, _ = jax.lax.fori_loop(first, last, turn, (start, early))
    for i in range(fields):
        _store(y_ref, (x, own, field(i), tile), sums[i], ok)


def _multiply_adds(*refs, cfg, rows, groups, bits, fields, interpret):
    """Rows times a tile of words; `together` groups side by side, one a warp."""
    x_ref, words_ref, *refs = refs
    top_ref = refs.pop(0) if bits == 3 else None
    scale_ref, y_ref = refs
    group, size = words_ref.shape[1], (cfg.together, cfg.tile)
    tile, x = pl.ds(pl.program_id(1) * cfg.tile, cfg.tile), pl.program_id(2)
    zero, none = jnp.zeros(size, jnp.float32), jnp.zeros((cfg.together,), jnp.float32)
    unroll = min(16, group)

    def turn(n, sums):
        some = pl.ds(n * cfg.together, cfg.together)
        scale = [scale_ref[some, i, tile] for i in range(fields)]

        def inputs(part, carry):
            parts, totals = carry
            for u in range(unroll):
                d = part * unroll + u
                words = words_ref[some, d, tile]
                top = None if top_ref is None else top_ref[some, d, tile]
                values = [number(words, top, bits, i, interpret) for i in range(fields)]
                x_q = [x_ref[m, some, d].astype(jnp.float32) for m in range(rows)]
                totals = [t + v for t, v in zip(totals, x_q, strict=True)]
                wide = [jnp.broadcast_to(v[:, None], size) for v in x_q]
                parts = [
                    [fma(wide[m], v, p, interpret) for v, p in zip(values, parts[m], strict=True)]
                    for m in range(rows)
                ]
            return parts, totals

        carry = [[zero] * fields for _ in range(rows)], [none] * rows
        parts, totals = jax.lax.fori_loop(0, group // unroll, inputs, carry)
        found = []
        for m in range(rows):
            row, total = [], jnp.broadcast_to(totals[m][:, None], size)
            for i in range(fields):
                step, offset = step_offset(scale[i])
                y = fma(parts[m][i], step, sums[m][i], interpret)
                row.append(fma(total, offset - place(bits, i)[1] * step, y, interpret))
            found.append(row)
        return found

    start = [[zero] * fields for _ in range(rows)]
    sums = jax.lax.fori_loop(*_turns(x, groups, cfg.together, cfg.splits), turn, start)
    for m in range(rows):
        for i in range(fields):
            y_ref[x, m, i, tile] = jnp.sum(sums[m][i], axis=0).astype(y_ref.dtype)


def quantized_matmul_triton(
    x_MD, w: Packed, cfg: Tiling, interpret: bool = False, out_dtype=None, terms: bool = False
) -> jax.Array:
    """[M, F] in `out_dtype` (x's). With splits XLA sums over them, in float32 until then; with
    `terms` they are what is returned, [splits, M, F]."""
    M, (D, F), S = x_MD.shape[0], w.shape, w.words_DS.shape[1]
    Q, fields = D // w.group, w.fields
    words = [a.reshape(Q, w.group, S) for a in (w.words_DS, w.top_DS) if a is not None]
    scale = w.scale_QF.reshape(Q, fields, S)
    blocks = pl.cdiv(M, cfg.rows)
    known = dict(cfg=cfg, rows=M, groups=Q, bits=w.bits, fields=fields, interpret=interpret)
    if cfg.way == "vector":
        kernel, x, blocks, out = _multiply_adds, x_MD.reshape(M, Q, w.group), 1, M
    else:
        kernel, x, out = _products, x_MD, M
        known["dense"] = cfg.way == "dense"
        if interpret:  # masked rows have to exist
            out = blocks * cfg.rows
            x = jnp.pad(x, ((0, out - M), (0, 0)))
    out_dtype = out_dtype or x_MD.dtype
    dtype = out_dtype if cfg.splits == 1 else jnp.float32
    y_XMiS = pl.pallas_call(
        functools.partial(kernel, **known),
        out_shape=jax.ShapeDtypeStruct((cfg.splits, out, fields, S), dtype),
        grid=(blocks * cfg.parts, S // cfg.tile, cfg.splits),
        compiler_params=plgpu.CompilerParams(num_warps=cfg.warps, num_stages=cfg.stages),
        interpret=interpret,
        name=f"quantized_matmul_{cfg.way}",
    )(x, *words, scale)
    if terms:
        return y_XMiS.reshape(cfg.splits, out, fields * S)[:, :M, :F]
    y_MF = sum(y_XMiS[1:], y_XMiS[0])  # terms, and no reduction: they fuse with what comes next
    return y_MF.reshape(out, fields * S)[:M, :F].astype(out_dtype)
