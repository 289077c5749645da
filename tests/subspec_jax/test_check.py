"""The comparison with plain decoding says where two texts part and how near a tie that was; and
numbers that are not finite are named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from proposers import BEAM, LENGTH, STEPS

from subspec_jax.check import ROUNDINGS, NotFiniteError, compare_with_plain
from subspec_jax.decoder import Decoder
from subspec_jax.draft_model import substitute
from subspec_jax.offload import place
from subspec_jax.propose import ModelDraft
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


# --- Numbers that are not finite ---------------------------------------------------------------


def spoiled(params, where, value):
    """The parameters with one wrong number."""
    change = dataclasses.replace
    if where == "in the embedding":
        return change(params, embed_VD=params.embed_VD.at[PROMPT[1], 0].set(value))
    if where == "in layer 1":
        mlp = params.layers[1].mlp
        mlp = change(mlp, down=mlp.down.at[3, 5].set(value))
        return change(params, layers=(params.layers[0], change(params.layers[1], mlp=mlp)))
    if where == "in layer 0":
        attn = params.layers[0].attn
        attn = change(attn, q=attn.q.at[0, 0].set(value))
        return change(params, layers=(change(params.layers[0], attn=attn), params.layers[1]))
    return change(params, head_DV=params.head_DV.at[0, 0].set(value))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize(
    "where", ["in the embedding", "in layer 0", "in layer 1", "in the last norm or the output head"]
)
def test_numbers_that_are_not_finite_are_named_with_their_layer(tiny, where, value):
    params = spoiled(tiny.params, where, value)
    params = dataclasses.replace(params, layers=place(params.layers, 1))
    decoder = Decoder(Target(params, tiny.cfg), max_length=LENGTH)
    with pytest.raises(NotFiniteError, match=rf"NaN or infinity {where}, after 5 tokens; its"):
        next(decoder.rounds(PROMPT, STEPS))


@pytest.mark.slow
def test_numbers_that_cease_to_be_finite_within_a_text_are_named(tiny, target):
    """Only the row of a later token is wrong, as where activations overflow only sometimes."""
    plain = Decoder(target, max_length=LENGTH).generate(PROMPT, STEPS)
    at = next(i for i, token in enumerate(plain) if token not in PROMPT and i > 2)
    params = tiny.params
    table = params.embed_VD.at[plain[at]].set(jnp.inf)
    broken = Target(dataclasses.replace(params, embed_VD=table), tiny.cfg)
    for proposer in (None, ModelDraft(substitute(tiny.placed, 4, 16), tiny.cfg, BEAM)):
        decoder = Decoder(broken, *([proposer] if proposer else []), max_length=LENGTH)
        got = []
        where = "for a drafted token" if proposer else "in the embedding, after"
        with pytest.raises(NotFiniteError, match=f"NaN or infinity {where}"):
            for r in decoder.rounds(PROMPT, STEPS):
                got += r.tokens
        assert got == plain[: len(got)] and len(got) <= at + 1
        assert decoder.target is broken
    # Whatever stands in the cache after that: the decoder goes on with the next text.
    assert Decoder(target, max_length=LENGTH).generate(PROMPT, STEPS) == plain
