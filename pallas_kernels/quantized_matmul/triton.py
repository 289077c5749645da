"""The Triton kernel: a block of the matrix is the left operand of tensor-core products.

In a group, sum_d x_d (code_d step + offset) = step sum_d x_d (code_d + 128) + (offset - 128 step)
sum_d x_d, so the inner loop neither scales nor shifts a weight. Both factors come from the tensor
cores, too: a block's scales [S, K] times a matrix [K, rows] of zeros with a 1 at the step's K (or a
-128 there and a 1 at the offset's) gives them where the sums lie, in every row, the step exact and
the other rounded once. So all that a program reads feeds products, which is what lets Triton copy
it ahead in the background. A program of many rows has many products already and loads its scales.

Letters: M rows, X splits of the groups; the others as in `packing`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.quantized_matmul.packing import BLOCK_WORDS, Packed
from pallas_kernels.quantized_matmul.tiling import Tiling
from pallas_kernels.quantized_matmul.unpack import fma, lift, operand

PRODUCT_ROWS = 16
"""Most rows of a program whose scales come from products."""


def _kernel(*refs, cfg, rows, bits, fields, each, interpret):
    """Some rows times a block's columns of words, summed over the chunks of a split."""
    x_ref, words_ref, *refs = refs
    top_ref = refs.pop(0) if bits == 3 else None
    scale_ref, y_ref = refs
    (_, N, _, c), K, R = words_ref.shape, scale_ref.shape[3], cfg.rows
    first, block, split = (pl.program_id(axis) for axis in range(3))
    index = jax.lax.broadcasted_iota(jnp.int32, (R, c), 0) + first * R
    ones = jnp.ones((BLOCK_WORDS, c), jnp.bfloat16)
    k = jax.lax.broadcasted_iota(jnp.int32, (K, R), 0)
    at = lambda k0: (k == k0).astype(jnp.float32)
    loaded = R > PRODUCT_ROWS
    step_of = [at(i).astype(jnp.bfloat16) for i in range(fields)]
    less_of = [(at(K // 2 + i) - lift(bits) * at(i)).astype(jnp.bfloat16) for i in range(fields)]

    def turn(n, sums):
        words = words_ref[block, n]
        scale = None if loaded else scale_ref[block, n // each]
        top = None if top_ref is None else top_ref[block, n]
        own = x_ref.at[pl.ds(first * R, R), pl.ds(n * c, c)]
        x = plgpu.load(own, mask=index < rows, other=jnp.zeros((), x_ref.dtype))
        total, found = plgpu.dot(ones, x, trans_b=True), []
        for i in range(fields):
            y = plgpu.dot(operand(words, top, bits, i, interpret), x, trans_b=True)
            if loaded:
                own = lambda at: scale_ref[block, n // each, :, at].astype(jnp.float32)
                step, less = own(i), own(K // 2 + i)
                step, less = (
                    jnp.broadcast_to(a[:, None], y.shape) for a in (step, less - lift(bits) * step)
                )
            else:
                step, less = (plgpu.dot(scale, a[i]) for a in (step_of, less_of))
            found.append(fma(less, total, fma(step, y, sums[i], interpret), interpret))
        return found

    start = [jnp.zeros((BLOCK_WORDS, R), jnp.float32)] * fields
    bound = lambda x: x * N // cfg.splits
    sums = jax.lax.fori_loop(bound(split), bound(split + 1), turn, start)
    mask = jax.lax.broadcasted_iota(jnp.int32, (R, BLOCK_WORDS), 0) + first * R < rows
    for i in range(fields):
        own = pl.ds(first * R, R), jnp.int32(i), pl.ds(block * BLOCK_WORDS, BLOCK_WORDS)
        out = y_ref.at[(split, *own)]
        plgpu.store(out, sums[i].T.astype(y_ref.dtype), mask=mask)


def quantized_matmul_triton(
    x_MD: jax.Array,
    w: Packed,
    cfg: Tiling,
    interpret: bool = False,
    out_dtype: Any = None,
    terms: bool = False,
) -> jax.Array:
    """[M, F] in `out_dtype` (x's). With splits XLA sums over them, in float32 until then; with
    `terms` they are what is returned, [splits, M, F]."""
    M, (_, F), blocks = x_MD.shape[0], w.shape, pl.cdiv(x_MD.shape[0], cfg.rows)
    words = [a for a in (w.words_BNSc, w.top_BNSc) if a is not None]
    out = M
    if interpret:  # masked rows have to exist
        out = blocks * cfg.rows
        x_MD = jnp.pad(x_MD, ((0, out - M), (0, 0)))
    out_dtype = out_dtype or x_MD.dtype
    dtype = out_dtype if cfg.splits == 1 else jnp.float32
    each = w.words_BNSc.shape[1] // w.scale_BQSK.shape[1]
    y_XMiS = pl.pallas_call(
        functools.partial(
            _kernel, cfg=cfg, rows=M, bits=w.bits, fields=w.fields, each=each, interpret=interpret
        ),
        out_shape=jax.ShapeDtypeStruct((cfg.splits, out, w.fields, w.words), dtype),
        grid=(blocks, w.words // BLOCK_WORDS, cfg.splits),
        compiler_params=plgpu.CompilerParams(num_warps=cfg.warps, num_stages=cfg.stages),
        interpret=interpret,
        name="quantized_matmul",
    )(x_MD, *words, w.scale_BQSK)
    if terms:
        return y_XMiS.reshape(cfg.splits, out, w.fields * w.words)[:, :M, :F]
    y_MF = sum(y_XMiS[1:], y_XMiS[0])  # terms, and no reduction: they fuse with what comes next
    return y_MF.reshape(out, w.fields * w.words)[:M, :F].astype(out_dtype)
