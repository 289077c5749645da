"""Packing, quantizing and storing latents, against plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lowrank_attention.latents import Latents, block_bytes, dense
from palu_jax.format import FormatError, LatentFormat
from palu_jax.hadamard import rotation
from palu_jax.latent import Exact, PaluCache, empty_latents, quantize_latents

jit_encode = jax.jit(quantize_latents, static_argnums=(1, 2, 3))
jit_write = jax.jit(PaluCache.write, donate_argnums=0)


@pytest.mark.quick_cases("blocks0-2", "blocks1-3", "blocks2-4", "blocks2-8")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("blocks", [(12,), (8, 8), (7, 5, 5)])
def test_quantization_covers_the_range_and_is_off_by_half_a_step(bits, blocks):
    rng = np.random.default_rng(bits)
    z = rng.normal(size=(2, 5, sum(blocks))) * np.exp(rng.normal(size=(2, 5, 1)) * 3)
    z += rng.normal(size=(2, 5, 1)) * 10  # an offset much larger than the range, too
    found = quantize_latents(jnp.asarray(z, jnp.float32), bits, blocks)
    value, step = np.asarray(dense(found), np.float64), np.asarray(found.step_BSg, np.float64)
    assert found.codes_BSP.shape[-1] == sum(block_bytes(b, bits) for b in blocks)
    for i, (start, size) in enumerate(zip(np.cumsum((0, *blocks)), blocks, strict=False)):
        part = slice(start, start + size)
        spread = np.ptp(z[..., part], axis=-1)
        error = np.abs(value[..., part] - z[..., part])
        assert (error <= step[..., i : i + 1] * 0.5001 + 1e-5 * np.abs(z[..., part])).all()
        # bfloat16's offset may lie an 1/128 of itself below the least value.
        room = np.abs(z[..., part]).max(-1) / 64
        assert (step[..., i] * (2**bits - 1) <= (spread + room) * 1.02).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4, 1e-20, 7e4])
def test_constant_blocks_survive(value):
    z = jnp.full((1, 2, 8), value, jnp.float32)
    np.testing.assert_allclose(dense(quantize_latents(z, 2, (8,))), z, rtol=2.0**-7, atol=1e-25)


@pytest.mark.slow
def test_more_bits_and_a_shorter_range_lower_the_error():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 128)), jnp.float32)
    error = lambda *a: float(jnp.mean((dense(quantize_latents(z, *a)) - z) ** 2))
    plain = [error(b, (128,)) for b in (2, 3, 4, 8)]
    assert plain == sorted(plain, reverse=True)
    assert error(2, (128,), (1.0, 0.8, 0.6)) < 0.75 * plain[0]
    assert LatentFormat(2, 2).shares(2)[0] == 1.0 and LatentFormat(4, 4).shares(4) == (1.0,)


HARD = {
    "an offset of a million ranges": lambda z: 1000 + 1e-3 * z,
    "ranges below float32's epsilon": lambda z: 3e4 + 1e-4 * z,
    "tiny": lambda z: 1e-18 * z,
    "huge": lambda z: 1e30 * z,
    "one outlier": lambda z: np.where(np.arange(16) == 5, 500.0, z),
    "both signs of one number": lambda z: np.where(z > 0, 2.0, -2.0),
    "zeros": lambda z: 0 * z,
}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("clip", [(1.0,), (1.0, 0.9, 0.7)], ids=len)
@pytest.mark.parametrize("name", HARD)
def test_hard_blocks(name, clip, bits):
    """No NaN, nothing clipped over the whole range, half a step of error, beside bfloat16's."""
    z = HARD[name](np.random.default_rng(0).normal(size=(1, 9, 16))).astype(np.float32)
    found = jit_encode(z, bits, (16,), clip)
    value, z = np.asarray(dense(found), np.float64), z.astype(np.float64)
    step, low = (np.asarray(a, np.float64) for a in (found.step_BSg, found.offset_BSg))
    assert np.isfinite(value).all() and (step > 0).all()
    if clip == (1.0,):
        size = np.abs(z).max(-1, keepdims=True)
        near = 2e-7 * size  # of float32
        assert (low <= z + near).all() and (low + step * (2**bits - 1) >= z - near).all()
        assert (np.abs(value - z) <= step * 0.5001 + near).all()
        tight = np.ptp(z, axis=-1, keepdims=True) + size * 2.0**-6
        assert (step * (2**bits - 1) <= tight * 1.02 + 1e-25).all()
    else:
        whole = np.asarray(dense(jit_encode(z.astype(np.float32), bits, (16,), (1.0,))), np.float64)
        worse = ((value - z) ** 2).sum(-1) - ((whole - z) ** 2).sum(-1)
        assert (worse <= 1e-5 * (z**2).sum(-1)).all()  # as good as the whole range, or better


