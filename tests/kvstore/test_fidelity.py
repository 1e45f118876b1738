from __future__ import annotations

import msgspec
import pytest
import torch

from ringspan.errors import BadInput, UnknownName
from ringspan.kvstore.codecs.registry import CODECS, codec
from ringspan.kvstore.fidelity import (
    Fidelity,
    attended_over,
    check_codec,
    check_fidelity,
    fidelity_named,
    fidelity_of,
)
from ringspan.kvstore.page import Origin, page_form
from ringspan.kvstore.testing import make_context

ORIGIN = Origin(fingerprint="ab" * 32, namespace="00" * 8, rope="applied")
WANTED = {
    "raw": "exact", "bf16": "16-bit", "int8": "8-bit", "fp8": "8-bit", "int4": "4-bit",
    "nuq4": "4-bit", "k4v2": "2-bit", "int2": "2-bit",
}  # fmt: skip


def form_of(name, head_dim=128):
    return page_form(codec(name), 4, 8, head_dim, torch.bfloat16, 128)


def over(*provenance):
    return msgspec.structs.replace(ORIGIN, provenance=provenance)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("name", CODECS)
def test_every_codec_has_its_place(name, head_dim):
    assert fidelity_of(form_of(name, head_dim), ORIGIN).text == WANTED[name]


def test_what_it_was_computed_over_counts_too():
    assert fidelity_of(form_of("raw"), over(attended_over("int8"))) == Fidelity.EIGHT_BIT
    assert fidelity_of(form_of("int4"), over(attended_over("int8"))) == Fidelity.FOUR_BIT
    both = over(attended_over("int8"), attended_over("int4"))
    assert fidelity_of(form_of("raw"), both) == Fidelity.FOUR_BIT
    assert fidelity_of(form_of("raw"), over("pooled queries")) == Fidelity.TWO_BIT
    assert fidelity_of(form_of("raw"), over(attended_over("int3"))) == Fidelity.TWO_BIT


def test_the_order_is_that_of_the_names():
    names = ["exact", "16-bit", "8-bit", "4-bit", "2-bit"]
    assert [fidelity_named(name) for name in names] == sorted(Fidelity, reverse=True)
    with pytest.raises(UnknownName, match="unknown fidelity 'good'"):
        fidelity_named("good")


def test_a_context_below_what_is_asked_is_refused_in_one_line():
    check_fidelity("context ab", form_of("int4"), ORIGIN, "")
    check_fidelity("context ab", form_of("int8"), ORIGIN, "8-bit")
    with pytest.raises(BadInput) as said:
        check_fidelity("context ab", form_of("int4"), ORIGIN, "8-bit")
    assert str(said.value) == (
        "context ab is 4-bit (codec int4), asked for is 8-bit or better: prefill it again with "
        "--codec int8, or ask for less"
    )
    with pytest.raises(BadInput, match=r"is 8-bit \(codec raw, attended over int8 pages\)"):
        check_fidelity("context ab", form_of("raw"), over(attended_over("int8")), "exact")


def test_a_codec_below_what_is_asked_is_refused_before_any_work():
    check_codec("int8", 8, 128, torch.bfloat16, "4-bit")
    with pytest.raises(BadInput, match="--codec int4 keeps 4-bit, asked for is exact or better"):
        check_codec("int4", 8, 128, torch.bfloat16, "exact")


@pytest.mark.parametrize("name", ["raw", "int4"])
def test_a_manifest_says_its_fidelity(tmp_path, name):
    assert make_context(tmp_path, 140, 1, name).manifest.fidelity.text == WANTED[name]
