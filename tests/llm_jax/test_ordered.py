"""Attention in order of positions: the right numbers, and the same bits wherever things are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import ordered
from llm_jax.ordered import block_slots, ordered_attention, window_start
from pallas_kernels.tree_attention.reference import tree_attention_reference

T, N, K, H, S, W = 24, 6, 2, 16, 320, 64
LONGEST = 256
KINDS = {
    "full": {},
    "window": dict(window=40),
    "wide window": dict(window=100),
    "cap and scale": dict(softcap=2.0, scale=0.4),
    "sinks": dict(sinks_N=np.linspace(-2, 3, N, dtype=np.float32)),
}
RNG = np.random.default_rng(0)
Q, KEYS, VALUES = (RNG.normal(size=(LONGEST, n, H)) for n in (N, K, K))
"""By position."""


@pytest.fixture(autouse=True)
def some_blocks(monkeypatch):
    monkeypatch.setattr(ordered, "BLOCK", 128)
    assert block_slots(S) == 128 and S % 128  # the last block begins earlier


@functools.cache
def attention(kind):
    return jax.jit(functools.partial(ordered_attention, **KINDS[kind]))


def by_position(positions, places, at, order, kind, dtype, seed):
    """{position: result}, of queries in these places. Positions from `at` on are in slots of the
    order given; all other queries and slots are random."""
    rng = np.random.default_rng(seed)
    q_TNH, k_SKH, v_SKH = (rng.normal(size=s) for s in ((T, N, H), (S, K, H), (S, K, H)))
    slot = np.arange(LONGEST)
    slot[at : at + len(order)] = at + order
    k_SKH[slot], v_SKH[slot] = KEYS, VALUES
    position_T = rng.integers(0, at + 1, T)
    q_TNH[places], position_T[places] = Q[positions], positions
    first_T = np.asarray(window_start(jnp.asarray(position_T), W))
    slot_TW = slot[np.minimum(first_T[:, None] + np.arange(W), LONGEST - 1)]
    arrays = (jnp.asarray(a, dtype) for a in (q_TNH, k_SKH, v_SKH))
    places_ = (jnp.asarray(a, jnp.int32) for a in (position_T, slot_TW))
    y_TNH = np.asarray(attention(kind)(*arrays, *places_).astype(jnp.float32))
    return dict(zip(positions, y_TNH[places], strict=True))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_query_has_the_same_bits_alone_and_in_every_tree(kind, dtype):
    none = np.zeros(0, int)
    for at in (1, 64, 150, 190):
        positions = np.arange(at, at + T, 7)
        rng = np.random.default_rng(at)
        found = [
            by_position(positions, rng.permutation(T)[: len(positions)], at, order, kind, dtype, n)
            for n, order in enumerate((rng.permutation(T), np.roll(np.arange(T), 7)))
        ]
        for p in positions:  # as in plain decoding: in the first place, all slots in order
            alone = by_position([p], [0], p, none, kind, dtype, 9)[p]
            np.testing.assert_array_equal(found[0][p], alone)
            np.testing.assert_array_equal(found[1][p], alone)


@pytest.mark.parametrize("kind", ["window", "sinks"])
def test_blocks_of_which_nothing_is_seen_change_no_bit(kind, monkeypatch):
    """On a GPU all blocks are read, behind the text too."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention.cache_clear()
    test_a_query_has_the_same_bits_alone_and_in_every_tree(kind, jnp.float32)
    test_the_numbers_are_those_of_attention(kind)
    attention.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_attention(kind):
    given = dict(KINDS[kind])
    window = given.pop("window", LONGEST)
    for p in (0, 5, 62, 63, 64, 129, 250):
        got = by_position([p], [3], min(p, 200), np.arange(20)[::-1], kind, jnp.float32, 1)[p]
        behind_S = p - np.arange(LONGEST)
        seen = jnp.asarray((behind_S >= 0) & (behind_S < window))[None, None]
        arrays = (jnp.asarray(a, jnp.float32)[None] for a in (Q[p : p + 1], KEYS, VALUES))
        want = tree_attention_reference(*arrays, seen, **given)
        np.testing.assert_allclose(got, want[0, 0], atol=2e-6)


def test_attention_in_order_of_slots_has_other_bits_in_a_tree():
    """So that the tests above can fail: the same keys in other slots, summed in their order."""
    order = np.concatenate([np.arange(100), 100 + np.random.default_rng(0).permutation(100)])
    arrays = [jnp.asarray(a[:200], jnp.float32)[None] for a in (KEYS, VALUES)]
    q, seen = jnp.asarray(Q[:64], jnp.float32)[None], jnp.ones((1, 64, 200), bool)
    attend = jax.jit(tree_attention_reference)
    plain, moved = (attend(q, *kv, seen) for kv in (arrays, [a[:, order] for a in arrays]))
    assert (np.asarray(plain) != np.asarray(moved)).any()
