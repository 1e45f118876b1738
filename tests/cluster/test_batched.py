"""Questions asked together, as the controller sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from ringspan.cluster.batched import Question, ask_many
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelSpec, PrefillPlan
from ringspan.cluster.scheme_choices import SchemeChoices
from ringspan.cluster.session import ContextHandle, Sessions
from ringspan.errors import BadInput, UnknownName

HANDLE = ContextHandle(context_id="c", num_tokens=200, codec="raw", kv_bytes=0)


@pytest.fixture(scope="module")
def gang() -> Iterator[LocalGang]:
    spec = GangSpec(world_size=2, model=ModelSpec(name="random:tiny"), device="cpu", threads=1)
    with LocalGang(spec) as gang:
        plan = PrefillPlan(
            context_id="c", num_tokens=200, page_tokens=128, chunk_tokens=256,
            layout="zigzag", scheme="ring", codec="raw",
        )  # fmt: skip
        ids = np.random.default_rng(0).integers(0, 256, 200).astype(np.int32)
        gang.call("begin_prefill", plan, ids, timeout_s=60.0, what="begin")
        gang.call("prefill_chunk", "c", 0, timeout_s=60.0, what="chunk")
        yield gang


def held(name: str) -> ContextHandle:
    if name != "c":
        raise UnknownName("context", name, ("c",))
    return HANDLE


def asked(gang: Any, questions: list[Question], sessions: Sessions, **options: Any) -> list[Any]:
    schemes = cast("SchemeChoices", None)  # no question here is long
    return list(ask_many(gang, sessions, held, schemes, questions, **options))


def test_tokens_of_all_sessions_come_each_in_order(gang: LocalGang) -> None:
    sessions = Sessions()
    questions = [
        Question(sessions.begin("c"), "c", (5, 17, 9)[: at + 1], max_tokens=4 + at)
        for at in range(3)
    ]
    tokens = asked(gang, questions, sessions)
    for question in questions:
        own = [token for token in tokens if token.session_id == question.session_id]
        assert [token.index for token in own] == list(range(question.max_tokens))
        assert [token.finish_reason for token in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == "length"
        alone = asked(gang, [question._replace(session_id=sessions.begin("c"))], sessions)
        assert [token.token_id for token in alone] == [token.token_id for token in own]


def test_a_client_that_leaves_ends_all_answers(gang: LocalGang) -> None:
    sessions = Sessions()
    questions = [Question(sessions.begin("c"), "c", (3,), max_tokens=50) for _ in range(2)]
    steps = iter([False, False, False, True])
    tokens = asked(gang, questions, sessions, cancelled=lambda: next(steps))
    assert len(tokens) == 2 * 4
    again = [question._replace(max_tokens=2) for question in questions]
    assert len(asked(gang, again, sessions)) == 4


def test_what_cannot_be_asked_is_refused_in_one_line(gang: LocalGang) -> None:
    sessions = Sessions()
    one = Question(sessions.begin("c"), "c", (3,), max_tokens=2)
    with pytest.raises(BadInput, match="no question was asked"):
        asked(gang, [], sessions)
    with pytest.raises(BadInput, match="two questions to one session"):
        asked(gang, [one, one], sessions)
    with pytest.raises(BadInput, match="max_tokens 0: wanted at least 1"):
        asked(gang, [one._replace(max_tokens=0)], sessions)
    with pytest.raises(BadInput, match="is not open"):
        asked(gang, [one._replace(session_id="nobody")], sessions)
    with pytest.raises(UnknownName, match="context"):
        asked(gang, [one._replace(context_id="d")], sessions)
    assert len(asked(gang, [one], sessions)) == 2
