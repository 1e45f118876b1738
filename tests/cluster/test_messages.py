"""Every message: immutable, by keyword, the same after a trip over the wire."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

import ringspan.cluster.events as events  # so that its messages are known here
from ringspan.cluster.messages import (
    AnswerRequest,
    ChunkDone,
    Findings,
    GangSpec,
    Message,
    ModelFacts,
    ModelSpec,
    PageRecord,
    PrefillPlan,
    RankReady,
    ShardOpened,
    ShardSaved,
    TokenChunk,
)
from ringspan.types import Span


def all_messages(base: type[Message] = Message) -> Iterator[type[Message]]:
    for message in base.__subclasses__():
        yield message
        yield from all_messages(message)


FINDINGS = Findings(exposed_s=(0.0, 0.5), seen_keys=9, audited_rows=4, audit_error=1e-6)
PLAN = PrefillPlan(
    context_id="ab" * 8,
    num_tokens=1000,
    page_tokens=128,
    chunk_tokens=384,
    layout="zigzag",
    scheme="ring",
    codec="raw",
)
FACTS = ModelFacts(
    name="tiny",
    family="llama",
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    hidden_size=64,
    num_params=1000,
    flops_per_token=1e3,
    max_positions=4096,
    dtype="float32",
    fingerprint="00ff",
    windows=(None, 64),
)
RECORD = PageRecord(
    key="ab" * 32,
    span=Span(0, 128),
    segment="rank-0.seg",
    offset=0,
    frame_bytes=8192,
    payload_bytes=4000,
    xxh3="00" * 16,
)
EXAMPLES: tuple[Message, ...] = (
    PLAN,
    RECORD,
    GangSpec(world_size=2, model=ModelSpec(name="smollm2", rope_scaling="yarn:4")),
    RankReady(
        rank=1,
        device="cpu",
        device_name="a CPU",
        host="h",
        pid=5,
        transport="gloo",
        facts=FACTS,
        weights_bytes=1,
        free_bytes=2,
        elapsed_s=0.5,
    ),
    FINDINGS,
    ChunkDone(
        context_id="ab" * 8,
        rank=0,
        chunk_index=2,
        span=Span(768, 1000),
        rank_tokens=116,
        elapsed_s=1.5,
        exchange_s=0.25,
        findings=FINDINGS,
        sent_bytes=10,
        kv_bytes=20,
    ),
    ShardSaved(context_id="ab" * 8, rank=0, records=(RECORD,), elapsed_s=0.1),
    ShardOpened(context_id="ab" * 8, rank=0, num_pages=1, kv_bytes=4000, elapsed_s=0.1),
    AnswerRequest(session_id="s", context_id="ab" * 8, token_ids=(1, 2), stop_ids=(3,)),
    TokenChunk(session_id="s", index=0, token_id=7, finish_reason="stop"),
    events.PrefillDone(context_id="ab" * 8, plan=PLAN),
)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_message_survives_the_wire(message: Message) -> None:
    data = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(data, type=type(message)) == message
    assert msgspec.json.decode(msgspec.json.encode(message), type=type(message)) == message


@pytest.mark.parametrize("message", list(all_messages()), ids=lambda m: m.__name__)
def test_a_message_is_frozen_tagged_and_by_keyword(message: type[Message]) -> None:
    config = message.__struct_config__
    assert config.frozen
    assert config.tag == message.__name__
    assert config.forbid_unknown_fields
    if message.__struct_fields__:
        with pytest.raises(TypeError, match="Extra positional arguments"):
            message("positional")
    assert message.__doc__


def test_an_unknown_field_is_refused() -> None:
    data = msgspec.json.encode(msgspec.to_builtins(RECORD) | {"colour": "red"})
    with pytest.raises(msgspec.ValidationError, match="unknown field `colour`"):
        msgspec.json.decode(data, type=PageRecord)


def test_a_span_that_runs_backwards_is_refused_with_its_place() -> None:
    data = msgspec.json.encode(msgspec.to_builtins(RECORD) | {"span": [5, 2]})
    with pytest.raises(msgspec.ValidationError, match=r"span \[5, 2\) .* at `\$\.span`"):
        msgspec.json.decode(data, type=PageRecord)


def test_chunks_tile_the_context_and_the_last_may_be_short() -> None:
    assert PLAN.chunks == (Span(0, 384), Span(384, 768), Span(768, 1000))


def test_findings_of_ranks_stand_beside_each_other_and_those_of_chunks_follow() -> None:
    a = Findings(exposed_s=(1.0, 5.0), seen_keys=3, audited_rows=1, audit_error=0.5, work_bytes=7)
    b = Findings(exposed_s=(2.0,), seen_keys=4, audited_rows=2, audit_error=0.25, work_bytes=9)
    both = Findings(
        exposed_s=(2.0, 5.0), seen_keys=7, audited_rows=3, audit_error=0.5, work_bytes=9
    )
    assert a.beside(b) == b.beside(a) == both
    assert a.then(b) == msgspec.structs.replace(both, exposed_s=(3.0, 5.0))
    assert Findings().then(a) == a
