"""The reference against float64 loops, the kernels (interpreted) against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bit_fields import pack_codes
from pallas_kernels.float64 import f64
from pallas_kernels.float64 import lowrank_attention as in_float64
from pallas_kernels.lowrank_attention import Latents, lowrank_attention, why_not
from pallas_kernels.lowrank_attention.absorption import FAST, SLOW, absorbed, basis, can_absorb
from pallas_kernels.lowrank_attention.rebuild import Rows
from pallas_kernels.lowrank_attention.reference import group_heads
from pallas_kernels.lowrank_attention.tiles import tiling


def latents(rng, batch, slots, ranks, bits, dtype=jnp.bfloat16):
    """Random latents; codes near what a cache of unit-variance latents would hold."""
    if bits == 16:
        return Latents(
            jnp.asarray(rng.normal(size=(batch, slots, sum(ranks))), dtype), None, None, 16, ranks
        )
    draw = lambda r: jnp.asarray(rng.integers(0, 2**bits, (batch, slots, r)), jnp.uint8)
    codes = jnp.concatenate([pack_codes(draw(r), bits) for r in ranks], -1)
    step = rng.uniform(3, 5, (batch, slots, len(ranks))) / 2**bits
    offset = -step * (2**bits - 1) / 2 + rng.normal(size=step.shape) * 0.1
    return Latents(
        codes, jnp.asarray(step, jnp.bfloat16), jnp.asarray(offset, jnp.bfloat16), bits, ranks
    )


def problem(
    seed=0, batch=2, slots=70, positions=1, groups=2, heads=2, shared=1, size=32, k_rank=16,
    v_rank=48, bits=16, dtype=jnp.bfloat16, ragged=True, extras=(), theta=1e4,
):  # fmt: skip
    """(positional arguments, keyword arguments) of `lowrank_attention`; `heads` are a group's."""
    rng = np.random.default_rng(seed)
    K, N = groups * heads, groups * heads * shared
    draw = lambda *shape, scale=1.0: jnp.asarray(rng.normal(size=shape) * scale, dtype)
    z_dtype = dtype if bits == 16 else jnp.bfloat16
    k = latents(rng, batch, slots, (k_rank,) * groups, bits, z_dtype)
    v = latents(rng, batch, slots, (v_rank,) * groups, bits, z_dtype)
    positional = (
        draw(batch, positions, N, size),
        k,
        v,
        draw(groups, k_rank, heads, size, scale=k_rank**-0.5),
        draw(groups, v_rank, heads, size, scale=v_rank**-0.5),
        (theta ** (-np.arange(size // 2) / (size // 2))).astype(np.float32),
        jnp.asarray([slots, slots // 3][:batch] if ragged else [slots] * batch, jnp.int32),
    )
    mask = rng.random((1, positions, slots)) < 0.7
    mask[..., 0] = True
    makers = {
        "mask": lambda: dict(mask_BTS=jnp.asarray(mask)),
        "position": lambda: dict(
            position_BS=jnp.asarray(rng.integers(0, 90, (1, slots)), jnp.int32)
        ),
        "bias": lambda: dict(k_bias_KH=draw(K, size), v_bias_KH=draw(K, size)),
        "mean": lambda: dict(
            mean_coefficient_BS=draw(batch, slots), k_mean_KH=draw(K, size), v_mean_KH=draw(K, size)
        ),
        "norm": lambda: dict(k_norm_H=draw(size), norm_eps=1e-5),
    }
    return positional, {k: v for name in extras for k, v in makers[name]().items()}


ALL = ("mask", "position", "bias", "mean", "norm")


def quickly(*positional, norm_eps=1e-6, **options):
    """`lowrank_attention` compiled in a hurry; implementation and interpret are static."""
    q, k, v, up_k, up_v, frequencies, lengths = positional
    static = {
        name: options.pop(name) for name in ("implementation", "interpret") if name in options
    }

    def f(q, k, v, up_k, up_v, lengths, options):
        return lowrank_attention(
            q, k, v, up_k, up_v, frequencies, lengths, **options, norm_eps=norm_eps, **static
        )

    quick = jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})
    return quick(q, k, v, up_k, up_v, lengths, options)


def reference(*positional, **options):
    return quickly(*positional, **options, implementation="xla")


def interpreted(*positional, **options):
    return quickly(*positional, **options, implementation="triton", interpret=True)


slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow)
"""One more case of a branch that a quick one takes, too."""
WAYS = pytest.mark.parametrize("way", [reference, interpreted])


def error(got, want):
    """|got - want| / |want|, which is not a number if anything in it is not."""
    return np.linalg.norm(f64(got) - f64(want)) / np.linalg.norm(f64(want))


# ------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(bits=4, shared=3, positions=2, extras=ALL),
        dict(bits=8, extras=("mask", "mean")),
        dict(bits=3, k_rank=24, extras=("bias",)),
        dict(bits=2, shared=2, extras=("position", "norm")),
    ],
    ids=str,
)
def test_reference_is_the_formula(settings):
    positional, options = problem(slots=23, dtype=jnp.float32, **settings)
    got = reference(*positional, **options)
    assert error(got, in_float64(*positional, **options)) < 2e-6


