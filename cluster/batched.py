"""Several questions answered together: one stream of tokens, one forward for all of them a step."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import msgspec

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
    min_tokens: int = 0
    """Until there are so many no stop id is chosen."""
    logprobs: int = 0
    """Alternatives told with each token; 0: none, and no logprob."""


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
    requests = tuple(request_of(sessions, held, schemes, question) for question in questions)
    return _answers(gang, requests, cancelled)


def request_of(
    sessions: Sessions,
    held: Callable[[str], ContextHandle],
    schemes: SchemeChoices,
    question: Question,
) -> AnswerRequest:
    """What the ranks are told. BadInput, UnknownName."""
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
        min_tokens=question.min_tokens,
        logprobs=question.logprobs,
    )


def next_slice(
    gang: Gang, requests: Sequence[AnswerRequest], tokens: int
) -> Iterator[tuple[TokenChunk, ...]]:
    """So many more tokens of every answer, one of each a step; each says what it says unsliced.

    Take all of it: what a step brought and nobody took is lost to the client. requests: of answers
    on their way; an answer that was given none yet begins with its question, which may take long.
    """
    sliced = tuple(msgspec.structs.replace(one, slice_tokens=tokens) for one in requests)
    longest = max(len(request.token_ids) for request in requests)
    steps = gang.stream(
        "generate_together",
        sliced,
        timeout_s=TOKEN_TIMEOUT_S * (1 + longest // TOKENS_A_TIMEOUT),
        what=f"answers of {len(requests)} sessions",
    )
    for step in cast("Iterator[TokenChunks]", steps):  # gangs stream whatever the method yields
        yield step.chunks


def going_on(request: AnswerRequest) -> AnswerRequest:
    """For the slices behind the first one."""
    return msgspec.structs.replace(request, token_ids=(), goes_on=True)


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
