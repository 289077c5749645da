"""The key/value cache: writes, overlapping moves, and that passes of any length fill it alike."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.attention import causal_step
from llm_jax.cache import KV, empty_caches, move, write_rows
from llm_jax.model import forward
from llm_jax.testing import tiny_config, tiny_params

CFG = tiny_config("qwen2", d_model=32, head_dim=8, d_ff=48, vocab=61)
TOKENS = np.random.default_rng(0).integers(0, CFG.vocab, 14)
SLOTS = 20
jit_forward = jax.jit(forward, static_argnames="cfg")


@pytest.fixture(scope="module")
def params():
    return tiny_params(CFG)


@pytest.fixture(scope="module")
def whole(params):
    """Logits [T, V] and caches of one pass over all tokens."""
    return pass_in_pieces(params, [len(TOKENS)])


def pass_in_pieces(params, sizes):
    caches, logits, at = empty_caches(CFG, 1, SLOTS), [], 0
    for size in sizes:
        piece = jnp.asarray(TOKENS[None, at : at + size])
        out, caches = jit_forward(params, piece, caches, causal_step(at, size, SLOTS), CFG)
        logits.append(out[0])
        at += size
    assert at == len(TOKENS)
    return jnp.concatenate(logits), caches


@pytest.mark.parametrize("sizes", [[7, 7], [5, 7, 1, 1], [7, *[1] * 7]], ids=str)
def test_a_pass_in_pieces_is_the_whole_pass(params, whole, sizes):
    """Chunked prefill, and prefill followed by decoding, see what one pass over everything sees."""
    logits, caches = pass_in_pieces(params, sizes)
    chex.assert_trees_all_close((logits, caches), whole, rtol=2e-5, atol=2e-5)


def test_what_lies_behind_is_not_seen(params, whole):
    """Slots behind the current ones may hold anything: rejected rows are left there."""
    caches = jax.tree.map(lambda a: a + 1e3, empty_caches(CFG, 1, SLOTS))
    step = causal_step(0, len(TOKENS), SLOTS)
    logits, _ = jit_forward(params, jnp.asarray(TOKENS[None]), caches, step, CFG)
    chex.assert_trees_all_close(logits[0], whole[0], rtol=1e-6, atol=1e-6)


def test_empty():
    caches = empty_caches(CFG, 3, 5)
    assert len(caches) == CFG.layers
    for leaf in jax.tree.leaves(caches):
        chex.assert_shape(leaf, (3, 5, CFG.kv_heads, CFG.head_dim))
        assert leaf.dtype == CFG.dtype and not leaf.any()


def test_write_casts_and_touches_its_slots_only():
    buffer = jnp.arange(2 * 6 * 2, dtype=jnp.bfloat16).reshape(2, 6, 2)
    new = -jnp.ones((2, 3, 2), jnp.float32)
    want = np.array(buffer)
    want[:, 2:5] = -1
    got = jax.jit(write_rows)(buffer, new, 2)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want)


def numbered(slots):
    rows = jnp.arange(slots, dtype=jnp.float32)[None, :, None, None]
    return KV(rows + jnp.zeros((2, 1, 1, 2)), -rows + jnp.zeros((2, 1, 1, 2)))


jit_move = jax.jit(move)


def test_move_of_the_docstring():
    letters = {5: "a", 6: "b", 7: "c", 8: "d", 9: "e"}
    moved = jit_move(numbered(12), jnp.array([5, 7, 8]), 5)
    got = [letters[int(s)] for s in moved.k_BSKH[0, 5:10, 0, 0]]
    assert got == list("acdde")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_move_reads_everything_before_it_writes(data):
    slots, rows = 12, 4
    at = data.draw(st.integers(0, slots - rows))
    source = data.draw(st.lists(st.integers(0, slots - 1), min_size=rows, max_size=rows))
    want = list(range(slots))
    for r in range(rows):
        want[at + r] = source[r]
    moved = jit_move(numbered(slots), jnp.array(source), jnp.int32(at))
    for b, h in np.ndindex(2, 2):
        assert moved.k_BSKH[b, :, 0, h].astype(int).tolist() == want
        assert (-moved.v_BSKH[b, :, 0, h]).astype(int).tolist() == want


def test_move_is_bit_equal_and_takes_any_cache(whole):
    """Also a tuple of layers, as rows are moved in all of them at once."""
    _, caches = whole
    source = jnp.array([3, 9, 4])
    moved = jit_move(caches, source, jnp.int32(3))
    for old, new in zip(jax.tree.leaves(caches), jax.tree.leaves(moved), strict=True):
        old, new = np.asarray(old), np.asarray(new)
        np.testing.assert_array_equal(new[:, 3:6], old[:, [3, 9, 4]])
        np.testing.assert_array_equal(np.delete(new, [3, 4, 5], 1), np.delete(old, [3, 4, 5], 1))


def test_move_asks_every_cache():
    """A cache of another kind moves what it holds in its own way, wherever it is in the tree."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Doubled:
        rows: jax.Array

        def move(self, source, at):
            return Doubled(self.rows.at[2 * at].set(2.0 * source[0].astype(float)))

    caches = [numbered(6), (Doubled(jnp.zeros(9)), numbered(4))]
    plain, (doubled, short) = jit_move(caches, jnp.array([3, 1]), 1)
    assert plain.k_BSKH[0, :, 0, 0].tolist() == [0, 3, 1, 3, 4, 5]
    assert short.k_BSKH[0, :, 0, 0].tolist() == [0, 3, 1, 3]
    assert doubled.rows.tolist() == [0, 0, 6, 0, 0, 0, 0, 0, 0]
    assert (plain.slots, short.slots) == (6, 4)


def test_donated_caches_are_written_in_place():
    caches = empty_caches(CFG, 1, SLOTS)
    before = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(caches)]
    update = jax.jit(
        functools.partial(jax.tree.map, lambda a: write_rows(a, jnp.ones_like(a[:, :2]), 4)),
        donate_argnums=0,
    )
    after = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(update(caches))]
    assert sorted(before) == sorted(after)
