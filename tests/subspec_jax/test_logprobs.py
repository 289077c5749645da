"""Log-probabilities of emitted tokens against the model of `transformers`, in float64 behind it."""

import dataclasses
import random

import numpy as np
import pytest
from proposers import LENGTH, PROMPT, PROPOSERS, SAMPLERS, STEPS

import subspec_jax
from llm_jax.sample import Sampler
from llm_jax.testing import tiny_config, tiny_params, tiny_tokenizer, write_safetensors
from llm_jax.tokenizer import ByteTokenizer, wrap
from subspec_jax import Request, Scheduler, SubspecError, logprobs, memory
from subspec_jax.accept import Gate
from subspec_jax.decoder import Decoder
from subspec_jax.logprobs import MOST, Logprob
from subspec_jax.requests import TextUntil

CFG = tiny_config("qwen2", layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_safetensors(tmp_path_factory.mktemp("model"), tiny_params(CFG), CFG)


@pytest.fixture(scope="module", params=(1, 3), ids=("alone", "together"))
def engine(folder, request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "card_bytes", lambda: None)
        tree, draft = subspec_jax.TreeSpec("beam", depth=3, width=2), subspec_jax.Draft(4, 16)
        how = dict(tree=tree, draft=draft, max_length=128, chunk=32, resident=1, dtype="float32")
        with subspec_jax.open(folder, "16MB", texts=request.param, **how) as engine:
            yield engine


@pytest.fixture(scope="module")
def reference(folder):
    """f(tokens) -> the log-probabilities behind each of them, [T, V] in float64."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def of(tokens):
        with torch.no_grad():
            return log_softmax(model(torch.tensor([tokens])).logits[0].numpy())

    return of


def log_softmax(logits_TV):
    z = np.asarray(logits_TV, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def check(found, tokens, wanted_TV, most=MOST):
    """The tokens' own numbers, and those of the likeliest, at their places."""
    assert [told.token for told in found] == list(tokens)
    for told, wanted_V in zip(found, wanted_TV, strict=True):
        assert told.logprob == pytest.approx(wanted_V[told.token], abs=2e-4)
        likely = [token for token, _ in told.top]
        assert len(set(likely)) == len(likely) == most
        values = [value for _, value in told.top]
        np.testing.assert_allclose(values, wanted_V[likely], atol=2e-4)
        np.testing.assert_allclose(values, np.sort(wanted_V)[::-1][:most], atol=2e-4)


def asked(seed, **changes):
    rng = random.Random(seed)
    prompt = tuple(rng.randrange(CFG.vocab) for _ in range(rng.randint(3, 40)))
    sampler = (Sampler(), Sampler(0.9, top_k=5), Sampler(2.0, top_p=0.9))[seed % 3]
    return Request(prompt, 20, seed, sampler, **changes)


def run(engine, *requests):
    """The updates of each, decoded as the engine decodes them."""
    scheduler, heard = Scheduler(engine), [[] for _ in requests]
    for request, updates in zip(requests, heard, strict=True):
        scheduler.submit(request, updates.append)
    while scheduler.step():
        continue
    return heard


@pytest.mark.reference
def test_every_token_has_the_models_own_number(engine, reference):
    """Greedy and sampled, alone and beside others, some of which do not ask."""
    requests = [asked(seed, logprobs=None if seed == 2 else 5 * (seed % 5)) for seed in range(6)]
    silent = [dataclasses.replace(r, logprobs=None) for r in requests]
    heard = run(engine, *requests)
    assert max(update.accepted for updates in heard for update in updates) > 1
    for request, updates, plain in zip(requests, heard, run(engine, *silent), strict=True):
        tokens = [t for update in updates for t in update.tokens]
        assert tokens == [t for update in plain for t in update.tokens]  # nothing changes
        assert not any(update.logprobs for update in plain)
        told = [told.logprob for update in updates for told in update.logprobs]
        if request.logprobs is None:
            assert not told
            continue
        behind = reference([*request.prompt, *tokens])[len(request.prompt) - 1 : -1]
        whole = len(told)
        assert whole == len(tokens) or not engine.tokenizer.decode(tokens[whole:]).strip("\ufffd")
        check(told, tokens[:whole], behind[:whole], request.logprobs)


@pytest.mark.reference
def test_a_later_turn_on_a_cache(engine, reference):
    first = Request(tuple(range(30, 70)), 8, logprobs=0)
    [updates] = run(engine, first)
    again = Request((*first.prompt, *[t for u in updates for t in u.tokens], 5, 6), 8, logprobs=5)
    [updates] = run(engine, again)
    assert bool(updates[0].cached) == bool(engine.plan.ladder)
    tokens = [t for update in updates for t in update.tokens]
    told = [told.logprob for update in updates for told in update.logprobs]
    check(told, tokens, reference([*again.prompt, *tokens])[len(again.prompt) - 1 : -1], 5)


def test_stop_strings_and_ends_cut_what_is_told(engine):
    """Told is what is wholly shown, with the update that shows it; all where nothing stops."""
    request = asked(3, logprobs=1)
    where = lambda updates: [(t.start, t.logprob.token) for u in updates for t in u.logprobs]
    [whole] = run(engine, request)
    tokens, text = [t for u in whole for t in u.tokens], "".join(u.text for u in whole)
    told = where(whole)
    assert [token for _, token in told] == tokens and told == sorted(told, key=lambda one: one[0])
    assert not {256, 257, 258} & set(tokens)  # special tokens, which have no text
    starts = sorted({start for start, _ in told} | {len(text)})
    end_of = lambda start: starts[starts.index(start) + 1]
    for at in range(0, len(text) - 1, 4):
        [updates] = run(engine, dataclasses.replace(request, stop=(text[at : at + 2], "never")))
        shown = ""
        for update in updates:
            before, shown = len(shown), shown + update.text
            for start, _ in where([update]):  # not before its text, and not later
                assert before < end_of(start) <= len(shown)
        end = text.index(text[at : at + 2])
        assert where(updates) == [one for one in told if end_of(one[0]) <= end]
    for n in range(3):
        [updates] = run(engine, dataclasses.replace(request, eos=(tokens[n],)))
        assert where(updates) == told[: tokens.index(tokens[n])]


@pytest.mark.parametrize("seed", range(12))
def test_tokens_are_told_with_their_last_character(seed):
    """Random texts of several bytes a character, in random rounds, against the whole text."""
    rng = random.Random(seed)
    tokenizer = ByteTokenizer() if seed % 2 else wrap(tiny_tokenizer(288))
    for _ in range(30):
        word = lambda n: "".join(rng.choice("ab→é😀") for _ in range(rng.randint(1, n)))
        tokens = tokenizer.encode(word(20))
        stop = tuple(word(3) for _ in range(rng.randint(0, 2)))
        text, shown, told = TextUntil(tokenizer, stop), "", []
        for i, token in enumerate(tokens):
            stopped = text.push(token, logprob=Logprob(i, -1.0, ()))
            last = stopped or i == len(tokens) - 1
            if last or rng.random() < 0.4:
                shown += "".join(piece for piece, _ in text.take(last))
                told += text.told()
                before = tokenizer.decode(tokens[: len(told)])
                assert shown.startswith(before.rstrip("\ufffd"))
            if stopped:
                break
        assert [t.logprob.token for t in told] == list(range(len(told)))
        whole = [n for n in range(len(tokens) + 1) if "\ufffd" not in tokenizer.decode(tokens[:n])]
        fits = [n for n in whole if len(tokenizer.decode(tokens[:n])) <= len(shown)]
        assert len(told) == max(fits)
        for one in told:
            n = max(n for n in whole if n <= one.logprob.token)
            assert one.start == len(tokenizer.decode(tokens[:n]))


@pytest.mark.quick_cases("gate-greedy")
@pytest.mark.parametrize("how", SAMPLERS)
@pytest.mark.parametrize("name", [*PROPOSERS, "gate"])
def test_every_proposer_tells_the_same(tiny, target, logits_behind, name, how):
    """Also where a gate accepts what is not the target's draw."""
    gate = Gate("probability", 0.0, 1) if name == "gate" else None
    proposer = PROPOSERS["beam" if gate else name](tiny)
    decoder = Decoder(target, proposer, SAMPLERS[how], gate, max_length=LENGTH)
    decoder.logprobs = True
    rounds = list(decoder.rounds(PROMPT, STEPS, seed=3))
    tokens = [t for r in rounds for t in r.tokens]
    behind = [
        log_softmax(logits_behind(tiny.params, PROMPT + tokens[:i], tiny.cfg))
        for i in range(len(tokens))
    ]
    check([told for r in rounds for told in r.logprobs], tokens, behind)


def test_one_program_tells_all(engine, monkeypatch):
    """However many tokens a round brings, and whoever asks."""
    before = logprobs._of_rows._cache_size()
    run(engine, *(asked(seed, logprobs=seed) for seed in range(5)))
    assert logprobs._of_rows._cache_size() - before <= 1


def test_a_number_that_cannot_be():
    for wrong in (-1, MOST + 1):
        with pytest.raises(SubspecError, match=f"logprobs is {wrong}; expected 0 to 20"):
            Request((1,), 1, logprobs=wrong)
