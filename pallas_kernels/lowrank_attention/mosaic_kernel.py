"""The Mosaic GPU kernel: scores of absorbed queries, their softmax and the averages of values.

A program takes one group of one text and a run of whole spans. Its third warpgroup copies tiles of
64 slots; the other two take turns with them, each with a running maximum and sums of its own, which
are joined outside. Tiles that are stored as codes become 16-bit numbers in shared memory first.

Letters: B batch, S slots, P columns of codes, g groups, K' kv heads of a group, R rank, X spans, C
runs of spans, c parts of a row of values.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lowrank_attention.absorption import SLOW
from pallas_kernels.lowrank_attention.mosaic_plan import COLUMNS, TILE, Plan
from pallas_kernels.lowrank_attention.mosaic_tiles import largest, opened, scratch_for
from pallas_kernels.lowrank_attention.reference import HIDDEN

AUTOMATIC_BARRIERS = True
"""Whether a warpgroup waits for all of its warps around every store to shared memory."""


@functools.cache
def fused(plan: Plan, interpret: bool = False):
    """The kernel as a function of arrays; see `mosaic.py` for what they hold.

    (lengths [B], fast matrices [B g, K' SLOW, R], slow ones [X SLOW, B g K' R], tables
    [X span, SLOW] and [span, SLOW], mask float32 [B, S'] if there is one, k codes [B, S, P], the
    table of scales [B, rows, S'], the same of v) -> sums float32 [B, g, C, 2, c, 128, COLUMNS],
    the largest scores (repeated) and the sums of weights (to be added up), each
    [B, g, C, 2, TILE, COLUMNS].
    """
    k, v, heads, steps = plan.k, plan.v, plan.heads, plan.span // TILE
    rows = plgpu.Layout.WGMMA.reduce(1)
    columns = plgpu.Layout.WGMMA.reduce(0)
    f32 = jnp.float32

    def lowrank_decode(
        *refs, fast, slow, tables, mask, ks, vs, kopen, vopen, weights, scratch, bars
    ):
        refs = list(refs)
        take = lambda n=1: [refs.pop(0) for _ in range(n)]
        lengths, fast_ref, slow_ref, turn_ref, place_ref = take(5)
        (mask_ref,) = take() if plan.masked else (None,)
        k_refs, v_refs = take(1 if k.bits == 16 else 2), take(1 if v.bits == 16 else 2)
        sum_ref, top_ref, total_ref = refs
        x, g, b = (lax.axis_index(name) for name in ("x", "g", "b"))
        wg = lax.axis_index("wg")
        start = x * (plan.each * plan.span)
        length = jnp.minimum(lengths[b], start + plan.each * plan.span) - start
        tiles = lax.div(jnp.maximum(length, 0) + (TILE - 1), TILE)
        group = b * plan.groups + g
        slot_of = lambda i: lax.rem(i, plan.slots)

        def copy_latents(stored, some, smem, at, slot, bar):
            codes, *scales = some
            first = g * stored.size
            for c in range(stored.parts):
                own = pl.ds(first + c * stored.width, stored.width)
                to = smem[0].at[slot, c]
                plgpu.copy_gmem_to_smem(codes.at[b, pl.ds(at, TILE), own], to, bar)
            for scale in scales:
                for i in range(2):
                    row = scale.at[b, stored.row + i * plan.groups + g, pl.ds(at, TILE)]
                    plgpu.copy_gmem_to_smem(row, smem[1].at[slot, i], bar)

        @pl.when(wg == 2)
        def _copying():
            plgpu.set_max_registers(40, action="decrease")

            @pl.when(tiles > 0)
            def _():
                for i in range(k.halves):
                    own = fast_ref.at[group, :, pl.ds(i * k.width, k.width)]
                    plgpu.copy_gmem_to_smem(own, fast.at[i], bars["fast"])

            def loop(i, _):
                slot, at = slot_of(i), start + i * TILE
                unit, step = lax.div(i, steps), lax.rem(i, steps)

                @pl.when(i >= plan.slots)
                def _():
                    plgpu.barrier_wait(bars["k_empty"].at[slot])
                    plgpu.commit_smem()  # what was read by ordinary loads

                full = bars["k_full"].at[slot]
                copy_latents(k, k_refs, ks, at, slot, full)
                plgpu.copy_gmem_to_smem(turn_ref.at[pl.ds(at, TILE)], tables.at[slot, 0], full)
                near = place_ref.at[pl.ds(step * TILE, TILE)]
                plgpu.copy_gmem_to_smem(near, tables.at[slot, 1], full)
                if mask_ref is not None:
                    plgpu.copy_gmem_to_smem(mask_ref.at[b, pl.ds(at, TILE)], mask.at[slot], full)

                @pl.when(i >= plan.slots)
                def _():
                    plgpu.barrier_wait(bars["v_empty"].at[slot])
                    plgpu.commit_smem()

                copy_latents(v, v_refs, vs, at, slot, bars["v_full"].at[slot])

                # After the first tiles of the span, so that there are bytes on their way meanwhile.
                @pl.when((step == 1) | ((step == 0) & (i == tiles - 1)))
                def _():
                    @pl.when(unit > 0)
                    def _():
                        plgpu.barrier_wait(bars["slow_empty"])

                    first = pl.ds((x * plan.each + unit) * SLOW, SLOW)
                    for h in range(heads):
                        for i in range(k.halves):
                            at = (group * heads + h) * plan.rank + i * k.width
                            own = slow_ref.at[first, pl.ds(at, k.width)]
                            to = slow.at[i, pl.ds(h * SLOW, SLOW)]
                            plgpu.copy_gmem_to_smem(own, to, bars["slow_full"])

                return ()

            lax.fori_loop(0, tiles, loop, ())
            for i in range(plan.slots):

                @pl.when(i < tiles)
                def _(i=i):
                    plgpu.barrier_wait(bars["k_empty"].at[i])
                    plgpu.barrier_wait(bars["v_empty"].at[i])

            @pl.when(tiles > 0)
            def _():
                plgpu.barrier_wait(bars["slow_empty"])

        def scores(slot, left):
            """Scores [TILE, COLUMNS], base 2; `HIDDEN` where there is nothing to see."""
            keys = [ks[0].at[slot, 0]]
            if k.bits < 16:
                keys = [kopen.at[wg, i] for i in range(k.halves)]
                for i, key in enumerate(keys):
                    key[...] = opened(ks[0].at[slot, 0], ks[1].at[slot], i, k.bits, plan.dtype)
                plgpu.commit_smem()
            turns = [
                plgpu.load(tables.at[slot, i], layout=plgpu.Layout.WGMMA).astype(f32)
                for i in range(2)
            ]

            def products(*accs):
                for acc, matrix in zip(accs, (fast, slow), strict=True):
                    for i, key in enumerate(keys):
                        plgpu.wgmma(acc, key, matrix.at[i].T)
                found = []
                for acc, wait, turn in zip(accs, (k.halves, 0), turns, strict=True):
                    y = plgpu.wgmma_accumulator_load(acc, wait_n=wait)
                    found.append([y[:, h * SLOW : (h + 1) * SLOW] * turn for h in range(heads)])
                return [jnp.sum(a + b, axis=1) for a, b in zip(*found, strict=True)]

            acc = plgpu.ACC((TILE, heads * SLOW), f32)
            found = pl.run_scoped(products, acc, acc)
            wide = (TILE, COLUMNS)
            head = plgpu.broadcasted_iota(jnp.int32, wide, 1, layout=plgpu.Layout.WGMMA)
            place = plgpu.broadcasted_iota(jnp.int32, wide, 0, layout=plgpu.Layout.WGMMA)
            hidden = plgpu.layout_cast(jnp.full(wide, HIDDEN, f32), plgpu.Layout.WGMMA)
            score = hidden
            for h, own in enumerate(found):
                score = jnp.where(head == h, lax.broadcast_in_dim(own, wide, (0,)), score)
            if mask_ref is not None:
                seen = plgpu.load(mask.at[slot], layout=rows)
                score = score + lax.broadcast_in_dim(seen, wide, (0,))
            return jnp.where(place < left, score, hidden)

        def averages(slot, left, narrow):
            """This tile's values times their weights, [128, COLUMNS] for each part."""

            def multiplied(*parts):
                def products(*accs):
                    for acc, part in zip(accs, parts, strict=True):
                        plgpu.wgmma(acc, part.T, narrow.T)
                    plgpu.wgmma_wait(0)
                    return [acc[...] for acc in accs]

                return pl.run_scoped(products, *[plgpu.ACC((128, COLUMNS), f32)] * len(parts))

            if v.bits == 16:

                @pl.when(left < TILE)
                def _():
                    wide = (TILE, v.width)
                    for c in range(v.parts):
                        own = vs[0].at[slot, c]
                        place = plgpu.broadcasted_iota(
                            jnp.int32, wide, 0, layout=plgpu.Layout.WGMMA
                        )
                        found = plgpu.load(own, layout=plgpu.Layout.WGMMA)
                        nothing = plgpu.layout_cast(jnp.zeros(wide, plan.dtype), plgpu.Layout.WGMMA)
                        own[...] = jnp.where(place < left, found, nothing)
                    plgpu.commit_smem()

                return multiplied(*(vs[0].at[slot, c] for c in range(v.parts)))
            out, mine = [], vopen.at[wg]
            for c in range(v.parts):
                if c and not AUTOMATIC_BARRIERS:
                    plgpu.commit_smem()  # the last part is multiplied by all warps
                for i in range(v.halves):
                    part = opened(vs[0].at[slot, c], vs[1].at[slot], i, v.bits, plan.dtype)
                    (mine.at[:, pl.ds(i * v.width, v.width)])[...] = part
                plgpu.commit_smem()
                out += multiplied(mine)
            return out

        spread = lambda a, size: lax.broadcast_in_dim(a, (size, COLUMNS), (1,))

        @pl.when(wg < 2)
        def _computing():
            plgpu.set_max_registers(232, action="increase")

            def unit(u, carry):
                @pl.when(u == 0)
                def _():
                    plgpu.barrier_wait(bars["fast"])

                plgpu.barrier_wait(bars["slow_full"])

                def step(n, carry):
                    top, total, accs = carry
                    i = u * steps + 2 * n + wg
                    slot, left = slot_of(i), length - i * TILE
                    plgpu.barrier_wait(bars["k_full"].at[slot])
                    score = scores(slot, left)
                    plgpu.barrier_arrive(bars["k_empty"].at[slot])
                    high = jnp.maximum(top, largest(score, scratch.at[wg], interpret))
                    weight = jnp.exp2(score - spread(high, TILE))
                    shrink = jnp.exp2(top - high)
                    total = total * spread(shrink, TILE) + weight
                    # Two in turn: a slow warp may still multiply while a fast one writes the next.
                    narrow = weights.at[2 * wg + lax.rem(n, 2)]
                    narrow.T[...] = plgpu.layout_cast(
                        weight.astype(plan.dtype), plgpu.Layout.WGMMA_TRANSPOSED
                    )
                    plgpu.commit_smem()
                    plgpu.barrier_wait(bars["v_full"].at[slot])
                    more = averages(slot, left, narrow)
                    plgpu.barrier_arrive(bars["v_empty"].at[slot])
                    accs = [a * spread(shrink, 128) + m for a, m in zip(accs, more, strict=True)]
                    return high, total, accs

                some = jnp.minimum(tiles - u * steps, steps)
                carry = lax.fori_loop(0, lax.div(some + 1 - wg, 2), step, carry)
                plgpu.barrier_arrive(bars["slow_empty"])
                return carry

            constant = lambda shape, value, layout: plgpu.layout_cast(
                jnp.full(shape, value, f32), layout
            )
            carry = (
                constant((COLUMNS,), HIDDEN, columns),
                constant((TILE, COLUMNS), 0, plgpu.Layout.WGMMA),
                [constant((128, COLUMNS), 0, plgpu.Layout.WGMMA)] * v.parts,
            )
            units = lax.div(tiles + (steps - 1), steps)
            top, total, accs = lax.fori_loop(0, units, unit, carry)
            for c, acc in enumerate(accs):
                sum_ref[b, g, x, wg, c] = acc
            top_ref[b, g, x, wg] = spread(top, TILE)
            total_ref[b, g, x, wg] = total

    B, g, C = plan.batch, plan.groups, plan.runs
    out = lambda *shape: jax.ShapeDtypeStruct((B, g, C, 2, *shape), f32)
    kernel = plgpu.kernel(
        lowrank_decode,
        out_type=(out(v.parts, 128, COLUMNS), out(TILE, COLUMNS), out(TILE, COLUMNS)),
        grid=(C, g, B),
        grid_names=("x", "g", "b"),
        num_threads=3,
        thread_name="wg",
        scratch_types=scratch_for(plan),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=not AUTOMATIC_BARRIERS
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )
    return jax.jit(kernel)  # one lowering for all calls of a program
