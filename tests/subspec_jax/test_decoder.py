"""The whole loop: its tokens are the target's own, whatever is proposed."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from proposers import BEAM, LENGTH, PROMPT, PROPOSERS, SAMPLED, SAMPLERS, STEPS

from llm_jax.cache import empty_caches
from llm_jax.generation import GenerationError, generate, prefill
from llm_jax.params import unjoined
from llm_jax.sample import Sampler
from llm_jax.testing import tiny_params
from subspec_jax import decoder as decode
from subspec_jax.accept import Gate
from subspec_jax.decoder import Decoder, LengthError
from subspec_jax.draft_model import substitute
from subspec_jax.offload import place, streamed_bytes
from subspec_jax.propose import ModelDraft, PromptLookup, Vanilla
from subspec_jax.random_weights import split_layer
from subspec_jax.residual.split import decode_layer, split_head_shapes, split_shapes
from subspec_jax.tree import TreeSpec
from subspec_jax.verify import Target

SAMPLED_TOO = ("beam", "best-first", "own cache", "lookup", "post beam", "post best-first")
SAMPLED_TOO += ("auto", "stop", "post and stop")


@pytest.mark.quick_cases("beam-sampling", "vanilla-greedy")
@pytest.mark.parametrize(
    "name, how",
    [(name, "greedy") for name in PROPOSERS]
    + [(name, "sampling") for name in (*SAMPLED, *SAMPLED_TOO)],
)
def test_tokens_are_those_of_plain_decoding(tiny, target, plain, name, how):
    sampler = SAMPLERS[how]
    proposer = (PROPOSERS | SAMPLED)[name](tiny)
    rounds = list(
        Decoder(target, proposer, sampler, max_length=LENGTH).rounds(PROMPT, STEPS, seed=3)
    )
    got = [t for r in rounds for t in r.tokens]
    assert got == plain(PROMPT, sampler, 3)
    assert len(set(got)) > 5
    spec = proposer.spec
    for r in rounds[1:-1]:
        assert len(r.tokens) == r.accepted + 1 <= spec.deepest + 1
        assert r.drafted <= spec.nodes - 1 and r.depth <= spec.deepest and r.accepted <= r.depth
        assert r.streamed_bytes == tiny.cfg.layers * 4 * tiny.cfg.layer_matrix_elements
    accepted = sum(r.accepted for r in rounds)
    if name in ("chain", "beam", "best-first", "8 bits", "post chain"):
        assert accepted > len(rounds)  # so that something was speculated at all
    if name == "vanilla":
        assert accepted == 0 and len(rounds) == STEPS


RESIDUAL = {
    "vanilla": lambda draft, cfg: Vanilla(),
    "beam": lambda draft, cfg: ModelDraft(draft, cfg, BEAM),
    "auto": lambda draft, cfg: ModelDraft(draft, cfg, BEAM, stop_gain="auto"),
    "own cache": lambda draft, cfg: ModelDraft(draft, cfg, BEAM, own_cache=True),
    "post beam": lambda draft, cfg: ModelDraft(draft, cfg, TreeSpec("beam", 2, 3, extra=2)),
    "post best-first": lambda draft, cfg: ModelDraft(
        draft, cfg, TreeSpec("best-first", 5, 2, budget=6, extra=4)
    ),
    "lookup": lambda draft, cfg: PromptLookup(BEAM),
}


@pytest.fixture(scope="module", params=["whole head", "head in two"])
def residual(tiny, request):
    """f(resident): a bfloat16 model whose layers are residuals; its plain parameters."""
    cfg = dataclasses.replace(tiny.cfg, dtype="bfloat16")
    params = tiny_params(cfg, 4)
    room = {name: (64, 4096) for name in cfg.joined_matrices}
    like = split_shapes(cfg, 4, 16, room)
    layers = tuple(split_layer(layer, like, 20) for layer in params.layers)
    whole = [unjoined(jax.jit(decode_layer)(layer), cfg) for layer in layers]
    chex.assert_trees_all_equal(tuple(whole), params.layers)
    head = params.head_DV
    if request.param == "head in two":
        like = split_head_shapes(cfg, 4, 16, (256, 4096))
        padding = like.shape[1] - cfg.vocab
        assert padding > 0
        head = split_layer(jnp.pad(head, ((0, 0), (0, padding))), like, 20)

    @functools.cache
    def target(resident):
        placed = dataclasses.replace(params, layers=place(layers, resident), head_DV=head)
        return Target(placed, cfg)

    return SimpleNamespace(cfg=cfg, params=params, target=target)


@pytest.mark.slow
@pytest.mark.parametrize("resident", [0, 1])
@pytest.mark.parametrize("how", SAMPLERS)
@pytest.mark.parametrize("name", RESIDUAL)
def test_tokens_are_those_of_plain_decoding_where_residuals_stream(residual, name, how, resident):
    """The stream's bytes are counted; the draft is what the residuals were made against."""
    cfg, target, sampler = residual.cfg, residual.target(resident), SAMPLERS[how]
    proposer = RESIDUAL[name](substitute(target.params), cfg)
    decoder = Decoder(target, proposer, sampler, max_length=LENGTH)
    rounds = list(decoder.rounds(PROMPT, STEPS, seed=3))
    got = [t for r in rounds for t in r.tokens]
    assert got == generate(residual.params, PROMPT, cfg, STEPS, sampler, 3)
    assert len(set(got)) > 5
    if name in ("beam", "own cache"):
        assert sum(r.accepted for r in rounds) > len(rounds) // 2
    moved = sum(map(streamed_bytes, target.params.layers[resident:]))
    assert {r.streamed_bytes for r in rounds[1:]} == {moved}


