"""A prompt of one's own, from the flags or standard input, a system message, and stop strings."""

import io
import json
import shlex
import sys

import pytest
from command import call

from llm_jax.formats import open_checkpoint
from llm_jax.generation import generate
from llm_jax.token_stream import StreamDecoder

ONE = "--compare vanilla --check-lossless"


@pytest.fixture(scope="module")
def plain(models):
    """(tokenizer, f(messages) -> tokens that the model writes by the plain loop)."""
    checkpoint = open_checkpoint(models["target"])
    tokenizer, cfg = checkpoint.tokenizer(), checkpoint.config("float32")
    params = checkpoint.load(cfg)
    ids = lambda messages: tokenizer.chat(messages)
    return tokenizer, lambda m: generate(params, ids(m), cfg, 8, eos=tokenizer.eos)


def said(text, system=None):
    told = [{"role": "system", "content": system}] if system else []
    return [*told, {"role": "user", "content": text}]


def test_a_question_with_a_system_message(run, plain, tmp_path):
    tokenizer, tokens = plain
    question, system = "What is a thimble?", "Be short."
    found = run(f"--prompt {shlex.quote(question)} --system '{system}' {ONE}", tmp_path)
    for record in found.records:
        assert record["token_ids"] == tokens(said(question, system))
        assert record["prompt_tokens"] == len(tokenizer.chat(said(question, system)))
        assert (record["benchmark"], record["sample"]) == ("prompt", "prompt")
    assert question in found.out
    # Another question in the same folder is decoded anew, and the first one is not.
    run(f"--prompt other --system '{system}' {ONE}", tmp_path)
    again = run(f"--prompt {shlex.quote(question)} --system '{system}' {ONE}", tmp_path)
    assert len(again.records) == 4 and again.out.count("1 turns were done before") == 2


def test_standard_input(run, plain, tmp_path, monkeypatch):
    _, tokens = plain
    given = io.TextIOWrapper(io.BytesIO("What is\n“a thimble”?\n".encode()))
    monkeypatch.setattr(sys, "stdin", given)
    found = run("--prompt - --method vanilla --compare", tmp_path)
    assert found.records[0]["token_ids"] == tokens(said("What is\n“a thimble”?"))


def test_standard_input_that_is_no_text(models, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    words = f"--checkpoint {models['target']} --memory-limit 16MB --max-length 192 --depth 3"
    done = call(f"{words} --draft-group 16 --prompt - --output {tmp_path}")
    assert done.code == 2 and "standard input is no UTF-8" in done.err


def test_stop_strings_end_the_answer_of_every_method(run, plain, tmp_path):
    tokenizer, tokens = plain
    whole = tokens(said("What is a thimble?"))
    text = "".join(tokenizer.stream(whole))
    stop = text[len(text) // 2 :][:2]
    decoder, seen, needed = StreamDecoder(tokenizer), "", 0
    while stop not in seen:
        seen += decoder.push(whole[needed])
        needed += 1
    found = run(f"--prompt 'What is a thimble?' --stop {shlex.quote(stop)} {ONE}", tmp_path)
    for record in found.records:
        assert record["text"] == text[: text.index(stop)]
        assert record["token_ids"] == whole[:needed]
        assert sum(record["rounds"]["emitted"]) == needed - 1  # the first came with the prompt
    run_json = json.loads((tmp_path / "run.json").read_text())
    assert run_json["arguments"]["stop"] == [stop]