UNKNOWN = {52, 92, 100, 116, 156, 172, 184, 188, 232, 236, 244, 260, 268, 292}
"""Multiples of 4 up to 300 that doubling and Paley's constructions over primes do not reach."""


@pytest.mark.parametrize(
    "sizes",
    [
        (*range(1, 46), 52, 64),
        pytest.param(
            (*range(46, 100), *range(100, 301, 4), 101, 129, 250, 299), marks=pytest.mark.slow
        ),
    ],
    ids=["small", "large"],
)
def test_rotations_of_every_size(sizes):
    """Orthogonal, first row constant; ±1/sqrt(n) throughout where a Hadamard matrix is known."""
    for size in sizes:
        q = rotation(size)
        assert q.shape == (size, size) and q.dtype == np.float64
        assert np.abs(q @ q.T - np.eye(size)).max() < 1e-9
        assert np.abs(q[0] - size**-0.5).max() < 1e-9
        flat = np.abs(np.abs(q) - size**-0.5).max() < 1e-12
        assert flat == (size in (1, 2) or (size % 4 == 0 and size not in UNKNOWN)), size
    np.testing.assert_array_equal(rotation(30), rotation(30))  # no randomness from run to run


@pytest.mark.parametrize("bits", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_rotation_helps_spiky_latents(bits):
    rng = np.random.default_rng(1)
    z = rng.normal(size=(1, 256, 32)) * np.geomspace(20, 0.1, 32)
    q = rotation(32)
    mse = lambda z, back: np.mean((np.asarray(dense(quantize_latents(jnp.asarray(z), bits, (32,)))) @ back - z @ back) ** 2)  # fmt: skip # noqa: E501
    assert mse((z @ q).astype(np.float32), q.T) < 0.7 * mse(z.astype(np.float32), np.eye(32))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(key_bits=5), "key_bits"),
        (dict(window=-1), "window"),
        (dict(clip=()), "clip"),
        (dict(clip=(1.5,)), "clip"),
    ],
)
def test_impossible_formats(change, word):
    with pytest.raises(FormatError, match=word):
        LatentFormat(**change)


def test_blocks_must_divide_ranks():
    assert LatentFormat(4, 4, block=8).blocks((16, 8)) == (8, 8, 8)
    with pytest.raises(FormatError, match="rank of 12"):
        LatentFormat(4, 4, block=8).blocks((16, 12))


@pytest.mark.parametrize("sinks", [0, 2])
def test_exact_rows_are_those_of_the_first_and_newest_slots(sinks):
    """Against a list: write chunks of many sizes, move rows, and look at what is promised."""
    slots, window, scratch = 40, 5, 6
    rng = np.random.default_rng(0)
    exact = Exact.empty(1, slots, 2, sinks, window, scratch, jnp.float32)
    written, at = np.zeros((slots, 2), np.float32), 0
    write = jax.jit(Exact.write)
    for count in (1, 3, 12, 1, 1, 4, 1):
        fresh = rng.normal(size=(1, count, 2)).astype(np.float32)
        view = np.asarray(exact.view(jnp.asarray(fresh), at, slots))[0]
        exact = write(exact, jnp.asarray(fresh), at)
        written[at : at + count] = fresh[0]
        at += count
        seen = [*range(min(sinks, at)), *range(max(0, at - count - window), at)]
        np.testing.assert_array_equal(view[seen], written[seen])
    # A padded chunk, as of a prompt: three rows are text, and what is behind them is not kept.
    fresh = rng.normal(size=(1, 16, 2)).astype(np.float32)
    exact = write(exact, jnp.asarray(fresh), at, jnp.int32(3))
    written[at : at + 3] = fresh[0, :3]
    at += 3
    # A tree of five nodes behind `at`, of which the first, third and fourth are kept.
    tree = rng.normal(size=(1, 5, 2)).astype(np.float32)
    exact = write(exact, jnp.asarray(tree), at)
    exact = exact.move(jnp.array([at, at + 2, at + 3]), at)
    written[at : at + 3] = tree[0, [0, 2, 3]]
    at += 3
    view = np.asarray(exact.view(jnp.zeros((1, 1, 2)), at, slots))[0]
    np.testing.assert_array_equal(view[at - window : at], written[at - window : at])
    np.testing.assert_array_equal(view[:sinks], written[:sinks])


@pytest.mark.slow
def test_writing_leaves_older_codes_alone():
    form = LatentFormat(3, 2, sinks=1, window=2)
    cache = PaluCache.empty(form, ((7, 5), (8, 8)), True, 1, 12, 4, "float32")
    rng = np.random.default_rng(0)
    new = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    cache = jit_write(cache, new(1, 6, 12), new(1, 6, 16), new(1, 6), 0)
    before = jax.tree.map(np.asarray, (cache.k, cache.v, cache.mean_coefficient_BS))
    cache = jit_write(cache, new(1, 1, 12), new(1, 1, 16), new(1, 1), 6)
    for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves((cache.k, cache.v, cache.mean_coefficient_BS))
    ):
        np.testing.assert_array_equal(a[:, :6], np.asarray(b)[:, :6])
        assert np.asarray(b)[:, 6].any()


