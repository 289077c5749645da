"""The comparison with plain decoding says where two texts part and how near a tie that was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspec_jax.check import ROUNDINGS, compare_with_plain
from subspec_jax.verify import Target

PROMPT = [1, 2, 3, 5, 7]
PLAIN = [11, 13, 17, 19]


def test_the_same_tokens_are_identical(target):
    nothing = dict(first_difference=None, logit_gap=None, tolerance=None)
    assert compare_with_plain(target, PROMPT, PLAIN, PLAIN) == dict(identical=True) | nothing
    assert compare_with_plain(target, PROMPT, [], [])["identical"]
    assert compare_with_plain(target, PROMPT, tuple(PLAIN), np.array(PLAIN))["identical"]


@pytest.mark.parametrize("at", range(4))
def test_the_gap_is_that_of_the_targets_logits_at_the_first_difference(
    tiny, target, logits_behind, at
):
    tokens = [*PLAIN[:at], 90, *PLAIN[at + 1 :]]
    tokens[-1] = 91  # what comes behind the first difference plays no part
    found = compare_with_plain(target, PROMPT, tokens, PLAIN)
    assert (found["identical"], found["first_difference"]) == (False, at)
    logits_V = logits_behind(tiny.params, PROMPT + PLAIN[:at], tiny.cfg)
    gap = logits_V[PLAIN[at]] - logits_V[tokens[at]]
    assert found["logit_gap"] == pytest.approx(gap, abs=2e-5)
    assert found["tolerance"] == pytest.approx(
        ROUNDINGS * 2**-23 * np.abs(logits_V).max(), rel=1e-4
    )
    back = compare_with_plain(target, PROMPT, PLAIN, tokens)
    assert back["logit_gap"] == pytest.approx(-gap, abs=2e-5)


def test_the_tolerance_is_of_the_models_dtype(tiny, target, logits_behind):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tiny.params)
    target = Target(half, dataclasses.replace(tiny.cfg, dtype="bfloat16"))
    found = compare_with_plain(target, PROMPT, [90], [11])
    logits_V = logits_behind(tiny.params, PROMPT, tiny.cfg)
    assert found["tolerance"] == pytest.approx(ROUNDINGS * 2**-7 * np.abs(logits_V).max(), rel=0.05)
    assert found["logit_gap"] == pytest.approx(logits_V[11] - logits_V[90], abs=0.1)


@pytest.mark.parametrize(
    ("tokens", "at"), [(PLAIN[:2], 2), ([*PLAIN, 23], 4), ([], 0)], ids=["fewer", "more", "none"]
)
def test_texts_of_two_lengths_part_where_the_shorter_ends(target, tokens, at):
    found = compare_with_plain(target, PROMPT, tokens, PLAIN)
    assert found == dict(identical=False, first_difference=at, logit_gap=None, tolerance=None)
    assert compare_with_plain(target, PROMPT, PLAIN, tokens) == found


def test_a_difference_within_texts_of_two_lengths_is_measured(target):
    found = compare_with_plain(target, PROMPT, [11, 90], PLAIN)
    assert found["first_difference"] == 1 and found["logit_gap"] is not None
