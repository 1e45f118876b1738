"""Several questions answered together: one stream of tokens, one forward for all of them a step."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

from ringspan.attention.tail import LONG_TURN_TOKENS
from ringspan.cluster.events import IsCancelled, never
from ringspan.cluster.gang import Gang
from ringspan.cluster.messages import AnswerRequest, TokenChunk, TokenChunks
from ringspan.cluster.scheme_choices import SchemeChoices
from ringspan.cluster.session import ContextHandle, Sessions
from ringspan.errors import BadInput

TOKEN_TIMEOUT_S = 600.0
"""For one token of every session; the first one takes a whole question through the model ..."""
TOKENS_A_TIMEOUT = 65_536
"""... and has the time once more for each so many tokens of it."""


class Question(NamedTuple):
    """What a session is asked; see `Controller.ask` for each."""

    session_id: str
    context_id: str
    token_ids: tuple[int, ...]
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    """Of sampling; None takes a fresh one."""
    stop_ids: tuple[int, ...] = ()


def ask_many(
    gang: Gang,
    sessions: Sessions,
    held: Callable[[str], ContextHandle],
    schemes: SchemeChoices,
    questions: Sequence[Question],
    cancelled: IsCancelled = never,
) -> Iterator[TokenChunk]:
    """Append each question to its session, then yield tokens of all answers as they come, each
    session's in order. Questions on one context share its sweeps; they may be on several.

    held: the context of an id; UnknownName or BadInput where the gang does not hold it. BadInput
    for no question, for two to one session, or for max_tokens below 1, before anything is done.
    Closing the iterator, or `cancelled`, ends all answers at most one token further.
    """
    if not questions:
        raise BadInput("no question was asked; wanted at least one")
    if len({question.session_id for question in questions}) < len(questions):
        raise BadInput("two questions to one session; ask the second when the first is answered")
    requests = tuple(_request(sessions, held, schemes, question) for question in questions)
    return _answers(gang, requests, cancelled)


def _request(
    sessions: Sessions,
    held: Callable[[str], ContextHandle],
    schemes: SchemeChoices,
    question: Question,
) -> AnswerRequest:
    handle = held(question.context_id)
    sessions.resume(question.session_id, handle.context_id)
    if question.max_tokens < 1:
        raise BadInput(f"max_tokens {question.max_tokens}: wanted at least 1")
    new_tokens = len(question.token_ids)
    scheme = "auto"
    if new_tokens >= LONG_TURN_TOKENS:
        scheme = schemes.onto(new_tokens, handle.num_tokens, handle.codec)
    return AnswerRequest(
        session_id=question.session_id,
        context_id=handle.context_id,
        token_ids=tuple(int(token) for token in question.token_ids),
        max_tokens=question.max_tokens,
        temperature=question.temperature,
        top_p=question.top_p,
        seed=secrets.randbits(31) if question.seed is None else question.seed,
        stop_ids=question.stop_ids,
        scheme=scheme,
    )


def _answers(
    gang: Gang, requests: tuple[AnswerRequest, ...], cancelled: IsCancelled
) -> Iterator[TokenChunk]:
    longest = max(len(request.token_ids) for request in requests)
    stream = gang.stream(
        "generate_together",
        requests,
        timeout_s=TOKEN_TIMEOUT_S * (1 + longest // TOKENS_A_TIMEOUT),
        what=f"answers of {len(requests)} sessions",
    )
    together = cast("Iterator[TokenChunks]", stream)  # gangs stream whatever the method yields
    try:
        for tokens in together:
            yield from tokens.chunks
            if cancelled():
                return
    finally:
        together.close()  # type: ignore[attr-defined]  # gangs stream by generators
