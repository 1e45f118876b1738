"""A stored context held in another codec than it is stored in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ringspan.cluster.controller import Controller
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.cluster.planner import PrefillOptions
from ringspan.errors import BadInput, UnknownName
from ringspan.kvstore.folder import Store
from ringspan.kvstore.forms import recode

TOKENS = np.random.default_rng(11).integers(0, 256, size=701, dtype=np.int32)
QUESTION = (5, 17, 200)


@pytest.fixture(scope="module")
def gang() -> Iterator[LocalGang]:
    model = ModelSpec(name="random:tiny", seed=3)
    with LocalGang(
        GangSpec(world_size=2, model=model, device="cpu", threads=1, timeout_s=30.0)
    ) as gang:
        yield gang


@pytest.fixture
def stored(gang: LocalGang, tmp_path: Path) -> tuple[Store, str]:
    store = Store(tmp_path / "store")
    controller = Controller(gang, store)
    done = controller.prefill(TOKENS, PrefillOptions(chunk_tokens=256))
    controller.drop(done.context_id)
    return store, done.context_id


def answer(controller: Controller, name: str) -> list[int]:
    session = controller.begin_session(name)
    return [t.token_id for t in controller.ask(session, name, QUESTION, max_tokens=6)]


def test_a_context_is_recoded_while_it_is_opened(
    gang: LocalGang, stored: tuple[Store, str]
) -> None:
    """It answers as its second form does, which holds the same bytes."""
    store, name = stored
    controller = Controller(gang, store)
    exact = controller.open(name)
    controller.drop(name)
    opened = controller.open(name, codec_name="int8")
    assert (opened.codec, opened.fidelity.text) == ("int8", "8-bit")
    assert opened.kv_bytes < exact.kv_bytes / 2
    here = answer(controller, name)
    controller.drop(name)
    recode(store, name, "int8")
    second = controller.open(name, codec_name="int8")
    assert (second.codec, second.kv_bytes) == ("int8", opened.kv_bytes)
    assert answer(controller, name) == here
    controller.drop(name)
    assert controller.open(name, codec_name="raw").codec == "raw"
    controller.drop(name)


def test_a_second_form_is_opened_even_where_the_first_is_damaged(
    gang: LocalGang, stored: tuple[Store, str]
) -> None:
    store, name = stored
    recode(store, name, "int4")
    for segment in store.folder(store.manifest(name)).glob("*.seg"):
        segment.write_bytes(b"")
    controller = Controller(gang, store)
    assert controller.open(name, codec_name="int4").fidelity.text == "4-bit"
    controller.drop(name)


def test_a_codec_that_would_claim_more_is_refused_before_anything_is_read(
    gang: LocalGang, stored: tuple[Store, str]
) -> None:
    store, name = stored
    recode(store, name, "int4", replace=True)
    controller = Controller(gang, store)
    with pytest.raises(BadInput, match=r"in codec int4 .*; as raw it would claim to be exact"):
        controller.open(name, codec_name="raw")
    with pytest.raises(BadInput, match=r"is 4-bit .* asked for is 8-bit"):
        controller.open(name, "8-bit")
    with pytest.raises(UnknownName, match="unknown codec 'int3'"):
        controller.open(name, codec_name="int3")
    assert controller.contexts == ()


def test_a_context_recoded_from_a_lossy_one_has_the_lower_of_both_fidelities(
    gang: LocalGang, stored: tuple[Store, str]
) -> None:
    store, name = stored
    _, manifest = recode(store, name, "int8", replace=True)
    assert manifest.fidelity.text == "8-bit"
    controller = Controller(gang, store)
    opened = controller.open(name, codec_name="fp8")
    assert (opened.codec, opened.fidelity.text) == ("fp8", "8-bit")
    controller.drop(name)
    at, manifest = recode(store, name, "int4")
    assert manifest.origin.provenance == ("decoded from int8 pages",)
    assert manifest.fidelity.text == "4-bit"
    assert at.verify(name).ok
