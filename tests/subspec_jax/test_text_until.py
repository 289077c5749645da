"""Text up to a stop string, against brute force: all of the text is looked at after each token."""

import random

import pytest

from llm_jax.testing import tiny_tokenizer
from llm_jax.token_stream import StreamDecoder
from llm_jax.tokenizer import ByteTokenizer, wrap
from subspec_jax import SubspecError
from subspec_jax.requests import Request, TextUntil

BYTES = ByteTokenizer()


def brute_force(tokenizer, tokens, stop):
    """(text, how many tokens were read): the whole text is searched again after each token."""
    decoder, text = StreamDecoder(tokenizer), ""
    for n, token in enumerate(tokens, 1):
        text += decoder.push(token)
        if found := [text.index(s) for s in stop if s in text]:
            return text[: min(found)], n
    text += decoder.flush()
    found = [text.index(s) for s in stop if s in text]
    return text[: min(found, default=len(text))], len(tokens)


def until(tokenizer, tokens, stop, sizes):
    """The same by `TextUntil`, in rounds of the given sizes; (text, tokens read, pieces)."""
    text, pieces, read, size = TextUntil(tokenizer, stop), [], 0, iter(sizes)
    while read < len(tokens) and not text.stopped:
        for token in tokens[read : read + next(size)]:
            read += 1
            if text.push(token):
                break
        last = text.stopped or read >= len(tokens)
        if last:
            text.flush()
        pieces.append("".join(piece for piece, _ in text.take(last)))
    return "".join(pieces), read, pieces


@pytest.mark.parametrize("seed", range(40))
def test_random_texts_end_where_brute_force_ends_them(seed):
    rng = random.Random(seed)
    alphabet = "ab" if seed % 2 else "ab\n→é"
    tokenizer = BYTES if seed % 4 < 2 else wrap(tiny_tokenizer(288))
    for _ in range(60):
        word = lambda n: "".join(rng.choice(alphabet) for _ in range(rng.randint(1, n)))
        tokens = tokenizer.encode(word(40))[: rng.randint(1, 60)]
        stop = tuple(word(6) for _ in range(rng.randint(0, 3)))
        sizes = [rng.randint(1, 5) for _ in tokens]
        text, read, pieces = until(tokenizer, tokens, stop, sizes)
        assert (text, read) == brute_force(tokenizer, tokens, stop)
        shown = ""
        for piece in pieces:  # what was shown is never taken back, and never a stop string
            shown += piece
            assert text.startswith(shown) and not any(s in shown for s in stop)


def test_a_possible_beginning_waits_until_it_is_none():
    text, seen = TextUntil(BYTES, ("END",)), []
    for letter in b"aENbEND":
        text.push(letter)
        seen.append("".join(piece for piece, _ in text.take()))
    assert seen == ["a", "", "", "ENb", "", "", ""] and text.stopped
    assert text.take(last=True) == ()


def test_pieces_keep_who_proposed_them_while_they_wait():
    text = TextUntil(BYTES, ("xyz",))
    for letter, drafted in zip(b"axyb", (False, True, True, False)):
        text.push(letter, drafted)
    assert text.take() == (("a", False), ("xy", True), ("b", False))
    for letter in b"cd":
        text.push(letter, True)
    assert text.take() == (("cd", True),)


def test_an_unfinished_character_is_shown_at_the_end():
    text = TextUntil(BYTES)
    text.push("é".encode()[0])
    assert text.take() == ()
    assert not text.flush() and text.take(last=True) == (("\ufffd", False),)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(SubspecError, match="stop string is empty"):
        Request((1,), 1, stop=("a", ""))