@pytest.mark.slow
def test_a_draft_that_is_the_target_is_accepted_whole(tiny, target):
    """Post-speculation then starts every round from a tree that is there already."""
    for spec in (
        TreeSpec("chain", 3),
        TreeSpec("chain", 3, extra=2),
        TreeSpec("beam", 2, 2, extra=2),
    ):
        decoder = Decoder(target, ModelDraft(tiny.params, tiny.cfg, spec), max_length=LENGTH)
        rounds = list(decoder.rounds(PROMPT, STEPS))
        assert {r.accepted for r in rounds[1:-1]} >= {spec.depth}
        assert min(r.accepted for r in rounds[1:-1]) >= spec.depth


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_some_layers_resident_and_the_table_on_the_host(tiny, plain, tied):
    """Layers of the draft may be the target's own; a table that is only looked up may be NumPy."""
    if tied:
        cfg = dataclasses.replace(tiny.cfg, tied=True)
        params = dataclasses.replace(tiny.params, head_DV=None)
        table = params.embed_VD
    else:
        cfg, params, table = tiny.cfg, tiny.params, np.asarray(tiny.params.embed_VD)
    placed = dataclasses.replace(params, embed_VD=table, layers=place(params.layers, 1))
    proposer = ModelDraft(substitute(placed, 4, 16, layers=[1]), cfg, BEAM)
    rounds = list(Decoder(Target(placed, cfg), proposer, max_length=LENGTH).rounds(PROMPT, STEPS))
    assert [t for r in rounds for t in r.tokens] == generate(params, PROMPT, cfg, STEPS)
    assert rounds[1].streamed_bytes == 4 * cfg.layer_matrix_elements  # one layer of two


@pytest.mark.slow
def test_one_decoder_serves_prompt_after_prompt(tiny, target, plain):
    """Whatever the last text left in the caches; also after a text that was abandoned halfway."""
    decoder = Decoder(target, ModelDraft(tiny.draft(4), tiny.cfg, BEAM), max_length=LENGTH)
    prompts = [PROMPT, [9] * 20, [50], PROMPT[::-1]]
    for prompt in prompts:
        assert decoder.generate(prompt, STEPS) == plain(prompt, Sampler())
        for _ in itertools.islice(decoder.rounds(prompt[:1], STEPS), 2):
            pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [TreeSpec("chain", 2, extra=4), TreeSpec("best-first", 8, 2, budget=2), BEAM],
    ids=lambda s: f"{s.kind} {s.extra}",
)
def test_a_text_may_fill_the_cache_to_the_end(tiny, target, plain, monkeypatch, spec):
    """Rows are moved and drafted close to the last slot, and no committed one is touched."""
    monkeypatch.setattr(decode, "cache_slots", lambda length, spec, shape: length + spec.places)
    for bits in (2, 4):
        proposer = ModelDraft(tiny.draft(bits), tiny.cfg, spec)
        decoder = Decoder(target, proposer, max_length=len(PROMPT) + STEPS)
        assert decoder.generate(PROMPT, STEPS) == plain(PROMPT, Sampler())


@pytest.mark.parametrize("steps", [1, 2, 5, 6])
def test_the_number_of_tokens_is_exact(tiny, target, plain, steps):
    decoder = Decoder(target, ModelDraft(tiny.draft(4), tiny.cfg, BEAM), max_length=LENGTH)
    assert decoder.generate(PROMPT, steps) == plain(PROMPT, Sampler())[:steps]


def test_an_end_token_stops(tiny, target, plain):
    whole = plain(PROMPT, Sampler())
    decoder = Decoder(target, ModelDraft(tiny.draft(4), tiny.cfg, BEAM), max_length=LENGTH)
    for at in range(0, 8):
        want = whole[: whole.index(whole[at]) + 1]
        assert decoder.generate(PROMPT, STEPS, eos=[whole[at]]) == want
    assert (
        decoder.generate(PROMPT, STEPS, eos=[next(t for t in range(97) if t not in whole)]) == whole
    )


