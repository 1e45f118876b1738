from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringspan.attention.kv import cut_units
from ringspan.errors import BadInput, CorruptPage, UnknownName
from ringspan.kvstore import transcode
from ringspan.kvstore.archive import FRAMES
from ringspan.kvstore.codecs import cold
from ringspan.kvstore.codecs.registry import CODECS, codec
from ringspan.kvstore.dtypes import dtype_of
from ringspan.kvstore.export import export_context
from ringspan.kvstore.fidelity import Fidelity, fidelity_of
from ringspan.kvstore.folder import Store
from ringspan.kvstore.forms import recode, remove_forms, second_form
from ringspan.kvstore.importing import import_context
from ringspan.kvstore.manifest import assign_pages
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.testing import make_context, open_shard, page_tokens_of
from ringspan.kvstore.tiers.moving import move, pin
from ringspan.kvstore.tiers.placement import TierName, read_placement
from ringspan.kvstore.transcode import load_recoded, recoded_form, recoded_origin
from ringspan.types import Span, coalesce

DOWN = [("raw", "bf16"), ("raw", "int8"), ("raw", "int4"), ("bf16", "fp8"), ("int8", "int4")]
SHORT = 11
"""Tokens of the last page."""


def payloads(shards, manifest):
    """{span: payload}, whatever rank holds it."""
    return {
        page.header.span: bytes(page.payload)
        for shard in shards
        for page in (
            shard.export_page(i, manifest.origin, manifest.keys) for i in range(len(shard.pages()))
        )
    }


def values(shards):
    """{page's span: K and V of all layers}, decoded."""
    found = {}
    for shard in shards:
        for layer in range(shard.num_layers):
            shape = (2, shard.num_tokens, shard.num_kv_heads, shard.head_dim)
            k, v = torch.empty(shape, dtype=shard.dtype)
            shard.codec.decode(shard.tensors(layer), k, v)
            for span, row in shard.pages():
                cut = slice(row, row + span.tokens)
                found.setdefault(span, []).append((k[cut].clone(), v[cut].clone()))
    return found


def reencoded(made, codec_name):
    """{span: payload} of the context's values, each page put by hand into the new codec."""
    form, chosen = made.manifest.form, codec(codec_name)
    found = {}
    for span, layers in values(made.shards).items():
        shard = ContextShard(
            chosen,
            form.num_layers,
            form.num_kv_heads,
            form.head_dim,
            dtype_of(form.dtype),
            "cpu",
            span.tokens,
            form.page_tokens,
        )
        shard.reserve((span,))
        for layer, (k, v) in enumerate(layers):
            shard.write(layer, k, v)
        found |= payloads([shard], made.manifest)
    return found


def striped(manifest, world_size):
    """Another layout than the contiguous blocks of `assign_pages`."""
    return [manifest.pages[rank::world_size] for rank in range(world_size)]


def empty_shard(manifest, records, codec_name=""):
    form = manifest.form
    return ContextShard(
        codec(codec_name or form.codec),
        form.num_layers,
        form.num_kv_heads,
        form.head_dim,
        dtype_of(form.dtype),
        "cpu",
        sum(record.span.tokens for record in records),
        form.page_tokens,
    )


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("stored_by", [1, 2, 3, 5])
def test_pages_are_bit_equal_on_any_number_of_ranks_and_in_any_layout(tmp_path, name, stored_by):
    made = make_context(tmp_path, 6 * page_tokens_of(name) + SHORT, stored_by, name, num_layers=2)
    wanted = payloads(made.shards, made.manifest)
    assert len(wanted) == 7
    for opened_by in (1, 2, 3, 4):
        for dealt in (assign_pages, striped):
            shards = [open_shard(made, part) for part in dealt(made.manifest, opened_by)]
            assert payloads(shards, made.manifest) == wanted


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pages=st.integers(1, 9),
    short=st.integers(0, 15),
    stored_by=st.sampled_from([1, 2, 3, 5]),
    opened_by=st.integers(1, 4),
    dealt=st.sampled_from([assign_pages, striped]),
    by_file=st.sampled_from(["", FRAMES, cold.NAME]),
)
def test_a_context_of_any_length_opens_anywhere_also_out_of_a_file(
    tmp_path_factory, pages, short, stored_by, opened_by, dealt, by_file
):
    root = tmp_path_factory.mktemp("any")
    made = make_context(root / "a", max(1, 16 * (pages - 1) + short), stored_by, num_layers=2)
    wanted = payloads(made.shards, made.manifest)
    if by_file:
        export_context(made.store, made.manifest.context_id, root / "c.rsctx", stored=by_file)
        store = Store(root / "b")
        made = made._replace(store=store, manifest=import_context(store, root / "c.rsctx"))
    shards = [open_shard(made, part) for part in dealt(made.manifest, opened_by)]
    assert payloads(shards, made.manifest) == wanted


