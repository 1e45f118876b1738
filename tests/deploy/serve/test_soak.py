"""The soak says what is wrong when something is; a short one of the real thing finds nothing."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import httpx2
import openai
import pytest

from ringspan.deploy.jobs import soak
from ringspan.deploy.jobs.soak import _over, main, table
from ringspan.deploy.jobs.soak_clients import Client, Heard, _Answer
from ringspan.deploy.jobs.soak_questions import Greedy, Question, every, questions
from ringspan.deploy.jobs.soak_watch import growth

QUESTION = Question(
    "one", False, {"prompt": [1, 2]}, 3, (1, 2), "", (7, 8, 9), "7 8 9", finish_reason="length"
)


def heard_of(tokens: list[int], text: str, finish_reason: str | None) -> Heard:
    heard = Heard()
    answer = _Answer(chat=False)
    answer.add(SimpleNamespace(model_extra={"token_ids": tokens}, text=text,
                               finish_reason=finish_reason))  # fmt: skip
    Client("", [QUESTION], {}, heard, threading.Event(), 0)._judge(QUESTION, answer)
    return heard


@pytest.mark.parametrize(
    ("tokens", "text", "reason", "outcome"),
    [
        ([7, 8, 9], "7 8 9", "length", "right"),
        ([7, 8, 9], "7 8 9", "stop", "WRONG"),
        ([7, 8, 1], "7 8 1", "length", "WRONG"),
        ([7, 8, 9], "7 8  9", "length", "WRONG"),
        ([7, 8], "7 8", "length", "WRONG"),
        ([7, 8], "7 8", None, "left within"),
        ([7, 9], "7 9", None, "WRONG"),
        ([], "", None, "WRONG"),
    ],
)
def test_an_answer_is_right_to_the_last_token_or_wrong(tokens, text, reason, outcome) -> None:
    heard = heard_of(tokens, text, reason)
    assert heard.outcomes == {outcome: 1}
    assert len(heard.wrong) == (outcome == "WRONG")


@pytest.mark.parametrize(
    ("code", "fields", "headers", "outcome"),
    [
        ("rank_lost", {}, {"retry-after": "5"}, "503 rank_lost"),
        ("rank_lost", {}, {}, "WRONG"),
        ("internal_error", {}, {"retry-after": "5"}, "WRONG"),
        ("rank_lost", {"more": 1}, {"retry-after": "5"}, "WRONG"),
    ],
)
def test_an_error_has_the_right_shape_or_is_wrong(code, fields, headers, outcome) -> None:
    body = {"message": "m", "type": "server_error", "param": None, "code": code, **fields}
    response = httpx2.Response(503, headers=headers, request=httpx2.Request("POST", "http://one"))
    heard = Heard()
    client = Client("", [QUESTION], {}, heard, threading.Event(), 0)
    error = openai.InternalServerError("m", response=response, body=body)
    client._failed(QUESTION, error, _Answer(chat=False))
    assert heard.outcomes == {outcome: 1}


def test_growth_is_the_slope_of_the_asked_process_and_time_alone() -> None:
    rows = [
        {"at_s": float(at), "processes": [{"pid": 1, "rss_bytes": (100 + at / 30) * 2**20},
                                          {"pid": 2, "rss_bytes": 5 * 2**20}]}
        for at in range(120)
    ]  # fmt: skip
    assert growth(rows, 1, 30, 90) == pytest.approx((2.0, 102.0))
    assert growth(rows, 2, 0, 120) == pytest.approx((0.0, 5.0))
    assert growth(rows, 3, 0, 120) == (0.0, 0.0)


def test_what_is_held_more_than_before_is_named() -> None:
    def sample(fds: int, ranks: int = 1, shm: int = 0) -> dict:
        one = {"pid": 1, "fds": 10, "threads": 9, "rss_bytes": 0}
        rank = {"pid": 2, "fds": fds, "threads": 9, "rss_bytes": 0}
        return {"processes": [one, rank], "ranks": ranks, "shm": shm}

    assert _over(sample(20), sample(22)) == []
    assert "process 2: 40 fds, 20 after the warm-up" in _over(sample(20), sample(40))[0]
    assert "0 ranks" in _over(sample(20), sample(20, ranks=0))[0]
    assert "/dev/shm" in _over(sample(20), sample(20, shm=1))[0]


def test_questions_of_a_seed_are_the_same_and_none_is_too_close_to_call() -> None:
    greedy = Greedy("random:tiny", 0)
    documents, asked, left_out = questions(greedy, 3, 40)
    again = questions(greedy, 3, 40)[1]
    assert [one.wanted for one in asked] == [one.wanted for one in again]
    assert len(asked) + left_out == 20
    assert all(len(one.wanted) == one.max_tokens for one in every(asked))
    assert {one.document for one in asked} == {"", *(one.title for one in documents)}


def test_a_missing_package_and_settings_that_say_nothing_are_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(soak, "NEEDED", ("no_such_package",))
    assert main(["--model", "random:tiny"]) == 2
    assert "soak: a soak wants the package no_such_package" in capsys.readouterr().err
    for wrong in (["--minutes", "0"], ["--sessions", "0"], ["--kill-rank-at", "1"]):
        with pytest.raises(SystemExit):
            main(wrong)


@pytest.mark.slow
@pytest.mark.ray
def test_a_short_soak_with_a_rank_killed_finds_nothing(tmp_path, capsys) -> None:
    rows = tmp_path / "soak.jsonl"
    options = ["--minutes", "0.4", "--sessions", "4", "--model", "random:tiny"]
    # memory of so short a time says nothing: that is for the long one
    status = main([*options, "--most-growth", "10000", "--json", str(rows)])
    said = capsys.readouterr()
    row = json.loads(rows.read_text().splitlines()[-1])
    assert status == 0, said.err
    assert row["ok"]
    assert row["outcomes"]["right"] > 0
    assert row["after"]["ranks"] == 2
    assert table(row) in said.out