def test_moved_rows_are_the_same_bits():
    form = LatentFormat(4, 3, sinks=2, window=3)
    cache = PaluCache.empty(form, ((6,), (5, 3)), True, 2, 16, 6, "float32")
    rng = np.random.default_rng(1)
    new = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    cache = jit_write(cache, new(2, 12, 6), new(2, 12, 8), new(2, 12), 0)
    moved = jax.jit(PaluCache.move)(cache, jnp.array([7, 9, 10]), jnp.int32(7))
    slots = lambda c: jax.tree.leaves((c.k, c.v, c.mean_coefficient_BS))
    for old, got in zip(slots(cache), slots(moved), strict=True):
        old, got = np.asarray(old), np.asarray(got)
        np.testing.assert_array_equal(got[:, 7:10], old[:, [7, 9, 10]])
        np.testing.assert_array_equal(np.delete(got, [7, 8, 9], 1), np.delete(old, [7, 8, 9], 1))
    view = lambda c: np.asarray(c.exact.view(jnp.zeros((2, 1, 14)), 15, 16))
    np.testing.assert_array_equal(view(moved)[:, 7:10], view(cache)[:, [7, 9, 10]])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1,) * 9, (4, 5)], ids=str)
def test_appending_equals_recomputing(sizes):
    """Bit for bit, however many tokens come at a time; buffers are reused when donated."""
    form, ranks = LatentFormat(2, 3, block=4), ((8, 4), (4, 4))
    rng = np.random.default_rng(2)
    zk, zv = (jnp.asarray(rng.normal(size=(2, 9, r)), jnp.float32) for r in (12, 8))
    lead = jnp.asarray(rng.normal(size=(2, 9)), jnp.float32)
    whole = PaluCache.write(
        PaluCache.empty(form, ranks, True, 2, 12, 0, "float32"), zk, zv, lead, 0
    )
    cache, at = PaluCache.empty(form, ranks, True, 2, 12, 0, "float32"), 0
    places = lambda c: sorted(a.unsafe_buffer_pointer() for a in jax.tree.leaves(c))
    before = places(cache)
    for size in sizes:
        part = slice(at, at + size)
        cache = jit_write(cache, zk[:, part], zv[:, part], lead[:, part], at)
        at += size
    assert places(cache) == before
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def bytes_of(tree):
    return sum(a.nbytes for a in jax.tree.leaves(tree))


def test_live_bytes():
    """Llama-2-7B's sizes at a rank cut of 30% and 2 bits: over 91% less, metadata counted.

    Full keys and values take 2 * 4096 * 2 bytes a token and layer.
    """
    slots, full = 64, 64 * 2 * 4096 * 2
    two = functools.partial(LatentFormat, 2, 2)
    joint = PaluCache.empty(two(), ((2864,), (2864,)), False, 1, slots, 0, "bfloat16")
    assert bytes_of(joint) == slots * 2 * (2864 // 4 + 4)
    assert 1 - bytes_of(joint) / full > 0.91
    groups = PaluCache.empty(two(), ((358,) * 8,) * 2, False, 1, slots, 0, "bfloat16")
    assert bytes_of(groups) == slots * 16 * (90 + 4)
    assert 0.905 < 1 - bytes_of(groups) / full < 0.91
    wide = empty_latents(1, slots, 16, (2864,), "bfloat16")
    assert bytes_of(wide) == slots * 2864 * 2
    assert isinstance(wide, Latents) and wide.step_BSg is None


def test_live_bytes_of_exact_rows_and_leads():
    """32 sinks, a window of 20 and 7 scratch slots beside packed codes of 4 and 3 bits."""
    form = LatentFormat(4, 3, sinks=32, window=20)
    cache = PaluCache.empty(form, ((24, 17), (10, 9)), True, 3, 100, 7, "float16")
    codes = (12 + 9) + (3 + 2) + (3 + 2)  # 24 and 17 of 4 bits; 10 and 9 of 3, in planes
    assert bytes_of((cache.k, cache.v)) == 3 * 100 * (codes + 4 * (2 + 2))
    assert bytes_of(cache.mean_coefficient_BS) == 3 * 100 * 2
    assert bytes_of(cache.exact) == 3 * (32 + 20 + 7) * (24 + 17 + 10 + 9) * 2
    few = PaluCache.empty(form, ((24, 17), (10, 9)), True, 3, 40, 7, "float16")
    assert few.exact.rows_BXR.shape == (3, 32 + 27, 60)  # never more in the ring than slots