@pytest.mark.parametrize(("old", "new"), DOWN, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_codec_gives_the_bytes_of_the_decoded_values(tmp_path, old, new, dtype):
    """On disk, in a file and while opening on other ranks: the same pages in the same bits."""
    made = make_context(tmp_path / "a", 2 * 128 + SHORT, 3, old, page_tokens=128, dtype=dtype)
    wanted = reencoded(made, new)
    at, manifest = recode(made.store, made.manifest.context_id, new)
    assert manifest.keys == made.manifest.keys
    assert at.verify(manifest.context_id).ok
    second = made._replace(store=at, manifest=manifest)
    assert payloads([open_shard(second, manifest.pages)], manifest) == wanted
    for opened_by in (1, 2):
        shards = []
        for records in assign_pages(made.manifest, opened_by):
            shards.append(empty_shard(made.manifest, records, new))
            load_recoded(made.store.root, made.manifest, records, shards[-1])
        assert payloads(shards, manifest) == wanted
    assert made.store.verify(made.manifest.context_id).ok
    assert made.store.manifest(made.manifest.context_id) == made.manifest


def test_recoding_while_opening_goes_in_groups_of_pages(tmp_path, monkeypatch):
    made = make_context(tmp_path, 3 * 128 + SHORT, 2, "raw", page_tokens=128)
    monkeypatch.setattr(transcode, "SCRATCH_BYTES", 1)
    shard = empty_shard(made.manifest, made.manifest.pages, "int4")
    first, rest = made.manifest.pages[:2], made.manifest.pages[2:]
    load_recoded(made.store.root, made.manifest, first, shard)
    load_recoded(made.store.root, made.manifest, rest, shard)
    assert shard.spans == (Span(0, 3 * 128 + SHORT),)
    assert payloads([shard], made.manifest) == reencoded(made, "int4")


def test_a_damaged_page_leaves_the_shard_as_it_was(tmp_path, monkeypatch):
    made = make_context(tmp_path, 3 * 128, 1, "raw", page_tokens=128)
    monkeypatch.setattr(transcode, "SCRATCH_BYTES", 1)
    record = made.manifest.pages[2]
    path = made.store.folder(made.manifest) / record.segment
    data = bytearray(path.read_bytes())
    data[record.offset + 9000] ^= 1
    path.write_bytes(data)
    shard = empty_shard(made.manifest, made.manifest.pages, "int8")
    with pytest.raises(CorruptPage):
        load_recoded(made.store.root, made.manifest, made.manifest.pages, shard)
    assert shard.spans == ()
    assert shard.is_complete
    with pytest.raises(CorruptPage):
        recode(made.store, made.manifest.context_id, "int8")
    assert second_form(made.store, made.manifest, "int8") is None


UP = [("bf16", "raw"), ("int8", "raw"), ("int8", "bf16"), ("int4", "raw"), ("int4", "fp8")]


@pytest.mark.parametrize(("old", "new"), UP, ids="-".join)
def test_recoding_never_claims_what_is_not_there(tmp_path, old, new):
    made = make_context(tmp_path, 130, 1, old, page_tokens=128)
    said = f"is in codec {old} .*; as {new} it would claim to be .*, which it is not"
    with pytest.raises(BadInput, match=said):
        recode(made.store, made.manifest.context_id, new)
    shard = empty_shard(made.manifest, made.manifest.pages, new)
    with pytest.raises(BadInput, match=said):
        load_recoded(made.store.root, made.manifest, made.manifest.pages, shard)
    with pytest.raises(BadInput, match=said):
        export_context(made.store, made.manifest.context_id, tmp_path / "c", codec_name=new)
    with pytest.raises(BadInput, match=r"in codec .* already"):
        recoded_form(made.manifest.form, old)
    with pytest.raises(UnknownName, match="unknown codec 'int3'"):
        recode(made.store, made.manifest.context_id, "int3")
    assert not (made.store.root / "forms").exists()


def test_provenance_says_what_was_decoded(tmp_path):
    made = make_context(tmp_path, 130, 1, "raw", page_tokens=128)
    origin = made.manifest.origin
    assert recoded_origin(origin, made.manifest.form) == origin
    form = recoded_form(made.manifest.form, "int8")
    once = recoded_origin(origin, form)
    assert once.provenance == ("decoded from int8 pages",)
    twice = recoded_origin(once, recoded_form(form, "fp8"))
    assert twice.provenance == ("decoded from int8 pages", "decoded from fp8 pages")
    assert fidelity_of(made.manifest.form, once) < Fidelity.EXACT
    attended = msgspec.structs.replace(origin, provenance=("attended over int4 pages",))
    assert recoded_origin(attended, form).provenance == (
        "attended over int4 pages",
        "decoded from int8 pages",
    )


def test_second_forms_lie_beside_the_context_and_go_with_it(tmp_path):
    made = make_context(tmp_path, 130, 2, "raw", page_tokens=128)
    name = made.manifest.context_id
    assert second_form(made.store, made.manifest, "int8") is None
    recode(made.store, name, "int8")
    recode(made.store, name[:5], "int4")
    at, manifest = second_form(made.store, made.manifest, "int8")
    assert (manifest.codec, at.root) == ("int8", made.store.root / "forms" / "int8")
    assert made.store.contexts() == ([made.manifest], [])
    assert remove_forms(made.store, name) == ["int4", "int8"]
    assert second_form(made.store, made.manifest, "int8") is None
    assert remove_forms(made.store, name) == []
    assert made.store.contexts() == ([made.manifest], [])


def test_a_form_takes_the_place_of_the_context_only_where_it_lies_on_disk_alone(tmp_path):
    made = make_context(tmp_path / "store", 130, 2, "raw", page_tokens=128)
    name = made.manifest.context_id
    move(made.store, name, TierName("remote", f"file://{tmp_path}/far"), keep=True)
    with pytest.raises(BadInput, match="bring it to disk alone first"):
        recode(made.store, name, "int8", replace=True)
    move(made.store, name, TierName("disk"))
    pin(made.store, name, pinned=True)
    at, manifest = recode(made.store, name, "int8", replace=True)
    assert at.root == made.store.root
    assert made.store.contexts() == ([manifest], [])
    assert read_placement(at.folder(manifest)).pinned
    shard = open_shard(made._replace(manifest=manifest), manifest.pages)
    assert shard.codec.name == "int8"


def test_pages_of_another_length_are_refused(tmp_path):
    made = make_context(tmp_path, 75, 2)
    with pytest.raises(BadInput, match="has pages of 16 tokens, codec int4 makes pages of 128"):
        recode(made.store, made.manifest.context_id, "int4")
    at, manifest = recode(made.store, made.manifest.context_id, "bf16")
    assert [page.span for page in manifest.pages] == [page.span for page in made.manifest.pages]
    assert coalesce(page.span for page in manifest.pages) == (Span(0, 75),)
    shard = open_shard(made._replace(store=at, manifest=manifest), manifest.pages)
    (k, _), (wanted, _) = shard.tensors(1), made.shards[1].tensors(1)
    specs = made.shards[1].specs
    row = made.shards[1].pages()[1][1]
    (page,) = cut_units((wanted,), specs[:1], row, row + 16)
    assert torch.equal(k[48:64], page.bfloat16())
