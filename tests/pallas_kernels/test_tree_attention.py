"""Tree attention: the kernel in the interpreter and the reference against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.float64 import tree_attention as expected
from pallas_kernels.lowering import lower_for
from pallas_kernels.tree_attention import tree_attention, why_not
from pallas_kernels.tree_attention.tiles import TILE, cut

slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow)
"""One more case of a branch that a quick one takes, too."""
# tokens, query heads, kv heads, head size, slots
SHAPES = [
    (6, 28, 4, 128, 512),  # Qwen2.5-7B's draft step
    (1, 8, 8, 64, 64),
    slow((6, 40, 8, 128, 128)),
    (37, 8, 2, 32, 192),  # blocks of rows with a part behind the last
    (5, 3, 1, 64, 1088),  # splits that do not divide the tiles
]


def inputs(T, N, K, H, S, dtype=jnp.bfloat16, seed=0, seen=0.3):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32) * 2, dtype)
    mask = rng.random((1, T, S)) < seen
    mask[:, np.arange(T), rng.integers(0, S, T)] = True
    return draw(1, T, N, H), draw(1, S, K, H), draw(1, S, K, H), jnp.asarray(mask)


@pytest.mark.quick_cases(
    "kernel-shape0-bfloat16", "kernel-shape4-bfloat16", "reference-shape1-bfloat16"
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, slow(jnp.float16)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernel"])
def test_it_is_the_attention(shape, dtype, interpret):
    arguments = inputs(*shape, dtype)
    y = tree_attention(*arguments, interpret=interpret)
    assert y.dtype == dtype and y.shape == arguments[0].shape
    step = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-11
    np.testing.assert_allclose(np.asarray(y, np.float64), expected(*arguments), atol=8 * step)


@pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernel"])
@pytest.mark.parametrize("T", [1, 6, slow(37)])
def test_sequences_in_rows_of_a_cache_read_their_own_slots_alone(T, interpret):
    """Four sequences of very different length, in another order than their rows; one has a row that
    is not there. What is behind a sequence's own slots is NaN."""
    live = [70, 512, 1, 200]
    row = [3, 0, 4, 9]
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.standard_normal((4, T, 8, 64), np.float32), jnp.bfloat16)
    k, v = (
        jnp.asarray(rng.standard_normal((5, 512, 2, 64), np.float32), jnp.bfloat16) for _ in "kv"
    )
    mask = rng.random((4, T, 512)) < 0.3
    mask[:, :, 0] = True
    mask &= np.arange(512) < np.array(live)[:, None, None]
    if interpret:  # the kernel does not even look there
        far = np.arange(512)[None] >= np.array([-(-n // TILE) * TILE for n in live])[:, None]
        dirty = lambda a: a.at[jnp.array(row[:3])].set(
            jnp.where(far[:3, :, None, None], jnp.nan, a[jnp.array(row[:3])])
        )  # fmt: skip
    else:
        dirty = lambda a: a
    rows = jnp.array(row, jnp.int32), jnp.array(live, jnp.int32)
    y = tree_attention(q, dirty(k), dirty(v), jnp.asarray(mask), rows=rows, interpret=interpret)
    for b in range(3):
        one = q[b : b + 1], k[row[b]][None], v[row[b]][None], mask[b : b + 1]
        np.testing.assert_allclose(np.asarray(y[b : b + 1], np.float64), expected(*one), atol=0.04)


def test_a_batch_lowers_to_the_same_two_kernels(monkeypatch):
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    array = jax.ShapeDtypeStruct
    cache, number = array((8, 1024, 4, 128), jnp.bfloat16), array((4,), jnp.int32)
    for T in (1, 6, 289):
        q, mask = array((4, T, 28, 128), jnp.bfloat16), array((4, T, 1024), jnp.bool_)
        given = q, cache, cache, mask, (number, number)
        program = lower_for(lambda *a: tree_attention(*a[:4], rows=a[4]), *given)
        assert program.count("__gpu$xla.gpu.triton") == (2 if cut(T * 7, 4, 1024, 4)[2] > 1 else 1)


@pytest.mark.parametrize("alone", [slow(0), 70, slow(511)])
def test_a_row_may_see_one_slot_alone(alone):
    """Whole tiles and whole splits then hold nothing for it."""
    q, k, v, mask = inputs(6, 28, 4, 128, 512)
    mask = mask.at[:, 2].set(False).at[:, 2, alone].set(True)
    y = tree_attention(q, k, v, mask, interpret=True)
    want = np.repeat(np.asarray(v[0, alone], np.float32), 7, axis=0)
    np.testing.assert_array_equal(np.asarray(y[0, 2], np.float32), want)


@pytest.mark.slow
def test_slots_behind_the_mask_are_not_looked_at():
    q, k, v, mask = inputs(6, 28, 4, 128, 512)
    for interpret in (False, True):
        short = tree_attention(q, k[:, :192], v[:, :192], mask[:, :, :192], interpret=interpret)
        long = tree_attention(
            q, k.at[:, 192:].set(jnp.nan), v, mask[:, :, :192], interpret=interpret
        )
        np.testing.assert_array_equal(np.asarray(long, np.float32), np.asarray(short, np.float32))


@pytest.mark.parametrize("M", [1, 16, 42, 64, 65, 2023])
@pytest.mark.parametrize("K, S", [(1, 64), (4, 1024), (8, 2368), (2, 192)])
def test_every_row_and_every_tile_is_taken(M, K, S):
    rows, blocks, splits = cut(M, K, S)
    assert rows * blocks >= M > rows * (blocks - 1) and rows & (rows - 1) == 0
    tiles = S // TILE
    each = -(-tiles // splits)
    assert (splits - 1) * each < tiles <= splits * each


@pytest.mark.parametrize("T", [1, 6, slow(64), 289, slow(512)])
@pytest.mark.parametrize("N, K", [(28, 4), slow(40, 8), slow(32, 8), (32, 32)])
def test_it_lowers_to_a_kernel_and_one_for_the_parts(T, N, K):
    array = jax.ShapeDtypeStruct
    cache = array((1, 1024, K, 128), jnp.bfloat16)
    arguments = array((1, T, N, 128), jnp.bfloat16), cache, cache, array((1, T, 1024), jnp.bool_)
    assert why_not(*arguments) is None
    program = lower_for(lambda *a: tree_attention(*a, implementation="triton"), *arguments)
    _, _, splits = cut(T * N // K, K, 1024)
    assert program.count("__gpu$xla.gpu.triton") == (2 if splits > 1 else 1)
    assert "tree_attention" in program


def test_it_can_be_differentiated():
    """Calibration asks for gradients through whatever attends."""
    *qkv, mask = inputs(6, 8, 2, 32, 128)
    loss = lambda *qkv, **how: jnp.sum(tree_attention(*qkv, mask, **how).astype(jnp.float32) ** 2)
    found = jax.grad(lambda *qkv: loss(*qkv, interpret=True), argnums=(0, 1, 2))(*qkv)
    want = jax.grad(lambda *qkv: loss(*qkv, implementation="xla"), argnums=(0, 1, 2))(*qkv)
    for a, b in zip(found, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


@pytest.mark.parametrize("T, taken", [(1, False), (6, True), (289, True)])
def test_a_gpu_takes_it_for_more_than_one_token(monkeypatch, T, taken):
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    program = lower_for(lambda *a: tree_attention(*a), *inputs(T, 28, 4, 128, 512))
    assert ("__gpu$xla.gpu.triton" in program) == taken


@pytest.mark.parametrize(
    "shape, change, reason",
    [
        ((6, 4, 2, 64, 64), dict(dtype=jnp.float32), "float32 queries"),
        ((6, 4, 2, 48, 64), {}, "heads of 48"),
        ((6, 4, 2, 64, 100), {}, "100 slots, no multiple of 64"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(shape, change, reason):
    arguments = inputs(*shape, **change)
    assert reason in why_not(*arguments)
    with pytest.raises(NotImplementedError, match=reason):
        tree_attention(*arguments, implementation="triton")
    y = tree_attention(*arguments, interpret=True)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected(*arguments), atol=0.04)


def test_batches_and_narrow_values_go_through_xla():
    q, k, v, mask = inputs(6, 4, 2, 64, 64)
    two = [jnp.concatenate([a, a]) for a in (q, k, v, mask)]
    assert "a batch of 2" in why_not(*two)
    y = tree_attention(*two)
    np.testing.assert_array_equal(np.asarray(y[0], np.float32), np.asarray(y[1], np.float32))
    assert "unlike keys" in why_not(q, k, v[..., :16], mask)
    assert tree_attention(q, k, v[..., :16], mask).shape == (1, 6, 4, 16)


def test_what_does_not_fit_raises():
    q, k, v, mask = inputs(6, 4, 2, 64, 64)
    for wrong in ((q[:, :, :3], k, v, mask), (q, k, v, mask[:, :5]), (q[..., :32], k, v, mask)):
        with pytest.raises(ValueError, match="do not fit"):
            tree_attention(*wrong)
    with pytest.raises(ValueError, match="one of"):
        tree_attention(q, k, v, mask, implementation="cuda")
