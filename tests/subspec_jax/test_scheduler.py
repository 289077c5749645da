"""The scheduler on a tiny checkpoint: every answer is what its request gives alone."""

import dataclasses
import random
import re
import threading

import pytest

import subspec_jax
from llm_jax.formats import open_checkpoint
from llm_jax.generation import GenerationError, generate
from llm_jax.grammar import GrammarError
from llm_jax.sample import Sampler
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from llm_jax.token_stream import StreamDecoder
from subspec_jax import Request, Scheduler, SubspecError, memory, runners
from subspec_jax import scheduler as scheduler_module
from subspec_jax.batch import BatchDecoder
from subspec_jax.decoder import LengthError
from subspec_jax.requests import QueueFull

CFG = tiny_config("qwen2", layers=2)
NEW = 20
SAMPLED = Sampler(0.9, top_k=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_safetensors(tmp_path_factory.mktemp("model"), tiny_params(CFG), CFG)


@pytest.fixture(scope="module", params=(1, 3), ids=("alone", "together"))
def engine(folder, request):
    """For one request after another, and for three that share every pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "card_bytes", lambda: None)
        tree, draft = subspec_jax.TreeSpec("beam", depth=3, width=2), subspec_jax.Draft(4, 16)
        how = dict(tree=tree, draft=draft, max_length=96, chunk=32, resident=1, dtype="float32")
        how |= dict(texts=request.param)
        with subspec_jax.open(folder, "16MB", **how) as engine:
            yield engine


@pytest.fixture(scope="module")
def params(folder):
    return open_checkpoint(folder).load(CFG)


def request(seed: int, **changes) -> Request:
    """A prompt of its own for each seed; every other one is sampled."""
    rng = random.Random(seed)
    prompt = tuple(rng.randrange(CFG.vocab) for _ in range(rng.randint(3, 40)))
    return Request(prompt, NEW, seed, (Sampler(), SAMPLED)[seed % 2], **changes)


def alone(params, asked: Request) -> list[int]:
    """What the model writes by the plain loop of `llm_jax`."""
    how = asked.new_tokens, asked.sampler, asked.seed, asked.eos
    return generate(params, asked.prompt, CFG, *how)


class Heard(list):
    """A request's updates."""

    @property
    def tokens(self):
        return [t for update in self for t in update.tokens]

    @property
    def text(self):
        return "".join(update.text for update in self)

    @property
    def finish(self):
        assert not any(update.finish for update in self[:-1])
        return self[-1].finish


@pytest.mark.parametrize(
    "pattern, most, matches, finish",
    [
        ("[0-9]{3}", 20, "[0-9]{3}", "stop"),
        ("the hand", 8, "the hand", "stop"),
        ("[0-9]{9}", 4, "[0-9]{4}", "length"),
    ],
)
def test_an_answer_ends_with_its_grammar(engine, pattern, most, matches, finish):
    pytest.importorskip("llguidance")
    scheduler, heard = Scheduler(engine), Heard()
    asked = dataclasses.replace(request(1), new_tokens=most)
    asked = dataclasses.replace(asked, grammar=engine.guide.grammar("regex", pattern))
    if scheduler.most == 1:
        with pytest.raises(GrammarError, match="subspec decodes alone, and follows no grammar"):
            scheduler.submit(asked, heard.append)
        return
    scheduler.submit(asked, heard.append)
    while scheduler.step():
        pass
    assert re.fullmatch(matches, heard.text) and heard.finish == finish


def test_answers_are_those_of_plain_decoding_alone(engine, params):
    scheduler = Scheduler(engine)
    heard = [Heard() for _ in range(6)]
    for seed, updates in enumerate(heard):
        scheduler.submit(request(seed), updates.append)
    assert scheduler.stats()["queued"] == 6 and not scheduler.stats()["tokens"]
    while scheduler.step():
        assert scheduler.stats()["running"] <= engine.options.texts
    for seed, updates in enumerate(heard):
        assert updates.tokens == alone(params, request(seed)) and updates.finish == "length"
        assert updates.text == "".join(engine.tokenizer.stream(updates.tokens))
        assert [u.prefill for u in updates] == [True] + [False] * (len(updates) - 1)
        for update in updates:
            assert update.text == "".join(piece for piece, _ in update.parts)
            assert update.seconds > 0
            assert 0 <= update.accepted <= len(update.tokens)
    assert sum(u.accepted for updates in heard for u in updates) > 0
    stats = scheduler.stats()
    rounds = [u for updates in heard for u in updates]
    assert stats["tokens"] == 6 * NEW
    assert stats["finished"] == {"stop": 0, "length": 6, "cancelled": 0, "error": 0}
    assert stats["prompt_tokens"] == sum(len(request(seed).prompt) for seed in range(6))
    if engine.plan.ladder:  # passes are shared, and their bytes are counted once
        assert stats["passes"] < len(rounds) and stats["batch"] > 1 and stats["tau"] > 1
        [size] = {u.streamed_bytes for u in rounds}
        assert stats["streamed_bytes"] == stats["passes"] * size > 0
        return
    assert stats["passes"] == len(rounds) and all(u.streamed_bytes > 0 for u in rounds)
    recent = rounds[-scheduler_module.RECENT :]
    decoded = [u for u in recent if not u.prefill]
    assert stats["tau"] == sum(len(u.tokens) for u in decoded) / len(decoded) > 1
    seconds = sum(u.seconds for u in recent)
    assert stats["tokens_per_s"] == pytest.approx(sum(len(u.tokens) for u in recent) / seconds)
    assert stats["bytes_per_s"] == pytest.approx(sum(u.streamed_bytes for u in recent) / seconds)


def test_eos_and_stop_strings_end_an_answer_inside_a_round(engine, params):
    """Every token as eos, every pair of characters as a stop string, against the whole text."""
    whole = alone(params, request(2))
    for at in range(NEW):
        updates = run(engine, request(2, eos=(whole[at],)))
        end = whole.index(whole[at])
        assert updates.tokens == whole[: end + 1] and updates.finish == "stop"
        assert updates.text == "".join(engine.tokenizer.stream(whole[:end]))
    text = "".join(engine.tokenizer.stream(whole))
    for at in range(0, len(text) - 1, 3):
        stop = (text[at : at + 2], "never there")
        updates = run(engine, request(2, stop=stop))
        assert updates.text == text[: text.index(stop[0])] and updates.finish == "stop"
        decoder, seen, needed = StreamDecoder(engine.tokenizer), "", 0
        for token in whole:  # the tokens that were needed to see it, and no more
            needed, seen = needed + 1, seen + decoder.push(token)
            if stop[0] in seen:
                break
        assert updates.tokens == whole[:needed]


def run(engine, asked: Request) -> Heard:
    scheduler, updates = Scheduler(engine), Heard()
    scheduler.submit(asked, updates.append)
    while scheduler.step():
        continue
    return updates


def test_special_tokens_are_shown_to_those_who_ask(engine, params):
    """A stop string that is a special token, at the place where the model writes one."""
    special = {256: "<|endoftext|>", 257: "<|im_start|>", 258: "<|im_end|>"}
    asked = next(r for r in map(request, range(100)) if special.keys() & set(alone(params, r)[1:]))
    whole = alone(params, asked)
    at, name = next((i, special[t]) for i, t in enumerate(whole) if t in special)
    shown = dataclasses.replace(asked, shows=(name,))
    assert name not in run(engine, asked).text
    assert name in run(engine, shown).text
    updates = run(engine, dataclasses.replace(shown, stop=(name,)))
    assert updates.tokens == whole[: at + 1] and updates.finish == "stop"
    assert updates.text == engine.tokenizer.decode(whole[:at])


def test_cancelled_ones_leave_at_the_next_round_and_change_nothing_for_others(engine, params):
    scheduler, heard = Scheduler(engine), [Heard() for _ in range(4)]
    tickets = [scheduler.submit(request(seed), heard[seed].append) for seed in range(4)]
    scheduler.step(), scheduler.step()
    tickets[0].cancel()  # is running
    tickets[2].cancel()  # waits
    before = len(heard[0])
    scheduler.step()
    assert len(heard[0]) == before + 1 and heard[0].finish == "cancelled"
    assert heard[2].finish == "cancelled" and bool(heard[2].tokens) == bool(engine.plan.ladder)
    while scheduler.step():
        continue
    for seed in (1, 3):
        assert heard[seed].tokens == alone(params, request(seed))
    tickets[1].cancel()  # has ended
    assert not scheduler.step() and heard[1].finish == "length"
    assert scheduler.stats()["finished"]["cancelled"] == 2


def test_a_full_queue_and_requests_that_cannot_be(engine):
    scheduler, none = Scheduler(engine, queue=1), lambda update: None
    room = engine.options.texts + 1
    tickets = [scheduler.submit(request(seed), none) for seed in range(room)]
    with pytest.raises(QueueFull, match=f"{room} requests are waiting") as full:
        scheduler.submit(request(2), none)
    assert full.value.seconds > 0
    tickets[1].cancel()  # makes room before anybody steps
    scheduler.submit(request(2), none)
    room = CFG.vocab - 1
    for asked, error, words in (
        (Request((1,) * 90, 7), LengthError, "90 prompt tokens and 7 new ones"),
        (Request((1,), 0), LengthError, "give at least 1"),
        (Request((), 5), GenerationError, "the prompt is empty"),
        (Request((room + 1,), 5), GenerationError, f"ids from 0 to {room}"),
        (Request((1,), 5, seed=-1), GenerationError, "the seed is -1"),
    ):
        with pytest.raises(error, match=words):
            scheduler.submit(asked, none)
    with pytest.raises(SubspecError, match="expected 0 or more"):
        Scheduler(engine, queue=-1)


def test_a_pass_that_fails_ends_those_that_shared_it(folder, params, monkeypatch, caplog):
    """The others get new caches, and their own answers."""
    how = dict(max_length=96, chunk=32, dtype="float32", texts=2, method="vanilla")
    with subspec_jax.open(folder, "full", **how) as engine:
        scheduler, heard = Scheduler(engine), [Heard() for _ in range(4)]
        for seed, updates in enumerate(heard):
            scheduler.submit(request(seed), updates.append)
        for _ in range(5):
            scheduler.step()

        def failing(self, texts):
            monkeypatch.undo()
            raise RuntimeError("the card fell off the bus")

        monkeypatch.setattr(BatchDecoder, "_round", failing)
        while scheduler.step():
            continue
    assert [u.finish for u in heard] == ["error", "error", "length", "length"]
    for seed, updates in enumerate(heard):
        assert updates.tokens == alone(params, request(seed))[: len(updates.tokens)]
        assert updates.tokens
    assert "a round failed" in caplog.text and scheduler.stats()["finished"]["error"] == 2


def test_a_round_that_fails_ends_its_request_alone(engine, params, monkeypatch, caplog):
    if engine.plan.ladder:
        pytest.skip("a pass of several is another test")
    scheduler, heard = Scheduler(engine), [Heard() for _ in range(3)]
    for seed, updates in enumerate(heard):
        scheduler.submit(request(seed), updates.append)
    scheduler.step()
    rounds = type(engine).rounds

    def failing(self, prompt, *how):
        for i, result in enumerate(rounds(self, prompt, *how)):
            if i == 2 and tuple(prompt) == request(1).prompt:
                raise RuntimeError("the card fell off the bus")
            yield result

    monkeypatch.setattr(type(engine), "rounds", failing)
    while scheduler.step():
        continue
    assert heard[1].finish == "error" and heard[1][-1].error == "the card fell off the bus"
    assert heard[1].tokens == alone(params, request(1))[: len(heard[1].tokens)]
    for seed in (0, 2):
        assert heard[seed].tokens == alone(params, request(seed))
    assert "a round failed" in caplog.text


def test_a_taker_that_fails_is_cancelled(engine, params, caplog):
    scheduler, updates, seen = Scheduler(engine), Heard(), []

    def taker(update):
        seen.append(update)
        raise OSError("gone")

    scheduler.submit(request(0), taker)
    scheduler.submit(request(1), updates.append)
    while scheduler.step():
        continue
    assert [u.finish for u in seen] == [None, "cancelled"] and "found no taker" in caplog.text
    assert updates.tokens == alone(params, request(1))


def test_many_samplers_are_forgotten_and_stay_right(engine, params, monkeypatch):
    monkeypatch.setattr(runners, "SAMPLERS", 2)
    shared, kept = Scheduler(engine), set()
    for temperature in (0.5, 0.7, 0.9, 0.5):
        asked = Request((1, 2, 3), 6, 5, Sampler(temperature))
        updates = Heard()
        shared.submit(asked, updates.append)
        while shared.step():
            kept = getattr(shared.runner, "samplers", set())
            assert len(kept) <= 2
        assert updates.tokens == alone(params, asked)
    assert bool(kept) != bool(engine.plan.ladder)  # together, samplers are data


def test_a_later_turn_says_what_was_cached(engine, params):
    if not engine.plan.ladder:
        pytest.skip("one after another keeps no cache")
    first = Request(tuple(range(30, 60)), 8)
    answer = run(engine, first)
    again = Request((*first.prompt, *answer.tokens, 5, 6), 8)
    told = run(engine, again)
    assert answer[0].cached == 0 and told[0].cached == 30 + 8 - 1
    assert told.tokens == alone(params, again)
    scheduler, updates = Scheduler(engine), Heard()
    scheduler.submit(again, updates.append)
    while scheduler.step():
        continue
    assert scheduler.stats()["cached_tokens"] == len(again.prompt) - 1


def test_threads_submit_and_cancel_while_one_steps(engine, params):
    """Random arrivals and cancels from four threads: none lost, none mixed up."""
    shared, ended = Scheduler(engine, queue=400), threading.Event()
    heard: dict[int, Heard] = {seed: Heard() for seed in range(40)}
    cancelled = set()

    def client(seeds):
        rng = random.Random(seeds[0])
        for seed in seeds:
            ticket = shared.submit(request(seed % 8), heard[seed].append)
            if rng.random() < 0.3:
                cancelled.add(seed)
                ticket.cancel()

    def serve():
        while not ended.is_set() or shared.step():
            if not shared.step():
                shared.wait(0.01)

    server = threading.Thread(target=serve)
    clients = [threading.Thread(target=client, args=[range(i, 40, 4)]) for i in range(4)]
    for thread in [server, *clients]:
        thread.start()
    for thread in clients:
        thread.join()
    ended.set()
    server.join(timeout=120)
    assert not server.is_alive() and cancelled
    wanted = {seed: alone(params, request(seed)) for seed in range(8)}
    for seed, updates in heard.items():
        if updates.finish == "cancelled":
            assert seed in cancelled
            assert updates.tokens == wanted[seed % 8][: len(updates.tokens)]
        else:
            assert updates.tokens == wanted[seed % 8] and updates.finish == "length"
    assert shared.stats()["requests"] == 40
