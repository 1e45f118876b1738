import io

import pytest

from ringspan.deploy.questions import check_given, questions
from ringspan.errors import BadInput


def test_given_questions_are_asked_and_stdin_is_left_alone() -> None:
    stdin = io.StringIO("never read\n")
    assert list(questions(["who?", "why?"], stdin)) == ["who?", "why?"]
    assert stdin.tell() == 0


def test_a_pipe_gives_one_question_a_line_without_blank_ones() -> None:
    assert list(questions([], io.StringIO("who?\n\n  why?\nlast"))) == ["who?", "why?", "last"]


def test_a_person_ends_with_an_empty_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert list(questions([], Terminal("who?\n\nnever\n"))) == ["who?"]
    assert capsys.readouterr().out == ""  # prompts are not results


def test_an_empty_question_is_refused_before_anything_starts() -> None:
    with pytest.raises(BadInput, match="question 2 of 2 is empty"):
        check_given(["who?", " "])
