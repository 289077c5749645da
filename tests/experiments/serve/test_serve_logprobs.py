"""Log-probabilities in OpenAI's forms; the numbers themselves are tests of `subspec_jax`."""

import json

import pytest
from fake_engine import answer, logprob

TEXT = "/v1/completions"


def pieces_of(text):
    *lines, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(line) for line in lines]


def named(byte):
    return chr(byte) if byte < 128 else f"\\x{byte:02x}"


@pytest.mark.parametrize("most", (0, 1, 20))
@pytest.mark.parametrize("said, stop", [("hello", []), ("é → b", []), ("hello", ["O H", "x"])])
def test_of_a_chat(server, most, said, stop):
    """Every token of the text, its bytes and the likeliest; whole, and the same in a stream."""
    ask = dict(messages=[{"role": "user", "content": said}], max_tokens=15, stop=stop)
    ask |= dict(logprobs=True, top_logprobs=most)
    _, _, reply = server.post(**ask)
    (choice,) = reply["choices"]
    content = choice["logprobs"]["content"]
    assert choice["logprobs"]["refusal"] is None
    text = choice["message"]["content"].encode()
    assert b"".join(bytes(one["bytes"]) for one in content) == text
    for one, byte in zip(content, text, strict=True):
        assert (one["token"], one["logprob"], one["bytes"]) == (named(byte), -20.0, [byte])
        top = logprob(byte).top[:most]
        assert [(t["bytes"], t["logprob"]) for t in one["top_logprobs"]] == [
            ([token], max(value, -9999.0)) for token, value in top
        ]
    _, _, text = server.post(**ask, stream=True)
    first, *pieces = [piece["choices"][0] for piece in pieces_of(text)]
    assert first["logprobs"] is None
    assert [one for piece in pieces for one in piece["logprobs"]["content"]] == content
    for piece in pieces:  # with the text that they are
        own = b"".join(bytes(one["bytes"]) for one in piece["logprobs"]["content"])
        assert own.decode() == piece["delta"]["content"]


def test_the_end_of_a_turn_and_what_is_no_text(server):
    _, _, reply = server.post(messages=[{"role": "user", "content": "bye"}], logprobs=True)
    (choice,) = reply["choices"]
    names = [one["token"] for one in choice["logprobs"]["content"]]
    assert names == list("BYE ") and reply["usage"]["completion_tokens"] == 5
    _, _, reply = server.post(logprobs=False, top_logprobs=0)
    assert reply["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("most", (0, 2, 5))
def test_of_a_text(server, most):
    ask = dict(prompt=["oné", "two"], max_tokens=8, logprobs=most)
    _, _, reply = server.post(TEXT, **ask)
    for choice, said in zip(reply["choices"], ask["prompt"], strict=True):
        told, tokens = choice["logprobs"], answer(said, 8)
        names = [named(b) if b < 128 else f"bytes:{named(b)}" for b in tokens]
        assert told["tokens"] == names and told["token_logprobs"] == [-20.0] * 8
        letters = bytes(tokens).decode(errors="ignore")
        where = [i for i, letter in enumerate(letters) for _ in letter.encode()]
        assert told["text_offset"][: len(where)] == where and len(told["text_offset"]) == 8
        for byte, top in zip(tokens, told["top_logprobs"], strict=True):
            assert len(top) == most + 1 and list(top.values()) == [
                -1.0 * i for i in range(most)
            ] + [-20.0]
            assert list(top)[-1] == (named(byte) if byte < 128 else f"bytes:{named(byte)}")
    _, _, text = server.post(TEXT, **ask | dict(prompt="oné"), stream=True)
    for field, whole in reply["choices"][0]["logprobs"].items():
        pieces = [piece["choices"][0]["logprobs"][field] for piece in pieces_of(text)]
        assert [value for piece in pieces for value in piece] == whole