@pytest.mark.slow
def test_unequal_ranks_and_a_smaller_last_group():
    """3 kv heads in groups of 2 and 1, of ranks 16 and 8."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    k, v = (latents(rng, 1, 9, ranks, 16, jnp.float32) for ranks in ((16, 8), (8, 24)))
    up_k, up_v = draw(2, 16, 2, 8), draw(2, 24, 2, 8)
    up_k, up_v = up_k.at[1, 8:].set(0), up_v.at[0, 8:].set(0)
    frequencies, lengths = np.asarray([1, 0.5, 0.2, 0.1], np.float32), jnp.asarray([9])
    positional = draw(1, 2, 6, 8), k, v, up_k, up_v, frequencies, lengths
    got = lowrank_attention(*positional, kv_heads=3)
    assert error(got, in_float64(*positional, kv_heads=3)) < 2e-6
    assert group_heads(6, 2, 2, 3) == (2, 1) == group_heads(9, 2, 2, None)
    with pytest.raises(ValueError, match="fit no"):
        group_heads(7, 2, 2, None)


def test_blocks_smaller_than_a_group():
    positional, _ = problem(dtype=jnp.float32, slots=9)
    q, k, v, *rest = positional
    small = Latents(k.codes_BSP, None, None, 16, (8,) * 4)
    np.testing.assert_array_equal(
        lowrank_attention(q, small, v, *rest), lowrank_attention(q, k, v, *rest)
    )
    odd = Latents(k.codes_BSP, None, None, 16, (8, 8, 12, 4))
    with pytest.raises(ValueError, match="k_ranks"):
        lowrank_attention(q, odd, v, *rest)
    again = lowrank_attention(q, odd, v, *rest, k_ranks=(16, 16))
    np.testing.assert_array_equal(again, lowrank_attention(q, k, v, *rest))


def poisoned(z: Latents, lengths):
    """The latents with what must not be looked at replaced by NaN (codes by 255)."""
    ok = jnp.arange(z.codes_BSP.shape[1])[None] < lengths[:, None]
    bad = lambda a, value: jnp.where(ok[..., None], a, jnp.asarray(value, a.dtype))
    if z.bits == 16:
        return Latents(bad(z.codes_BSP, jnp.nan), None, None, 16, z.blocks)
    scale = bad(z.step_BSg, jnp.nan), bad(z.offset_BSg, jnp.nan)
    return Latents(bad(z.codes_BSP, 255), *scale, z.bits, z.blocks)


@pytest.mark.quick_cases("4-reference")
@WAYS
@pytest.mark.parametrize("bits", [slow(16), 4])
def test_slots_beyond_the_length_are_not_looked_at(bits, way):
    positional, _ = problem(bits=bits, k_rank=32, v_rank=32)
    q, k, v, *rest, lengths = positional
    clean = way(q, k, v, *rest, lengths)
    dirty = way(q, poisoned(k, lengths), poisoned(v, lengths), *rest, lengths)
    np.testing.assert_array_equal(f64(dirty), f64(clean))


@pytest.mark.quick_cases("1-reference")
@WAYS
@pytest.mark.parametrize("shared", [1, slow(2)])
def test_rows_that_see_nothing_are_finite(shared, way):
    (*positional, _), _ = problem(shared=shared, k_rank=32)
    nothing = jnp.zeros((1, 1, 70), bool)
    for lengths, mask in ((jnp.asarray([0, 5]), None), (jnp.asarray([70, 5]), nothing)):
        y = way(*positional, lengths, mask_BTS=mask)
        assert np.isfinite(f64(y)).all()


# --------------------------------------------------------------------------------- the kernels

CASES = {
    "absorbed": dict(size=64, k_rank=32, extras=("mask",)),
    "absorbed 4 bits": dict(size=64, k_rank=32, v_rank=96, bits=4),
    "absorbed 8 bits, long": dict(size=64, v_rank=16, bits=8, slots=700, batch=1, groups=1),
    "rebuilt, three heads": dict(heads=3, groups=1, shared=3, extras=("mask", "norm")),
    "rebuilt 4 bits, everything": dict(k_rank=32, v_rank=96, bits=4, shared=2, extras=ALL),
    "tree 8 bits, everything": dict(bits=8, shared=3, positions=3, extras=ALL),
    "many rows": dict(shared=5, positions=16, batch=1, groups=1, extras=("mask",)),
    "latents out": dict(shared=2, up_v=False, extras=("bias",)),
}


MORE = ("absorbed 8 bits, long", "rebuilt, three heads", "many rows", "latents out")


@pytest.mark.quick_cases("rebuilt 4 bits, everything")
@pytest.mark.parametrize("case", [slow(case) if case in MORE else case for case in CASES])
def test_kernels_are_the_reference(case):
    """bfloat16 rounds to 1 part in 256 in a few places; 0.8 % covers all of them."""
    settings = dict(CASES[case])
    with_values = settings.pop("up_v", True)
    positional, options = problem(**settings)
    if not with_values:
        positional = (*positional[:4], None, *positional[5:])
    assert why_not(*positional, **options) is None
    got, want = interpreted(*positional, **options), reference(*positional, **options)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert error(got, want) < 8e-3
    is_absorbed = case.startswith("absorbed")
    q, *_, up_k, _, frequencies, _ = positional
    keys = [options.get(n) for n in ("position_BS", "k_bias_KH", "k_mean_KH", "k_norm_H")]
    assert can_absorb(q, up_k.shape[2], up_k.shape[0], frequencies, 256, keys) == is_absorbed


def test_large_scores_do_not_overflow():
    """Scores of several hundred, where one slot takes all the weight."""
    (q, *rest), _ = problem(size=64, k_rank=32, batch=1, ragged=False)
    assert error(interpreted(q * 60, *rest), reference(q * 60, *rest)) < 0.05


def test_absorbed_matrices_give_rotated_scores():
    """z @ (cos C + sin D) is q . RoPE(z U), in float64."""
    rng = np.random.default_rng(0)
    q, up = rng.normal(size=(1, 1, 2, 8)), rng.normal(size=(1, 5, 2, 8))
    z, angle = rng.normal(size=5), rng.normal(size=4)
    c, d = (f64(a)[0, 0] for a in absorbed(jnp.asarray(q, jnp.float32), jnp.asarray(up)))
    for k in range(2):
        key = z @ up[0, :, k]
        turned = (key[:4] + 1j * key[4:]) * np.exp(1j * angle)
        want = np.concatenate([turned.real, turned.imag]) @ q[0, 0, k]
        got = z @ c[:, k] @ np.cos(angle) + z @ d[:, k] @ np.sin(angle)
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("span", [256, 1024])
def test_few_functions_stand_in_for_the_slow_pairs(theta, span):
    slow = theta ** (-np.arange(FAST, 64) / 64)
    place, parts, worst = basis(tuple(slow.tolist()), span, SLOW)
    at = np.arange(span)[:, None] * slow[None]
    np.testing.assert_allclose(
        place @ parts.T, np.concatenate([np.cos(at), np.sin(at)], 1), atol=1e-4
    )
    assert worst < 1e-4 and np.abs(place).max() <= 1 + 1e-12


def test_too_long_a_span_is_noticed():
    slow = tuple((1e4 ** (-np.arange(16, 64) / 64)).tolist())
    assert basis(slow, 2048, 32)[2] > 0.1
    (q, *_), _ = problem(size=128, k_rank=16, v_rank=16, slots=3)
    whole = np.asarray([1e4 ** (-i / 64) for i in range(64)], np.float32)
    assert can_absorb(q, 2, 2, whole, 1024, []) and not can_absorb(q, 2, 2, whole, 2048, [])
    assert not can_absorb(q, 2, 2, jnp.asarray(whole), 1024, [])  # unknown when it is traced


def test_spans_shrink_until_a_gpu_is_busy():
    assert tiling(1, 8, 65536).span == 1024
    assert tiling(1, 8, 16384).span == 512
    assert tiling(1, 8, 4096).span == 256 == tiling(1, 1, 256).span
    assert tiling(32, 8, 4096).span == 1024


@pytest.mark.parametrize("heads, needed", [(4, 1), (4, 7), (3, 9), (1, 64), (2, 112), (8, 12)])
def test_rows_come_back_where_they_were(heads, needed):
    rows = Rows(2, heads, needed)
    T = 1 if needed % 4 else 4
    N = 2 * heads * needed // T
    q = jnp.arange(3 * T * N * 2, dtype=jnp.float32).reshape(3, T, N, 2)
    placed = rows.arranged(q)
    B, g, K, blocks, each, H = placed.shape
    together = placed.reshape(B, g, K // rows.together, rows.together, blocks, each, H)
    sets = together.swapaxes(3, 4).reshape(B, g * rows.sets, rows.together * each, H)
    assert sets.shape[2] <= 64 and sets.shape[2] & (sets.shape[2] - 1) == 0
    np.testing.assert_array_equal(rows.restored(sets, T), q)


# ------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize(
    "settings, reason",
    [
        (dict(bits=3, k_rank=24), "3-bit k"),
        (dict(bits=2), "2-bit k"),
        (dict(dtype=jnp.float32), "float32 k"),
        (dict(dtype=jnp.float32, bits=8), "float32 queries"),
        (dict(k_rank=24), "not a multiple of 16"),
        (dict(bits=4, k_rank=48), "not a multiple of 32"),
        (dict(size=96), "head size 96"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_has_a_reason(settings, reason):
    positional, options = problem(slots=9, **settings)
    assert reason in why_not(*positional, **options)
    with pytest.raises(NotImplementedError, match=reason):
        lowrank_attention(*positional, implementation="triton", interpret=True, **options)


def test_without_a_kernel_the_reference_answers():
    positional, options = problem(slots=9, bits=3, k_rank=24)
    fallen = quickly(*positional, interpret=True, **options)
    np.testing.assert_array_equal(f64(fallen), f64(reference(*positional, **options)))


def test_wrong_arguments_are_refused():
    positional, _ = problem(slots=9)
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        lowrank_attention(*positional, implementation="cuda")
    with pytest.raises(ValueError, match="mean_coefficient_BS"):
        lowrank_attention(*positional, k_mean_KH=jnp.zeros((4, 32), jnp.bfloat16))
    unequal = Latents(positional[1].codes_BSP, None, None, 16, (20, 12))
    assert "differ between groups" in why_not(positional[0], unequal, *positional[2:])


def test_one_program_serves_every_length():
    positional, _ = problem(slots=40)
    traces = []

    @jax.jit
    def f(lengths):
        traces.append(1)
        return lowrank_attention(*positional[:-1], lengths)

    f(jnp.asarray([3, 4])), f(jnp.asarray([40, 1]))
    assert len(traces) == 1
