"""Answers that come together are printed one after the other."""

from __future__ import annotations

from ringspan.cluster.messages import TokenChunk
from ringspan.deploy.answers import NumberStream, Spoken, Voice, in_order, numbers

VOICE = Voice(numbers, numbers, NumberStream, stop_ids=(9,))


def chunk(session: str, index: int, token: int, reason: str | None = None) -> TokenChunk:
    return TokenChunk(session_id=session, index=index, token_id=token, finish_reason=reason)


def test_answers_are_printed_in_the_order_of_their_questions() -> None:
    answers = {name: Spoken(VOICE, f"why {name}", (1, 2)) for name in "abc"}
    tokens = [
        chunk("a", 0, 10),
        chunk("b", 0, 20),
        chunk("c", 0, 30, "length"),
        chunk("a", 1, 11),
        chunk("b", 1, 9, "stop"),
        chunk("a", 2, 12, "length"),
    ]
    pieces = list(in_order(answers, tokens))
    assert "".join(pieces) == "> why a\n10 11 12\n\n> why b\n20\n\n> why c\n30\n"
    assert "".join(pieces[: pieces.index(" 11") + 1]) == "> why a\n10 11"  # as it comes
    told = [spoken.answered() for spoken in answers.values()]
    assert [(one.answer, one.answer_tokens, one.finish_reason) for one in told] == [
        ("10 11 12", 3, "length"),
        ("20", 2, "stop"),
        ("30", 1, "length"),
    ]
    assert all(0 < one.first_token_s <= one.elapsed_s for one in told)
