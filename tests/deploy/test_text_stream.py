import random

import pytest

from ringspan.deploy.text_stream import TextStream


def decode_bytes(ids: list[int]) -> str:
    """The hardest tokenizer: one byte a token."""
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["", "a", "naïve café", "漢字と🙂" * 40, "plain " * 100])
def test_the_pieces_joined_are_the_text(text: str) -> None:
    stream = TextStream(decode_bytes)
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_is_given_out_when_it_is_whole() -> None:
    stream = TextStream(decode_bytes)
    assert [stream.push(byte) for byte in "é!".encode()] == ["", "é", "!"]


def test_bytes_that_never_make_a_character_do_not_hold_the_stream_for_ever() -> None:
    stream = TextStream(decode_bytes)
    ids = [0xFF] * 40
    assert any(stream.push(byte) for byte in ids)
    stream = TextStream(decode_bytes)
    assert stream.push(0xC3) == ""
    assert stream.finish() == "\ufffd"


def test_leading_spaces_between_words_survive_a_window_that_moves_on() -> None:
    words = [random.Random(5).choice(["the", "old", "man"]) for _ in range(100)]

    def decode_words(ids: list[int]) -> str:  # a decoder that eats the first space
        return " ".join(words[i] for i in ids)

    stream = TextStream(decode_words)
    pieces = [stream.push(i) for i in range(100)]
    assert "".join(pieces) == " ".join(words)
