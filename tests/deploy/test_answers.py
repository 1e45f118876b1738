"""Answers that come together are printed one after the other."""

from __future__ import annotations

from ringspan.cluster.messages import TokenChunk
from ringspan.deploy.answers import NumberStream, Spoken, Voice, in_order, numbers, pace
from ringspan.deploy.record import Answered

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


def answered(first_s: float, elapsed_s: float, tokens: int) -> Answered:
    return Answered(
        question="q", answer="a", question_tokens=3, answer_tokens=tokens, first_token_s=first_s,
        elapsed_s=elapsed_s, finish_reason="length",
    )  # fmt: skip


def test_the_pace_of_answers_is_told_in_a_line() -> None:
    assert (
        pace([answered(0.5, 2.5, 101)])
        == "101 tokens: the first after 0.50 s, then 20.0 ms a token"
    )
    assert pace([answered(0.5, 0.5, 1)]) == "1 tokens: the first after 0.50 s"
    both = [answered(0.5, 2.5, 101), answered(1.0, 4.5, 101)]
    wanted = "2 answers at once, 202 tokens: the first after 0.50 s, then 20.0 ms a token"
    assert pace(both) == wanted