# ---------------------------------------------------------------------------------------- caches


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["beam", "2 bits", "post chain", "post best-first", "own cache", "good own cache"]
)
def test_caches_hold_what_a_fresh_prefill_gives(tiny, target, name):
    """After several rounds of overwriting and moving, nothing of the draft is left."""
    proposer = PROPOSERS[name](tiny)
    decoder = Decoder(target, proposer, max_length=LENGTH)
    emitted = []
    for r in itertools.islice(decoder.rounds(PROMPT, 40), 7):
        emitted += r.tokens
    text = PROMPT + emitted[:-1]  # the newest token is in no cache yet
    _, want = prefill(tiny.params, text, empty_caches(tiny.cfg, 1, LENGTH), tiny.cfg)
    head = lambda caches: jax.tree.map(lambda a: a[:, : len(text)], tuple(caches))
    chex.assert_trees_all_close(head(decoder.caches), head(want), rtol=1e-4, atol=2e-5)
    if proposer.own_cache:
        _, want = prefill(proposer.params, text, empty_caches(tiny.cfg, 1, LENGTH), tiny.cfg)
        chex.assert_trees_all_close(head(proposer._caches), head(want), rtol=1e-4, atol=2e-5)


# --------------------------------------------------------------------------------- gates, replays


@pytest.mark.slow
def test_replay_accepts_what_the_trace_says(tiny, target):
    lengths = [3, 0, 2, 1, 3, 3, 0, 1]
    decoder = Decoder(target, ModelDraft(tiny.draft(2), tiny.cfg, BEAM), max_length=LENGTH)
    rounds = list(decoder.rounds(PROMPT, 1 + sum(n + 1 for n in lengths), replay=lengths))
    assert [r.accepted for r in rounds[1:]] == lengths
    assert [len(r.tokens) for r in rounds[1:]] == [n + 1 for n in lengths]


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        TreeSpec("chain", 3, extra=2),
        TreeSpec("beam", 3, 3, extra=1),
        TreeSpec("best-first", 4, 2, extra=2),
    ],
    ids=lambda s: s.kind,
)
def test_replay_with_post_speculation(tiny, target, spec):
    """The draw at a forced end may be a node of the verified tree; such a tree is not kept."""
    lengths = [2, 0, 1, 0, 0, 2, 1, 0, 1, 0]
    decoder = Decoder(target, ModelDraft(tiny.params, tiny.cfg, spec), max_length=LENGTH)
    rounds = list(decoder.rounds(PROMPT, 1 + sum(n + 1 for n in lengths), replay=lengths))
    assert [r.accepted for r in rounds[1:]] == lengths
    assert all(spec.nodes - spec.width <= r.drafted < spec.nodes for r in rounds[1:])


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_shut_gate_is_exact_and_an_open_one_is_not(tiny, target, plain, sampler):
    proposer = ModelDraft(tiny.draft(2), tiny.cfg, TreeSpec("beam", 4, 3))
    run = lambda gate: list(
        Decoder(target, proposer, sampler, gate, max_length=LENGTH).rounds(PROMPT, STEPS, seed=3)
    )
    tokens = lambda rounds: [t for r in rounds for t in r.tokens]
    want = plain(PROMPT, sampler, 3)
    shut = run(Gate("entropy", 0.0, 1))
    assert tokens(shut) == want
    wide = run(Gate("probability", 0.0, 1))
    assert tokens(wide) != want and len(tokens(wide)) == STEPS
    mean = lambda rounds: np.mean([r.accepted for r in rounds[1:-1]])
    assert mean(wide) >= mean(shut)


# --------------------------------------------------------------------------------- error messages


@pytest.mark.parametrize(
    "prompt, steps, seed, words",
    [
        ([1], 0, 0, "0 new tokens were asked for; give at least 1"),
        ([1] * 10, 7, 0, "10 prompt tokens and 7 new ones do not fit into"),
        ([], 3, 0, "the prompt is empty"),
        ([1, 97], 3, 0, "the token id 97 is outside the vocabulary"),
        ([-1], 3, 0, "the token id -1 is outside"),
        ([0.5], 3, 0, "token ids are of type float64"),
        ([1], 3, 2**32, "the seed is 4294967296; expected a whole number from 0 to 4294967295"),
    ],
)
def test_what_cannot_be_decoded_raises_before_anything_runs(target, prompt, steps, seed, words):
    decoder = Decoder(target, max_length=16)
    with pytest.raises((LengthError, GenerationError)) as caught:
        next(decoder.rounds(prompt, steps, seed=seed))
    assert words in str(caught.value)
    assert all(not a.any() for a in jax.tree.leaves(decoder.caches))
