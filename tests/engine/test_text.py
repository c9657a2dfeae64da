"""Streaming text: the pieces given out, joined, are the decoded answer up to the first stop text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.engine.text import TextStream
from loopwise.hub.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
END = 256


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, int]:
    """The text before the stop text that ends first (the longest of several), and where that ends."""
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    end, begin = min(found, default=(len(text), len(text)))
    return text[:begin], end


def run(tokens: list[int], stops: tuple[str, ...]) -> tuple[list[str], int]:
    """The texts of all tokens that were taken, and how many tokens that were."""
    stream = TextStream(BYTES, stops)
    texts: list[str] = []
    for count, token in enumerate(tokens, start=1):
        before = len(stream.held)
        given_out = stream.push(token, last=count == len(tokens))
        assert before + 1 == len(given_out) + len(stream.held)
        texts += given_out
        if stream.stopped:
            return texts, count
    return texts, len(tokens)


@given(st.binary(min_size=1, max_size=40))
def test_any_bytes_stream_as_they_decode(data: bytes) -> None:
    texts, taken = run(list(data), ())
    assert "".join(texts) == BYTES.decode(list(data)) == data.decode("utf-8", "replace")
    assert len(texts) == taken == len(data)


@given(st.text(alphabet="abé🙂", max_size=30), st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=4), max_size=3))
def test_stop_texts_are_cut_wherever_tokens_end(text: str, stops: list[str]) -> None:
    tokens = [*text.encode(), ord("z")]
    texts, taken = run(tokens, tuple(stops))
    expected, end = cut(text + "z", tuple(stops))
    assert "".join(texts) == expected
    # No token is taken after the one that completes a stop text.
    assert len(texts) == taken == len((text + "z")[:end].encode())


def test_only_what_may_become_a_stop_text_is_held_back() -> None:
    stream = TextStream(BYTES, ("\nUser:", "END"))
    assert stream.push(ord("a")) == ["a"]
    assert stream.push(ord("\n")) == []
    assert stream.push(ord("U")) == []
    assert stream.held == ["\n", "U"]
    assert stream.push(ord("n")) == ["\n", "U", "n"]
    assert [stream.push(ord(letter)) for letter in "ENE"] == [[], [], ["E", "N"]]
    assert [stream.push(ord(letter)) for letter in "ND"] == [[], ["", "", ""]]
    assert stream.stopped


def test_a_stop_text_inside_one_token_keeps_what_stands_before_it() -> None:
    words = Tokenizer.train(["hello world " * 50], 280)
    token = max(range(words.vocab_size), key=lambda index: len(words.token_bytes(index)) * (index != words.eos_id))
    text = words.decode([token])
    assert len(text) > 3
    stream = TextStream(words, (text[2:4], text[1:4]))
    assert stream.push(token) == [text[:1]]
    assert stream.stopped


@pytest.mark.parametrize("end", [None, END])
def test_an_unfinished_character_shows_at_the_end(end: int | None) -> None:
    stream = TextStream(BYTES)
    assert stream.push("é".encode()[0]) == [""]
    assert stream.push(end, last=True) == ["\ufffd"]
